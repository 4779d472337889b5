"""The nonfinite watch: detects and reports skipped steps."""

import collections
import math
from pathlib import Path
from typing import Any

import jax
from absl import logging

from dml_jax import data
from dml_jax._utils import processes, sharding
from dml_jax._utils.files import write_json
from dml_jax.training import run_directory
from dml_jax.training.builder import Experiment
from dml_jax.training.checkpoint import Checkpoints
from dml_jax.training.state import split
from dml_jax.training.step import StepMetrics
from dml_jax.training.trackers import Tracker

STEPS_LATE = 4
"""Number of later steps after which the metrics of a step are read, on accelerators."""


def describe(experiment: Experiment, step: int, metrics: StepMetrics) -> dict[str, Any]:
    """Returns a description of a nonfinite step, to be written as JSON.

    Args:
        experiment: experiment of the run.
        step: number of steps done after the nonfinite one.
        metrics: step metrics of the nonfinite step, on the host.

    Returns:
        Values by name, nonfinite numbers as strings. Parameter arrays are ordered by decreasing
        norm of their gradients.
    """
    config, train = experiment.config, experiment.sources["train"]
    order = data.Order(train.labels, config.batch_size, config.data.n_instance, config.seed)
    rate, proxy_rate = experiment.learning_rate(step - 1)
    trained, _ = split(experiment.abstract_state.params, experiment.step_config.fixed)
    arrays = [
        (
            jax.tree_util.keystr(path, simple=True, separator="/"),
            {"gradient": float(gradient), "parameter": float(parameter)},
        )
        for (path, _), gradient, parameter in zip(
            jax.tree.leaves_with_path(trained),
            metrics.gradient_norms,
            metrics.parameter_norms,
            strict=True,
        )
    ]
    arrays.sort(key=lambda item: _gradient_order(item[1]["gradient"]), reverse=True)
    return {
        "step": step,
        "epoch": (step - 1) // experiment.steps_per_epoch + 1,
        "in_a_row": int(metrics.skipped.in_a_row),
        "learning_rate": rate,
        "proxy_learning_rate": proxy_rate,
        "loss": _json(float(metrics.loss)),
        "gradient_norm": _json(float(metrics.gradient_norm)),
        "images": [train.where(index) for index in order(step - 1).tolist()],
        "norms": {path: {of: _json(norm) for of, norm in norms.items()} for path, norms in arrays},
    }


def _gradient_order(norm: float) -> float:
    return math.inf if math.isnan(norm) else norm


def _json(number: float) -> float | str:
    """Returns a value for JSON, which has no nonfinite numbers."""
    return number if math.isfinite(number) else str(number)


class Watch:
    """Reads the metrics of each step with a delay, logs them, and reports nonfinite steps."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: Path,
        writer: Tracker,
        checkpoints: Checkpoints,
    ) -> None:
        """Creates a watch with no pending steps.

        Args:
            experiment: experiment of the run.
            workdir: directory of the run.
            writer: tracker that logs the steps that are not skipped.
            checkpoints: checkpoints of the run; the error names the latest.
        """
        self._experiment, self._workdir = experiment, workdir
        self._writer, self._checkpoints = writer, checkpoints
        # The delay keeps accelerators busy. CPUs need none, because steps take long compared with
        # the work between them, and each dispatched step holds its own temporary memory.
        self._steps_late = 0 if sharding.on_cpu(experiment.mesh) else STEPS_LATE
        self._pending: collections.deque[tuple[int, StepMetrics]] = collections.deque()

    def put(self, step: int, metrics: StepMetrics) -> None:
        """Adds the metrics of a step, and checks those of an earlier one.

        Args:
            step: number of steps done after it.
            metrics: step metrics, on the devices.

        Raises:
            FloatingPointError: more consecutive steps than the config allows were nonfinite.
        """
        self._pending.append((step, metrics))
        if len(self._pending) > self._steps_late:
            self._check_next()

    def drain(self) -> None:
        """Checks all pending steps; raises as `put` does."""
        while self._pending:
            self._check_next()

    def _check_next(self) -> None:
        step, metrics = self._pending.popleft()
        metrics = jax.device_get(metrics)
        if metrics.skipped.in_a_row:
            self._skipped(step, metrics)
        else:
            rate, _ = self._experiment.learning_rate(step - 1)
            self._writer.step(step, loss=float(metrics.loss), learning_rate=rate)

    def _skipped(self, step: int, metrics: StepMetrics) -> None:
        description = describe(self._experiment, step, metrics)
        file = self._workdir / run_directory.NOT_FINITE
        details = f"see {file}"
        if processes.is_first_process():
            try:
                write_json(file, description)
            except OSError as error:  # The step must be reported even if the file is not written.
                details = f"{file} could not be written: {error}"
        message = (
            f"step {step} leads to nonfinite values: its loss is {description['loss']}, "
            f"the norm of its gradient {description['gradient_norm']} (learning rate "
            f"{description['learning_rate']:g}); {details}"
        )
        if description["in_a_row"] <= self._experiment.config.skip_nonfinite:
            logging.warning("%s; it is skipped", message)
            return
        latest = self._checkpoints.latest
        raise FloatingPointError(
            f"{message}; "
            + (
                "there is no checkpoint yet"
                if latest is None
                else f"the last good checkpoint is that of step {latest}"
            )
        )
