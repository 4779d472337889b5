"""The published tables: their runs, and our scores beside the published ones."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dml_jax import retrieval
from dml_jax._utils import storage
from dml_jax._utils.errors import UserError
from dml_jax._utils.files import write_json, write_text
from dml_jax.published import TABLES, Reference, Variant
from dml_jax.report import comparison
from dml_jax.training import cells
from dml_jax.training.cells import Cell

METHODS = ("baseline", "ps", "memvir_baseline", "memvir")
"""Methods of the tables, in the order of their rows. No paper has `memvir_baseline`, the bare loss
on MemVir's schedule, but without it MemVir would be compared with another schedule."""

RUNS = {"readme": {"baseline": 8, "ps": 8, "memvir_baseline": 5, "memvir": 5}}
"""Runs of each method in the tables that state it."""

_RUNS = 5  # Of the other tables, our choice.
_COMPARED = ("seed", "loss", "proxy_init", "proxy_synthesis", "memvir")
_BEST_AND_LAST = (True, False)

NOTES = {
    "best": "The official programs report each metric at its best epoch on the test classes. The "
    "papers do not state the epoch, nor how many runs they average.",
    "memvir": "MemVir is compared with memvir_baseline, the bare loss on MemVir's schedule and "
    "with its initial proxies, which no paper reports.",
    "proxy_anchor": "proxy_anchor has the recipe of its authors, and with MemVir its epochs. The "
    "papers mark it with a dagger: its settings differ from those of the other losses.",
}
"""What a reader of a table must know, by what the table shows."""


class Plan(NamedTuple):
    """A published table, or a part of it."""

    table: str
    cells: Sequence[Cell]
    """All runs. Seeds are the outer loop, so that an interrupted table covers all variants."""
    baselines: Mapping[str, Mapping[str, str]]
    """By data set and variant: the variant that it is compared with."""
    references: Mapping[str, Mapping[str, Sequence[Reference]]]
    """By data set and variant: the published scores, which `memvir_baseline` has not."""
    overrides: Mapping[str, Any]
    """Settings that all runs have instead of those of their config files, by path."""


def plan(
    table: str,
    globals_of: Callable[[str], Mapping[str, Any]],
    *,
    data_sets: Sequence[str] | None,
    losses: Sequence[str] | None,
    methods: Sequence[str] | None,
    seeds: int | None,
    root: str,
    data_root: str,
    overrides: Mapping[str, Any],
) -> Plan:
    """Returns the runs of a published table; those of all tables share a root.

    Args:
        table: a key of `TABLES`.
        globals_of: returns the globals of the config file of a data set.
        data_sets: data sets to select; None for all of the table.
        losses: losses to select, or None.
        methods: methods to select of `METHODS`, or None.
        seeds: runs of each variant; None for as many as in the table, if it states them.
        root: folder or URL of the runs.
        data_root: folder or URL with the folder of each data set.
        overrides: settings that all runs share, by path.

    Raises:
        ValueError: the table is unknown, or lacks what is selected, or a setting is.
    """
    published = TABLES[_select("table", [table], TABLES)[0]]
    variants = _variants(published, losses, methods)
    _check_overrides(overrides)
    runs = RUNS.get(table, dict.fromkeys(METHODS, _RUNS))
    runs = runs if seeds is None else dict.fromkeys(METHODS, seeds)
    made: dict[int, list[Cell]] = {seed: [] for seed in range(max(runs.values()))}
    baselines: dict[str, dict[str, str]] = {}
    references: dict[str, dict[str, Sequence[Reference]]] = {}
    for data_set in _select("--datasets", data_sets, published):
        globals = globals_of(data_set)
        against = {name: comparison.baseline(name, globals["get_config"]) for name in variants}
        baselines[data_set] = {
            name: bare for name, bare in against.items() if bare != name and bare in variants
        }
        references[data_set] = {
            name: published[data_set].get(variant, ()) for name, variant in variants.items()
        }
        for name, (method, _) in variants.items():
            for seed in range(runs[method]):
                cell = cells.make(
                    data_set,
                    name,
                    seed,
                    globals=globals,
                    overrides={"data.root": storage.join(data_root, data_set), **overrides},
                    root=storage.join(root, data_set),
                )
                made[seed].append(cell._replace(name=f"{data_set}/{name}"))
    in_order = [cell for of_seed in made.values() for cell in of_seed]
    return Plan(table, in_order, baselines, references, overrides)


