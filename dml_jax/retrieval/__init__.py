"""Zero-shot retrieval: metrics of exact nearest-neighbour search."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, Shaped
from numpy.typing import ArrayLike

from dml_jax._utils.errors import UserError
from dml_jax.retrieval import classes, exact, inputs, metrics, reranking, verification
from dml_jax.retrieval.diagnostics import diagnose

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
    precision_at: Sequence[int] = (),
    map_at: Sequence[int] = (),
    ami: bool = False,
    per_class: bool = False,
    confidence: float | None = None,
    fmr: Sequence[float] = (),
    rerank: str | None = None,
    same_images: bool = False,
    diagnostics: bool = False,
) -> dict[str, float]:
    """Returns retrieval metrics of an exact inner-product search of normalised embeddings.

    Without a gallery, each image is a query and all other images are its gallery; R is the number
    of other images of its class. The query is excluded by its index. With a gallery, nothing is
    excluded, and R is the number of gallery images of the query's class. The metrics exclude
    queries with R = 0, which `queries_without_match` counts. Neighbours of equal similarity are in
    the backend's order. With several processes, all must call this with the same arguments, since
    "jax" searches on the devices of all.

    Source: Musgrave et al., A Metric Learning Reality Check, ECCV 2020. `docs/how-to/metrics.md`
    defines every metric.

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
        precision_at: values of k for precision@k.
        map_at: values of k for MAP@k, normalised by min(k, R).
        ami: whether to compute the AMI of the same clustering (scikit-learn).
        per_class: whether to compute means over classes, too, which count each class once.
        confidence: share of the bootstrap samples over classes that an interval holds, such as
            0.95; by default there are no intervals.
        fmr: false match rates, for each of which a threshold and its FNMR are computed from all
            pairs, on the host.
        rerank: a method of `reranking.METHODS`; by default the order is that of the similarity.
        same_images: whether the gallery has the images of the queries in the same order, embedded
            in another way. The query's own image is then excluded, as without a gallery.
        diagnostics: whether to compute the diagnostics of the space of the queries.

    Returns:
        Fractions in 0..1: `recall@{k}` for each k, `r_precision`, `map@r`, `precision@{k}` and
        `map@{k}`; if requested, each of these as a mean over classes (`macro_{name}`), its interval
        (`{name}_low`, `{name}_high`), `nmi` and `ami`; for each false match rate f `fnmr@fmr{f}`,
        and the cosine `threshold@fmr{f}`; the fields of `diagnostics.Diagnostics`, which are not
        all fractions; and the count `queries_without_match`.

    Raises:
        ValueError: shapes do not match, an array is empty or not finite, a k is below 1 or larger
            than the gallery, no query has a match, a rate is not within 0..1 or needs more pairs,
            the backend or the method is not available, or `same_images` does not fit the others, or
            diagnostics need more classes or images.
        TypeError: labels or values of k are not integers, or embeddings are not real numbers.
        ModuleNotFoundError: AMI needs scikit-learn.
    """
    exclude_query = gallery is None or same_images
    problem = _problem(embeddings, labels, gallery, exclude_query=exclude_query)
    queries, codes, targets, target_codes, relevant = problem
    if same_images and (gallery is None or fmr or not np.array_equal(codes, target_codes)):
        raise UserError("same_images needs a gallery with the labels of the queries, and no fmr")
    levels = {"recall_at": recall_at, "precision_at": precision_at, "map_at": map_at}
    for name, values in levels.items():
        inputs.check_levels(name, values, len(targets) - exclude_query)
    inputs.check_rates("confidence", [] if confidence is None else [confidence])
    inputs.check_rates("fmr", fmr)
    backend = exact.choose(backend)
    with_match = np.count_nonzero(relevant)
    if with_match == 0:
        raise UserError("no query has an image of its class in the gallery")

    described = diagnose(queries, codes)._asdict() if diagnostics else {}
    search = reranking.searcher(targets, backend, rerank, exclude_query=exclude_query)
    depth, blocks = max([1, *recall_at, *precision_at, *map_at]), []
    for rows, k in _blocks(relevant, depth):
        matches = target_codes[search(queries, rows, k)] == codes[rows, None]
        blocks.append((codes[rows], _of_queries(matches, relevant[rows], **levels)))
    others = None if gallery is None else (targets, target_codes)
    return {
        **_means(blocks, per_class, confidence),
        **described,
        **_of_clusters(queries, codes, nmi=nmi, ami=ami, gpu=backend == "gpu"),
        **_of_pairs(queries, codes, others, fmr),
        "queries_without_match": float(len(queries) - with_match),
    }


class _Problem(NamedTuple):
    """Checked queries and gallery, with classes numbered from 0."""

    queries: Float32[np.ndarray, "n d"]
    codes: Int32[np.ndarray, " n"]
    targets: Float32[np.ndarray, "m d"]
    target_codes: Int32[np.ndarray, " m"]
    relevant: Int64[np.ndarray, " n"]
    """Number of gallery images of each query's class."""


