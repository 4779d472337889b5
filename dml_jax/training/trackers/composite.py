"""All trackers of a run as one."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from dml_jax import data
from dml_jax._utils import processes
from dml_jax.training.config import Config
from dml_jax.training.trackers.base import Tracker
from dml_jax.training.trackers.jsonl import JsonlTracker
from dml_jax.training.trackers.mlflow import MlflowTracker
from dml_jax.training.trackers.progress import ProgressTracker
from dml_jax.training.trackers.tensorboard import TensorBoardTracker
from dml_jax.training.trackers.wandb import WandbTracker


class Trackers(Tracker):
    """Calls several trackers in order; closes all of them, also when one fails.

    Without any it is a no-op.
    """

    def __init__(self, openers: Iterable[Callable[[], Tracker]] = ()) -> None:
        """Opens the trackers in order.

        Args:
            openers: each returns an open tracker.
        """
        self._trackers: list[Tracker] = []
        with contextlib.ExitStack() as opened:
            for opener in openers:
                tracker = opener()
                opened.push(_closing(tracker))
                self._trackers.append(tracker)
            self._opened = opened.pop_all()

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def step(self, step: int, *, loss: float, learning_rate: float) -> None:
        """Calls `step` of each tracker."""
        for tracker in self._trackers:
            tracker.step(step, loss=loss, learning_rate=learning_rate)

    def epoch(self, metrics: Mapping[str, Any], timings: Mapping[str, Any]) -> None:
        """Calls `epoch` of each tracker."""
        for tracker in self._trackers:
            tracker.epoch(metrics, timings)

    def evaluation(
        self,
        step: int,
        sources: Mapping[str, data.Source],
        embeddings: Mapping[str, Float32[np.ndarray, "_ d"]],
    ) -> None:
        """Calls `evaluation` of each tracker."""
        for tracker in self._trackers:
            tracker.evaluation(step, sources, embeddings)


def _closing(tracker: Tracker) -> Callable[..., None]:
    """Returns the exit callback of a tracker."""

    def close(kind: type[BaseException] | None, *_: object) -> None:
        tracker.close(failed=kind is not None)

    return close


def create(
    folder: Path,
    config: Config,
    steps_per_epoch: int,
    step: int,
    other: Tracker | None = None,
) -> Trackers:
    """Opens the trackers of a run in the first process, and none in the others.

    Records of a later step than `step`, which an interrupted run has left, are dropped.

    Args:
        folder: the run's, with its config.
        config: the run's.
        steps_per_epoch: the run's.
        step: steps done.
        other: a tracker that is called after all others.

    Raises:
        ValueError: Weights & Biases or MLflow refuses the run.
    """
    if not processes.is_first_process():
        return Trackers()
    openers: list[Callable[[], Tracker]] = [
        lambda: JsonlTracker(folder, step=step),
        lambda: TensorBoardTracker(folder, step=step),
    ]
    if config.wandb:
        openers.append(lambda: WandbTracker(folder, project=config.wandb))
    if config.mlflow:
        openers.append(lambda: MlflowTracker(folder, experiment=config.mlflow))
    openers.append(
        lambda: ProgressTracker(
            folder.name,
            step=step,
            total_steps=config.epochs * steps_per_epoch,
            batch_size=config.batch_size,
        )
    )
    if other is not None:
        openers.append(lambda: other)
    return Trackers(openers)


def check(config: Config) -> None:
    """Checks that the packages of the trackers that a config names are installed.

    Args:
        config: the run's.

    Raises:
        ModuleNotFoundError: one is not installed.
    """
    for name, wanted in (("wandb", config.wandb), ("mlflow", config.mlflow)):
        if not wanted:
            continue
        spec = find_spec(name)
        # `find_spec` also finds a folder `wandb`, such as Weights & Biases leaves behind.
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(
                f'config.{name} needs the package {name}: pip install "dml_jax[{name}]", or leave '
                f"config.{name} empty"
            )
