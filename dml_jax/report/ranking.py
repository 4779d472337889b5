"""What each test image finds, and what that says of classes: the report's numbers.

Measured as `dml_jax.retrieval.evaluate` measures, but kept for each query.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from dml_jax.report.runs import Run
from dml_jax.retrieval import exact, metrics

SHOWN = 8
"""Neighbours that are shown of a query."""

_BLOCK = 2048
_HISTOGRAM_QUERIES = 4000
BINS = 100
"""Of a histogram of similarities, over -1..1."""


class Ranking(NamedTuple):
    """What each query finds.

    Attributes:
        neighbours: the first few in the gallery, nearest first.
        similarities: their cosines.
        right: whether they are of the query's class.
        relevant: R, how many images of the query's class there are to find.
        average_precision: at R, in 0..1; 0 where R is.
    """

    neighbours: Int64[np.ndarray, "q k"]
    similarities: Float32[np.ndarray, "q k"]
    right: Bool[np.ndarray, "q k"]
    relevant: Int64[np.ndarray, " q"]
    average_precision: Float64[np.ndarray, " q"]


def rank(run: Run) -> Ranking:
    """Searches the neighbours of a run's test images, each left out of its own."""
    queries, labels = exact.unit_rows(run.queries.embeddings), run.queries.labels
    alone = run.gallery is None
    gallery = queries if run.gallery is None else exact.unit_rows(run.gallery.embeddings)
    gallery_labels = labels if run.gallery is None else run.gallery.labels
    relevant = np.bincount(gallery_labels, minlength=labels.max() + 1)[labels] - alone
    count = min(max(SHOWN, int(relevant.max())), len(gallery) - alone)
    searcher = exact.make(gallery, exact.choose("auto"))
    parts = []
    for start in range(0, len(queries), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(queries)))
        ids = searcher.nearest(queries[rows], count, own=rows if alone else None)
        right = gallery_labels[ids] == labels[rows, None]
        precision = np.zeros(len(rows))
        some = relevant[rows] > 0
        precision[some] = metrics.average_precision(right[some], relevant[rows][some])
        near = ids[:, :SHOWN]
        similarities = np.einsum("qd,qkd->qk", queries[rows], gallery[near])
        parts.append((near, similarities, right[:, :SHOWN], precision))
    near, similarities, right, precision = map(np.concatenate, zip(*parts, strict=True))
    return Ranking(near, similarities, right, relevant, precision)


class Classes(NamedTuple):
    """How well each class is found; classes without a query that has a match have 0 queries.

    Attributes:
        queries: of each class, those that have a match.
        recall: the share of them whose first neighbour is right.
        precision: their mean average precision at R.
    """

    queries: Int64[np.ndarray, " c"]
    recall: Float64[np.ndarray, " c"]
    precision: Float64[np.ndarray, " c"]


def by_class(run: Run, ranking: Ranking) -> Classes:
    """R@1 and MAP@R of each class; weighted by their queries they average to the run's."""
    counted = ranking.relevant > 0
    labels, classes = run.queries.labels[counted], len(run.queries.class_names)
    queries = np.bincount(labels, minlength=classes)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(labels, values[counted], minlength=classes) / np.maximum(queries, 1)

    return Classes(queries, mean(ranking.right[:, 0]), mean(ranking.average_precision))


def confused_pairs(run: Run, ranking: Ranking, most: int) -> list[dict[str, Any]]:
    """The pairs of classes that are most often each other's wrong first neighbour.

    Args:
        run: the run.
        ranking: its.
        most: pairs to return, at most.

    Returns:
        `first` and `second`, the classes; `there`, how many queries of the first find the second;
        `back`, the reverse; `queries`, of both classes. Most confused first.
    """
    found_labels = run.queries.labels if run.gallery is None else run.gallery.labels
    wrong = ~ranking.right[:, 0] & (ranking.relevant > 0)
    asked = run.queries.labels[wrong].astype(np.int64)
    found = found_labels[ranking.neighbours[wrong, 0]].astype(np.int64)
    classes = len(run.queries.class_names)
    low, high = np.minimum(asked, found), np.maximum(asked, found)
    pairs, place, counts = np.unique(low * classes + high, return_inverse=True, return_counts=True)
    there = np.bincount(place, asked == low, minlength=len(pairs)).astype(int)
    queries = by_class(run, ranking).queries
    return [
        {
            "first": int(pairs[i] // classes),
            "second": int(pairs[i] % classes),
            "there": int(there[i]),
            "back": int(counts[i] - there[i]),
            "queries": int(queries[pairs[i] // classes] + queries[pairs[i] % classes]),
        }
        for i in np.lexsort((pairs, -counts))[:most]
    ]


def similarity_histogram(
    run: Run,
) -> tuple[Int64[np.ndarray, " bins"], Int64[np.ndarray, " bins"]]:
    """Counts the cosines of same-class pairs and of other pairs, of no image with itself.

    Of thousands of queries, a fixed random choice is compared with everything.

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
            bins[np.arange(len(rows)), rows] = BINS  # An image with itself, counted nowhere.
        everything = np.bincount(bins.ravel(), minlength=BINS + 1)[:BINS]
        matching = np.bincount(bins[equal], minlength=BINS + 1)[:BINS]
        same, other = same + matching, other + everything - matching
    return same, other
