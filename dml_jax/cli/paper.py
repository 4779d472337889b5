"""Trains the runs of a published table, and prints our scores beside the published ones.

dml-jax paper readme --root=runs/papers --data_root=data
dml-jax paper ps-table6 --datasets=cub200,cars196 --losses=proxy_nca --seeds=3 --root=runs/papers
dml-jax paper memvir-table4 --root=runs/papers --dry_run --device=a100
dml-jax paper memvir-table4 --root=runs/papers --print

`readme` has the CARS196 tables of both official READMEs, `ps-table6` and `memvir-table4` those of
the papers. A cell is a run of `dml-jax train` at ROOT/DATASET/VARIANT/seedN; the tables share
cells. The same command resumes; finished cells are not repeated. Settings of all cells may be
changed by --config.PATH=VALUE.

With --cell=INDEX or --array one cell is trained, for jobs of a cluster; see
examples/launch/paper_array.sh. --print makes the table of the cells that have finished.
"""

import os

from absl import flags
from ml_collections import config_flags

from dml_jax import retrieval
from dml_jax._utils.errors import UserError
from dml_jax.cli import command_line, config_flag
from dml_jax.report import papers
from dml_jax.report.dry_run import Listing
from dml_jax.report.papers import Plan
from dml_jax.training import cells
from dml_jax.training.config import default
from dml_jax.training.cost import PEAKS

_ROOT = flags.DEFINE_string("root", None, "Folder or URL of the runs of all tables.", required=True)
_DATA_ROOT = flags.DEFINE_string(
    "data_root", "data", "Folder or URL with the prepared data sets: cars196, cub200, sop, inshop."
)
_DATA_SETS = flags.DEFINE_list("datasets", None, "Data sets of the table; default: all.")
_LOSSES = flags.DEFINE_list("losses", None, "Losses of the table; default: all.")
_METHODS = flags.DEFINE_list(
    "methods", None, f"Of {', '.join(papers.METHODS)}; default: all of the table."
)
_SEEDS = flags.DEFINE_integer(
    "seeds",
    None,
    "Runs of each variant; default: those of the READMEs, 8 and 5 with MemVir, and 5 for the "
    "papers, which do not state theirs.",
    lower_bound=1,
)
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


def main(table: str) -> None:
    """Runs the program."""
    with command_line.user_errors():
        index = _index()
        planned = papers.plan(
            table,
            config_flag.packaged_globals,
            data_sets=_DATA_SETS.value,
            losses=_LOSSES.value,
            methods=_METHODS.value,
            seeds=_SEEDS.value,
            root=_ROOT.value,
            data_root=_DATA_ROOT.value,
            overrides=config_flag.overrides(),
        )
        if _LIST.value:
            print(len(planned.cells))
        elif _DRY_RUN.value:
            listing = Listing(
                device=_DEVICE.value,
                utilisation=_UTILISATION.value,
                images_per_second=_IMAGES_PER_SECOND.value,
                topology=_TOPOLOGY.value,
            )
            for line in listing.lines(planned.cells):
                print(line, flush=True)
        elif index is not None:
            _train_one(planned, index)
        else:
            result_of = cells.finished if _PRINT.value else cells.train
            results = [result_of(cell) for cell in planned.cells]
            print(f"\n{papers.text(planned, results)}")
            print("written: " + ", ".join(papers.write(planned, results, _ROOT.value)))


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


def _train_one(planned: Plan, index: int) -> None:
    if index >= len(planned.cells):
        raise UserError(
            f"there is no cell {index}: the selected part of {planned.table} has "
            f"{len(planned.cells)}, counted from 0"
        )
    result = cells.train(planned.cells[index])
    print(f"last: {retrieval.summary(result['last'])}")


def start() -> None:
    """Parses the command line and runs the program."""
    with command_line.flag_errors():  # It reads the command line when it is defined.
        config_flags.DEFINE_config_dict("config", default(), "Settings that all cells share.")
    command_line.run(main, "TABLE", embeds=True)
