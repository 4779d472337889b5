"""The tables of the report: scores, costs, settings and commands."""

import statistics
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from dml_jax import published, retrieval
from dml_jax.data.config import test_side
from dml_jax.report import comparison
from dml_jax.report.runs import Group, Run
from dml_jax.training import config as configs
from dml_jax.training import fork
from dml_jax.training.origin import Origin


def scores(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Returns the table of scores in percent, one row per group.

    Args:
        groups: groups of runs.

    Returns:
        For each row: `name`, `seeds`, `baseline` (the name of the group it is compared with, or "")
        and `cells`. For each cell: `value`; `best`, whether it is the best of its column; `spread`,
        the values of the seeds; `against`, the difference from the baseline; `published`, published
        scores with their sources.
    """
    rows = []
    for group in groups:
        baseline = _baseline(group, groups)
        cells = []
        for metric in retrieval.SCORES.values():
            ours = _percents(group, metric)
            best = max(statistics.mean(_percents(other, metric)) for other in groups)
            cell = {
                "value": comparison.mean_and_std(ours),
                "best": len(groups) > 1 and statistics.mean(ours) == best,
                "spread": ", ".join(f"{x:.2f}" for x in ours) if len(ours) > 1 else "",
                "published": published.describe(group.first.published, metric),
                "against": "",
            }
            if baseline is not None:
                theirs = _percents(baseline, metric)
                p = comparison.p_value(ours, theirs)
                cell["against"] = f"{statistics.mean(ours) - statistics.mean(theirs):+.2f}" + (
                    f", p {p}" if p else ""
                )
            cells.append(cell)
        rows.append(
            {
                "name": group.name,
                "seeds": [run.config.seed for run in group.runs],
                "baseline": baseline.name if baseline else "",
                "cells": cells,
            }
        )
    return rows


def zero_shot(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Returns the scores of the backbones before training, one row per backbone and its input.

    Each row has the `name` of the backbone and the `values` in percent.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for group in groups:
        model, data, scores = (
            group.first.config.model,
            group.first.config.data,
            group.first.zero_shot,
        )
        if scores is not None:
            key = (model.backbone, model.pretrained, model.pooling, test_side(data), data.resize)
            values = [f"{100 * scores[metric]:.2f}" for metric in retrieval.SCORES.values()]
            rows.setdefault(key, {"name": model.backbone, "values": values})
    return list(rows.values())


def _percents(group: Group, metric: str) -> list[float]:
    return [100 * run.scores[metric] for run in group.runs]


def _baseline(group: Group, groups: Sequence[Group]) -> Group | None:
    """Returns the group with the same settings but without regularisers, or None."""

    def other_settings(one: Group) -> dict[str, Any]:
        return one.first.config.to_dict() | dict.fromkeys(("seed", *configs.SWITCHES), 0)

    if not _is_regularised(group):
        return None
    alike = [
        x for x in groups if not _is_regularised(x) and other_settings(x) == other_settings(group)
    ]
    return alike[0] if alike else None


def _is_regularised(group: Group) -> bool:
    config = group.first.config
    return any(config[method][switch] for method, switch in configs.SWITCHES.items())


def costs(groups: Sequence[Group]) -> list[dict[str, str]]:
    """Returns the training cost of each run; speeds are medians without the first epoch."""
    return [_cost(group, run) for group in groups for run in group.runs]


def _cost(group: Group, run: Run) -> dict[str, str]:
    later = run.timings[1:] or run.timings  # The first epoch includes compilation.
    if not later:
        return {"name": group.name, "seed": str(run.config.seed)}
    speed = statistics.median(line["images_per_second"] for line in later)
    training = sum(line["train_seconds"] for line in run.timings)
    evaluation = sum(line["evaluation_seconds"] for line in run.timings)
    return {
        "name": group.name,
        "seed": str(run.config.seed),
        "images_per_second": f"{speed:,.0f}",
        "step": f"{1000 * run.config.batch_size / speed:,.0f} ms",
        "training": duration(training),
        "evaluation": duration(evaluation),
        "total": duration(training + evaluation),
        "memory": f"{max(line.get('peak_memory_gb', 0.0) for line in run.timings):.1f} GB",
    }


def duration(seconds: float) -> str:
    """Returns a duration as text with a suitable unit.

    >>> duration(7.25), duration(184.0), duration(9000.0)
    ('7.2 s', '3 min 4 s', '2 h 30 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest} min"


def settings(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Returns all settings but the seed; those that differ come first.

    Each row has the setting's `path`, the `values` of the groups, and whether these `differ`.
    """
    flat = [_flat(group.first.config) for group in groups]
    rows = [
        {
            "path": path,
            "values": [_text(one.get(path)) for one in flat],
            "differ": any(one.get(path) != flat[0].get(path) for one in flat),
        }
        for path in dict.fromkeys(path for one in flat for path in one if path != "seed")
    ]
    return sorted(rows, key=lambda row: not row["differ"])


def _flat(config: ConfigDict) -> dict[str, Any]:
    return {
        path: tuple(value) if isinstance(value, list | tuple) else value
        for path, value in configs.leaves(config)
    }


def _text(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def commands(groups: Sequence[Group]) -> list[dict[str, str]]:
    """Returns the `name` and the training `command` of each run that has an origin."""
    return [
        {"name": f"{group.name}, seed {run.config.seed}", "command": _command(run, run.origin)}
        for group in groups
        for run in group.runs
        if run.origin is not None
    ]


def _command(run: Run, origin: Origin) -> str:
    return " \\\n    ".join(origin.command(run.place, fork.forked_from(run.folder, None)))
