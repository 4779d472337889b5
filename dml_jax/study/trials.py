"""The search: trials of settings, scored on class-disjoint folds of the training classes."""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging
from ml_collections import ConfigDict

from dml_jax._utils import extras, locks
from dml_jax._utils.errors import UserError
from dml_jax._utils.files import read_json_lines
from dml_jax.study.space import Space, with_settings
from dml_jax.training import run_directory, trackers

with extras.required_by("study"):
    import optuna
    from optuna.storages import journal
    from optuna.trial import TrialState

Storage = optuna.storages.BaseStorage

METRIC = "map@r"
"""The metric that a search maximises, on the validation classes of each fold."""

LOCKS = "locks"
"""Folder of the lock files of a study."""

PAUSE = 10.0
"""Seconds before asking again for what another process works on."""


class Variant(NamedTuple):
    """A method with a loss, and what is searched for it."""

    name: str
    config: ConfigDict
    space: Space


def of_fold(config: ConfigDict, fold: int, folds: int, settings: Mapping[str, Any]) -> ConfigDict:
    """Returns the config of a fold: a share of the training classes is for validation.

    Args:
        config: config of the variant.
        fold: number of the fold, from 0.
        folds: number of folds, each the same share of the classes.
        settings: other settings to change, by path.
    """
    held_out = {"data.validation_classes": 1 / folds, "data.validation_fold": fold}
    return with_settings(config, {**settings, **held_out})


def open_storage(url: str | None, root: Path) -> Storage:
    """Returns the storage of a study's trials.

    Args:
        url: URL of a database; None for a journal file in the folder of the study.
        root: folder of the study.

    Raises:
        ValueError: the database cannot be opened.
    """
    if url is None:
        root.mkdir(parents=True, exist_ok=True)
        file = str(root / "journal.log")
        return optuna.storages.JournalStorage(journal.JournalFileBackend(file))
    try:
        return optuna.storages.get_storage(url)
    except Exception as error:  # Of any kind of database.
        raise UserError(f"--storage={url} cannot be opened: {error}") from error


