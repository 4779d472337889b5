"""The end of an epoch of training: metrics, evaluation, log, checkpoint."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging

from dml_jax import losses, memvir
from dml_jax._utils import processes, sharding
from dml_jax.retrieval import collapse
from dml_jax.training import checkpoint, history, trackers
from dml_jax.training.builder import Experiment
from dml_jax.training.state import TrainState, network_variables


class Epochs:
    """The end of each epoch: metrics, evaluation, log, checkpoint."""

    def __init__(
        self,
        experiment: Experiment,
        done: history.History,
        writer: trackers.Trackers,
        checkpoints: checkpoint.Checkpoints,
        start: int,
    ) -> None:
        """Prepares the epochs that follow a step.

        Args:
            experiment: experiment of the run.
            done: what the run has done so far; evaluations are added to it.
            writer: trackers that log the epochs.
            checkpoints: checkpoints of the run.
            start: number of steps done.
        """
        self._experiment, self._done = experiment, done
        self._writer, self._checkpoints = writer, checkpoints
        self._began, self._first_step = time.perf_counter(), start
        self._measure_memory = _measurement_of_memory(experiment)
        self._embeddings: dict[str, np.ndarray] | None = None  # Those of the latest evaluation.

    def finish(self, step: int, state: TrainState, stops: bool) -> None:
        """Logs an epoch, and evaluates and saves at the configured intervals.

        Args:
            step: number of steps done.
            state: state after the step.
            stops: whether the run stops after this epoch and must be saved.
        """
        config, trained = self._experiment.config, time.perf_counter()
        metrics = _epoch_metrics(self._experiment, state, step) | self._of_memory(state)
        epoch = metrics["epoch"]
        scores: dict[str, float] = {}
        if epoch % config.evaluation.every_epochs == 0 or epoch == config.epochs:
            scores = self._evaluate(state)
            self._done.evaluated.append(metrics | scores)
        timings = {
            "step": step,
            "epoch": epoch,
            "images_per_second": (step - self._first_step)
            * config.batch_size
            / (trained - self._began),
            "train_seconds": trained - self._began,
            "evaluation_seconds": time.perf_counter() - trained,
            "peak_memory_gb": sharding.peak_memory() / 1e9,
        }
        self._writer.epoch(metrics | scores, timings)
        if scores and self._embeddings is not None:
            self._writer.evaluation(step, self._experiment.sources, self._embeddings)
        if scores or stops or epoch % config.checkpoint.every_epochs == 0:
            self._checkpoints.save(step, state, scores or None)
        self._began, self._first_step = time.perf_counter(), step

    def test_embeddings(self, state: TrainState) -> dict[str, np.ndarray] | None:
        """Returns the embeddings of the test images; None for a run without test scores.

        Args:
            state: state after the last step.
        """
        if self._experiment.selection_split == "test" and self._embeddings is not None:
            return self._embeddings
        if not self._experiment.config.evaluation.test:
            return None
        return self._experiment.evaluator.embed(network_variables(state), "test")

    def _of_memory(self, state: TrainState) -> dict[str, int | float]:
        """Returns the number of classes of the latest step, and the drift of any virtual ones."""
        if not isinstance(state.memory, memvir.Memory):
            return {}
        classes, drift = jax.device_get(self._measure_memory(state.memory))
        values = {f"memvir_{name}": float(value) for name, value in drift._asdict().items()}
        if self._experiment.config.memvir.virtual == "embeddings":
            values = {}  # There are no virtual classes.
        drifted = {name: value for name, value in values.items() if not math.isnan(value)}
        return {"memvir_classes": int(classes)} | drifted

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        evaluator = self._experiment.evaluator
        self._embeddings = evaluator.embed(
            network_variables(state), self._experiment.selection_split
        )
        return evaluator.score(self._embeddings) | self._spread()

    def _spread(self) -> dict[str, float]:
        """Returns how far the latest embeddings are apart; warns of a collapse."""
        embeddings = (self._embeddings or {})[self._experiment.selection_split]
        if len(embeddings) < 2:  # A single query, searched in a gallery.
            return {}
        spread = collapse.spread(embeddings)
        if spread.is_collapsed and processes.is_first_process():
            logging.warning(
                "the embeddings have collapsed: two images have a mean cosine of %.3f, and the "
                "effective rank is %.1f of %d; see docs/how-to/metrics.md",
                spread.mean_cosine,
                spread.effective_rank,
                embeddings.shape[1],
            )
        # Further digits depend on the number of cores.
        return {name: round(value, 6) for name, value in spread._asdict().items()}


def _measurement_of_memory(experiment: Experiment) -> Callable[[memvir.Memory], tuple]:
    """Returns a compiled function from a memory to its classes in use and their drift."""
    config = experiment.config

    def measure(memory: memvir.Memory) -> tuple:
        return (
            memvir.classes_in_use(memory, **config.memvir.of_update()),
            memvir.drift(losses.of_proxies(config.loss), memory, growth=config.memvir.growth),
        )

    return jax.jit(measure, out_shardings=sharding.replicated_sharding(experiment.mesh))


def _epoch_metrics(experiment: Experiment, state: TrainState, step: int) -> dict[str, Any]:
    rate, proxy_rate = experiment.learning_rate(step - 1)
    averages = {
        name: metric.total / metric.count
        for name, metric in vars(jax.device_get(state.metrics)).items()
        if not name.startswith("_")
    }
    return {
        "step": step,
        "epoch": step // experiment.steps_per_epoch,
        **{name: float(value) for name, value in averages.items()},
        "skipped_steps": int(jax.device_get(state.skipped.total)),
        "learning_rate": rate,
        "proxy_learning_rate": proxy_rate,
    }
