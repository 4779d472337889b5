"""Functions shared by the losses, with finite gradients at every finite input."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_MIN_SCALE = 1e-12


def normalize(vectors: Float[Array, "*n dim"]) -> Float[Array, "*n dim"]:
    """Returns vectors of unit length, in float32; zero stays zero, with a finite gradient.

    Args:
        vectors: `[..., dim]`, any floating type.

    Returns:
        `[..., dim]`, float32.
    """
    vectors = vectors.astype(jnp.float32)
    vectors = vectors / _scale(vectors)
    square = jnp.sum(vectors**2, axis=-1, keepdims=True)
    # The derivative of the square root is infinite at zero; `where` removes it from the gradient.
    return vectors / jnp.sqrt(jnp.where(square > 0, square, 1.0))


def lengths(vectors: Float[Array, "*n dim"]) -> Float[Array, "*n"]:
    """Returns the length of each vector, in float32; the gradient at a zero vector is zero."""
    vectors = vectors.astype(jnp.float32)
    scale = _scale(vectors)
    square = jnp.sum((vectors / scale) ** 2, axis=-1)
    nonzero = square != 0  # True for NaN, which propagates.
    return scale[..., 0] * jnp.where(nonzero, jnp.sqrt(jnp.where(nonzero, square, 1.0)), 0.0)


def _scale(vectors: Float[Array, "*n dim"]) -> Float[Array, "*n 1"]:
    """Returns divisors of the vectors that keep squares of huge and tiny entries in range."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(vectors), axis=-1, keepdims=True))
    return jnp.where(largest > 0, jnp.maximum(largest, _MIN_SCALE), 1.0)


def inner_products(
    rows: Float[Array, "rows dim"], columns: Float[Array, "columns dim"]
) -> Float[Array, "rows columns"]:
    """Returns all inner products of two sets of vectors, in full float32.

    By default accelerators multiply float32 matrices at a lower precision, which changes the third
    digit of a scaled cosine.

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
    """Returns the log of a sum of exponentials; -inf, with zero gradient, for an empty sum.

    NaN propagates.

    Args:
        x: any array; entries of -inf add nothing.
        axis: the axis to sum over.
        where: entries to include, broadcast to `x`; None includes all.

    Returns:
        `x` without `axis`.
    """
    if where is not None:
        x = jnp.where(where, x, -jnp.inf)
    largest = jax.lax.stop_gradient(jnp.max(x, axis=axis, keepdims=True))
    largest = jnp.where(largest == -jnp.inf, 0.0, largest)
    total = jnp.sum(jnp.exp(x - largest), axis=axis)
    # The backward pass of log would divide by zero for an empty sum: take log(1) there.
    nonempty = total != 0
    return jnp.where(
        nonempty, jnp.log(jnp.where(nonempty, total, 1.0)) + jnp.squeeze(largest, axis), -jnp.inf
    )
