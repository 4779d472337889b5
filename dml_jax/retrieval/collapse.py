"""Signs of a collapse, in which all images get similar embeddings."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from dml_jax.retrieval import exact

SAMPLE = 2000
"""Embeddings that are looked at."""

# Of two directions at an angle of 18 degrees the cosine is 0.95. Retrieval can still rank them, but
# all classes share a cone that leaves a twentieth of the range of the cosine to tell them apart.
_TOO_SIMILAR = 0.95
# Below two, the embeddings are nearly multiples of one vector.
_TOO_FLAT = 2.0


class Spread(NamedTuple):
    """How far the embeddings of random images are apart."""

    mean_cosine: float
    """Mean cosine of two different images; 1 if all are equal."""
    effective_rank: float
    """The number of directions that the embeddings use, between 1 and their dimension."""

    @property
    def is_collapsed(self) -> bool:
        """Whether nearly all embeddings have one direction, or lie on one line."""
        return self.mean_cosine > _TOO_SIMILAR or self.effective_rank < _TOO_FLAT


def spread(embeddings: Float32[np.ndarray, "n d"], *, seed: int = 0) -> Spread:
    """Returns the spread of a random sample of up to `SAMPLE` embeddings, normalised.

    The mean cosine is that of all pairs of the sample. The effective rank is the exponential of the
    entropy of the singular values, divided by their sum, of the sample, which is not centred.

    Source: Roy and Vetterli, The effective rank, EUSIPCO 2007.

    Args:
        embeddings: [n, d], n at least 2.
        seed: seed of the sample.
    """
    chosen = np.random.default_rng(seed).permutation(len(embeddings))[:SAMPLE]
    unit = exact.unit_rows(embeddings[chosen]).astype(np.float64)
    return Spread(_mean_cosine(unit), effective_rank(unit))


def effective_rank(unit: Float[np.ndarray, "n d"]) -> float:
    """Returns the effective rank of unit vectors; see `spread`."""
    values = np.linalg.svd(unit, compute_uv=False)
    if not values.any():
        return 0.0
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _mean_cosine(unit: Float[np.ndarray, "n d"]) -> float:
    count, total = len(unit), unit.sum(axis=0)
    return float((total @ total - (unit**2).sum()) / (count * (count - 1)))
