"""Retrieval results per query and per class.

The definitions are those of `dml_jax.retrieval.evaluate`, without the average over queries.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from dml_jax.evaluation.embedding_files import Embeddings
from dml_jax.report.runs import Run
from dml_jax.retrieval import exact, metrics

SHOWN = 8
"""Number of neighbours shown for a query."""

_BLOCK = 2048
_HISTOGRAM_QUERIES = 4000
BINS = 100
"""Number of bins of a similarity histogram, over -1..1."""


class Ranking(NamedTuple):
    """The retrieval results of each query.

    Attributes:
        neighbours: gallery indices of the nearest images, nearest first.
        similarities: their cosine similarities.
        correct: whether they belong to the query's class.
        relevant: R, the number of other gallery images of the query's class.
        average_precision: average precision at R, in 0..1; 0 where R is 0.
    """

    neighbours: Int64[np.ndarray, "q k"]
    similarities: Float32[np.ndarray, "q k"]
    correct: Bool[np.ndarray, "q k"]
    relevant: Int64[np.ndarray, " q"]
    average_precision: Float64[np.ndarray, " q"]


def rank(queries: Embeddings, gallery: Embeddings | None) -> Ranking:
    """Returns the nearest neighbours of queries in a gallery.

    Args:
        queries: the queries.
        gallery: the gallery; None for the queries themselves, of which none is its own neighbour.
    """
    alone = gallery is None
    found = queries if gallery is None else gallery
    labels, gallery_labels = queries.labels, found.labels
    vectors = exact.unit_rows(queries.embeddings)
    gallery_vectors = vectors if gallery is None else exact.unit_rows(found.embeddings)
    relevant = np.bincount(gallery_labels, minlength=labels.max() + 1)[labels] - alone
    count = min(max(SHOWN, int(relevant.max())), len(gallery_vectors) - alone)
    searcher = exact.make(gallery_vectors, exact.choose("auto"))
    parts = []
    for start in range(0, len(vectors), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(vectors)))
        ids = searcher.nearest(vectors[rows], count, own=rows if alone else None)
        correct = gallery_labels[ids] == labels[rows, None]
        precision = np.zeros(len(rows))
        has_match = relevant[rows] > 0
        precision[has_match] = metrics.average_precision(
            correct[has_match], relevant[rows][has_match]
        )
        near = ids[:, :SHOWN]
        similarities = np.einsum("qd,qkd->qk", vectors[rows], gallery_vectors[near])
        parts.append((near, similarities, correct[:, :SHOWN], precision))
    near, similarities, correct, precision = map(np.concatenate, zip(*parts, strict=True))
    return Ranking(near, similarities, correct, relevant, precision)


class Classes(NamedTuple):
    """Retrieval scores of each class.

    Attributes:
        queries: number of queries with at least one relevant gallery image.
        recall: fraction of these queries whose first neighbour is correct; 0 without queries.
        precision: their mean average precision at R; 0 without queries.
    """

    queries: Int64[np.ndarray, " c"]
    recall: Float64[np.ndarray, " c"]
    precision: Float64[np.ndarray, " c"]


def by_class(run: Run, ranking: Ranking) -> Classes:
    """Returns R@1 and MAP@R of each class; their mean weighted by queries is the run's score."""
    counted = ranking.relevant > 0
    labels, classes = run.queries.labels[counted], len(run.queries.class_names)
    queries = np.bincount(labels, minlength=classes)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(labels, values[counted], minlength=classes) / np.maximum(queries, 1)

    return Classes(queries, mean(ranking.correct[:, 0]), mean(ranking.average_precision))


def confused_pairs(run: Run, ranking: Ranking, most: int) -> list[dict[str, Any]]:
    """Returns the pairs of classes that are confused most often.

    A query counts as confused if its first neighbour belongs to another class.

    Args:
        run: a run.
        ranking: the run's retrieval results.
        most: the maximum number of pairs.

    Returns:
        A dict for each pair, most confused first: the classes `first` and `second`;
        `first_as_second`, the number of queries of the first class whose first neighbour is of the
        second; `second_as_first`, the reverse; `queries`, the number of queries of both classes.
    """
    gallery_labels = run.queries.labels if run.gallery is None else run.gallery.labels
    wrong = ~ranking.correct[:, 0] & (ranking.relevant > 0)
    query_labels = run.queries.labels[wrong].astype(np.int64)
    neighbour_labels = gallery_labels[ranking.neighbours[wrong, 0]].astype(np.int64)
    classes = len(run.queries.class_names)
    low, high = (
        np.minimum(query_labels, neighbour_labels),
        np.maximum(query_labels, neighbour_labels),
    )
    pairs, pair, counts = np.unique(low * classes + high, return_inverse=True, return_counts=True)
    forward = np.bincount(pair, query_labels == low, minlength=len(pairs)).astype(int)
    queries = by_class(run, ranking).queries
    return [
        {
            "first": int(pairs[i] // classes),
            "second": int(pairs[i] % classes),
            "first_as_second": int(forward[i]),
            "second_as_first": int(counts[i] - forward[i]),
            "queries": int(queries[pairs[i] // classes] + queries[pairs[i] % classes]),
        }
        for i in np.lexsort((pairs, -counts))[:most]
    ]


def similarity_histogram(
    run: Run,
) -> tuple[Int64[np.ndarray, " bins"], Int64[np.ndarray, " bins"]]:
    """Returns histograms of the cosine similarities of same-class and of other-class pairs.

    Pairs of an image with itself are excluded. At most 4,000 queries, a fixed random subset, are
    compared with the whole gallery.

    Returns:
        Counts of same-class and of other-class pairs, in equal bins over -1..1.
    """
    queries, labels = exact.unit_rows(run.queries.embeddings), run.queries.labels
    gallery = queries if run.gallery is None else exact.unit_rows(run.gallery.embeddings)
    gallery_labels = labels if run.gallery is None else run.gallery.labels
    chosen = np.random.default_rng(0).permutation(len(queries))[:_HISTOGRAM_QUERIES]
    same, other = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    for rows in np.array_split(chosen, -(-len(chosen) // 512)):
        cosines = queries[rows] @ gallery.T
        bins = ((cosines + 1) * (BINS / 2)).astype(np.int32).clip(0, BINS - 1)
        equal = labels[rows, None] == gallery_labels
        if run.gallery is None:
            bins[np.arange(len(rows)), rows] = BINS  # Excludes pairs of an image with itself.
        total = np.bincount(bins.ravel(), minlength=BINS + 1)[:BINS]
        matching = np.bincount(bins[equal], minlength=BINS + 1)[:BINS]
        same, other = same + matching, other + total - matching
    return same, other
