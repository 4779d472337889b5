"""Diagnostics of an embedding space: how near images of a class are, and how the space is used.

They describe unit vectors. Sources: Wang and Isola, Understanding contrastive representation
learning through alignment and uniformity on the hypersphere, ICML 2020; Roth et al., Revisiting
training strategies and generalization performance in deep metric learning, ICML 2020 (arXiv
2002.08473).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int

from dml_jax._utils.errors import UserError
from dml_jax.retrieval.collapse import effective_rank

_ROWS = 1024  # Rows of the matrix of similarities at a time.


class Diagnostics(NamedTuple):
    """The diagnostics of an embedding space."""

    alignment: float
    """Mean squared distance of two images of one class, over all such pairs; 0 to 4."""
    uniformity: float
    """Logarithm of the mean of `exp(-2 |x - y|^2)` over all pairs of images; -8 to 0, lower if the
    embeddings are spread more evenly."""
    pi_intra: float
    """Mean over classes of the mean cosine distance of two images of the class."""
    pi_inter: float
    """Mean cosine distance of the mean embeddings of two classes."""
    pi_ratio: float
    """`pi_intra / pi_inter`, the embedding space density."""
    spectral_decay: float
    """The divergence KL(uniform || spectrum) of the singular values; 0 if all are equal."""
    effective_rank: float
    """The number of directions that the embeddings use; see `collapse.spread`."""


def diagnose(
    unit: Float32[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], *, rows: int = _ROWS
) -> Diagnostics:
    """Returns the diagnostics of unit embeddings with classes.

    Pairs are of two different images. A pair of one class takes the place of Wang and Isola's two
    views of an image. Cosine distance and the averages of `pi_intra` and `pi_inter` are those of
    the program of Roth et al., except that classes of one image are left out of `pi_intra`.

    Args:
        unit: [n, d] unit vectors.
        labels: [n] classes.
        rows: rows of the n x n similarities that are in memory at a time.

    Raises:
        ValueError: there are fewer than two classes, or none has two images.
    """
    names, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(names) < 2 or counts.max() < 2:
        raise UserError(
            f"diagnostics need two classes and a class with two images, but there are {len(names)} "
            f"classes of up to {counts.max()} images"
        )
    vectors = unit.astype(np.float64)
    sums = np.zeros((len(names), unit.shape[1]))
    np.add.at(sums, codes, vectors)
    squares = np.bincount(codes, weights=(vectors**2).sum(axis=1))
    # Over ordered pairs: sum |x - y|^2 = 2 n sum |x|^2 - 2 |sum x|^2.
    distances = np.maximum(2 * (counts * squares - (sums**2).sum(axis=1)), 0)
    pairs = counts * (counts - 1)
    with_pair = pairs > 0
    # The cosine distance of unit vectors is half their squared distance.
    intra = float((distances[with_pair] / pairs[with_pair]).mean() / 2)
    inter = _mean_cosine_distance(sums)
    return Diagnostics(
        alignment=float(distances.sum() / pairs.sum()),
        uniformity=_uniformity(unit, rows),
        pi_intra=intra,
        pi_inter=inter,
        pi_ratio=intra / max(inter, 1e-8),
        spectral_decay=spectral_decay(vectors),
        effective_rank=effective_rank(vectors),
    )


def spectral_decay(vectors: Float64[np.ndarray, "n d"]) -> float:
    """Returns rho, the divergence KL(uniform || spectrum) of the singular values of embeddings.

    The spectrum is all min(n, d) singular values of the embeddings, which are not centred, divided
    by their sum. Values that are below the rounding error of float32 count as that.

    Args:
        vectors: [n, d] embeddings, not all zero.
    """
    values = np.linalg.svd(vectors, compute_uv=False)
    values = np.maximum(values, np.finfo(np.float32).eps * values[0])
    return float(-np.log(len(values) * values / values.sum()).mean())


def _mean_cosine_distance(sums: Float64[np.ndarray, "c d"]) -> float:
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    means = sums / np.where(lengths > 0, lengths, 1)
    total, count = means.sum(axis=0), len(means)
    cosines = total @ total - (means**2).sum()
    return float(1 - cosines / (count * (count - 1)))


def _uniformity(unit: Float32[np.ndarray, "n d"], rows: int) -> float:
    """Returns the logarithm of the mean Gaussian potential of two different vectors."""
    total, count = 0.0, len(unit)
    for start in range(0, count, rows):
        block = unit[start : start + rows]
        # |x - y|^2 = 2 - 2 cos. Each pair counts once: the later rows are the columns.
        potentials = np.exp(4 * (block @ unit[start:].T).astype(np.float64) - 4)
        inside = np.tri(len(block), potentials.shape[1], dtype=bool)
        total += float(potentials.sum(where=~inside))
    return float(np.log(total / (count * (count - 1) / 2)))
