"""Arithmetic that the losses share, safe to differentiate at every finite input."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_SHORTEST = 1e-12


def normalize(vectors: Float[Array, "*n dim"]) -> Float[Array, "*n dim"]:
    """Scales each vector to unit length, in float32; zero stays zero, with a finite gradient.

    Args:
        vectors: `[..., dim]`, any floating type.

    Returns:
        `[..., dim]`, float32.
    """
    vectors = vectors.astype(jnp.float32)
    # Dividing by the largest entry first keeps the squares of huge and of tiny entries in range.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(vectors), axis=-1, keepdims=True))
    vectors = vectors / jnp.where(largest > 0, jnp.maximum(largest, _SHORTEST), 1.0)
    square = jnp.sum(vectors**2, axis=-1, keepdims=True)
    # The square root's slope at zero is infinite; `where` keeps that branch out of the gradient.
    return vectors / jnp.sqrt(jnp.where(square > 0, square, 1.0))


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