def search(
    variants: Sequence[Variant],
    storage: Storage,
    root: Path,
    train: Callable[..., dict[str, Any]],
    *,
    trials: int,
    folds: int,
) -> list[optuna.Study]:
    """Searches the settings of each variant, or continues, until each has enough trials.

    For each fold, a trial trains a run on the other folds' classes; its value is the `METRIC` of
    the last epoch on the held-out classes, averaged over folds. While it trains on its first fold,
    Hyperband may prune it. Trials that were interrupted are repeated with their settings, without
    the folds that were finished. Several processes, also on several machines that share the root
    and the storage, may search at the same time; with the same number of trials, all of them return
    after the last trial.

    Args:
        variants: the variants.
        storage: storage of the trials.
        root: folder of the study.
        train: `run.train`.
        trials: number of completed and pruned trials of each variant.
        folds: number of folds.

    Raises:
        Stopped: the process was asked to stop.
        ValueError: a setting or an image is invalid, or all trials of a variant were pruned.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    studies = [_open(variant, storage) for variant in variants]
    pending = list(zip(variants, studies, strict=True))
    while pending:
        for variant, study in pending:
            while _run_next(variant, study, root, train, trials, folds):
                pass
        pending = [(variant, study) for variant, study in pending if _done(study) < trials]
        if pending:
            time.sleep(PAUSE)  # Other processes run their last trials.
    for variant, study in zip(variants, studies, strict=True):
        if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            raise UserError(
                f"none of the {trials} trials of {variant.name} was completed; give more trials, "
                "or search lower learning rates"
            )
    return studies


def _open(variant: Variant, storage: Storage) -> optuna.Study:
    epochs, every = variant.config.epochs, variant.config.evaluation.every_epochs
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if 3 * every <= epochs:
        pruner = optuna.pruners.HyperbandPruner(every, epochs, reduction_factor=3)
    return optuna.create_study(
        study_name=variant.name,
        storage=storage,
        sampler=optuna.samplers.TPESampler(),
        pruner=pruner,
        direction="maximize",
        load_if_exists=True,
    )


def _run_next(
    variant: Variant,
    study: optuna.Study,
    root: Path,
    train: Callable[..., dict[str, Any]],
    trials: int,
    folds: int,
) -> bool:
    """Runs another trial; returns False if enough are done or running."""
    with contextlib.ExitStack() as until_finished:
        # Between counting the trials and starting one, no other process may start one.
        with locks.exclusive(root / LOCKS / study.study_name):
            _repeat_interrupted(study, root)
            running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if _done(study) + len(running) >= trials:
                return False
            trial = study.ask()
            lock = _lock_file(root, study, trial.number)
            until_finished.enter_context(locks.exclusive(lock))
            settings = _suggest(trial, variant.space)
        folder, value = root / "trials" / variant.name, None
        try:
            value = _evaluate(trial, variant, settings, folder, train, folds)
            state = TrialState.COMPLETE
        except optuna.TrialPruned:
            state = TrialState.PRUNED
        # Another process must not see a trial that seems to run when its lock is released.
        with locks.exclusive(root / LOCKS / study.study_name):
            study.tell(trial, value, state=state)
    return True


def best_settings(study: optuna.Study) -> dict[str, Any]:
    """Returns the settings of the best trial, by path."""
    return dict(study.best_trial.params)


def _done(study: optuna.Study) -> int:
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    return len(study.get_trials(deepcopy=False, states=states))


def _suggest(trial: optuna.Trial, space: Space) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for path, bounds in sorted(space.items()):
        if bounds.integer:
            low, high = int(bounds.low), int(bounds.high)
            settings[path] = trial.suggest_int(path, low, high, log=bounds.log)
        else:
            settings[path] = trial.suggest_float(path, bounds.low, bounds.high, log=bounds.log)
    return settings


def _evaluate(
    trial: optuna.Trial,
    variant: Variant,
    settings: Mapping[str, Any],
    root: Path,
    train: Callable[..., dict[str, Any]],
    folds: int,
) -> float:
    """Trains the runs of a trial and returns its value."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    scores = []
    for fold in range(folds):
        # The settings name the folder, so that a repeated trial finds its finished runs.
        workdir = root / digest / f"fold{fold}"
        config = of_fold(variant.config, fold, folds, {**settings, "evaluation.test": False})
        tracker = _Reporter(trial, workdir) if fold == 0 else None
        print(f"\n{variant.name}, trial {trial.number}, fold {fold}: {workdir}")
        try:
            result = train(config, workdir, tracker=tracker)
        except FloatingPointError as error:
            logging.warning("trial %d of %s is pruned: %s", trial.number, variant.name, error)
            _drop_checkpoints(workdir)
            raise optuna.TrialPruned from None
        except optuna.TrialPruned:
            _drop_checkpoints(workdir)
            raise
        _drop_checkpoints(workdir)
        scores.append(result["last"][METRIC])
    trial.set_user_attr("folds", scores)
    return sum(scores) / len(scores)


def _drop_checkpoints(workdir: Path) -> None:
    """Deletes the checkpoints of a run: nothing reads those of a trial, and many fill a disk."""
    shutil.rmtree(workdir / run_directory.CHECKPOINTS, ignore_errors=True)


class _Reporter(trackers.Tracker):
    """Reports the evaluations of a run to its trial, and prunes it."""

    def __init__(self, trial: optuna.Trial, workdir: Path) -> None:
        self._trial = trial
        for line in read_json_lines(workdir / run_directory.METRICS):
            self._report(line)

    def epoch(self, metrics: Mapping[str, Any], timings: Mapping[str, Any]) -> None:
        """Reports an epoch.

        Raises:
            TrialPruned: the trial is worse than others at this epoch.
        """
        del timings
        self._report(metrics)
        if METRIC in metrics and self._trial.should_prune():
            raise optuna.TrialPruned

    def _report(self, metrics: Mapping[str, Any]) -> None:
        if METRIC in metrics:
            self._trial.report(metrics[METRIC], metrics["epoch"])


def _repeat_interrupted(study: optuna.Study, root: Path) -> None:
    """Enqueues the settings of trials whose process was interrupted, once each."""
    repeated = {trial.user_attrs.get("repeats") for trial in study.trials}
    for trial in study.trials:
        if trial.state == TrialState.RUNNING:
            if locks.is_held(_lock_file(root, study, trial.number)):
                continue
            study.tell(trial.number, state=TrialState.FAIL)
        elif trial.state != TrialState.FAIL:
            continue
        if trial.number not in repeated and trial.params:
            study.enqueue_trial(trial.params, user_attrs={"repeats": trial.number})


def _lock_file(root: Path, study: optuna.Study, number: int) -> Path:
    """Returns the file that is locked while a process runs a trial."""
    return root / LOCKS / f"{study.study_name}-{number}"
