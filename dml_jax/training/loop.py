"""The training loop: step, log, evaluate, checkpoint."""

import collections
import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Array

from dml_jax import data, sharding
from dml_jax.retrieval import embed
from dml_jax.training import bad_numbers, checkpoint, networks, stopping, workdir
from dml_jax.training.experiment import (
    Experiment,
    abstract_state,
    embed_split,
    load_fork,
    score,
)
from dml_jax.training.state import TrainState
from dml_jax.training.step import Observed
from dml_jax.training.writer import Silence, Writer

_STEPS_IN_FLIGHT = 4


def train(
    experiment: Experiment, folder: Path, asked: stopping.Request | None = None
) -> dict[str, Any]:
    """Trains to the end, from the beginning or from the latest checkpoint in the folder.

    Args:
        experiment: what to train.
        folder: the run's, claimed for this experiment.
        asked: set when this process is asked to stop; see `stopping.listening`.

    Returns:
        The contents of `result.json`.

    Raises:
        Stopped: one of the processes was asked to.
        ValueError: the run has done more than the config asks for, or lines of its metrics are
            lost.
        FloatingPointError: more steps in a row than the config lets pass were not finite;
            checkpoints of before are kept.
    """
    asked = stopping.Request() if asked is None else asked
    config, steps_per_epoch = experiment.config, experiment.steps_per_epoch
    total_steps = config.epochs * steps_per_epoch
    with checkpoint.Checkpoints(folder, keep_last=config.checkpoint.keep_last) as checkpoints:
        state, start = _start(experiment, folder, checkpoints)
        # Epochs that ended with an evaluation.
        evaluated = [x for x in _lines(folder, start, steps_per_epoch) if "map@r" in x]
        _check_length(config.epochs, start / steps_per_epoch, evaluated)
        embeddings = None
        agreement = sharding.Agreement(experiment.mesh, _STEPS_IN_FLIGHT)
        with (
            Writer.of_this_process(
                folder,
                step=start,
                total_steps=total_steps,
                batch_size=config.batch_size,
                wandb=config.wandb,
            ) as writer,
            jax.transfer_guard("disallow"),
        ):
            watch = _Watch(experiment, folder, writer, checkpoints)
            end = start if _has_stopped(experiment, evaluated) else total_steps
            epoch_began, first_step = time.perf_counter(), start
            for step, batch in batches(experiment, start, end):
                state, observed = experiment.take_step(state, batch)
                asked.unsaved = True
                watch.put(step, observed)
                stops = agreement.after(step, asked.is_set())
                if step % steps_per_epoch:
                    if stops:
                        watch.drain()
                        checkpoints.save(step, state, None)
                        raise _stopped(step)
                    continue
                watch.drain()
                metrics = _epoch_metrics(experiment, state, step)
                trained = time.perf_counter()
                scores: dict[str, float] = {}
                if metrics["epoch"] % config.evaluation.every_epochs == 0 or step == total_steps:
                    embeddings = embed_split(
                        experiment, networks.variables(state), experiment.chosen_on
                    )
                    scores = score(experiment, embeddings)
                    evaluated.append(metrics | scores)
                timings = {
                    "step": step,
                    "epoch": metrics["epoch"],
                    "images_per_second": (
                        (step - first_step) * config.batch_size / (trained - epoch_began)
                    ),
                    "train_seconds": trained - epoch_began,
                    "evaluation_seconds": time.perf_counter() - trained,
                    "peak_memory_gb": sharding.peak_memory() / 1e9,
                }
                writer.epoch(metrics | scores, timings)
                if scores or stops or metrics["epoch"] % config.checkpoint.every_epochs == 0:
                    checkpoints.save(step, state, scores or None)
                if stops:
                    raise _stopped(step)
                if _has_stopped(experiment, evaluated):
                    break
                epoch_began, first_step = time.perf_counter(), step
    asked.unsaved = jax.process_count() > 1  # The others would wait for one that ended alone.
    if sharding.any_process(asked.is_set()):
        raise stopping.Stopped("stopped when all was trained and saved: start again for the result")
    if embeddings is None or experiment.chosen_on != "test":
        embeddings = embed_split(experiment, networks.variables(state), "test")
    return _finish(experiment, folder, evaluated, embeddings)


