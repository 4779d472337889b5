"""Checkpoints: the whole train state, written behind the training's back, each whole or not at all.

The input has no state of its own: batch t is a function of the seed and of t, so the step in the
state is the input's position too.
"""

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Iterator
from logging import LogRecord, getLogger
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp
from absl import logging
from jaxtyping import PyTree

from dml_jax._utils import processes
from dml_jax._utils.errors import UserError
from dml_jax.evaluation.network import Network
from dml_jax.settings import integer, setting
from dml_jax.training import integrity, run_directory


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """How often a run is saved, and how many checkpoints are kept."""

    every_epochs: int = setting(1, integer(1), help="Epochs from one checkpoint to the next.")
    keep_last: int = setting(
        2, integer(1), help="How many of the latest are kept, besides the best of each metric."
    )


BEST = {"best_map": "map@r", "best_r1": "recall@1", "best_rp": "r_precision"}
"""Names of the best checkpoints, and the metric by which each is the best."""

_DAMAGED = (
    "{} is damaged: {}. A run that goes on sets such checkpoints aside by itself; from a finished "
    "one, move it elsewhere, and the next best is taken"
)
_LOOKS, _PAUSE = 10, 0.2  # How often a reader looks, and the seconds between two looks.

# Orbax and its asyncio tasks log a failure several times over, with tracebacks. It is told once, by
# what is raised here; --verbosity=1 shows all.
_KNOWN = ("orbax", "asyncio")


def _untold(record: LogRecord) -> bool:
    return logging.level_debug() or not any(name in record.pathname for name in _KNOWN)


for _logger in (logging.get_absl_logger(), getLogger("asyncio")):
    _logger.addFilter(_untold)


class Checkpoints:
    """The checkpoints of a run: the latest few, and the best of each metric."""

    def __init__(self, workdir: Path, *, keep_last: int | None = None) -> None:
        """Opens the checkpoints of a folder.

        Whoever opens them for writing sets those aside that are damaged, so that none of the others
        is deleted to make room for them.

        Args:
            workdir: the run's.
            keep_last: how many of the latest to keep; the best ones are kept besides. None opens
                them for reading only.

        Raises:
            ValueError: there are some, but none that is sound; they are left as they are.
        """
        self._directory = (workdir / run_directory.CHECKPOINTS).absolute()
        self._writes, self._saving = keep_last is not None, 0
        self._save: ocp.AsyncResponse[bool] | None = None
        if self._writes:
            processes.in_first_process(lambda: _set_damaged_aside(workdir, self._directory))
        policies = ocp.training.preservation_policies
        best = [
            policies.BestN(
                get_metric_fn=lambda metrics, name=name: metrics[name],
                n=1,
                keep_checkpoints_without_metrics=False,
            )
            for name in BEST.values()
        ]
        context = ocp.Context()
        # A function: orbax copies its options deeply, and would copy a method's object with it.
        context.asynchronous.post_finalization_callback = lambda: self._seal()
        # MemVir pads its classes to a multiple of the devices, which may be others than they were.
        context.array.loading.enable_padding_and_truncation = True
        context.pytree.loading.partial_load = not self._writes
        try:
            self._checkpointer = ocp.training.Checkpointer(
                self._directory,
                context=context,
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(keep_last), *best]
                ),
                # Whoever only reads must not clean up behind the run that is writing.
                cleanup_tmp_directories=self._writes,
            )
        except (ValueError, OSError) as error:  # It reads all scores.
            if self._writes and isinstance(error, OSError):
                raise
            for step, damage in _damaged(self._directory).items():
                raise UserError(_DAMAGED.format(self._directory / str(step), damage)) from error
            raise UserError(
                f"the checkpoints in {self._directory} cannot be read: {error}"
            ) from error

    def __enter__(self) -> "Checkpoints":
        """Opens nothing more."""
        return self

    def __exit__(self, *_: object) -> None:
        """Waits until what was saved is on disk.

        Raises:
            OSError: it could not be written.
        """
        try:
            self._finish()
        finally:
            self._checkpointer.close()

    def save(self, step: int, state: Any, metrics: dict[str, float] | None) -> None:
        """Saves a state; returns once it is copied from the devices, to be written meanwhile.

        Args:
            step: the state's.
            state: what to save.
            metrics: of the evaluation at this step; None if there was none.

        Raises:
            OSError: this state, or the one before, could not be written; earlier ones are kept.
        """
        self._finish()
        self._saving = step
        # The copy to the host counts as an implicit one.
        with self._telling(), jax.transfer_guard("allow"):
            self._save = self._checkpointer.save_async(step, state, force=True, metrics=metrics)

    def _finish(self) -> None:
        """Waits for the save that is under way."""
        save, self._save = self._save, None
        if save is not None:
            with self._telling():
                try:
                    # A failure is told once to each thread that waits, so here and not on closing.
                    self._checkpointer.wait()
                finally:
                    # Not asked for its result, a save would leave a thread and three open files.
                    save.result()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Tells what orbax could not do; it passes on whatever its storage raises."""
        try:
            yield
        except Exception as error:
            raise OSError(
                f"the checkpoint of step {self._saving} could not be written; those of before are "
                f"kept. Mend this and start again: {str(error).splitlines()[0]:.300}"
            ) from error

    def _seal(self) -> None:
        """Completes the checkpoint that orbax has written, before it gets its name."""
        if processes.is_first_process():
            (written,) = self._directory.glob(f"{self._saving}.*")
            integrity.seal(written)

    @property
    def latest(self) -> int | None:
        """The step of the latest checkpoint; None if there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def find(self, name: str) -> int:
        """The step of a checkpoint by name.

        Args:
            name: `last`, or a key of `BEST`. Of equally good ones, the best is the latest.

        Raises:
            FileNotFoundError: there is none.
        """
        candidates = [
            (checkpoint.metrics[BEST[name]] if name in BEST else 0.0, checkpoint.step)
            for checkpoint in self._checkpointer.checkpoints
            if checkpoint.metrics or name not in BEST
        ]
        if not candidates:
            raise FileNotFoundError(f"{self._directory} holds no {name} checkpoint")
        return max(candidates)[1]

    def restore(self, step: int, like: Any) -> Any:
        """Restores a state.

        Args:
            step: of the checkpoint.
            like: a state of the same structure, of `jax.ShapeDtypeStruct`s with shardings. Where
                checkpoints are open for reading only, it may be a dictionary of some of its fields.

        Returns:
            The state, sharded as `like` is, which may be over other devices than it was saved from.

        Raises:
            ValueError: the checkpoint is damaged.
        """
        folder = self._directory / str(step)
        if not self._writes and (damage := integrity.damage(folder)):
            raise UserError(_DAMAGED.format(folder, damage))
        return self._checkpointer.load(step, like)


