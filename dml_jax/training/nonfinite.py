"""Watches the steps for numbers that are not finite, and reports them."""

import collections
import math
from pathlib import Path
from typing import Any

import jax
from absl import logging

from dml_jax import data
from dml_jax._utils import processes
from dml_jax._utils.files import write_json
from dml_jax.training import run_directory
from dml_jax.training.builder import Experiment
from dml_jax.training.checkpoint import Checkpoints
from dml_jax.training.step import StepMetrics
from dml_jax.training.trackers import Tracker


def describe(experiment: Experiment, step: int, observed: StepMetrics) -> dict[str, Any]:
    """What led to a step that could not be taken, to be written as JSON.

    Args:
        experiment: the run's.
        step: how many steps were done after it.
        observed: of that step, on the host.

    Returns:
        Numbers by name, those that are not finite as strings. The arrays of the parameters are
        ordered by their gradients, the worst first.
    """
    config, train = experiment.config, experiment.sources["train"]
    order = data.Order(train.labels, config.batch_size, config.data.n_instance, config.seed)
    rate, proxy_rate = experiment.learning_rate(step - 1)
    arrays = [
        (
            jax.tree_util.keystr(path, simple=True, separator="/"),
            {"gradient": float(gradient), "parameter": float(parameter)},
        )
        for (path, _), gradient, parameter in zip(
            jax.tree.leaves_with_path(experiment.state_shape.params),
            observed.gradient_norms,
            observed.parameter_norms,
            strict=True,
        )
    ]
    arrays.sort(key=lambda one: _badness(one[1]["gradient"]), reverse=True)
    return {
        "step": step,
        "epoch": (step - 1) // experiment.steps_per_epoch + 1,
        "in_a_row": int(observed.skipped.in_a_row),
        "learning_rate": rate,
        "proxy_learning_rate": proxy_rate,
        "loss": _json(float(observed.loss)),
        "gradient_norm": _json(float(observed.gradient_norm)),
        "images": [train.where(index) for index in order(step - 1).tolist()],
        "norms": {path: {of: _json(norm) for of, norm in norms.items()} for path, norms in arrays},
    }


def _badness(norm: float) -> float:
    return math.inf if math.isnan(norm) else norm


def _json(number: float) -> float | str:
    """JSON knows no number that is not finite."""
    return number if math.isfinite(number) else str(number)


class Watch:
    """Looks at the metrics of each step, some steps late, and reports those that were skipped."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: Path,
        writer: Tracker,
        checkpoints: Checkpoints,
        steps_late: int,
    ) -> None:
        """Starts without any step.

        Args:
            experiment: the run's.
            workdir: the run's.
            writer: is told of each step that was taken.
            checkpoints: the run's, named in the error.
            steps_late: how many later steps are put before a step is looked at.
        """
        self._experiment, self._folder = experiment, workdir
        self._writer, self._checkpoints = writer, checkpoints
        self._steps_late = steps_late
        self._waiting: collections.deque[tuple[int, StepMetrics]] = collections.deque()

    def put(self, step: int, metrics: StepMetrics) -> None:
        """Takes the metrics of a step, and looks at those of an earlier one.

        Args:
            step: steps done after it.
            metrics: on the devices.

        Raises:
            FloatingPointError: more steps in a row than the config allows were not finite.
        """
        self._waiting.append((step, metrics))
        if len(self._waiting) > self._steps_late:
            self._look()

    def drain(self) -> None:
        """Looks at all steps that are waiting; raises as `put` does."""
        while self._waiting:
            self._look()

    def _look(self) -> None:
        step, metrics = self._waiting.popleft()
        metrics = jax.device_get(metrics)
        if metrics.skipped.in_a_row:
            self._skipped(step, metrics)
        else:
            rate, _ = self._experiment.learning_rate(step - 1)
            self._writer.step(step, loss=float(metrics.loss), learning_rate=rate)

    def _skipped(self, step: int, metrics: StepMetrics) -> None:
        described = describe(self._experiment, step, metrics)
        file = self._folder / run_directory.NOT_FINITE
        more = f"{file} tells more"
        if processes.is_first_process():
            try:
                write_json(file, described)
            except OSError as error:  # The steps must be reported even if the file cannot be.
                more = f"{file} could not be written: {error}"
        message = (
            f"step {step} leads to numbers that are not finite: its loss is {described['loss']}, "
            f"the norm of its gradient {described['gradient_norm']} (learning rate "
            f"{described['learning_rate']:g}); {more}"
        )
        if described["in_a_row"] <= self._experiment.config.skip_nonfinite:
            logging.warning("%s; it is skipped", message)
            return
        latest = self._checkpoints.latest
        raise FloatingPointError(
            f"{message}; the last good checkpoint is "
            + ("none yet" if latest is None else f"that of step {latest}")
        )
