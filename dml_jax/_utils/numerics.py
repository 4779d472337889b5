"""Arithmetic that the losses share, safe to differentiate at every finite input."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_SHORTEST = 1e-12


def normalize(vectors: Float[Array, "*n dim"]) -> Float[Array, "*n dim"]:
    """Scales each vector to unit length, in float32; zero stays zero, with a finite gradient.

    Args:
        vectors: `[..., dim]`, any floating type.

    Returns:
        `[..., dim]`, float32.
    """
    vectors = vectors.astype(jnp.float32)
    vectors = vectors / _size(vectors)
    square = jnp.sum(vectors**2, axis=-1, keepdims=True)
    # The square root's slope at zero is infinite; `where` keeps that branch out of the gradient.
    return vectors / jnp.sqrt(jnp.where(square > 0, square, 1.0))


def lengths(vectors: Float[Array, "*n dim"]) -> Float[Array, "*n"]:
    """The length of each vector, in float32; a zero vector's has no gradient."""
    vectors = vectors.astype(jnp.float32)
    size = _size(vectors)
    square = jnp.sum((vectors / size) ** 2, axis=-1)
    some = square != 0  # True of NaN, which stays.
    return size[..., 0] * jnp.where(some, jnp.sqrt(jnp.where(some, square, 1.0)), 0.0)


def _size(vectors: Float[Array, "*n dim"]) -> Float[Array, "*n 1"]:
    """What to divide vectors by, so that the squares of huge and of tiny entries are in range."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(vectors), axis=-1, keepdims=True))
    return jnp.where(largest > 0, jnp.maximum(largest, _SHORTEST), 1.0)


def inner_products(
    rows: Float[Array, "rows dim"], columns: Float[Array, "columns dim"]
) -> Float[Array, "rows columns"]:
    """All inner products of two sets of vectors, in full float32.

    Left to themselves, accelerators multiply float32 matrices in fewer bits, which a scaled cosine
    shows in its third digit.

    Args:
        rows: `[rows, dim]`.
        columns: `[columns, dim]`.

    Returns:
        `[rows, columns]`, float32.
    """
    return jnp.matmul(rows, columns.T, precision="highest", preferred_element_type=jnp.float32)


def log_sum_exp(
    x: Float[Array, "*n"], *, axis: int, where: Bool[Array, "*#n"] | None = None
) -> Float[Array, "*m"]:
    """Log of a sum of exponentials; an empty sum's is -inf, and has no gradient. NaN stays NaN.

    Args:
        x: any array; -inf adds nothing.
        axis: what to sum over.
        where: which entries count, broadcast to `x`; None counts all.

    Returns:
        `x` without `axis`.
    """
    if where is not None:
        x = jnp.where(where, x, -jnp.inf)
    largest = jax.lax.stop_gradient(jnp.max(x, axis=axis, keepdims=True))
    largest = jnp.where(largest == -jnp.inf, 0.0, largest)
    total = jnp.sum(jnp.exp(x - largest), axis=axis)
    # An empty sum would divide by zero on the way back: the logarithm is of one, and left out.
    some = total != 0
    return jnp.where(
        some, jnp.log(jnp.where(some, total, 1.0)) + jnp.squeeze(largest, axis), -jnp.inf
    )
