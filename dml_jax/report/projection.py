"""Two-dimensional maps of embeddings by t-SNE."""

import numpy as np
from jaxtyping import Float32, Float64

from dml_jax._utils import extras
from dml_jax.retrieval import exact

with extras.required_by("report"):
    import openTSNE
    from openTSNE import affinity, initialization, nearest_neighbors

_PERPLEXITY = 30
# With fewer points the map is their first two principal components.
_MIN_POINTS = 8


def project(
    vectors: Float32[np.ndarray, "n d"], *, start: Float64[np.ndarray, "n 2"] | None = None
) -> Float64[np.ndarray, "n 2"]:
    """Returns a two-dimensional t-SNE map of unit vectors.

    Neighbours are exact (faiss); gradients are openTSNE's interpolated ones. The result is
    deterministic.

    Source: van der Maaten and Hinton, Visualizing data using t-SNE, JMLR 2008.

    Args:
        vectors: unit vectors.
        start: initial positions of the same images, so that maps of several runs can be compared;
            by default the first two principal components.

    Returns:
        Positions in 0..1.
    """
    if len(vectors) < _MIN_POINTS:
        centred = vectors.astype(np.float64) - vectors.mean(axis=0)
        left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
        positions = np.zeros((len(vectors), 2))
        positions[:, : len(sizes)] = (left * sizes)[:, :2]
        return _into_square(positions)
    neighbours = min(3 * _PERPLEXITY, len(vectors) - 1)
    ids = exact.Searcher(vectors).nearest(vectors, neighbours, own=np.arange(len(vectors)))
    distances = np.stack(
        [np.linalg.norm(vectors[near] - vectors[i], axis=1) for i, near in enumerate(ids)]
    )
    affinities = affinity.PerplexityBasedNN(
        perplexity=neighbours / 3,
        knn_index=nearest_neighbors.PrecomputedNeighbors(ids, distances),
    )
    if start is None:
        initial, exaggerated, iterations = initialization.pca(vectors, random_state=0), 100, 300
    else:
        initial, exaggerated, iterations = initialization.rescale(start), 30, 170
    positions = openTSNE.TSNE(
        early_exaggeration_iter=exaggerated,
        n_iter=iterations,
        negative_gradient_method="fft" if len(vectors) > 2000 else "bh",
        # Half the default grid resolution takes a third of the time, without a visible difference.
        ints_in_interval=2,
        random_state=0,
    ).fit(affinities=affinities, initialization=initial)
    return _into_square(np.asarray(positions, np.float64))


def _into_square(positions: Float64[np.ndarray, "n 2"]) -> Float64[np.ndarray, "n 2"]:
    # Quantiles, so that a few outliers do not compress the rest of the map.
    low, high = np.quantile(positions, [0.001, 0.999], axis=0)
    size = max((high - low).max(), 1e-12)
    return np.clip((positions - (low + high) / 2) / size / 1.06 + 0.5, 0, 1)