def read(workdir: Path, name: str, like: dict[str, Any]) -> tuple[int, Any]:
    """Reads a run's checkpoint, also while the run goes on and deletes what it no longer keeps.

    Args:
        workdir: the run's.
        name: `last`, or a key of `BEST`.
        like: see `Checkpoints.restore`.

    Returns:
        Its step, and the state.

    Raises:
        FileNotFoundError: there is none of that name.
        ValueError: it is damaged.
    """
    for _ in range(_LOOKS):
        before = _steps(workdir / run_directory.CHECKPOINTS)
        try:
            return _read(workdir, name, like)
        except (ValueError, OSError):
            # A checkpoint that is being deleted looks damaged.
            time.sleep(_PAUSE)
            if _steps(workdir / run_directory.CHECKPOINTS) == before:
                raise
    return _read(workdir, name, like)


def _read(workdir: Path, name: str, like: dict[str, Any]) -> tuple[int, Any]:
    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.find(name)
        return step, checkpoints.restore(step, like)


def _steps(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal())


def _damaged(directory: Path) -> dict[int, str]:
    found = {step: integrity.damage(directory / str(step)) for step in _steps(directory)}
    return {step: damage for step, damage in found.items() if damage}


def _set_damaged_aside(workdir: Path, directory: Path) -> None:
    damaged = _damaged(directory)
    sound = [step for step in _steps(directory) if step not in damaged]
    if damaged and not sound:
        raise UserError(
            f"no checkpoint in {directory} is sound; to train from the beginning, delete it:\n"
            + "\n".join(f"  step {step}: {damage}" for step, damage in damaged.items())
        )
    for step, damage in damaged.items():
        aside = workdir / run_directory.DAMAGED / str(step)
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(exist_ok=True)
        (directory / str(step)).rename(aside)
        logging.warning("the checkpoint of step %d is damaged: %s; see %s", step, damage, aside)
    if damaged:
        logging.warning("the newest sound checkpoint is that of step %d", sound[-1])


def read_network(network: Network, folder: Path, name: str) -> tuple[int, dict[str, PyTree]]:
    """Reads the network's variables in a run's checkpoint, without the rest of it.

    Args:
        network: the run's.
        folder: the run's.
        name: of the checkpoint: `last`, or a key of `BEST`.

    Returns:
        The step of the checkpoint, and the variables.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is damaged.
    """
    shapes = network.variables_shape
    wanted = {"params": {"embedder": shapes["params"]}, "batch_stats": shapes["batch_stats"]}
    step, found = read(folder, name, wanted)
    return step, {"params": found["params"]["embedder"], "batch_stats": found["batch_stats"]}
