"""Means over classes, and confidence intervals by a bootstrap over classes.

Images of one class are not independent: a class that is hard to find is hard in all its images. So
classes are resampled, not images.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int

_DRAWS = 2000  # Bootstrap samples; the 2.5 % percentile is the 50th value.
_CELLS = 1 << 22  # Numbers of classes drawn at a time, over all samples; 32 MB.


class ClassSums(NamedTuple):
    """Sums of per-query metrics over the queries of each class that has some."""

    sums: Float64[np.ndarray, "metrics classes"]
    counts: Float64[np.ndarray, " classes"]


def by_class(values: Float64[np.ndarray, "metrics q"], classes: Int[np.ndarray, " q"]) -> ClassSums:
    """Returns the sums of metrics over the queries of each class.

    Args:
        values: [metrics, q] metrics of each query.
        classes: [q] class of each query.
    """
    _, codes, counts = np.unique(classes, return_inverse=True, return_counts=True)
    sums = [np.bincount(codes, weights=row, minlength=len(counts)) for row in values]
    return ClassSums(np.array(sums), counts.astype(np.float64))


def mean_over_classes(found: ClassSums) -> Float64[np.ndarray, " metrics"]:
    """Returns the mean over classes of the mean over the queries of a class (macro average)."""
    return (found.sums / found.counts).mean(axis=1)


def intervals(
    found: ClassSums, confidence: float, *, per_class: bool = False, seed: int = 0
) -> Float64[np.ndarray, "metrics 2"]:
    """Returns percentile bootstrap intervals of mean metrics.

    Each of 2000 samples has as many classes as there are, drawn with replacement, each with all its
    queries. The galleries stay as they are.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.

    Args:
        found: metrics by class.
        confidence: the share of the samples within the interval, above 0 and below 1.
        per_class: whether the means are those over classes, instead of those over queries.
        seed: seed of the samples.

    Returns:
        [metrics, 2] lower and upper ends.
    """
    sums, counts = found
    if per_class:
        sums, counts = sums / counts, np.ones_like(counts)
    rng, classes = np.random.default_rng(seed), len(counts)
    rows = max(1, _CELLS // classes)
    means = []
    for start in range(0, _DRAWS, rows):
        size = min(rows, _DRAWS - start)
        drawn = rng.multinomial(classes, np.full(classes, 1 / classes), size=size)
        means.append(drawn @ sums.T / (drawn @ counts)[:, None])
    tail = (1 - confidence) / 2
    return np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0).T
