"""The epochs that a run has done: their metrics, read back on resume, and early stopping."""

import math
from pathlib import Path
from typing import Any

from dml_jax._utils.errors import UserError
from dml_jax._utils.files import read_json_lines
from dml_jax.training import checkpoint, run_directory


class History:
    """The metrics of the epochs that ended with an evaluation."""

    def __init__(self, evaluated: list[dict[str, Any]], patience: int) -> None:
        """Starts from the evaluations of a run so far.

        Args:
            evaluated: their lines of metrics, in order.
            patience: evaluations without a better score that end a run; 0 for no early stopping.
        """
        self.evaluated, self._patience = evaluated, patience

    @property
    def out_of_patience(self) -> bool:
        """Whether no score has improved for as many evaluations as the config allows."""
        best: dict[str, float] = {}
        waited = 0
        for line in self.evaluated:
            better = {
                metric: line[metric]
                for metric in checkpoint.BEST.values()
                if line[metric] > best.get(metric, -math.inf)
            }
            best |= better
            waited = 0 if better else waited + 1
        return 0 < self._patience <= waited


def read(workdir: Path, step: int, *, steps_per_epoch: int, epochs: int, patience: int) -> History:
    """Reads the history of a run up to a checkpoint.

    Args:
        workdir: the run's.
        step: the checkpoint's.
        steps_per_epoch: of the run.
        epochs: that the config asks for.
        patience: see `History`.

    Raises:
        ValueError: lines of metrics are lost, or the run has done more epochs than asked for.
    """
    evaluated = [x for x in _lines(workdir, step, steps_per_epoch) if "map@r" in x]
    _check_length(epochs, step / steps_per_epoch, evaluated)
    return History(evaluated, patience)


def _lines(workdir: Path, step: int, steps_per_epoch: int) -> list[dict[str, Any]]:
    file = workdir / run_directory.METRICS
    # Another process may have appended lines since the checkpoint.
    lines = [line for line in read_json_lines(file) if line["step"] <= step]
    there, done = [line["epoch"] for line in lines], list(range(1, step // steps_per_epoch + 1))
    if there == done:
        return lines
    lost = [epoch for epoch in done if epoch not in there]
    what = f"lacks the lines of epochs {lost}" if lost else f"has lines of epochs {there}"
    sound = next((n for n, epoch in enumerate(done) if there[n : n + 1] != [epoch]), len(done))
    raise UserError(
        f"{file} {what}, but the run's checkpoint is of step {step}, in which epochs 1 to "
        f"{len(done)} are done. Put the file back as it was; or delete the checkpoints of steps "
        f"above {sound * steps_per_epoch} in {workdir / run_directory.CHECKPOINTS}, and what came "
        "after is trained again"
    )


def _check_length(epochs: int, done: float, evaluated: list[dict[str, Any]]) -> None:
    if done > epochs:
        raise UserError(
            f"config.epochs is {epochs}, but the run has done {done:.4g} and does not go back; "
            "choose more"
        )
    if done == epochs and not (evaluated and evaluated[-1]["epoch"] == epochs):
        raise UserError(
            f"the run has done all of the {epochs} epochs that config.epochs asks for, but has "
            "not evaluated the last one, which was not the last when it was trained; choose more"
        )
