"""The report's tables: scores, costs, settings, commands."""

import shlex
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from dml_jax import published, retrieval
from dml_jax.report import comparison
from dml_jax.report.runs import Group, Run
from dml_jax.training import config as configs
from dml_jax.training import fork


def variant(config: ConfigDict, recipe: Mapping[str, Any]) -> tuple[str, str]:
    """Method and loss of a configuration, as `config.parse_variant` gives them of a name.

    The bare loss on MemVir's schedule is told from the one on its own by which of the two the
    configuration differs from in fewer settings.

    Args:
        config: of a run.
        recipe: what the config file of its data set defines.
    """
    used = {"ps": config.proxy_synthesis.ratio, "memvir": config.memvir.num_steps}
    regularisers = [name for name, amount in used.items() if amount]
    loss = config.loss.name
    if regularisers:
        return "_".join(regularisers), loss
    schedules = ("baseline", "memvir_baseline")  # Of equal ones min takes the first.
    return min(schedules, key=lambda method: len(_changes(config, recipe, method, loss))), loss


def _changes(
    config: ConfigDict, recipe: Mapping[str, Any], method: str, loss: str
) -> dict[str, Any]:
    """The settings of a configuration that a variant of its config file has otherwise."""
    start = _flat(recipe["get_config"](f"{method}_{loss}"))
    return {path: value for path, value in _flat(config).items() if start.get(path) != value}


def scores(groups: Sequence[Group], recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The comparison: a row a group, percent.

    Args:
        groups: of runs.
        recipe: what the config file of their data set defines, which may be published scores.

    Returns:
        Of each row `name`, `seeds`, `bare` (the group that it is compared with, if any) and
        `cells`; of each cell `value`, `best`, `spread` (each seed's), `against` (how far it is from
        `bare`) and `published`, with the sources.
    """
    rows = []
    for group in groups:
        references = recipe.get("PUBLISHED", {}).get(variant(group.first.config, recipe), ())
        bare = _bare(group, groups)
        cells = []
        for metric in retrieval.SCORES.values():
            ours = _percents(group, metric)
            best = max(statistics.mean(_percents(other, metric)) for other in groups)
            cell = {
                "value": comparison.mean_and_std(ours),
                "best": len(groups) > 1 and statistics.mean(ours) == best,
                "spread": ", ".join(f"{x:.2f}" for x in ours) if len(ours) > 1 else "",
                "published": published.describe(references, metric),
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

    if not _is_regularised(group):
        return None
    alike = [x for x in groups if not _is_regularised(x) and rest(x) == rest(group)]
    return alike[0] if alike else None


def _is_regularised(group: Group) -> bool:
    config = group.first.config
    return bool(config.proxy_synthesis.ratio or config.memvir.num_steps)


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
    method, loss = variant(run.config, recipe)
    name = method if loss == "norm_softmax" else f"{method}_{loss}"
    file = run.config.data.name
    changed = [
        f"--config.{path}={shlex.quote(_flag(value))}"
        for path, value in _changes(run.config, recipe, method, loss).items()
    ]
    origin = fork.forked_from(run.folder, None)
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
