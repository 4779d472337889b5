"""Maps: many dimensions laid out in two, neighbours beside each other."""

import numpy as np
from jaxtyping import Float32, Float64

from dml_jax._utils import extras
from dml_jax.retrieval import exact

with extras.required_by("report"):
    import openTSNE
    from openTSNE import affinity, initialization, nearest_neighbors

_PERPLEXITY = 30
# Fewer points are laid out by principal components alone.
_LEAST = 8


def project(
    vectors: Float32[np.ndarray, "n d"], *, start: Float64[np.ndarray, "n 2"] | None = None
) -> Float64[np.ndarray, "n 2"]:
    """Lays out unit vectors in a plane by t-SNE.

    Van der Maaten and Hinton, Visualizing data using t-SNE, JMLR 2008; with the exact neighbours
    of faiss and openTSNE's interpolated gradients.

    Args:
        vectors: of length 1.
        start: a layout of the same images to begin with, so that maps of several runs look alike;
            by default the first two principal components.

    Returns:
        Places in 0..1, the same at every call.
    """
    if len(vectors) < _LEAST:
        centred = vectors.astype(np.float64) - vectors.mean(axis=0)
        left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
        places = np.zeros((len(vectors), 2))
        places[:, : len(sizes)] = (left * sizes)[:, :2]
        return _into_square(places)
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
        begin, exaggerated, iterations = initialization.pca(vectors, random_state=0), 100, 300
    else:
        begin, exaggerated, iterations = initialization.rescale(start), 30, 170
    places = openTSNE.TSNE(
        early_exaggeration_iter=exaggerated,
        n_iter=iterations,
        negative_gradient_method="fft" if len(vectors) > 2000 else "bh",
        # Half as fine a grid as by default: a third of the work, and as good a map.
        ints_in_interval=2,
        random_state=0,
    ).fit(affinities=affinities, initialization=begin)
    return _into_square(np.asarray(places, np.float64))


def _into_square(places: Float64[np.ndarray, "n 2"]) -> Float64[np.ndarray, "n 2"]:
    # A few far outliers must not press everything else together.
    low, high = np.quantile(places, [0.001, 0.999], axis=0)
    size = max((high - low).max(), 1e-12)
    return np.clip((places - (low + high) / 2) / size / 1.06 + 0.5, 0, 1)