def _variants(
    published: Mapping[str, Mapping[Variant, Any]],
    losses: Sequence[str] | None,
    methods: Sequence[str] | None,
) -> dict[str, Variant]:
    """Returns the selected variants of a table by name, in the order of its rows."""
    rows = [variant for of_set in published.values() for variant in of_set]
    has = {method for method, _ in rows}
    has |= {"memvir_baseline"} if "memvir" in has else set()
    known_losses = list(dict.fromkeys(loss for _, loss in rows))
    return {
        loss if method == "baseline" else f"{method}_{loss}": (method, loss)
        for loss in _select("--losses", losses, known_losses)
        for method in _select("--methods", methods, [x for x in METHODS if x in has])
    }


def _check_overrides(overrides: Mapping[str, Any]) -> None:
    """Raises ValueError for a setting that the table compares, which must differ between cells."""
    for path in overrides:
        if path.partition(".")[0] in _COMPARED:
            raise UserError(
                f"--config.{path} would be a setting of all cells, but the table compares its "
                "values; train runs with other ones by `dml-jax reproduce`"
            )


def _select(what: str, wanted: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """Returns the selected names in the order of the known ones, or all of them."""
    for name in wanted or ():
        if name not in known:
            raise UserError(f"{what}: {name!r} is unknown; choose from {', '.join(known)}")
    return [name for name in known if wanted is None or name in wanted]


def text(planned: Plan, results: Sequence[Mapping[str, Any] | None]) -> str:
    """Returns the table in Markdown: a table for each data set, metric and epoch.

    Args:
        planned: the table.
        results: the result of each of its cells; None for a run that has not finished.
    """
    # Of the table, not of the selected variants: memvir_baseline alone has no published scores.
    reported = {
        metric
        for rows in TABLES[planned.table].values()
        for found in rows.values()
        for x in found
        for metric in x.scores
    }
    done = sum(result is not None for result in results)
    parts = [f"# {planned.table}", f"{done} of {len(results)} runs are finished."]
    if planned.overrides:
        changed = ", ".join(f"{path}={value}" for path, value in planned.overrides.items())
        parts.append(f"Settings that differ from those of the config files: {changed}.")
    missing = cells.missing(planned.cells, results)
    if missing:
        parts.append("Missing:\n\n" + "\n".join(f"- {line}" for line in missing))
    by_name = cells.by_name(planned.cells, results)
    for data_set, references in planned.references.items():
        parts.append(f"## {data_set}")
        by_variant = {name: by_name[f"{data_set}/{name}"] for name in references}
        for best in _BEST_AND_LAST:
            parts += comparison.tables(
                by_variant,
                baselines=planned.baselines[data_set],
                references=references,
                metrics={x: key for x, key in retrieval.SCORES.items() if key in reported},
                best=best,
            )
    names = " ".join(cell.name for cell in planned.cells)
    parts += [note for key, note in NOTES.items() if key == "best" or key in names]
    return "\n\n".join(parts) + "\n"


def write(planned: Plan, results: Sequence[Mapping[str, Any] | None], root: str) -> list[str]:
    """Writes the table as Markdown and as JSON; returns the paths or URLs of both.

    The JSON has for each cell its data set and variant, its seed, its folder and, once it has
    finished, its scores as fractions: of each metric at its best epoch, and at the last epoch.

    Raises:
        OSError: a file cannot be written.
    """
    paths = [storage.join(root, f"{planned.table}.{suffix}") for suffix in ("md", "json")]
    with storage.writing(paths[0]) as path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text(planned, results))
    with storage.writing(paths[1]) as path:
        write_json(path, _json(planned, results))
    return paths


def _json(planned: Plan, results: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    made = [
        {
            "name": cell.name,
            "seed": cell.config.seed,
            "workdir": cell.workdir,
            "scores": None if result is None else _scores(result),
        }
        for cell, result in zip(planned.cells, results, strict=True)
    ]
    published = {
        data_set: {name: [_reference(x) for x in found] for name, found in of_set.items()}
        for data_set, of_set in planned.references.items()
    }
    return {
        "table": planned.table,
        "overrides": dict(planned.overrides),
        "cells": made,
        "against": planned.baselines,
        "published_percent": published,
    }


def _reference(reference: Reference) -> dict[str, Any]:
    scores = {metric: score._asdict() for metric, score in reference.scores.items()}
    return {"source": reference.source, "scores": scores}


def _scores(result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "chosen_on": result["best_chosen_on"],
        **{
            epoch: {
                key: comparison.score(result, key, best=best) for key in retrieval.SCORES.values()
            }
            for epoch, best in (("best", True), ("last", False))
        },
    }
