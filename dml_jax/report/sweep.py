"""Sweeps: a grid of runs over one or two settings, and the table of their scores."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dml_jax import retrieval
from dml_jax._utils import storage
from dml_jax._utils.errors import UserError
from dml_jax.report import comparison
from dml_jax.training import cells
from dml_jax.training.cells import Cell
from dml_jax.training.config import SWITCHES, leaves, parse

TEST_NOTE = (
    "These scores are of the test classes. Choose no setting by them: "
    "--config.data.validation_classes=0.25, for example, holds out training classes, and scores "
    "those instead."
)
VALIDATION_NOTE = (
    "These scores are of the validation classes, which are held out from the training classes. No "
    "test image was embedded."
)

# Cells that differ in them would be scored on different images.
_OF_SCORED_IMAGES = (
    *("data.name", "data.root", "data.unreadable", "data.split_classes", "evaluation.test"),
    *("data.validation_classes", "data.validation_fold"),
)
_VARIANTS = {"proxy_synthesis": "ps", "xbm": "xbm_contrastive"}
_READ: dict[type, tuple[str, Callable[[str], Any]]] = {
    bool: ("True or False", {"True": True, "False": False}.__getitem__),
    int: ("an integer", int),
    float: ("a number", float),
    str: ("text", str),
}


class Sweep(NamedTuple):
    """A grid of runs."""

    title: str
    """The config file and its variant."""
    axes: Mapping[str, Sequence[Any]]
    """The values of each swept setting, by path. Numbers are in ascending order."""
    cells: Sequence[Cell]
    """All runs. Seeds are the outer loop, so that an interrupted sweep covers the grid; within a
    seed, the last axis changes fastest."""
    overrides: Mapping[str, Any]
    """Settings that all runs have instead of those of the config file, by path."""

    @property
    def scored_on(self) -> str:
        """The classes of the scores: `validation` or `test`."""
        return "test" if self.cells[0].config.evaluation.test else "validation"


def plan(
    config_file: str,
    variant: str,
    globals: Mapping[str, Any],
    *,
    over: Sequence[str],
    seeds: Sequence[int],
    overrides: Mapping[str, Any],
    workdir: str,
) -> Sweep:
    """Returns the runs of a sweep.

    If validation classes are held out, the runs are scored on them and never on the test classes,
    unless `evaluation.test` is among `overrides`.

    Args:
        config_file: config file, as the origin of the runs shows it.
        variant: variant of the config file; empty for its default.
        globals: globals of the config file.
        over: one or two swept settings, as `PATH=VALUE,VALUE,...`.
        seeds: seeds of the runs of each cell of the grid.
        overrides: settings that all runs share, by path.
        workdir: folder or URL of the sweep.

    Raises:
        ValueError: a setting is unknown or given twice, has a value that it does not take, cannot
            be swept, or has no effect; or a seed is given twice.
    """

    def cell(settings: Mapping[str, Any], seed: int) -> Cell:
        return cells.make(
            config_file, variant, seed, globals=globals, overrides=settings, root=workdir
        )

    _check_seeds(seeds, overrides)
    base = cell(overrides, seeds[0]).config
    if base.data.validation_classes:
        overrides = {"evaluation.test": False, **overrides}
    axes = _axes(over, base, overrides)
    grid = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    made = []
    for seed, point in itertools.product(seeds, grid):
        name = ",".join(f"{path}={text(value)}" for path, value in point.items())
        folder = storage.join(workdir, f"{name.replace('/', '_')}/seed{seed}")
        made.append(cell({**overrides, **point}, seed)._replace(name=name, workdir=folder))
    _check_cells(made, axes)
    title = f"{config_file}:{variant}" if variant else config_file
    return Sweep(title, axes, made, overrides)


def text(value: Any) -> str:
    """Returns a value of a setting as text.

    >>> text(1.0), text(0.25), text(None)
    ('1', '0.25', 'None')
    """
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _check_seeds(seeds: Sequence[int], overrides: Mapping[str, Any]) -> None:
    if "seed" in overrides:
        raise UserError("--config.seed is not for a sweep; give the seeds as --seeds")
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds={','.join(map(str, seeds))} must be one or more different seeds")


def _axes(
    over: Sequence[str], base: ConfigDict, overrides: Mapping[str, Any]
) -> dict[str, Sequence[Any]]:
    """Returns the values of the swept settings by path; see `plan` for errors."""
    if not 1 <= len(over) <= 2:
        raise UserError(f"a sweep is over one or two settings, but --over gives {len(over)}")
    axes: dict[str, Sequence[Any]] = {}
    for one in over:
        path, _, given = one.partition("=")
        if not path or not given:
            raise UserError(
                f"--over={one} must be PATH=VALUE,VALUE,..., such as proxy_synthesis.ratio=0.5,1,2"
            )
        if path in axes:
            raise UserError(f"--over gives {path} twice; give it once, with all values")
        if path in overrides:
            raise UserError(f"{path} is swept by --over, so it cannot be --config.{path} too")
        axes[path] = _values(path, given.split(","), base)
    return axes


def _values(path: str, given: Sequence[str], base: ConfigDict) -> list[Any]:
    """Returns the values of a setting, converted to its type."""
    if path not in dict(leaves(base)):
        raise UserError(f"--over={path}: there is no setting config.{path}; see docs/settings.md")
    if path == "seed":
        raise UserError("--over=seed: give the seeds as --seeds, which averages over them")
    if path in _OF_SCORED_IMAGES:
        raise UserError(
            f"--over={path}: cells that differ in it are scored on different images, so they "
            "cannot be compared"
        )
    *groups, name = path.split(".")
    for group in groups:
        base = base[group]
    kind = base.get_type(name)
    if kind not in _READ:
        raise UserError(f"--over={path}: its values are sequences, which cannot be swept")
    allowed, read = _READ[kind]
    values: list[Any] = []
    for one in given:
        try:
            values.append(None if one == "None" else read(one))
        except (KeyError, ValueError):
            raise UserError(f"--over={path}: {one!r} must be {allowed}") from None
    if len(set(values)) < len(values):
        raise UserError(f"--over={path}={','.join(given)} has a value twice")
    is_numeric = all(type(value) in (int, float) for value in values)
    return sorted(values) if is_numeric else values


def _check_cells(made: Sequence[Cell], axes: Mapping[str, Sequence[Any]]) -> None:
    """Raises ValueError if the settings of a cell are impossible, or a swept one has no effect."""
    problems: dict[str, str] = {}
    for cell in made:
        try:
            parse(cell.config)
        except UserError as error:
            problems.setdefault(str(error), cell.name)
    if problems:
        lines = [f"{name}: {problem}" for problem, name in problems.items()]
        raise UserError("the sweep has impossible settings:\n  " + "\n  ".join(lines))
    for path in axes:
        group = path.partition(".")[0]
        switch = SWITCHES.get(group)
        if switch and not any(cell.config[group][switch] for cell in made):
            raise UserError(
                f"--over={path} would have no effect, since config.{group}.{switch} is 0 in all "
                f"cells; choose a variant with it, such as cars196:{_VARIANTS.get(group, group)}"
            )


def summary(sweep: Sweep, results: Sequence[Mapping[str, Any] | None]) -> str:
    """Returns what is done, and a table of each metric at the last epoch, in Markdown.

    Args:
        sweep: the sweep.
        results: the result of each of its cells; None for a run that has not finished.

    Raises:
        ValueError: a finished run was scored on other classes than those of the sweep.
    """
    check_classes(sweep, results)
    done = sum(result is not None for result in results)
    parts = [f"# {sweep.title}", f"{done} of {len(results)} runs are finished."]
    missing = cells.missing(sweep.cells, results)
    if missing:
        parts.append("Missing:\n\n" + "\n".join(f"- {line}" for line in missing))
    on_classes = f"{sweep.scored_on} classes"
    parts += comparison.tables(
        cells.by_name(sweep.cells, results),
        baselines={},
        references={},
        metrics={f"{title}, {on_classes}": key for title, key in retrieval.SCORES.items()},
        best=False,
    )
    return "\n\n".join([*parts, note(sweep)])


def note(sweep: Sweep) -> str:
    """Returns what a reader must know about the classes of the scores."""
    return TEST_NOTE if sweep.scored_on == "test" else VALIDATION_NOTE


def check_classes(sweep: Sweep, results: Sequence[Mapping[str, Any] | None]) -> None:
    """Raises ValueError if a finished run was scored on other classes than those of the sweep."""
    for cell, result in zip(sweep.cells, results, strict=True):
        # `evaluation.test` may change when a run is resumed, so a finished run may have another.
        if result is not None and result["scored_on"] != sweep.scored_on:
            raise UserError(
                f"{cell.workdir} was scored on {result['scored_on']} classes, but this sweep is of "
                f"{sweep.scored_on} classes; give it another --workdir"
            )
