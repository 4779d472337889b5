"""Checks of the arguments of an evaluation."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int64
from numpy.typing import ArrayLike

from dml_jax._utils.errors import UserError
from dml_jax.retrieval import exact


def validate(
    embeddings: ArrayLike, labels: ArrayLike, prefix: str
) -> tuple[Float32[np.ndarray, "n d"], Int64[np.ndarray, " n"]]:
    """Returns unit embeddings (zero ones stay zero) and labels; raises an error if invalid."""
    vectors, classes = _as_float32(embeddings, prefix), np.asarray(labels)
    if vectors.ndim != 2 or classes.ndim != 1:
        raise UserError(
            f"{prefix}embeddings must be [n, d] and labels [n], "
            f"got shapes {vectors.shape} and {classes.shape}"
        )
    if vectors.size == 0:
        raise UserError(f"{prefix}embeddings are empty: shape {vectors.shape}")
    if len(vectors) != len(classes):
        raise UserError(f"{len(vectors)} {prefix}embeddings but {len(classes)} labels")
    if not np.issubdtype(classes.dtype, np.integer):
        raise TypeError(f"{prefix}labels must be integers, got {classes.dtype}")
    return exact.unit_rows(vectors, f"{prefix}embeddings"), classes.astype(np.int64)


def check_levels(name: str, levels: Sequence[int], available: int) -> None:
    """Checks values of k.

    Args:
        name: name of the argument.
        levels: the values.
        available: number of gallery images.

    Raises:
        ValueError: one is below 1 or exceeds the gallery.
        TypeError: one is not an integer.
    """
    if not all(isinstance(k, int | np.integer) for k in levels):
        raise TypeError(f"{name}={tuple(levels)} must be integers")
    if not all(1 <= k <= available for k in levels):
        raise UserError(
            f"{name}={tuple(levels)} must be in 1..{available}, the number of gallery images"
        )


def check_rates(name: str, rates: Sequence[float]) -> None:
    """Checks shares of a whole.

    Args:
        name: name of the argument.
        rates: the shares.

    Raises:
        ValueError: one is not above 0 and below 1.
        TypeError: one is not a number.
    """
    if not all(isinstance(rate, float | np.floating) for rate in rates):
        raise TypeError(f"{name}={tuple(rates)} must be floats")
    if not all(0 < rate < 1 for rate in rates):
        raise UserError(f"{name}={tuple(rates)} must be above 0 and below 1")


def _as_float32(embeddings: ArrayLike, prefix: str) -> Float32[np.ndarray, "..."]:
    """Returns real numbers as float32; numbers out of range become infinite."""
    try:
        given = np.asarray(embeddings)
    except ValueError as error:  # Rows of different lengths.
        raise UserError(f"{prefix}embeddings are not an array: {error}") from None
    if not (np.issubdtype(given.dtype, np.floating) or np.issubdtype(given.dtype, np.integer)):
        raise TypeError(f"{prefix}embeddings must be real numbers, got {given.dtype}")
    with np.errstate(over="ignore"):
        return given.astype(np.float32, copy=False)
