"""The terminal: a progress bar, and a line per epoch."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dml_jax import retrieval
from dml_jax.training.trackers.base import Tracker


class ProgressTracker(Tracker):
    """Shows a progress bar if the output is a terminal, and prints a line per epoch."""

    def __init__(self, name: str, *, step: int, total_steps: int, batch_size: int) -> None:
        """Shows the progress bar.

        Args:
            name: of the run.
            step: steps done.
            total_steps: steps of the whole run.
            batch_size: images per step.
        """
        self._batch_size = batch_size
        self._console = Console()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(
            name, total=total_steps, completed=step, status="compiling"
        )
        self._progress.start()

    def step(self, step: int, *, loss: float, learning_rate: float) -> None:
        """Moves the progress bar to a step."""
        speed = (self._progress.tasks[0].speed or 0.0) * self._batch_size
        status = f"{speed:.0f} images/s  loss {loss:.3f}  lr {learning_rate:.2g}"
        self._progress.update(self._task, completed=step, status=status)

    def epoch(self, metrics: Mapping[str, Any], timings: Mapping[str, Any]) -> None:
        """Prints loss, speed and, after an evaluation, retrieval scores."""
        shown = [f"epoch {metrics['epoch']}", f"loss {metrics['loss']:.3f}"]
        if "map@r" in metrics:
            shown.append(retrieval.summary(metrics))
        shown.append(f"{timings['images_per_second']:.0f} images/s")
        self._console.print("  ".join(shown), highlight=False)

    def close(self, failed: bool) -> None:
        """Removes the progress bar."""
        self._progress.stop()
