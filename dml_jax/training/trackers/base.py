"""The interface of a tracker."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32

from dml_jax import data


class Tracker:
    """Records the progress of a run; a subclass overrides the methods that it needs.

    A tracker opens what it writes to when it is created. The loop calls `epoch`, and after it
    `evaluation` if the epoch ended with one, before it saves the checkpoint of that epoch.
    """

    def step(self, step: int, *, loss: float, learning_rate: float) -> None:
        """Records a step.

        Args:
            step: steps done.
            loss: of the step.
            learning_rate: of the step.
        """

    def epoch(self, metrics: Mapping[str, Any], timings: Mapping[str, Any]) -> None:
        """Records an epoch.

        Args:
            metrics: by name, with `step` and `epoch`. Equal runs have equal metrics.
            timings: by name, with `step` and `epoch`.
        """

    def evaluation(
        self,
        step: int,
        sources: Mapping[str, data.Source],
        embeddings: Mapping[str, Float32[np.ndarray, "_ d"]],
    ) -> None:
        """Records examples of an evaluation.

        Args:
            step: steps done.
            sources: the images by split.
            embeddings: of the evaluated split, and of its gallery if it has one, by split; see
                `Evaluator.embed`.
        """

    def close(self, failed: bool) -> None:
        """Releases all resources.

        Args:
            failed: whether the run ends with an exception.
        """
