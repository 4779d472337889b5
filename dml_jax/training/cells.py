"""Cells of a comparison: the runs of several variants with several seeds."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dml_jax._utils import storage
from dml_jax.training import run, variants
from dml_jax.training.origin import Origin


class Cell(NamedTuple):
    """One run of a comparison."""

    name: str
    """What is compared: the variant, or the data set and the variant."""
    config: ConfigDict
    origin: Origin
    workdir: str
    """Folder or URL of the run."""


def make(
    config_file: str,
    variant: str,
    seed: int,
    *,
    globals: Mapping[str, Any],
    overrides: Mapping[str, Any],
    root: str,
) -> Cell:
    """Returns the run of a variant with a seed, below the folder of its comparison.

    Args:
        config_file: config file, as the origin of the run shows it.
        variant: variant of the config file; empty for its default.
        seed: seed of the run.
        globals: globals of the config file.
        overrides: settings that all runs share, by path.
        root: folder or URL of the comparison.
    """
    settings = {**overrides, "seed": seed}
    config = globals["get_config"](*[variant] if variant else [])
    config.update_from_flattened_dict(settings)
    if config.data.cache == "features" and not config.data.features:
        config.data.features = storage.join(root, "features")
    origin = variants.origin_of(config_file, variant, globals, settings)
    return Cell(variant, config, origin, storage.join(root, f"{variant}/seed{seed}"))


def train(cell: Cell) -> dict[str, Any]:
    """Trains a run, or resumes it, and returns its result; see `run.train` for errors."""
    print(f"\n{cell.name}, seed {cell.config.seed}: {cell.workdir}", flush=True)
    return run.train(cell.config, cell.workdir, origin=cell.origin)


def finished(cell: Cell) -> dict[str, Any] | None:
    """Returns the result of a run, or None if it has not finished; see `run.finished`."""
    return run.finished(cell.config, cell.workdir)


def by_name(
    cells: Sequence[Cell], results: Sequence[Mapping[str, Any] | None]
) -> dict[str, list[Mapping[str, Any] | None]]:
    """Returns the results of the cells of each name, in the order of the cells.

    Args:
        cells: the cells of a comparison.
        results: the result of each; None for a run that has not finished.
    """
    found: dict[str, list[Mapping[str, Any] | None]] = {cell.name: [] for cell in cells}
    for cell, result in zip(cells, results, strict=True):
        found[cell.name].append(result)
    return found


def missing(cells: Sequence[Cell], results: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """Returns a line for each name with runs that have not finished; see `by_name`."""
    seeds: dict[str, list[str]] = {}
    for cell, result in zip(cells, results, strict=True):
        if result is None:
            seeds.setdefault(cell.name, []).append(str(cell.config.seed))
    return [f"{name}: seed{'s' * (len(x) > 1)} {', '.join(x)}" for name, x in seeds.items()]