def _has_stopped(experiment: Experiment, evaluated: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no score has become better for as many evaluations as the config has patience."""
    best: dict[str, float] = {}
    waited = 0
    for line in evaluated:
        better = {
            metric: line[metric]
            for metric in checkpoint.BEST.values()
            if line[metric] > best.get(metric, -math.inf)
        }
        best |= better
        waited = 0 if better else waited + 1
    return 0 < experiment.config.evaluation.patience <= waited


def _lines(folder: Path, start: int, steps_per_epoch: int) -> list[dict[str, Any]]:
    """The metrics of all epochs that are done; ValueError if some are lost."""
    file = folder / workdir.METRICS
    # It may already be longer, by what another process has written since.
    lines = [line for line in workdir.read_lines(file) if line["step"] <= start]
    there, done = [line["epoch"] for line in lines], list(range(1, start // steps_per_epoch + 1))
    if there == done:
        return lines
    lost = [epoch for epoch in done if epoch not in there]
    what = f"lacks the lines of epochs {lost}" if lost else f"has lines of epochs {there}"
    sound = next((n for n, epoch in enumerate(done) if there[n : n + 1] != [epoch]), len(done))
    raise ValueError(
        f"{file} {what}, but the run's checkpoint is of step {start}, in which epochs 1 to "
        f"{len(done)} are done. Put the file back as it was; or delete the checkpoints of steps "
        f"above {sound * steps_per_epoch} in {folder / workdir.CHECKPOINTS}, and what came after "
        "is trained again"
    )


def _check_length(epochs: int, done: float, evaluated: Sequence[Mapping[str, Any]]) -> None:
    if done > epochs:
        raise ValueError(
            f"config.epochs is {epochs}, but the run has done {done:.4g} and does not go back; "
            "choose more"
        )
    if done == epochs and not (evaluated and evaluated[-1]["epoch"] == epochs):
        raise ValueError(
            f"the run has done all of the {epochs} epochs that config.epochs asks for, but has "
            "not evaluated the last one, which was not the last when it was trained; choose more"
        )


def _stopped(step: int) -> stopping.Stopped:
    return stopping.Stopped(f"stopped after step {step}, which is saved: start again to go on")


def _start(
    experiment: Experiment, folder: Path, checkpoints: checkpoint.Checkpoints
) -> tuple[TrainState, int]:
    latest = checkpoints.latest
    if latest is not None:
        return checkpoints.restore(latest, abstract_state(experiment)), latest
    state = experiment.init()
    fork = workdir.forked_from(folder, None)
    if fork is not None:
        forked = load_fork(experiment, fork)
        state = state._replace(
            params={**state.params, "embedder": forked["params"]},
            batch_stats=forked["batch_stats"],
        )
        checkpoints.save(0, state, None)  # From here on the other run is not needed.
    return state, 0


def batches(
    experiment: Experiment, start: int, total_steps: int
) -> Iterator[tuple[int, dict[str, Array]]]:
    """Batches on their devices, with the number of steps done after each; one is sent ahead.

    They hold labels, and either images or what the step makes images of.

    Args:
        experiment: whose images.
        start: steps that are done.
        total_steps: steps of the whole run.

    Yields:
        Steps done after the batch, and the batch.
    """
    reader, on_devices = _reader(experiment, start, total_steps)
    try:
        sent = None
        for step, batch in enumerate(reader, start):
            ahead = sharding.put_batch(experiment.mesh, batch | on_devices)
            if sent is not None:
                yield step, sent
            sent = ahead
        if sent is not None:
            yield total_steps, sent
    finally:
        reader.close()


def _reader(
    experiment: Experiment, start: int, total_steps: int
) -> tuple[data.Batches | Generator[dict[str, Any]], dict[str, Array]]:
    """This process's rows of each batch, and what is on the devices and in every batch."""
    config, source, cache = (
        experiment.config,
        experiment.sources["train"],
        experiment.cache("train"),
    )
    which = {
        "batch_size": config.batch_size,
        "n_instance": config.data.n_instance,
        "seed": config.seed,
        "start_step": start,
        "num_steps": total_steps,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
    if cache is not None:
        indices = data.train_indices(source, **which)
        rows = (batch | {"sides": cache.sides[batch["index"]]} for batch in indices)
        return rows, {"cache": cache.images}
    reader = data.train_batches(
        source,
        image_size=config.data.image_size,
        augmentation=data.Augmentation(**config.data.augmentation),
        num_workers=config.data.num_workers,
        **which,
    )
    return reader, {}


class _Watch:
    """Looks at each step a few steps late, so that accelerators never wait for the host.

    CPUs do wait. There, each step in flight holds its own temporary memory from the time when it
    is dispatched, and steps are long beside what the host does between them.
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        writer: Writer | Silence,
        checkpoints: checkpoint.Checkpoints,
    ) -> None:
        self._experiment, self._folder = experiment, folder
        self._writer, self._checkpoints = writer, checkpoints
        self._steps_late = 0 if sharding.on_cpu(experiment.mesh) else _STEPS_IN_FLIGHT
        self._observed: collections.deque[tuple[int, Observed]] = collections.deque()

    def put(self, step: int, observed: Observed) -> None:
        self._observed.append((step, observed))
        if len(self._observed) > self._steps_late:
            self._look()

    def drain(self) -> None:
        while self._observed:
            self._look()

    def _look(self) -> None:
        step, observed = self._observed.popleft()
        observed = jax.device_get(observed)
        if observed.skipped.in_a_row:
            self._skipped(step, observed)
        else:
            rate, _ = self._experiment.learning_rate(step - 1)
            self._writer.step(step, loss=float(observed.loss), learning_rate=rate)

    def _skipped(self, step: int, observed: Observed) -> None:
        bad = bad_numbers.describe(self._experiment, step, observed)
        file = self._folder / workdir.NOT_FINITE
        more = f"{file} tells more"
        if sharding.is_first_process():
            try:
                workdir.write_json(file, bad)
            except OSError as error:  # What happened is worth more than its file.
                more = f"{file} could not be written: {error}"
        message = (
            f"step {step} leads to numbers that are not finite: its loss is {bad['loss']}, the "
            f"norm of its gradient {bad['gradient_norm']} (learning rate "
            f"{bad['learning_rate']:g}); {more}"
        )
        if bad["in_a_row"] <= self._experiment.config.skip_nonfinite:
            logging.warning("%s; it is skipped", message)
            return
        latest = self._checkpoints.latest
        raise FloatingPointError(
            f"{message}; the last good checkpoint is "
            + ("none yet" if latest is None else f"that of step {latest}")
        )


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


def _finish(
    experiment: Experiment,
    folder: Path,
    evaluated: Sequence[Mapping[str, Any]],
    embeddings: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Exports the test images' last embeddings, and the scores of the last and best epochs."""
    last = evaluated[-1]
    best = {
        metric: max(evaluated, key=lambda line: (line[metric], line["step"]))
        for metric in checkpoint.BEST.values()
    }
    if experiment.chosen_on != "test":
        last = _place(last) | score(experiment, embeddings)
        with checkpoint.Checkpoints(folder) as saved:
            # Where the best one was damaged, the best of the others.
            steps = {name: saved.find(name) for name in checkpoint.BEST}
        for name, metric in checkpoint.BEST.items():
            (line,) = (line for line in evaluated if line["step"] == steps[name])
            chosen = embed_split(
                experiment, networks.load(experiment.network, folder, name), "test"
            )
            best[metric] = _place(line) | score(experiment, chosen)
    result = {
        "last": last,
        "best": best["map@r"],
        "best_of": best,
        "best_chosen_on": experiment.chosen_on,
        "skipped_steps": evaluated[-1]["skipped_steps"],
        "images": {split: len(source) for split, source in experiment.sources.items()},
        "classes": {split: len(source.class_names) for split, source in experiment.sources.items()},
        **experiment.findings.counts(),
    }
    if sharding.is_first_process():
        for split, file in (("test", workdir.EMBEDDINGS), ("gallery", workdir.GALLERY)):
            if split in embeddings:
                source = experiment.sources[split]
                rows = embeddings[split]
                with workdir.naming(folder / file):
                    embed.save_embeddings(
                        folder / file, rows, source.labels, source.names, source.class_names
                    )
        workdir.write_json(folder / workdir.RESULT, result)
    sharding.wait_for_all("result written")
    return result


def _place(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: line[name] for name in ("step", "epoch")}
