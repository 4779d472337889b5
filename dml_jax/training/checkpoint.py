"""Checkpoints of the train state, written asynchronously and atomically.

The input has no state of its own: batch t is a function of the seed and t, so the step in the train
state is the position of the input too.
"""

import contextlib
import re
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
from dml_jax.training import integrity, run_directory
from dml_jax.training.bucket import Bucket

BEST = {"best_map": "map@r", "best_r1": "recall@1", "best_rp": "r_precision"}
"""Names of the best checkpoints, and the metric that selects each."""
LAST, _STEP = "last", "step"

_DAMAGED = (
    "{} is damaged: {}. A resumed run moves damaged checkpoints aside by itself; in a finished "
    "run, move it elsewhere, and the next best is used"
)
_ATTEMPTS, _PAUSE = 10, 0.2  # Attempts to read a checkpoint, and seconds between them.

# Orbax and its asyncio tasks log a failure several times, with tracebacks. The errors raised here
# report it once; --verbosity=1 shows all.
_DUPLICATES = ("orbax", "asyncio")


def _is_new(record: LogRecord) -> bool:
    return logging.level_debug() or not any(name in record.pathname for name in _DUPLICATES)


for _logger in (logging.get_absl_logger(), getLogger("asyncio")):
    _logger.addFilter(_is_new)


class Checkpoints:
    """The checkpoints of a run: the latest few, and the best of each metric."""

    def __init__(
        self,
        workdir: Path,
        *,
        keep_last: int | None = None,
        keep_every: int = 0,
        bucket: Bucket | None = None,
    ) -> None:
        """Opens the checkpoints of a run.

        Opening them for writing moves damaged ones aside, so that no intact checkpoint is deleted
        in favour of a damaged one, and finishes interrupted deletions.

        Args:
            workdir: directory of the run.
            keep_last: number of latest checkpoints to keep, besides the best ones. None opens them
                for reading only.
            keep_every: steps between checkpoints that are kept too; 0 keeps no others.
            bucket: where they are published. Each process then has a workdir of its own.

        Raises:
            ValueError: there are checkpoints, but none is intact; they are not changed.
        """
        self._directory = (workdir / run_directory.CHECKPOINTS).absolute()
        self._writes, self._saving, self._bucket = keep_last is not None, 0, bucket
        self._save: ocp.AsyncResponse[bool] | None = None
        if self._writes:
            if bucket is None:
                processes.in_first_process(lambda: _move_damaged_aside(workdir, self._directory))
            else:
                _move_damaged_aside(workdir, self._directory)
                processes.in_first_process(bucket.publish)
        policies = ocp.training.preservation_policies
        best = [
            policies.BestN(
                get_metric_fn=lambda metrics, name=name: metrics[name],
                n=1,
                keep_checkpoints_without_metrics=False,
            )
            for name in BEST.values()
        ]
        kept = [policies.EveryNSteps(keep_every)] if keep_every else []
        context = ocp.Context()
        # A function, since orbax deep-copies its options, and a bound method's object with them.
        context.asynchronous.post_finalization_callback = lambda: self._seal()
        # MemVir pads its classes to a multiple of the devices, whose number may have changed.
        context.array.loading.enable_padding_and_truncation = True
        context.pytree.loading.partial_load = not self._writes
        if bucket is not None and jax.process_count() > 1:
            # Each process writes files of its own, named by the part of the array that they hold.
            context.multiprocessing.primary_host = None
            context.array.saving.use_ocdbt = False
            context.array.saving.use_replica_parallel = False
        try:
            self._checkpointer = ocp.training.Checkpointer(
                self._directory,
                context=context,
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(keep_last), *best, *kept]
                ),
                # A reader must not delete the temporary directories of the run that is writing.
                cleanup_tmp_directories=self._writes,
            )
        except (ValueError, OSError) as error:  # Orbax reads the scores of all checkpoints.
            if self._writes and isinstance(error, OSError):
                raise
            for step, damage in _damaged(self._directory).items():
                raise UserError(_DAMAGED.format(self._directory / str(step), damage)) from error
            raise UserError(
                f"the checkpoints in {self._directory} cannot be read: {error}"
            ) from error

    def __enter__(self) -> "Checkpoints":
        """Returns the checkpoints."""
        return self

    def __exit__(self, *_: object) -> None:
        """Waits until the last save is on disk.

        Raises:
            OSError: it could not be written.
        """
        try:
            self._finish()
        finally:
            self._checkpointer.close()

    def save(self, step: int, state: Any, metrics: dict[str, float] | None) -> None:
        """Saves a state asynchronously; returns once it is copied from the devices.

        Args:
            step: step of the state.
            state: the state to save.
            metrics: scores of the evaluation at this step; None if there was none.

        Raises:
            OSError: this or the previous state could not be written; earlier ones are kept.
        """
        self._finish()
        self._saving = step
        # The copy to the host counts as an implicit transfer.
        with self._describing_errors(), jax.transfer_guard("allow"):
            self._save = self._checkpointer.save_async(step, state, force=True, metrics=metrics)

    def _finish(self) -> None:
        """Waits for the save in progress."""
        save, self._save = self._save, None
        if save is not None:
            with self._describing_errors():
                try:
                    # Orbax raises a failure once per waiting thread: here, not in `close`.
                    self._checkpointer.wait()
                finally:
                    # Without this call a save leaves a thread and three open files.
                    save.result()

    @contextlib.contextmanager
    def _describing_errors(self) -> Iterator[None]:
        """Raises any error of orbax, which may be of any type, as an OSError with the step."""
        try:
            yield
        except Exception as error:
            raise OSError(
                f"the checkpoint of step {self._saving} could not be written; earlier ones are "
                f"kept. Fix the cause and start again: {str(error).splitlines()[0]:.300}"
            ) from error

    def _seal(self) -> None:
        """Seals and publishes the checkpoint that orbax has written, before it is renamed."""
        if self._bucket is None and not processes.is_first_process():
            return
        (written,) = self._directory.glob(f"{self._saving}.*")
        if self._bucket is None:
            integrity.write(written, integrity.digests(written))
        else:
            self._bucket.publish_checkpoint(written, self._saving)

    @property
    def latest(self) -> int | None:
        """Step of the latest checkpoint; None if there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def find(self, name: str) -> int:
        """Returns the step of a checkpoint by name.

        Args:
            name: see `check_name`. Of equally good checkpoints, the latest is the best.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: there cannot be one of this name.
        """
        check_name(name)
        if name.startswith(_STEP):
            steps = [checkpoint.step for checkpoint in self._checkpointer.checkpoints]
            if (step := int(name.removeprefix(_STEP))) in steps:
                return step
            raise FileNotFoundError(
                f"{self._directory} holds no checkpoint of step {step}, but of "
                f"{', '.join(map(str, sorted(steps))) or 'none'}; see config.checkpoint.keep_every"
            )
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
            step: step of the checkpoint.
            like: a state of the same structure, of `jax.ShapeDtypeStruct`s with shardings. For
                checkpoints opened for reading only, it may be a dictionary of some of its fields.

        Returns:
            The state, sharded as `like`, also if it was saved from other devices.

        Raises:
            ValueError: the checkpoint is damaged.
        """
        folder = self._directory / str(step)
        if self._bucket is not None:
            self._bucket.complete(step)
        if not self._writes and (damage := integrity.damage(folder)):
            raise UserError(_DAMAGED.format(folder, damage))
        return self._checkpointer.load(step, like)


