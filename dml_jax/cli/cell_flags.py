"""The flags of programs that train the cells of a comparison: all of them, one, or none."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from dml_jax import retrieval
from dml_jax._utils.errors import UserError
from dml_jax.report.dry_run import Listing
from dml_jax.training import cells
from dml_jax.training.cells import Cell
from dml_jax.training.cost import PEAKS

_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Whether to list the cells and what they cost.")
_LIST = flags.DEFINE_bool("list", False, "Whether to print the number of cells.")
_PRINT = flags.DEFINE_bool("print", False, "Whether to make the table without training.")
_CELL = flags.DEFINE_integer("cell", None, "Index of the cell to train, from 0.", lower_bound=0)
_ARRAY = flags.DEFINE_bool("array", False, "Whether SLURM_ARRAY_TASK_ID is the index of the cell.")
_DEVICE = flags.DEFINE_enum(
    "device", "h100", list(PEAKS), "Device of the hours that a dry run estimates."
)
_UTILISATION = flags.DEFINE_float(
    "utilisation",
    0.1,
    "Assumed share of the peak of --device that training reaches.",
    lower_bound=0.001,
    upper_bound=1.0,
)
_IMAGES_PER_SECOND = flags.DEFINE_float(
    "images_per_second",
    None,
    "Measured rate of training on a device, which the hours are then computed from.",
    lower_bound=0.001,
)
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "Accelerators that a dry run compiles each step for, to state its memory; see `dml-jax compile`"
    "; some minutes for each variant.",
)


def carry_out(
    planned: Sequence[Cell], write: Callable[[list[dict[str, Any] | None]], None]
) -> None:
    """Does what the flags ask for: trains all cells, or one, or shows what there is.

    Args:
        planned: the cells, in the order in which they are trained.
        write: writes the table; it is given the result of each cell, None for one that has not
            finished. A job for one cell does not write it, since jobs run at the same time.

    Raises:
        UserError: flags exclude each other, or there is no such cell; see also `run.train`.
        FloatingPointError: the loss of some cells became nonfinite; the others are trained.
    """
    index = _index()
    if _LIST.value:
        print(len(planned))
    elif _DRY_RUN.value:
        listing = Listing(
            device=_DEVICE.value,
            utilisation=_UTILISATION.value,
            images_per_second=_IMAGES_PER_SECOND.value,
            topology=_TOPOLOGY.value,
        )
        for line in listing.lines(planned):
            print(line, flush=True)
    elif index is not None:
        if index >= len(planned):
            raise UserError(
                f"there is no cell {index}: {len(planned)} are selected, counted from 0"
            )
        print(f"last: {retrieval.summary(cells.train(planned[index])['last'])}")
    elif _PRINT.value:
        write([cells.finished(cell) for cell in planned])
    else:
        _train_all(planned, write)


def _train_all(
    planned: Sequence[Cell], write: Callable[[list[dict[str, Any] | None]], None]
) -> None:
    """Trains all cells, also those after one whose loss becomes nonfinite."""
    results: list[dict[str, Any] | None] = []
    failed = []
    for cell in planned:
        try:
            results.append(cells.train(cell))
        except FloatingPointError as error:
            print(f"error: {error}", file=sys.stderr)
            failed.append(f"{cell.workdir}: {error}")
            results.append(None)
    write(results)
    if failed:
        raise FloatingPointError("\n".join(failed))


def _index() -> int | None:
    """Returns the index of the only cell to train; None for all."""
    modes = ("dry_run", "list", "print", "array")
    given = [f"--{name}" for name in modes if flags.FLAGS[name].value]
    given += ["--cell"] * (_CELL.value is not None)
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other; give one of them")
    if not _ARRAY.value:
        return _CELL.value
    index = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    if not index.isdecimal():
        raise UserError(
            "--array needs SLURM_ARRAY_TASK_ID, which sbatch --array sets; elsewhere give --cell"
        )
    return int(index)
