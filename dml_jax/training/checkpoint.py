"""Checkpoints: the whole train state, written behind the training's back, each whole or not at all.

The input has no state of its own: batch t is a function of the seed and of t, so the step in the
state is the input's position too.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp

from dml_jax.training import workdir as workdirs

BEST = {"best_map": "map@r", "best_r1": "recall@1", "best_rp": "r_precision"}
"""Names of the best checkpoints, and the metric by which each is the best."""


class Checkpoints:
    """The checkpoints of a run: the latest few, and the best of each metric."""

    def __init__(self, workdir: Path, *, keep_last: int | None = None) -> None:
        """Opens the checkpoints of a folder.

        Args:
            workdir: the run's.
            keep_last: how many of the latest to keep; the best ones are kept besides. None opens
                them for reading only.
        """
        policies = ocp.training.preservation_policies
        best = [
            policies.BestN(
                get_metric_fn=lambda metrics, name=name: metrics[name],
                n=1,
                keep_checkpoints_without_metrics=False,
            )
            for name in BEST.values()
        ]
        self._checkpointer = ocp.training.Checkpointer(
            (workdir / workdirs.CHECKPOINTS).absolute(),
            preservation_policy=policies.AnyPreservationPolicy(
                [policies.LatestN(keep_last), *best]
            ),
            # Whoever only reads must not clean up behind the run that is writing.
            cleanup_tmp_directories=keep_last is not None,
        )

    def __enter__(self) -> "Checkpoints":
        """Opens nothing more."""
        return self

    def __exit__(self, *_: object) -> None:
        """Waits until what was saved is on disk."""
        self._checkpointer.close()

    def save(self, step: int, state: Any, metrics: dict[str, float] | None) -> None:
        """Saves a state; returns once it is copied from the devices, to be written meanwhile.

        Args:
            step: the state's.
            state: what to save.
            metrics: of the evaluation at this step; None if there was none.
        """
        with jax.transfer_guard("allow"):  # The copy to the host counts as an implicit one.
            self._checkpointer.save_async(step, state, force=True, metrics=metrics)

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
            raise FileNotFoundError(f"{self._checkpointer.directory} holds no {name} checkpoint")
        return max(candidates)[1]

    def restore(self, step: int, like: Any) -> Any:
        """Restores a state.

        Args:
            step: of the checkpoint.
            like: a state of the same structure, of `jax.ShapeDtypeStruct`s with shardings.

        Returns:
            The state, sharded as `like` is, which may be over other devices than it was saved from.
        """
        # MemVir pads its classes to a multiple of the devices, which may be others than they were.
        context = ocp.Context()
        context.array.loading.enable_padding_and_truncation = True
        with context:
            return self._checkpointer.load(step, like)

    def restore_part(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Restores what is wanted of a state, whatever else is in it.

        Args:
            step: of the checkpoint.
            like: `jax.ShapeDtypeStruct`s with shardings, in dictionaries named as the state's parts
                and fields are.

        Returns:
            Arrays, in the same dictionaries.
        """
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            return self._checkpointer.load(step, like)