def check_name(name: str) -> str:
    """Returns a name that a checkpoint may have.

    Args:
        name: `last`; a key of `BEST`; or `step` and a number, for the checkpoint after so many
            steps.

    Raises:
        ValueError: it is another name.
    """
    if name == LAST or name in BEST or re.fullmatch(rf"{_STEP}\d{{1,10}}", name):
        return name
    raise UserError(
        f"the checkpoint {name!r} must be {LAST}, {', '.join(BEST)}, or {_STEP} and a number of "
        "steps, such as step1200"
    )


def read(
    workdir: Path, name: str, like: dict[str, Any], bucket: Bucket | None = None
) -> tuple[int, Any]:
    """Reads a checkpoint of a run, also while the run is training and deletes old checkpoints.

    Args:
        workdir: directory of the run.
        name: see `check_name`.
        like: see `Checkpoints.restore`.
        bucket: see `Checkpoints`.

    Returns:
        The step of the checkpoint, and the state.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is damaged.
    """
    for _ in range(_ATTEMPTS):
        before = _steps(workdir / run_directory.CHECKPOINTS)
        try:
            return _read(workdir, name, like, bucket)
        except (ValueError, OSError):
            # A partly deleted checkpoint looks damaged.
            time.sleep(_PAUSE)
            if _steps(workdir / run_directory.CHECKPOINTS) == before:
                raise
    return _read(workdir, name, like, bucket)


def _read(workdir: Path, name: str, like: dict[str, Any], bucket: Bucket | None) -> tuple[int, Any]:
    with Checkpoints(workdir, bucket=bucket) as checkpoints:
        step = checkpoints.find(name)
        return step, checkpoints.restore(step, like)


def _steps(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal())


def _damaged(directory: Path) -> dict[int, str]:
    found = {step: integrity.damage(directory / str(step)) for step in _steps(directory)}
    return {step: damage for step, damage in found.items() if damage}


def _move_damaged_aside(workdir: Path, directory: Path) -> None:
    damaged = _damaged(directory)
    intact = [step for step in _steps(directory) if step not in damaged]
    if damaged and not intact:
        raise UserError(
            f"no checkpoint in {directory} is intact; to train from the beginning, delete it:\n"
            + "\n".join(f"  step {step}: {damage}" for step, damage in damaged.items())
        )
    for step, damage in damaged.items():
        # Orbax deletes a checkpoint file by file, once a newer one is complete.
        if step < intact[-1] and integrity.is_partly_deleted(directory / str(step)):
            shutil.rmtree(directory / str(step))
            logging.info("deleted the rest of the checkpoint of step %d: %s", step, damage)
            continue
        aside = workdir / run_directory.DAMAGED / str(step)
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(exist_ok=True)
        (directory / str(step)).rename(aside)
        logging.warning(
            "the checkpoint of step %d is damaged: %s; it is now in %s, and the newest intact "
            "checkpoint is that of step %d",
            *(step, damage, aside, intact[-1]),
        )


def read_network(
    network: Network, workdir: Path, name: str, bucket: Bucket | None = None
) -> tuple[int, dict[str, PyTree]]:
    """Reads only the variables of the network from a checkpoint of a run: the average, if any.

    Args:
        network: network of the run.
        workdir: directory of the run.
        name: name of the checkpoint; see `check_name`.
        bucket: see `Checkpoints`.

    Returns:
        The step of the checkpoint, and the variables.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is damaged.
    """
    shapes = network.variables_shape
    if run_directory.read_config(workdir).optimizer.average_decay:
        step, found = read(workdir, name, {"average": shapes}, bucket)
        return step, found["average"]
    wanted = {"params": {"embedder": shapes["params"]}, "batch_stats": shapes["batch_stats"]}
    step, found = read(workdir, name, wanted, bucket)
    return step, {"params": found["params"]["embedder"], "batch_stats": found["batch_stats"]}
