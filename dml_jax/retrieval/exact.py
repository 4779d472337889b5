"""Exact nearest neighbours and k-means through faiss, which only this module and `index` know.

On a GPU machine JAX takes most of the memory at start; what it leaves (25 % by default) must hold
the gallery and faiss's scratch space. `XLA_PYTHON_CLIENT_MEM_FRACTION` leaves more.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, Int64

from dml_jax.retrieval.topk import MeshSearcher, check_depth

try:
    import faiss
except ImportError as error:  # pragma: no cover
    raise ImportError(
        "retrieval needs faiss: install dml_jax with the extra [cpu] or [cuda]"
    ) from error

BACKENDS = ("auto", "cpu", "gpu", "jax")
"""Names of what searches run on: faiss on the CPU or the first GPU, or JAX on its devices."""

# The most neighbours that faiss's GPU selection can return.
GPU_MAX_K = 2048
# faiss would take 1.5 GB, which a small card shared with JAX does not have left.
_GPU_SCRATCH_BYTES = 512 << 20


def choose(backend: str) -> str:
    """What searches run on for one of `BACKENDS`: "cpu", "gpu" or "jax".

    For "auto" that is the GPU if faiss sees one; else JAX if it has other devices than CPUs, such
    as TPUs; else the CPU.

    Raises:
        ValueError: if the name is unknown, or "gpu" is asked for and faiss sees none.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    visible = faiss.get_num_gpus() > 0
    if backend == "gpu" and not visible:
        raise ValueError(
            'backend "gpu": faiss sees no GPU; install a GPU build of faiss or use another backend'
        )
    if backend != "auto":
        return backend
    if visible:
        return "gpu"
    return "cpu" if jax.default_backend() == "cpu" else "jax"


def make(gallery: Float32[np.ndarray, "n d"], backend: str) -> "Searcher | MeshSearcher":
    """A gallery to search in.

    Args:
        gallery: [n, d] embeddings, finite.
        backend: as `choose` returns it.
    """
    return MeshSearcher(gallery) if backend == "jax" else Searcher(gallery, gpu=backend == "gpu")


class Searcher:
    """Exact inner-product search in a gallery of embeddings.

    Equal similarities come in whatever order faiss finds them, which may depend on how many
    queries are asked for at once. What needs one fixed order must not rely on ties.
    """

    def __init__(self, gallery: Float32[np.ndarray, "n d"], *, gpu: bool = False) -> None:
        """Index the gallery, [n, d] embeddings, in memory or on the first GPU."""
        self._cpu_index = faiss.IndexFlatIP(gallery.shape[1])
        self._cpu_index.add(gallery)
        self._index = _to_gpu(self._cpu_index) if gpu else self._cpu_index

    def nearest(
        self,
        queries: Float32[np.ndarray, "q d"],
        k: int,
        *,
        own: Int64[np.ndarray, " q"] | None = None,
    ) -> Int64[np.ndarray, "q k"]:
        """The gallery indices of the k nearest neighbours of each query, nearest first.

        More than `GPU_MAX_K` neighbours are searched on the CPU whatever the backend.

        Args:
            queries: [q, d] embeddings.
            k: number of neighbours, at most n, or n - 1 with `own`.
            own: [q] the gallery index of each query itself, to be left out. It is left out by this
                index and not by its rank: copies of an image may come before the image itself.

        Returns:
            [q, k] indices.

        Raises:
            ValueError: if the gallery holds fewer than k (other) images.
        """
        check_depth(k, self._cpu_index.ntotal, own=own is not None)
        wanted = k if own is None else k + 1
        index = self._cpu_index if wanted > GPU_MAX_K else self._index
        _, ids = index.search(queries, wanted)
        return ids if own is None else without_own(ids, own)


def without_own(
    ids: Int64[np.ndarray, "q wider"], own: Int64[np.ndarray, " q"]
) -> Int64[np.ndarray, "q k"]:
    """Leaves the query itself out of its neighbours, or else the last of them.

    Args:
        ids: [q, k + 1] gallery indices, nearest first.
        own: [q] the gallery index of each query.

    Returns:
        [q, k] indices.
    """
    keep = ids != own[:, None]
    # With enough copies before it, a query is not even among its k + 1 nearest.
    keep[keep.all(axis=1), -1] = False
    return ids[keep].reshape(len(ids), -1)


def unit_rows(
    vectors: Float32[np.ndarray, "n d"], what: str = "embeddings"
) -> Float32[np.ndarray, "n d"]:
    """Vectors of length 1, in a new array; those of length 0 stay so.

    Args:
        vectors: [n, d].
        what: to call them in an error.

    Raises:
        ValueError: some are not finite.
    """
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    bad = np.flatnonzero(~np.isfinite(norms))
    if len(bad):
        raise ValueError(f"{len(bad)} {what} are not finite in float32, the first in row {bad[0]}")
    norms[norms == 0] = 1
    return np.divide(vectors, norms[:, None], out=np.empty_like(vectors), casting="same_kind")


def kmeans(
    embeddings: Float32[np.ndarray, "n d"], clusters: int, *, gpu: bool = False, seed: int = 0
) -> Int64[np.ndarray, " n"]:
    """Assign each embedding to one of k-means' clusters (Euclidean, 25 iterations).

    Args:
        embeddings: [n, d].
        clusters: number of clusters, at most n.
        gpu: whether to run on the first GPU.
        seed: of the initial centroids.

    Returns:
        [n] cluster numbers in 0..clusters-1.
    """
    model = faiss.Kmeans(
        embeddings.shape[1],
        clusters,
        niter=25,
        seed=seed,
        # No warning about small clusters, and no subsampling of large ones.
        min_points_per_centroid=1,
        max_points_per_centroid=len(embeddings),
    )
    if gpu:
        # Kmeans(gpu=1) would take every GPU, since 1 == True.
        model.index = _to_gpu(model.index)
    model.train(embeddings)
    return model.assign(embeddings)[1]


def _to_gpu(index: Any) -> Any:
    """Copy a faiss index to the first GPU."""
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(_GPU_SCRATCH_BYTES)
    return faiss.index_cpu_to_gpu(resources, 0, index)
