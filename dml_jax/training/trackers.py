"""What a run tells: a line of metrics an epoch, in files, in TensorBoard and on the terminal.

Weights & Biases hears it too, if it is asked for.
"""

import contextlib
import json
import os
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tensorboardX
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dml_jax import retrieval
from dml_jax._utils import files, processes
from dml_jax.training import run_directory
from dml_jax.training.config import Config


class Writer:
    """Writes the metrics of each epoch, once, however often the run is interrupted.

    What took how long goes to a file of its own: metrics of equal runs are equal to the byte.
    """

    def __init__(
        self, workdir: Path, *, step: int, total_steps: int, batch_size: int, wandb: str = ""
    ) -> None:
        """Opens the files of a run, and drops from them what lies behind `step`.

        Args:
            workdir: the run's.
            step: at which the run begins, or goes on.
            total_steps: at which it ends.
            batch_size: images a step.
            wandb: project of Weights & Biases; "" for none.

        Raises:
            ValueError: Weights & Biases refuses the run.
        """
        self._workdir, self._batch_size = workdir, batch_size
        with contextlib.ExitStack() as opened:
            self._wandb = _open_wandb(workdir, wandb) if wandb else None
            opened.push(self._finish_wandb)
            self._files = []
            for path in (workdir / run_directory.METRICS, workdir / run_directory.TIMINGS):
                self._files.append(_open_up_to(path, step))
                opened.callback(_close, self._files[-1], path)
            # It writes in a thread. Had a full disk ended that, a short queue would wait for ever.
            with files.naming_the_file(workdir):
                self._events = tensorboardX.SummaryWriter(
                    str(workdir), purge_step=step + 1, max_queue=10_000
                )
            opened.callback(_close, self._events, workdir)
            self._opened = opened.pop_all()
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
            workdir.name,
            total=total_steps,
            completed=step,
            status="compiling",
        )

    def __enter__(self) -> "Writer":
        """Shows the progress bar."""
        self._progress.start()
        self._opened.callback(self._progress.stop)
        return self

    def __exit__(self, *error: Any) -> None:
        """Closes everything, also when something of it fails."""
        self._opened.__exit__(*error)

    def _finish_wandb(self, error: type[BaseException] | None, *_: object) -> None:
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(error is not None))

    def step(self, step: int, *, loss: float, learning_rate: float) -> None:
        """Moves the progress bar to a step."""
        speed = (self._progress.tasks[0].speed or 0.0) * self._batch_size
        status = f"{speed:.0f} images/s  loss {loss:.3f}  lr {learning_rate:.2g}"
        self._progress.update(self._task, completed=step, status=status)

    def epoch(self, metrics: dict[str, Any], timings: dict[str, Any]) -> None:
        """Writes an epoch's metrics.

        Args:
            metrics: with `step` and `epoch` among them.
            timings: with `step` and `epoch` among them.
        """
        for file, line in zip(self._files, (metrics, timings), strict=True):
            with files.naming_the_file(Path(file.name)):
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())  # Before the checkpoint, which it belongs to.
        with files.naming_the_file(self._workdir):  # TensorBoard's files there.
            for name, value in (metrics | timings).items():
                if name not in ("step", "epoch"):
                    self._events.add_scalar(name, value, metrics["step"])
            self._events.flush()
        if self._wandb is not None:
            self._wandb.log(metrics | timings, step=metrics["step"])
        shown = [f"epoch {metrics['epoch']}", f"loss {metrics['loss']:.3f}"]
        if "map@r" in metrics:
            shown.append(retrieval.summary(metrics))
        shown.append(f"{timings['images_per_second']:.0f} images/s")
        self._console.print("  ".join(shown), highlight=False)


class NoOpWriter:
    """What is written by a process that is not the first."""

    def __enter__(self) -> "NoOpWriter":
        """Opens nothing."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes nothing."""

    def step(self, step: int, *, loss: float, learning_rate: float) -> None:
        """Shows nothing."""

    def epoch(self, metrics: dict[str, Any], timings: dict[str, Any]) -> None:
        """Writes nothing."""


def create(folder: Path, config: Config, steps_per_epoch: int, step: int) -> Writer | NoOpWriter:
    """Returns the writer of a run: one that writes in the first process, a no-op in the others.

    Args:
        folder: the run's.
        config: the run's.
        steps_per_epoch: the run's.
        step: steps that are done.
    """
    if not processes.is_first_process():
        return NoOpWriter()
    return Writer(
        folder,
        step=step,
        total_steps=config.epochs * steps_per_epoch,
        batch_size=config.batch_size,
        wandb=config.wandb,
    )


def check(wandb: str) -> None:
    """Makes sure that Weights & Biases is there, if it is asked for.

    Args:
        wandb: its project; "" for none.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    spec = find_spec("wandb") if wandb else None
    # A folder of that name, such as Weights & Biases leaves behind, is found as well.
    if wandb and (spec is None or spec.origin is None):
        raise ModuleNotFoundError(
            'config.wandb needs the package wandb: pip install "dml_jax[wandb]", or leave it empty'
        )


def _open_wandb(workdir: Path, project: str) -> Any:
    """Opens the run's record at Weights & Biases, which is the same however often it goes on."""
    import wandb

    path = workdir / run_directory.WANDB
    if not path.exists():
        files.write_json(path, {"id": uuid.uuid4().hex[:8]})
    try:
        return wandb.init(
            project=project,
            id=json.loads(path.read_text(encoding="utf-8"))["id"],
            resume="allow",
            name=workdir.name,
            dir=workdir,
            config=run_directory.read_config(workdir).to_dict(),
            settings=wandb.Settings(console="off", silent=True),
        )
    except wandb.Error as error:
        raise ValueError(
            f"Weights & Biases: {error}\n`wandb login` tells it who you are, WANDB_MODE=offline "
            "keeps everything here until `wandb sync`, and --config.wandb= does without it"
        ) from error


def _close(file: Any, path: Path) -> None:
    with files.naming_the_file(path):
        file.close()


def _open_up_to(path: Path, step: int) -> Any:
    """Opens a file of JSON lines to append to, without the lines behind a step."""
    kept = [line for line in files.read_json_lines(path) if line["step"] <= step]
    files.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return path.open("a", encoding="utf-8")
