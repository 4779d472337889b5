"""The training loop: step, log, evaluate, save."""

import functools
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dml_jax import memvir
from dml_jax._utils import processes, sharding
from dml_jax.training import checkpoint, history, nonfinite, preemption, result, trackers
from dml_jax.training.batches import device_batches
from dml_jax.training.builder import Experiment, with_features
from dml_jax.training.fork import forked_from, initial_state
from dml_jax.training.state import TrainState, network_variables

_STEPS_IN_FLIGHT = 4


def train(
    experiment: Experiment,
    workdir: Path,
    stop: preemption.StopRequest | None = None,
    tracker: trackers.Tracker | None = None,
    initial: TrainState | None = None,
) -> dict[str, Any]:
    """Trains to the last epoch, from the beginning or from the latest checkpoint in the workdir.

    Args:
        experiment: the experiment to train.
        workdir: directory of the run, claimed for this experiment.
        stop: set when this process is asked to stop; see `preemption.listening`.
        tracker: records the run too.
        initial: state before the first step, which is donated; by default it is made if needed.

    Returns:
        The contents of `result.json`.

    Raises:
        Stopped: one of the processes was asked to stop.
        ValueError: the run has done more epochs than configured, or lines of its metrics are
            missing.
        FloatingPointError: more consecutive steps than the config allows were nonfinite; earlier
            checkpoints are kept.
    """
    stop = preemption.StopRequest() if stop is None else stop
    config, steps_per_epoch = experiment.config, experiment.steps_per_epoch
    with checkpoint.Checkpoints(workdir, keep_last=config.checkpoint.keep_last) as checkpoints:
        state, start = _start(experiment, workdir, checkpoints, initial)
        done = history.read(
            workdir,
            start,
            steps_per_epoch=steps_per_epoch,
            epochs=config.epochs,
            patience=config.evaluation.patience,
        )
        experiment = _prepared(experiment, workdir, state, start, stop)
        with trackers.create(workdir, config, steps_per_epoch, start, tracker) as writer:
            epochs = _Epochs(experiment, done, writer, checkpoints, start)
            watch = nonfinite.Watch(
                experiment, workdir, writer, checkpoints, _steps_late(experiment)
            )
            agreement = processes.Agreement(experiment.mesh, _STEPS_IN_FLIGHT)
            end = start if done.out_of_patience else config.epochs * steps_per_epoch
            with jax.transfer_guard("disallow"):
                for step, batch in device_batches(experiment, start, end):
                    state, step_metrics = experiment.take_step(state, batch)
                    stop.unsaved = True
                    watch.put(step, step_metrics)
                    stops = agreement.after(step, stop.is_set())
                    if step % steps_per_epoch == 0:
                        watch.drain()
                        epochs.finish(step, state, stops)
                    elif stops:
                        watch.drain()
                        checkpoints.save(step, state, None)
                    if stops:
                        raise preemption.Stopped(
                            f"stopped after step {step}, which is saved: start again to resume"
                        )
                    if done.out_of_patience:
                        break
    stop.unsaved = jax.process_count() > 1  # Other processes would wait for one that exits alone.
    _stop_if_asked(stop, "stopped after training: start again for the result")
    embeddings = _test_embeddings(experiment, state, epochs)
    return result.write(experiment, workdir, done.evaluated, embeddings)


def _stop_if_asked(stop: preemption.StopRequest, message: str) -> None:
    """Raises Stopped if any process was asked to stop."""
    if processes.any_process(stop.is_set()):
        raise preemption.Stopped(message)


def _prepared(
    experiment: Experiment,
    workdir: Path,
    state: TrainState,
    start: int,
    stop: preemption.StopRequest,
) -> Experiment:
    """Returns the experiment with cached features, if any; scores the backbone of a new run."""
    variables = network_variables(state)
    message = "stopped while computing features: start again to resume"
    experiment = with_features(
        experiment, variables, workdir, lambda: _stop_if_asked(stop, message)
    )
    if start == 0:
        result.score_backbone(experiment, workdir, variables)
    return experiment


def _test_embeddings(
    experiment: Experiment, state: TrainState, epochs: "_Epochs"
) -> dict[str, np.ndarray] | None:
    """Returns the embeddings of the test images after the last step; None without scores."""
    if experiment.selection_split == "test" and epochs.embeddings is not None:
        return epochs.embeddings
    if not experiment.config.evaluation.test:
        return None
    return experiment.evaluator.embed(network_variables(state), "test")


def _steps_late(experiment: Experiment) -> int:
    """Returns after how many later steps the metrics of a step are read.

    The delay keeps accelerators busy. CPUs need none, because steps take long compared with the
    work between them, and each dispatched step holds its own temporary memory.
    """
    return 0 if sharding.on_cpu(experiment.mesh) else _STEPS_IN_FLIGHT


def _start(
    experiment: Experiment,
    workdir: Path,
    checkpoints: checkpoint.Checkpoints,
    initial: TrainState | None,
) -> tuple[TrainState, int]:
    """Returns the state to train from, and the number of steps done."""
    latest = checkpoints.latest
    if latest is not None:
        return checkpoints.restore(latest, experiment.abstract_state), latest
    fork = forked_from(workdir, None)
    state = initial_state(experiment, fork) if initial is None else initial
    if fork is not None:
        checkpoints.save(0, state, None)  # From now on the other run is not needed.
    return state, 0


class _Epochs:
    """The end of each epoch: metrics, evaluation, log, checkpoint."""

    def __init__(
        self,
        experiment: Experiment,
        done: history.History,
        writer: trackers.Trackers,
        checkpoints: checkpoint.Checkpoints,
        start: int,
    ) -> None:
        self._experiment, self._done = experiment, done
        self._writer, self._checkpoints = writer, checkpoints
        self._began, self._first_step = time.perf_counter(), start
        self._measure_drift = jax.jit(
            functools.partial(memvir.drift, experiment.config.loss),
            out_shardings=sharding.replicated_sharding(experiment.mesh),
        )
        self.embeddings: dict[str, np.ndarray] | None = None
        """Embeddings of the selection split in the latest evaluation."""

    def finish(self, step: int, state: TrainState, stops: bool) -> None:
        """Logs an epoch, and evaluates and saves at the configured intervals.

        Args:
            step: number of steps done.
            state: state after the step.
            stops: whether the run stops after this epoch and must be saved.
        """
        config, trained = self._experiment.config, time.perf_counter()
        metrics = _epoch_metrics(self._experiment, state, step) | self._drift(state)
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
        if scores and self.embeddings is not None:
            self._writer.evaluation(step, self._experiment.sources, self.embeddings)
        if scores or stops or epoch % config.checkpoint.every_epochs == 0:
            self._checkpoints.save(step, state, scores or None)
        self._began, self._first_step = time.perf_counter(), step

    def _drift(self, state: TrainState) -> dict[str, float]:
        """Returns the drift of MemVir's virtual classes at the latest step, if there were any."""
        if state.memory is None:
            return {}
        drift = jax.device_get(self._measure_drift(state.memory))
        values = {f"memvir_{name}": float(value) for name, value in drift._asdict().items()}
        return {name: value for name, value in values.items() if not math.isnan(value)}

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        evaluator = self._experiment.evaluator
        self.embeddings = evaluator.embed(
            network_variables(state), self._experiment.selection_split
        )
        return evaluator.score(self.embeddings)


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
