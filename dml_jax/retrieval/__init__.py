"""Zero-shot retrieval: metrics of exact nearest-neighbour search."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64
from numpy.typing import ArrayLike

from dml_jax._utils.errors import UserError
from dml_jax.retrieval import exact, metrics

# Queries per block: as many as faiss processes at a time, but so few that the neighbours of a block
# (8 bytes each, in a few arrays) need about 64 MB for any k.
_BLOCK_QUERIES = 4096
_BLOCK_NEIGHBOURS = 1 << 23

SCORES = {"R@1": "recall@1", "RP": "r_precision", "MAP@R": "map@r"}
"""The metrics that papers report, by their names in the papers."""


def summary(metrics: Mapping[str, Any]) -> str:
    """Returns a line with the metrics that papers report, in percent."""
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
    """Returns retrieval metrics of an exact inner-product search of normalised embeddings.

    Without a gallery, each image is a query and all other images are its gallery; R is the number
    of other images of its class. The query is excluded by its index. With a gallery, nothing is
    excluded, and R is the number of gallery images of the query's class. The metrics exclude
    queries with R = 0, which `queries_without_match` counts. Neighbours of equal similarity are in
    the backend's order. With several processes, all must call this with the same arguments, since
    "jax" searches on the devices of all.

    Source: Musgrave et al., A Metric Learning Reality Check, ECCV 2020.

    Args:
        embeddings: [n, d] query embeddings, finite; this function normalises them.
        labels: [n] classes of the queries, any integers.
        recall_at: values of k for Recall@k.
        gallery: (embeddings [m, d], labels [m]) of the gallery; by default the queries.
        nmi: whether to compute the NMI of the classes and a k-means clustering of the queries with
            as many clusters.
        backend: "cpu" or "gpu" for faiss, "jax" for JAX's devices, or "auto": the GPU if faiss
            finds one, else JAX's devices unless they are CPUs, else the CPU. The k-means of "jax"
            uses faiss.

    Returns:
        Fractions in 0..1: `recall@{k}` for each k, `r_precision`, `map@r` and, if requested, `nmi`;
        and the count `queries_without_match`.

    Raises:
        ValueError: shapes do not match, an array is empty or not finite, a k is below 1 or larger
            than the gallery, no query has a match, or the backend is not available.
        TypeError: labels or recall_at are not integers, or embeddings are not real numbers.
    """
    queries, query_labels = _validate(embeddings, labels, "")
    exclude_query = gallery is None
    targets, target_labels = (
        (queries, query_labels) if gallery is None else _validate(*gallery, "gallery ")
    )
    if queries.shape[1] != targets.shape[1]:
        raise UserError(
            f"embeddings have {queries.shape[1]} dimensions, the gallery's {targets.shape[1]}"
        )
    available = len(targets) - exclude_query
    if not all(isinstance(k, int | np.integer) for k in recall_at):
        raise TypeError(f"recall_at={tuple(recall_at)} must be integers")
    if not all(1 <= k <= available for k in recall_at):
        raise UserError(
            f"recall_at={tuple(recall_at)} must be in 1..{available}, the number of gallery images"
        )
    backend = exact.choose(backend)

    classes, codes = np.unique(np.concatenate([query_labels, target_labels]), return_inverse=True)
    query_codes, target_codes = np.split(codes.astype(np.int32), [len(queries)])
    relevant = np.bincount(target_codes, minlength=len(classes))[query_codes] - exclude_query
    with_match = np.count_nonzero(relevant)
    if with_match == 0:
        raise UserError("no query has an image of its class in the gallery")

    searcher = exact.make(targets, backend)
    totals = np.zeros(len(recall_at) + 2)
    for rows, k in _blocks(relevant, max(recall_at, default=1)):
        ids = searcher.nearest(queries[rows], k, own=rows if exclude_query else None)
        matches = target_codes[ids] == query_codes[rows, None]
        totals[:-2] += metrics.recall(matches, recall_at).sum(axis=0)
        totals[-2] += metrics.r_precision(matches, relevant[rows]).sum()
        totals[-1] += metrics.average_precision(matches, relevant[rows]).sum()

    names = [*(f"recall@{k}" for k in recall_at), "r_precision", "map@r"]
    result = dict(zip(names, (totals / with_match).tolist(), strict=True))
    if nmi:
        clusters = exact.kmeans(queries, len(np.unique(query_codes)), gpu=backend == "gpu")
        result["nmi"] = metrics.normalized_mutual_information(query_codes, clusters)
    result["queries_without_match"] = float(len(queries) - with_match)
    return result


def _blocks(
    relevant: Int64[np.ndarray, " n"], min_neighbours: int
) -> Iterator[tuple[Int64[np.ndarray, " q"], int]]:
    """Yields blocks of queries that have a match, with the number of neighbours a block needs.

    Queries of large classes come first, so that only their blocks need many neighbours.
    """
    order = np.argsort(-relevant, kind="stable")[: np.count_nonzero(relevant)]
    start = 0
    while start < len(order):
        k = int(max(relevant[order[start]], min_neighbours))
        stop = start + max(1, min(_BLOCK_QUERIES, _BLOCK_NEIGHBOURS // k))
        yield order[start:stop], k
        start = stop


def _as_float32(embeddings: ArrayLike, prefix: str) -> Float32[np.ndarray, "..."]:
    """Returns real numbers as float32; numbers out of range become infinite."""
    try:
        given = np.asarray(embeddings)
    except ValueError as error:  # Rows of different lengths.
        raise UserError(f"{prefix}embeddings are not an array: {error}") from None
    if not (np.issubdtype(given.dtype, np.floating) or np.issubdtype(given.dtype, np.integer)):
        raise TypeError(f"{prefix}embeddings must be real numbers, got {given.dtype}")
    with np.errstate(over="ignore"):
        return given.astype(np.float32, copy=False)


def _validate(
    embeddings: ArrayLike, labels: ArrayLike, prefix: str
) -> tuple[Float32[np.ndarray, "n d"], Int64[np.ndarray, " n"]]:
    """Returns unit embeddings (zero ones stay zero) and labels; raises an error if invalid."""
    vectors, classes = _as_float32(embeddings, prefix), np.asarray(labels)
    if vectors.ndim != 2 or classes.ndim != 1:
        raise UserError(
            f"{prefix}embeddings must be [n, d] and labels [n], "
            f"got shapes {vectors.shape} and {classes.shape}"
        )
    if vectors.size == 0:
        raise UserError(f"{prefix}embeddings are empty: shape {vectors.shape}")
    if len(vectors) != len(classes):
        raise UserError(f"{len(vectors)} {prefix}embeddings but {len(classes)} labels")
    if not np.issubdtype(classes.dtype, np.integer):
        raise TypeError(f"{prefix}labels must be integers, got {classes.dtype}")
    return exact.unit_rows(vectors, f"{prefix}embeddings"), classes.astype(np.int64)
