"""Functions shared by losses and mixtures, with finite gradients at every finite input."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Bool, Float, PRNGKeyArray

_MIN_SCALE = 1e-12
_QUANTILES = 2**14
"""Different numbers of `draw_beta`. Their distribution function is exact to 1 / 2**15."""


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


def log_one_plus_exp(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns `log(1 + exp(x))`; at -inf the value and the gradient are 0."""
    nonempty = x != -jnp.inf
    return jnp.where(nonempty, jax.nn.softplus(jnp.where(nonempty, x, 0.0)), 0.0)


def draw_beta(key: PRNGKeyArray, alpha: float, shape: tuple[int, ...]) -> Float[Array, "*n"]:
    """Returns numbers drawn from Beta(alpha, alpha), without a loop.

    `jax.random.beta` rejects candidates in a loop, for which a GPU's host has to wait.

    Args:
        key: a random key.
        alpha: both parameters of the distribution.
        shape: shape of the result.
    """
    quantiles = jnp.asarray(_beta_quantiles(alpha))
    return quantiles[jax.random.randint(key, shape, 0, _QUANTILES)]


def _beta_quantiles(alpha: float) -> Float[np.ndarray, " quantiles"]:
    """Returns quantiles of Beta(alpha, alpha), which are equally likely."""
    levels = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    return scipy.special.betaincinv(alpha, alpha, levels).astype(np.float32)
