"""The evaluation history of a run, which is read back on resume, and early stopping."""

import math
from pathlib import Path
from typing import Any

from dml_jax._utils.errors import UserError
from dml_jax._utils.files import read_json_lines
from dml_jax.training import checkpoint, run_directory


class History:
    """The metrics of the evaluated epochs of a run."""

    def __init__(self, evaluated: list[dict[str, Any]], patience: int) -> None:
        """Starts from the evaluations of a run so far.

        Args:
            evaluated: metrics of the evaluated epochs, in order.
            patience: evaluations without improvement that end the run; 0 for no early stopping.
        """
        self.evaluated, self._patience = evaluated, patience

    @property
    def out_of_patience(self) -> bool:
        """Whether no score has improved for `patience` evaluations."""
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
        workdir: directory of the run.
        step: step of the checkpoint.
        steps_per_epoch: steps in an epoch.
        epochs: epochs of the config.
        patience: see `History`.

    Raises:
        ValueError: lines of metrics are missing, or the run has done more epochs than `epochs`.
    """
    evaluated = [x for x in _lines(workdir, step, steps_per_epoch) if "map@r" in x]
    _check_length(epochs, step / steps_per_epoch, evaluated)
    return History(evaluated, patience)


def _lines(workdir: Path, step: int, steps_per_epoch: int) -> list[dict[str, Any]]:
    file = workdir / run_directory.METRICS
    # Another process may have appended lines since the checkpoint.
    lines = [line for line in read_json_lines(file) if line["step"] <= step]
    found, done = [line["epoch"] for line in lines], list(range(1, step // steps_per_epoch + 1))
    if found == done:
        return lines
    missing = [epoch for epoch in done if epoch not in found]
    problem = f"lacks the lines of epochs {missing}" if missing else f"has lines of epochs {found}"
    intact = next((n for n, epoch in enumerate(done) if found[n : n + 1] != [epoch]), len(done))
    raise UserError(
        f"{file} {problem}, but the checkpoint of the run is of step {step}, after epochs 1 to "
        f"{len(done)}. Restore the file, or delete the checkpoints of steps above "
        f"{intact * steps_per_epoch} in {workdir / run_directory.CHECKPOINTS} to repeat the "
        "training after them"
    )


def _check_length(epochs: int, done: float, evaluated: list[dict[str, Any]]) -> None:
    if done > epochs:
        raise UserError(
            f"config.epochs is {epochs}, but the run has already done {done:.4g}; choose more"
        )
    if done == epochs and not (evaluated and evaluated[-1]["epoch"] == epochs):
        raise UserError(
            f"the run has already done config.epochs = {epochs} epochs without an evaluation of "
            "the last one; choose more epochs"
        )
