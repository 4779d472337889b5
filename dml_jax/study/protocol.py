"""A whole study: checks, searches, final runs, tables and page."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from dml_jax import data
from dml_jax._utils import locks
from dml_jax._utils.errors import UserError
from dml_jax._utils.files import read_json, write_json, write_text
from dml_jax.data.splits import load_splits
from dml_jax.study import finals, page, space, summary, trials
from dml_jax.study.space import Range
from dml_jax.study.trials import Variant
from dml_jax.training import run
from dml_jax.training.config import parse

PLAN = "study.json"
PAGE = "study.html"
RUNS = "runs.csv"


class Plan(NamedTuple):
    """What a study compares, and how."""

    variants: Sequence[Variant]
    baselines: Mapping[str, str]
    """The bare loss of each variant with a regulariser."""
    trials: int
    folds: int
    seeds: int
    inspection: data.InspectionReport
    """The inspection report of the images, which no run has to inspect again."""


def plan(
    get_config: Callable[[str], ConfigDict],
    overrides: Mapping[str, Any],
    searched: Mapping[str, Range | None],
    *,
    methods: Sequence[str],
    losses: Sequence[str],
    trials: int,
    folds: int,
    seeds: int,
    root: Path,
) -> Plan:
    """Returns the plan of a study, after checking its settings, its spaces and its folds.

    Args:
        get_config: returns the config of a variant.
        overrides: settings that all variants have, by path.
        searched: `SPACE` of the config file; see `space.of_variant`.
        methods: methods to compare; the bare loss is compared in any case.
        losses: losses to compare them with.
        trials: trials of each variant.
        folds: folds of the training classes, at least two.
        seeds: seeds of the final runs.
        root: folder of the study.

    Raises:
        ValueError: a setting or a bound is invalid, or a fold has too few classes or images.
    """
    if folds < 2:
        raise UserError(f"--folds is {folds}; a study needs at least two folds")
    methods = list(dict.fromkeys(["baseline", *methods]))
    found, baselines = [], {}
    for loss in losses:
        for method in methods:
            name = f"{method}_{loss}"
            config = space.with_settings(get_config(name), overrides)
            if config.data.cache == "features" and not config.data.features:
                config.data.features = str(root.absolute() / "features")
            found.append(Variant(name, config, space.of_variant(config, loss, searched)))
            if method != "baseline":
                baselines[name] = f"baseline_{loss}"
    inspection = _check_folds(found[0].config, folds)
    return Plan(found, baselines, trials, folds, seeds, inspection)


def _check_folds(config: ConfigDict, folds: int) -> data.InspectionReport:
    """Checks that every fold has enough classes and images; returns the inspection report."""
    inspection: data.InspectionReport | None = None
    for fold in range(folds):
        settings = parse(trials.of_fold(config, fold, folds, {}))
        _, inspection = load_splits(settings.data, settings.evaluation.recall_at, inspection)
    assert inspection is not None  # There are at least two folds.
    return inspection


def carry_out(study: Plan, storage: trials.Storage, root: Path) -> str:
    """Carries out a study, or the rest of it; writes its page and the list of all runs.

    Args:
        study: the plan.
        storage: storage of the trials.
        root: folder of the study.

    Returns:
        The tables, in Markdown.

    Raises:
        Stopped: the process was asked to stop; start again to continue.
        ValueError: the folder holds another study.
    """
    if jax.process_count() > 1:
        raise UserError(
            "a study trains each run in one process; start it once on each machine instead"
        )
    with locks.exclusive(root / trials.LOCKS / "study"):
        _claim(study, root)
    train = functools.partial(run.train, inspection=study.inspection)
    searches = trials.search(
        study.variants, storage, root, train, trials=study.trials, folds=study.folds
    )
    best = [trials.best_settings(search) for search in searches]
    scores = finals.train(
        list(zip(study.variants, best, strict=True)),
        root,
        train,
        folds=study.folds,
        seeds=study.seeds,
    )
    kinds = {
        kind: summary.rows(scores, study.baselines, kind) for kind in ("concatenated", "separated")
    }
    names = [variant.name for variant in study.variants]
    by_name = dict(zip(names, searches, strict=True))
    runs = summary.runs_csv({k: x.trials for k, x in by_name.items()}, scores)
    rendered = page.render(by_name, kinds, study.trials, study.folds, study.seeds)
    with locks.exclusive(root / trials.LOCKS / "study"):
        write_text(root / RUNS, runs)
        write_text(root / PAGE, rendered)
    return "\n\n".join(summary.markdown(rows, f"{kind}, %") for kind, rows in kinds.items())


def _claim(study: Plan, root: Path) -> None:
    """Records the plan, or checks that the recorded one is the same but for more trials or seeds.

    Raises:
        ValueError: settings, spaces or folds differ.
    """
    planned = {
        "folds": study.folds,
        "variants": {
            variant.name: {
                "config": json.loads(variant.config.to_json()),
                "space": {path: list(bounds) for path, bounds in variant.space.items()},
            }
            for variant in study.variants
        },
    }
    planned = json.loads(json.dumps(planned))
    recorded = read_json(root / PLAN)
    if recorded is not None:
        changed = [
            name
            for name, one in planned["variants"].items()
            if recorded["variants"].get(name, one) != one
        ]
        if recorded["folds"] != study.folds:
            changed.insert(0, f"--folds ({recorded['folds']} before, {study.folds} now)")
        if changed:
            raise UserError(
                f"{root} holds a study with other settings or another space; choose another "
                f"--root, or undo the changes of: {', '.join(changed)}"
            )
        planned["variants"] = recorded["variants"] | planned["variants"]
    write_json(root / PLAN, planned)