def _problem(
    embeddings: ArrayLike,
    labels: ArrayLike,
    gallery: tuple[ArrayLike, ArrayLike] | None,
    *,
    exclude_query: bool,
) -> _Problem:
    queries, query_labels = inputs.validate(embeddings, labels, "")
    targets, target_labels = (
        (queries, query_labels) if gallery is None else inputs.validate(*gallery, "gallery ")
    )
    if queries.shape[1] != targets.shape[1]:
        raise UserError(
            f"embeddings have {queries.shape[1]} dimensions, the gallery's {targets.shape[1]}"
        )
    names, codes = np.unique(np.concatenate([query_labels, target_labels]), return_inverse=True)
    query_codes, target_codes = np.split(codes.astype(np.int32), [len(queries)])
    relevant = np.bincount(target_codes, minlength=len(names))[query_codes] - exclude_query
    return _Problem(queries, query_codes, targets, target_codes, relevant)


def _of_clusters(
    queries: Float32[np.ndarray, "n d"],
    codes: Int32[np.ndarray, " n"],
    *,
    nmi: bool,
    ami: bool,
    gpu: bool,
) -> dict[str, float]:
    """Returns the requested metrics of a k-means clustering."""
    if not (nmi or ami):
        return {}
    clusters = exact.kmeans(queries, len(np.unique(codes)), gpu=gpu)
    found = {}
    if nmi:
        found["nmi"] = metrics.normalized_mutual_information(codes, clusters)
    if ami:
        found["ami"] = metrics.adjusted_mutual_information(codes, clusters)
    return found


def _of_pairs(
    queries: Float32[np.ndarray, "n d"],
    codes: Int32[np.ndarray, " n"],
    gallery: tuple[Float32[np.ndarray, "m d"], Int32[np.ndarray, " m"]] | None,
    fmr: Sequence[float],
) -> dict[str, float]:
    """Returns the FNMR at each false match rate, and the threshold."""
    if not fmr:
        return {}
    found: dict[str, float] = {}
    points = verification.operating_points(queries, codes, gallery, fmr)
    for rate, point in zip(fmr, points, strict=True):
        found |= {f"fnmr@fmr{rate:g}": point.fnmr, f"threshold@fmr{rate:g}": point.threshold}
    return found


def _means(
    blocks: Sequence[tuple[Int32[np.ndarray, " _"], dict[str, Shaped[np.ndarray, " _"]]]],
    per_class: bool,
    confidence: float | None,
) -> dict[str, float]:
    """Returns the means of the metrics of all queries, given as blocks of classes and metrics."""
    codes, values = zip(*blocks, strict=True)
    count = sum(map(len, codes))
    means = {name: float(sum(x[name].sum() for x in values) / count) for name in values[0]}
    if not per_class and confidence is None:
        return means
    rows = [np.concatenate([x[name] for x in values]).astype(np.float64) for name in means]
    found = classes.by_class(np.array(rows), np.concatenate(codes))
    kinds = {False: means}
    if per_class:
        kinds[True] = {
            f"macro_{name}": float(mean)
            for name, mean in zip(means, classes.mean_over_classes(found), strict=True)
        }
    result = {name: mean for kind in kinds.values() for name, mean in kind.items()}
    if confidence is not None:
        for macro, kind in kinds.items():
            intervals = classes.intervals(found, confidence, per_class=macro).tolist()
            for name, (low, high) in zip(kind, intervals, strict=True):
                result |= {f"{name}_low": low, f"{name}_high": high}
    return result


def _of_queries(
    matches: Bool[np.ndarray, "q k"],
    relevant: Int64[np.ndarray, " q"],
    *,
    recall_at: Sequence[int],
    precision_at: Sequence[int],
    map_at: Sequence[int],
) -> dict[str, Shaped[np.ndarray, " q"]]:
    """Returns the metrics of each query of a block, by name."""
    recall, precision = (
        metrics.recall(matches, recall_at),
        metrics.precision(matches, precision_at),
    )
    return {
        **{f"recall@{k}": recall[:, i] for i, k in enumerate(recall_at)},
        "r_precision": metrics.r_precision(matches, relevant),
        "map@r": metrics.average_precision(matches, relevant),
        **{f"precision@{k}": precision[:, i] for i, k in enumerate(precision_at)},
        **{f"map@{k}": metrics.average_precision_at(matches, relevant, k) for k in map_at},
    }


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
