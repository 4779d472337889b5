"""Re-ranking: neighbours in a better order, at the cost of more work for each query."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float32, Int64

from dml_jax._utils.errors import UserError
from dml_jax.retrieval import exact

METHODS = ("aqe", "k_reciprocal")
"""Alpha query expansion, which searches again, and k-reciprocal encoding of a shortlist."""

EXPANSION = 10
"""Neighbours of which an expanded query is made."""

SHORTLIST = 100
"""Neighbours that k-reciprocal encoding re-orders; those beyond stay in their order."""

_BATCH = 32  # Queries at a time, with a few [SHORTLIST + 1, SHORTLIST + 1] arrays each.


def searcher(
    gallery: Float32[np.ndarray, "n d"], backend: str, method: str | None, *, exclude_query: bool
) -> Callable[
    [Float32[np.ndarray, "all d"], Int64[np.ndarray, " q"], int], Int64[np.ndarray, "q k"]
]:
    """Returns a search of some rows of the queries for k neighbours each, with re-ranking.

    Args:
        gallery: [n, d] unit vectors.
        backend: a backend that `exact.choose` returned.
        method: one of `METHODS`; None searches once, without re-ranking.
        exclude_query: whether the queries and the gallery are the same images in the same order,
            so that each query excludes its own.

    Raises:
        ValueError: there is no such method.
    """
    if method not in (None, *METHODS):
        raise UserError(f"rerank must be one of {', '.join(METHODS)}, got {method!r}")
    plain, available = exact.make(gallery, backend), len(gallery) - exclude_query

    def search(
        queries: Float32[np.ndarray, "all d"], rows: Int64[np.ndarray, " q"], k: int
    ) -> Int64[np.ndarray, "q k"]:
        chosen, own = queries[rows], rows if exclude_query else None
        if method == "aqe":
            ids = plain.nearest(chosen, min(EXPANSION, available), own=own)
            chosen = expand(chosen, gallery[ids])
        if method != "k_reciprocal":
            return plain.nearest(chosen, k, own=own)
        ids = plain.nearest(chosen, min(max(k, SHORTLIST), available), own=own)
        for start in range(0, len(ids), _BATCH):
            shortlist = ids[start : start + _BATCH, :SHORTLIST]
            order = k_reciprocal(chosen[start : start + _BATCH], gallery[shortlist])
            shortlist[:] = np.take_along_axis(shortlist, order, axis=1)
        return ids[:, :k]

    return search


def expand(
    queries: Float32[np.ndarray, "q d"],
    neighbours: Float32[np.ndarray, "q n d"],
    *,
    alpha: float = 3.0,
) -> Float32[np.ndarray, "q d"]:
    """Returns queries expanded by their neighbours (alpha-QE), to search with.

    The sum of the query and its neighbours, each times its similarity to the query to the power of
    alpha, scaled to length 1. Neighbours of negative similarity add nothing.

    Source: Radenović et al., Fine-tuning CNN Image Retrieval with No Human Annotation, TPAMI 2019,
    section 3.3, with alpha = 3. They use 50 neighbours; `EXPANSION` is 10, because classes with a
    few images are common here.

    Args:
        queries: [q, d] unit vectors.
        neighbours: [q, n, d] unit vectors of the nearest neighbours.
        alpha: the power.

    Returns:
        [q, d] unit vectors.
    """
    weights = np.maximum(np.einsum("qd,qnd->qn", queries, neighbours), 0) ** np.float32(alpha)
    expanded = queries + np.einsum("qn,qnd->qd", weights, neighbours)
    lengths = np.linalg.norm(expanded, axis=1, keepdims=True)
    return expanded / np.where(lengths > 0, lengths, 1)


def k_reciprocal(
    queries: Float32[np.ndarray, "q d"],
    shortlists: Float32[np.ndarray, "q m d"],
    *,
    k1: int = 20,
    k2: int = 6,
    weight: float = 0.3,
) -> Int64[np.ndarray, "q m"]:
    """Returns the order of shortlists by k-reciprocal encoding.

    Each query is re-ranked on its own: the images among which neighbours are sought are the query
    and its shortlist. The distance is 1 - cosine. An image is its own nearest neighbour.

    Source: Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding, CVPR 2017,
    equations 1-12, with their k1, k2 and lambda. Their program differs from the paper: it divides
    the distances of an image by the largest, and the encodings by their sums.

    Args:
        queries: [q, d] unit vectors.
        shortlists: [q, m, d] unit vectors of the nearest neighbours, nearest first.
        k1: neighbours that must be mutual.
        k2: neighbours whose encodings are averaged.
        weight: share of the original distance; the rest is the Jaccard distance.

    Returns:
        [q, m] positions in the shortlist, the nearest first.
    """
    images = np.concatenate([queries[:, None], shortlists], axis=1)
    # einsum, because the threads of BLAS wait for each other longer than such products take.
    distances = 1 - np.einsum("qid,qjd->qij", images, images)
    count = images.shape[1]
    ranked = distances.copy()
    ranked[:, np.arange(count), np.arange(count)] = -np.inf
    order = np.argsort(ranked, axis=2, kind="stable")
    mutual, half = _mutual(order, k1 + 1), _mutual(order, k1 // 2 + 1)
    # A mutual neighbour brings its own, if two thirds of these are mutual neighbours already.
    halves = half.astype(np.float32)
    shared = np.einsum("qim,qjm->qij", mutual.astype(np.float32), halves)
    brings = mutual & (3 * shared >= 2 * halves.sum(axis=2)[:, None])
    # Being mutual is symmetric, so that rows can stand for columns.
    members = mutual | (np.einsum("qim,qjm->qij", brings.astype(np.float32), halves) > 0)
    encodings = np.where(members, np.exp(-distances), np.float32(0))
    averaged = [
        np.take_along_axis(encodings, order[:, :, i, None], 1) for i in range(min(k2, count))
    ]
    encodings = np.mean(averaged, axis=0)
    least = np.minimum(encodings[:, :1], encodings[:, 1:]).sum(axis=2)
    most = np.maximum(encodings[:, :1], encodings[:, 1:]).sum(axis=2)
    jaccard = 1 - least / most
    final = np.float32(1 - weight) * jaccard + np.float32(weight) * distances[:, 0, 1:]
    return np.argsort(final, axis=1, kind="stable")


def _first(order: Int64[np.ndarray, "q m m"], k: int) -> Bool[np.ndarray, "q m m"]:
    """Returns whether each image is among the first k of each other's order."""
    found = np.zeros(order.shape, bool)
    np.put_along_axis(found, order[:, :, :k], True, axis=2)
    return found


def _mutual(order: Int64[np.ndarray, "q m m"], k: int) -> Bool[np.ndarray, "q m m"]:
    """Returns whether two images are each among the first k of the other's order."""
    found = _first(order, k)
    return found & found.swapaxes(1, 2)
