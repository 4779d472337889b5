"""Zero-shot retrieval: embed test images, search their neighbours, measure."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64
from numpy.typing import ArrayLike

from dml_jax.retrieval import exact, metrics

# One block of queries: as many as faiss multiplies at a time, and few enough that a block's
# neighbours (8 bytes each, and a few such arrays) stay near 64 MB whatever k.
_BLOCK_QUERIES = 4096
_BLOCK_NEIGHBOURS = 1 << 23


SCORES = {"R@1": "recall@1", "RP": "r_precision", "MAP@R": "map@r"}
"""The scores that papers compare, by the names they give them."""


def summary(metrics: Mapping[str, Any]) -> str:
    """The scores that papers compare, in percent, in a line."""
    return "  ".join(f"{name} {100 * metrics[metric]:.1f}" for name, metric in SCORES.items())


def evaluate(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    recall_at: Sequence[int] = (1, 2, 4, 8),
    gallery: tuple[ArrayLike, ArrayLike] | None = None,
    nmi: bool = False,
    backend: str = "auto",
) -> dict[str, float]:
    """Measure retrieval by exact inner-product search of normalised embeddings.

    Without a gallery each image queries all the others, itself left out by its index, and R is the
    number of other images of its class. With one nothing is left out and R is the size of the
    class in the gallery. Queries with R = 0 count for nothing but in `queries_without_match`.
    Metrics: Musgrave et al., "A Metric Learning Reality Check", ECCV 2020. Neighbours of equal
    similarity come in the backend's order, so exact ties between classes may count either way.
    Of several processes each must ask for the same, since "jax" searches on all their devices.

    Args:
        embeddings: [n, d] query embeddings, finite; they are normalised here.
        labels: [n] their classes, any integers.
        recall_at: the k of Recall@k.
        gallery: (embeddings [m, d], labels [m]) to search in; by default the queries themselves.
        nmi: also cluster the query embeddings by k-means, as many clusters as classes, and compare.
        backend: "cpu" or "gpu" (faiss), "jax" (its devices), or "auto": the GPU if faiss sees one,
            else JAX's devices unless they are CPUs, else the CPU. With "jax" k-means is faiss's.

    Returns:
        Fractions in 0..1: `recall@{k}` for each k, `r_precision`, `map@r`, with nmi `nmi`; and
        the count `queries_without_match`.

    Raises:
        ValueError: if shapes disagree, something is empty or not finite, a k is below 1 or larger
            than the gallery, no query has a match at all, or the backend is not to be had.
        TypeError: if labels or recall_at are not integers, or embeddings no real numbers.
    """
    queries, query_labels = _checked(embeddings, labels, "")
    itself = gallery is None
    targets, target_labels = (
        (queries, query_labels) if gallery is None else _checked(*gallery, "gallery ")
    )
    if queries.shape[1] != targets.shape[1]:
        raise ValueError(
            f"embeddings have {queries.shape[1]} dimensions, the gallery's {targets.shape[1]}"
        )
    available = len(targets) - itself
    if not all(isinstance(k, int | np.integer) for k in recall_at):
        raise TypeError(f"recall_at={tuple(recall_at)} must be whole numbers")
    if not all(1 <= k <= available for k in recall_at):
        raise ValueError(
            f"recall_at={tuple(recall_at)} must lie in 1..{available}, "
            f"the images that a query can find"
        )
    backend = exact.choose(backend)

    classes, codes = np.unique(np.concatenate([query_labels, target_labels]), return_inverse=True)
    query_codes, target_codes = np.split(codes.astype(np.int32), [len(queries)])
    relevant = np.bincount(target_codes, minlength=len(classes))[query_codes] - itself
    answerable = np.count_nonzero(relevant)
    if answerable == 0:
        raise ValueError("no query has an image of its class to find: every class is a single one")

    searcher = exact.make(targets, backend)
    totals = np.zeros(len(recall_at) + 2)
    for rows, k in _blocks(relevant, max(recall_at, default=1)):
        ids = searcher.nearest(queries[rows], k, own=rows if itself else None)
        matches = target_codes[ids] == query_codes[rows, None]
        totals[:-2] += metrics.recall(matches, recall_at).sum(axis=0)
        totals[-2] += metrics.r_precision(matches, relevant[rows]).sum()
        totals[-1] += metrics.average_precision(matches, relevant[rows]).sum()

    names = [*(f"recall@{k}" for k in recall_at), "r_precision", "map@r"]
    result = dict(zip(names, (totals / answerable).tolist(), strict=True))
    if nmi:
        clusters = exact.kmeans(queries, len(np.unique(query_codes)), gpu=backend == "gpu")
        result["nmi"] = metrics.normalized_mutual_information(query_codes, clusters)
    result["queries_without_match"] = float(len(queries) - answerable)
    return result


def _blocks(
    relevant: Int64[np.ndarray, " n"], least: int
) -> Iterator[tuple[Int64[np.ndarray, " q"], int]]:
    """Yield blocks of queries that have a match, with the number of neighbours a block needs.

    Queries of large classes come first, so that only they are searched deeply.
    """
    order = np.argsort(-relevant, kind="stable")[: np.count_nonzero(relevant)]
    start = 0
    while start < len(order):
        k = int(max(relevant[order[start]], least))
        stop = start + max(1, min(_BLOCK_QUERIES, _BLOCK_NEIGHBOURS // k))
        yield order[start:stop], k
        start = stop


def _array(embeddings: ArrayLike, what: str) -> Float32[np.ndarray, "..."]:
    """Real numbers in float32, where those that are too large become infinite."""
    try:
        given = np.asarray(embeddings)
    except ValueError as error:  # Rows of different lengths.
        raise ValueError(f"{what}embeddings are no array: {error}") from None
    if not (np.issubdtype(given.dtype, np.floating) or np.issubdtype(given.dtype, np.integer)):
        raise TypeError(f"{what}embeddings must be real numbers, got {given.dtype}")
    with np.errstate(over="ignore"):
        return given.astype(np.float32, copy=False)


def _checked(
    embeddings: ArrayLike, labels: ArrayLike, what: str
) -> tuple[Float32[np.ndarray, "n d"], Int64[np.ndarray, " n"]]:
    """Refuse what cannot be evaluated; return unit embeddings (zero ones stay zero) and labels."""
    vectors, classes = _array(embeddings, what), np.asarray(labels)
    if vectors.ndim != 2 or classes.ndim != 1:
        raise ValueError(
            f"{what}embeddings must be [n, d] and labels [n], "
            f"got shapes {vectors.shape} and {classes.shape}"
        )
    if vectors.size == 0:
        raise ValueError(f"{what}embeddings are empty: shape {vectors.shape}")
    if len(vectors) != len(classes):
        raise ValueError(f"{len(vectors)} {what}embeddings but {len(classes)} labels")
    if not np.issubdtype(classes.dtype, np.integer):
        raise TypeError(f"{what}labels must be integers, got {classes.dtype}")
    return exact.unit_rows(vectors, f"{what}embeddings"), classes.astype(np.int64)
