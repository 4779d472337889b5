"""The training loop: step, log, evaluate, save."""

from pathlib import Path
from typing import Any

import jax

from dml_jax._utils import processes
from dml_jax._utils.errors import UserError
from dml_jax.training import (
    bucket,
    checkpoint,
    history,
    nonfinite,
    preemption,
    result,
    trackers,
)
from dml_jax.training.batches import device_batches
from dml_jax.training.builder import Experiment, with_features
from dml_jax.training.epochs import Epochs
from dml_jax.training.fork import forked_from, initial_state
from dml_jax.training.state import TrainState, network_variables


def train(
    experiment: Experiment,
    workdir: Path,
    stop: preemption.StopRequest | None = None,
    tracker: trackers.Tracker | None = None,
    initial: TrainState | None = None,
    published: bucket.Bucket | None = None,
) -> dict[str, Any]:
    """Trains to the last epoch, from the beginning or from the latest checkpoint in the workdir.

    Args:
        experiment: the experiment to train.
        workdir: directory of the run, claimed for this experiment.
        stop: set when this process is asked to stop; see `preemption.listening`.
        tracker: records the run too.
        initial: state before the first step, which is donated; by default it is made if needed.
        published: where the run is published; None if the workdir is all there is.

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
    with checkpoint.Checkpoints(
        workdir,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every * steps_per_epoch,
        bucket=published,
    ) as checkpoints:
        state, start = _start(experiment, workdir, checkpoints, initial)
        done = history.read(
            workdir,
            start,
            steps_per_epoch=steps_per_epoch,
            epochs=config.epochs,
            patience=config.evaluation.patience,
        )
        experiment = _prepared(experiment, workdir, published, state, start, stop)
        with trackers.create(workdir, config, steps_per_epoch, start, tracker) as writer:
            epochs = Epochs(experiment, done, writer, checkpoints, start)
            watch = nonfinite.Watch(experiment, workdir, writer, checkpoints)
            agreement = processes.Agreement(experiment.mesh, nonfinite.STEPS_LATE)
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
    embeddings = epochs.test_embeddings(state)
    return result.write(experiment, workdir, done.evaluated, embeddings, published)


def _stop_if_asked(stop: preemption.StopRequest, message: str) -> None:
    """Raises Stopped if any process was asked to stop."""
    if processes.any_process(stop.is_set()):
        raise preemption.Stopped(message)


def _prepared(
    experiment: Experiment,
    workdir: Path,
    published: bucket.Bucket | None,
    state: TrainState,
    start: int,
    stop: preemption.StopRequest,
) -> Experiment:
    """Returns the experiment with cached features, if any; scores the backbone of a new run."""
    variables = network_variables(state)
    message = "stopped while computing features: start again to resume"
    place = workdir if published is None else published.url
    experiment = with_features(experiment, variables, place, lambda: _stop_if_asked(stop, message))
    if start == 0:
        result.score_backbone(experiment, workdir, variables)
    return experiment


def _start(
    experiment: Experiment,
    workdir: Path,
    checkpoints: checkpoint.Checkpoints,
    initial: TrainState | None,
) -> tuple[TrainState, int]:
    """Returns the state to train from, and the number of steps done."""
    latest = checkpoints.latest
    step = -1.0 if latest is None else float(latest)
    # Without a common disk, each process has a copy of its own.
    if processes.any_process(processes.from_first_process({"step": step})["step"] != step):
        raise UserError(
            "the processes have different checkpoints: a copy of the latest one is damaged on some "
            "of the hosts; see their warnings, and start again"
        )
    if latest is not None:
        return checkpoints.restore(latest, experiment.abstract_state), latest
    fork = forked_from(workdir, None)
    state = initial_state(experiment, fork) if initial is None else initial
    if fork is not None:
        checkpoints.save(0, state, None)  # From now on the other run is not needed.
    return state, 0
