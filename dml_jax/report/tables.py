"""The report's tables: scores, costs, settings, commands."""

import shlex
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from dml_jax import config as configs
from dml_jax import retrieval
from dml_jax.report import comparison
from dml_jax.report.runs import Group, Run
from dml_jax.training import workdir


def variant(config: ConfigDict) -> tuple[str, str]:
    """Method and loss of a configuration, as `config.parse_variant` gives them of a name."""
    parts = [
        name
        for name, used in (
            ("ps", config.proxy_synthesis.ratio),
            ("memvir", config.memvir.num_steps),
        )
        if used
    ]
    return "_".join(parts) or "baseline", config.loss.name


def scores(groups: Sequence[Group], recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The comparison: a row a group, percent.

    Args:
        groups: of runs.
        recipe: what the config file of their data set defines, which may be published scores.

    Returns:
        Of each row `name`, `seeds` and `cells`; of each cell `value`, `best`, `spread` (each
        seed's), `against` (the bare variant, and how far apart they are) and `published`.
    """
    published = recipe.get("PUBLISHED", {})
    rows = []
    for group in groups:
        told = published.get(variant(group.first.config), {})
        bare = _bare(group, groups)
        cells = []
        for metric in retrieval.SCORES.values():
            ours = _percents(group, metric)
            best = max(statistics.mean(_percents(other, metric)) for other in groups)
            cell = {
                "value": comparison.mean_and_std(ours),
                "best": len(groups) > 1 and statistics.mean(ours) == best,
                "spread": ", ".join(f"{x:.2f}" for x in ours) if len(ours) > 1 else "",
                "published": "{:g} ± {:g}".format(*told[metric]) if metric in told else "",
                "against": "",
            }
            if bare is not None:
                theirs = _percents(bare, metric)
                p = comparison.p_value(ours, theirs)
                cell["against"] = f"{statistics.mean(ours) - statistics.mean(theirs):+.2f}" + (
                    f", p {p}" if p else ""
                )
            cells.append(cell)
        rows.append(
            {
                "name": group.name,
                "seeds": [run.config.seed for run in group.runs],
                "bare": bare.name if bare else "",
                "cells": cells,
            }
        )
    return rows


def _percents(group: Group, metric: str) -> list[float]:
    return [100 * run.scores[metric] for run in group.runs]


def _bare(group: Group, groups: Sequence[Group]) -> Group | None:
    """The group without a regulariser that is otherwise the same, if it is there."""

    def rest(one: Group) -> dict[str, Any]:
        return one.first.config.to_dict() | {"seed": 0, "proxy_synthesis": 0, "memvir": 0}

    if variant(group.first.config)[0] == "baseline":
        return None
    alike = [
        other
        for other in groups
        if variant(other.first.config)[0] == "baseline" and rest(other) == rest(group)
    ]
    return alike[0] if alike else None


def costs(groups: Sequence[Group]) -> list[dict[str, str]]:
    """What training cost, a row a run; epochs' medians, without the first, which compiles."""
    return [_cost(group, run) for group in groups for run in group.runs]


def _cost(group: Group, run: Run) -> dict[str, str]:
    later = run.timings[1:] or run.timings
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
    """Seconds as people say them.

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
    """Every setting but the seed: `path`, a `values` for each group, and whether they `differ`.

    Those that differ come first.
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


def commands(groups: Sequence[Group], recipe: Mapping[str, Any]) -> list[dict[str, str]]:
    """What to type to have the runs again: `name` and `command`, one for each run.

    Args:
        groups: of runs.
        recipe: what the config file of their data set defines.
    """
    return [
        {"name": f"{group.name}, seed {run.config.seed}", "command": _command(run, recipe)}
        for group in groups
        for run in group.runs
    ]


def _command(run: Run, recipe: Mapping[str, Any]) -> str:
    method, loss = variant(run.config)
    name = method if loss == "norm_softmax" else f"{method}_{loss}"
    file = run.config.data.name
    start = _flat(recipe["get_config"](name))
    changed = [
        f"--config.{path}={shlex.quote(_flag(value))}"
        for path, value in _flat(run.config).items()
        if start.get(path) != value
    ]
    origin = workdir.forked_from(run.folder, None)
    words = [
        "python scripts/train.py",
        f"--config=configs/{file}.py:{name}",
        f"--workdir={shlex.quote(str(run.folder))}",
        *([f"--fork_from={shlex.quote(str(origin))}"] if origin else []),
        *changed,
    ]
    return " \\\n    ".join(words)


def _flag(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ",".join(map(str, value)) + ("," if len(value) == 1 else "") + ")"
    return str(value)
