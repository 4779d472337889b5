"""Retrieval metrics as pure functions of the neighbours' correctness.

`matches[i, j]` is whether the j-th nearest neighbour of query i is of its class; `relevant[i]` (R)
is the number of gallery images of that class. Results are per query, so that a caller can process
the queries in blocks.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int

from dml_jax._utils import extras


def recall(
    matches: Bool[np.ndarray, "q k"], recall_at: Sequence[int]
) -> Bool[np.ndarray, "q levels"]:
    """Returns Recall@k of each query: whether one of the first k neighbours is of its class.

    Args:
        matches: [q, k] correct neighbours, nearest first.
        recall_at: the values of k, each at most the width of `matches`.

    Returns:
        [q, len(recall_at)] booleans.

    Raises:
        ValueError: a k exceeds the number of neighbours.
    """
    _check_width(matches, "recall", max(recall_at, default=0))
    first = matches.argmax(axis=1, keepdims=True)
    # The argmax of a row without a match is 0, too.
    found = np.take_along_axis(matches, first, axis=1)
    return found & (first < np.asarray(recall_at, dtype=np.int64))


def precision(
    matches: Bool[np.ndarray, "q k"], precision_at: Sequence[int]
) -> Float64[np.ndarray, "q levels"]:
    """Returns precision@k of each query: the fraction of the first k neighbours that is correct.

    With R < k it cannot reach 1.

    Args:
        matches: [q, k] correct neighbours, nearest first.
        precision_at: the values of k, each at least 1 and at most the width of `matches`.

    Returns:
        [q, len(precision_at)] values in 0..1.

    Raises:
        ValueError: a k exceeds the number of neighbours.
    """
    _check_width(matches, "precision", max(precision_at, default=0))
    levels = np.asarray(precision_at, dtype=np.int64)
    return np.cumsum(matches, axis=1, dtype=np.int32)[:, levels - 1] / levels


def r_precision(
    matches: Bool[np.ndarray, "q k"], relevant: Int[np.ndarray, " q"]
) -> Float64[np.ndarray, " q"]:
    """Returns the R-precision: the fraction of the first R neighbours that is correct.

    Args:
        matches: [q, k] correct neighbours, nearest first, k >= max(relevant).
        relevant: [q] R of each query, at least 1.

    Returns:
        [q] values in 0..1.

    Raises:
        ValueError: an R is 0 or exceeds the number of neighbours.
    """
    return _first_r(matches, relevant).sum(axis=1) / relevant


def average_precision(
    matches: Bool[np.ndarray, "q k"], relevant: Int[np.ndarray, " q"]
) -> Float64[np.ndarray, " q"]:
    """Returns the average precision at R, whose mean over queries is MAP@R.

    (1/R) * sum of precision@i over the correct ranks i <= R. The denominator is R, not the number
    of correct neighbours.

    Source: Musgrave et al., A Metric Learning Reality Check, ECCV 2020.

    Args:
        matches: [q, k] correct neighbours, nearest first, k >= max(relevant).
        relevant: [q] R of each query, at least 1.

    Returns:
        [q] values in 0..1.

    Raises:
        ValueError: an R is 0 or exceeds the number of neighbours.
    """
    hits = _first_r(matches, relevant)
    return _sum_of_precisions(hits) / relevant


def average_precision_at(
    matches: Bool[np.ndarray, "q k"], relevant: Int[np.ndarray, " q"], k: int
) -> Float64[np.ndarray, " q"]:
    """Returns the average precision truncated at rank k, whose mean over queries is MAP@k.

    1/min(k, R) * sum of precision@i over the correct ranks i <= k: 1 if the first min(k, R)
    neighbours are correct. Other programs divide by R, or by the number of correct neighbours.

    Args:
        matches: [q, width] correct neighbours, nearest first.
        relevant: [q] R of each query, at least 1.
        k: the last rank that counts, at least 1 and at most the width of `matches`.

    Returns:
        [q] values in 0..1.

    Raises:
        ValueError: k exceeds the number of neighbours.
    """
    _check_width(matches, "map", k)
    return _sum_of_precisions(matches[:, :k]) / np.minimum(relevant, k)


def normalized_mutual_information(
    labels: Int[np.ndarray, " n"], clusters: Int[np.ndarray, " n"]
) -> float:
    """Returns the mutual information of two partitions over the mean of their entropies.

    The contingency table is sparse, with at most n cells for any number of classes.

    Args:
        labels: [n] class of each image.
        clusters: [n] cluster of each image.

    Returns:
        A value in 0..1; 1 if both partitions have a single part.
    """
    _, rows, row_counts = np.unique(labels, return_inverse=True, return_counts=True)
    _, columns, column_counts = np.unique(clusters, return_inverse=True, return_counts=True)
    cells, counts = np.unique(rows * len(column_counts) + columns, return_counts=True)
    row, column = np.divmod(cells, len(column_counts))
    joint, p, q = (c / len(labels) for c in (counts, row_counts, column_counts))
    information = np.sum(joint * np.log(joint / (p[row] * q[column])))
    entropies = -np.sum(p * np.log(p)) - np.sum(q * np.log(q))
    return float(np.clip(2 * information / entropies, 0, 1)) if entropies > 0 else 1.0


def adjusted_mutual_information(
    labels: Int[np.ndarray, " n"], clusters: Int[np.ndarray, " n"]
) -> float:
    """Returns the mutual information of two partitions, adjusted for chance, by scikit-learn.

    (I - E[I]) / (mean of the entropies - E[I]), with E[I] of random partitions with parts of the
    same sizes. NMI has no such correction and grows with the number of clusters.

    Source: Vinh et al., Information Theoretic Measures for Clusterings Comparison, JMLR 2010.

    Args:
        labels: [n] class of each image.
        clusters: [n] cluster of each image.

    Returns:
        1 for equal partitions; about 0, and possibly below, for independent ones.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    with extras.required_by("metrics"):
        from sklearn.metrics import adjusted_mutual_info_score

    return float(adjusted_mutual_info_score(labels, clusters))


def _check_width(matches: Bool[np.ndarray, "q k"], name: str, largest: int) -> None:
    if largest > matches.shape[1]:
        raise ValueError(f"{name}@{largest} needs more than {matches.shape[1]} neighbours")


def _sum_of_precisions(hits: Bool[np.ndarray, "q k"]) -> Float64[np.ndarray, " q"]:
    """Returns the sum of precision@i over the correct ranks i."""
    precision = np.cumsum(hits, axis=1, dtype=np.int32) / np.arange(1, hits.shape[1] + 1)
    return np.einsum("qr,qr->q", precision, hits)


def _first_r(
    matches: Bool[np.ndarray, "q k"], relevant: Int[np.ndarray, " q"]
) -> Bool[np.ndarray, "q r"]:
    """Returns the matches among each query's first R neighbours, with max(R) columns."""
    width = relevant.max(initial=0)
    if width > matches.shape[1] or relevant.min(initial=1) < 1:
        raise ValueError(
            f"R must be in 1..{matches.shape[1]}, the number of neighbours, "
            f"got {relevant.min()}..{width}"
        )
    return matches[:, :width] & (np.arange(width) < relevant[:, None])
