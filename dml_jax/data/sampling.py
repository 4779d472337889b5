"""Sampling of training batches, with or without balanced classes."""

import dataclasses

import numpy as np
from jaxtyping import Int, Int64

from dml_jax._utils.errors import UserError


def steps_per_epoch(labels: Int[np.ndarray, " n"], *, batch_size: int, n_instance: int = 1) -> int:
    """Returns the number of full batches in one pass over the training images.

    Args:
        labels: class of each training image.
        batch_size: images in a global batch.
        n_instance: images of each class in a batch; 1 ignores the classes.

    Returns:
        `n // batch_size`: the last partial batch is dropped.

    Raises:
        ValueError: such a batch cannot be drawn from these labels.
    """
    if batch_size < 1 or n_instance < 1:
        raise UserError(
            f"batch_size and n_instance must be positive, got {batch_size} and {n_instance}"
        )
    if batch_size > len(labels):
        raise UserError(
            f"batch_size {batch_size} is larger than the training set of {len(labels)} images; "
            "choose a smaller batch"
        )
    if batch_size % n_instance:
        raise UserError(
            f"batch_size {batch_size} is not divisible by n_instance {n_instance}, "
            "so the batch cannot hold n_instance images of every class in it"
        )
    classes = len(np.unique(labels))
    if n_instance > 1 and batch_size // n_instance > classes:
        raise UserError(
            f"batch_size {batch_size} with n_instance {n_instance} needs "
            f"{batch_size // n_instance} classes, the training set has {classes}; "
            "raise n_instance or lower batch_size"
        )
    return len(labels) // batch_size


def epoch_order(
    labels: Int[np.ndarray, " n"], *, batch_size: int, n_instance: int, seed: int, epoch: int
) -> Int64[np.ndarray, "steps batch"]:
    """Returns the image indices of all batches of an epoch, a pure function of the arguments.

    With `n_instance` 1 the batches partition a permutation of the images. Otherwise each batch
    holds `batch_size / n_instance` distinct classes drawn uniformly, with `n_instance` images of
    each in adjacent rows. The images of a class are distinct if it has at least `n_instance`;
    a smaller class is repeated.

    Args:
        labels: class of each training image.
        batch_size: images in a global batch.
        n_instance: images of each class in a batch.
        seed: seed of the run, not negative.
        epoch: the epoch, counted from 0.

    Returns:
        Indices into `labels`, one row per batch.

    Raises:
        ValueError: such a batch cannot be drawn from these labels.
    """
    steps = steps_per_epoch(labels, batch_size=batch_size, n_instance=n_instance)
    rng = np.random.default_rng([seed, epoch])
    if n_instance == 1:
        return rng.permutation(len(labels))[: steps * batch_size].reshape(steps, batch_size)
    _, sizes = np.unique(labels, return_counts=True)
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])
    groups = [
        np.resize(rng.permutation(members[c]), n_instance)
        for _ in range(steps)
        for c in rng.choice(len(members), batch_size // n_instance, replace=False)
    ]
    return np.concatenate(groups).reshape(steps, batch_size)


@dataclasses.dataclass(eq=False)
class Order:
    """Maps steps to the image indices of their batches; caches the order of one epoch.

    Attributes:
        labels: class of each training image.
        batch_size: images in a global batch.
        n_instance: images of each class in a batch.
        seed: seed of the run, not negative.
    """

    labels: Int[np.ndarray, " n"]
    batch_size: int
    n_instance: int
    seed: int
    _cached: tuple[int, Int64[np.ndarray, "steps batch"]] | None = None

    def __call__(self, step: int) -> Int64[np.ndarray, " batch"]:
        """Returns indices into `labels` of the batch of a step, counted from the run's start."""
        epoch, position = divmod(step, len(self.labels) // self.batch_size)
        cached = self._cached
        if cached is None or cached[0] != epoch:
            order = epoch_order(
                self.labels,
                batch_size=self.batch_size,
                n_instance=self.n_instance,
                seed=self.seed,
                epoch=epoch,
            )
            cached = self._cached = (epoch, order)
        return cached[1][position]
