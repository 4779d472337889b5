"""Exact nearest neighbours and k-means with faiss.

Only this module and `dml_jax.search.index` import faiss.

On a GPU, JAX allocates 75 % of the memory at start; the rest must hold the gallery and faiss's
scratch space. A lower `XLA_PYTHON_CLIENT_MEM_FRACTION` leaves more to faiss.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, Int64

from dml_jax._utils import extras
from dml_jax._utils.errors import UserError
from dml_jax.retrieval.topk import MeshSearcher, check_depth

with extras.required_by("cpu", "cuda", "tpu"):
    import faiss

BACKENDS = ("auto", "cpu", "gpu", "jax")
"""Search backends: faiss on the CPU or on the first GPU, or JAX on its devices."""

# The maximum number of neighbours of faiss's GPU search.
GPU_MAX_K = 2048
# The default of 1.5 GB does not fit on a small GPU shared with JAX.
_GPU_SCRATCH_BYTES = 512 << 20


def choose(backend: str) -> str:
    """Returns the backend for one of `BACKENDS`: "cpu", "gpu" or "jax".

    "auto" selects the GPU if faiss finds one; else JAX if its devices are not CPUs, such as TPUs;
    else the CPU.

    Raises:
        ValueError: the name is unknown, or it is "gpu" and faiss finds no GPU.
    """
    if backend not in BACKENDS:
        raise UserError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    gpu_available = faiss.get_num_gpus() > 0
    if backend == "gpu" and not gpu_available:
        raise UserError(
            'backend "gpu": faiss finds no GPU; install a GPU build of faiss or use another backend'
        )
    if backend != "auto":
        return backend
    if gpu_available:
        return "gpu"
    return "cpu" if jax.default_backend() == "cpu" else "jax"


def make(gallery: Float32[np.ndarray, "n d"], backend: str) -> "Searcher | MeshSearcher":
    """Returns a searcher of a gallery.

    Args:
        gallery: [n, d] embeddings, finite.
        backend: a backend that `choose` returned.
    """
    return MeshSearcher(gallery) if backend == "jax" else Searcher(gallery, gpu=backend == "gpu")


class Searcher:
    """Exact inner-product search in a gallery of embeddings.

    The order of equal similarities is faiss's, which may depend on the number of queries.
    """

    def __init__(self, gallery: Float32[np.ndarray, "n d"], *, gpu: bool = False) -> None:
        """Builds the index of a gallery [n, d], on the host or on the first GPU."""
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
        """Returns the gallery indices of the k nearest neighbours of each query, nearest first.

        A search for more than `GPU_MAX_K` neighbours runs on the CPU.

        Args:
            queries: [q, d] embeddings.
            k: number of neighbours, at most n, or n - 1 with `own`.
            own: [q] gallery index of each query, which is excluded. Excluding the first rank
                would be wrong, since copies of an image may precede the image itself.

        Returns:
            [q, k] indices.

        Raises:
            ValueError: the gallery has fewer than k (other) images.
        """
        check_depth(k, self._cpu_index.ntotal, own=own is not None)
        depth = k if own is None else k + 1
        index = self._cpu_index if depth > GPU_MAX_K else self._index
        _, ids = index.search(queries, depth)
        return ids if own is None else without_own(ids, own)


def without_own(
    ids: Int64[np.ndarray, "q wider"], own: Int64[np.ndarray, " q"]
) -> Int64[np.ndarray, "q k"]:
    """Returns neighbours without the query itself, or without the last one if it is not there.

    Args:
        ids: [q, k + 1] gallery indices, nearest first.
        own: [q] gallery index of each query.

    Returns:
        [q, k] indices.
    """
    keep = ids != own[:, None]
    # A query with k + 1 or more copies may not be among its k + 1 nearest neighbours.
    keep[keep.all(axis=1), -1] = False
    return ids[keep].reshape(len(ids), -1)


def unit_rows(
    vectors: Float32[np.ndarray, "n d"], name: str = "embeddings"
) -> Float32[np.ndarray, "n d"]:
    """Returns a new array of vectors scaled to length 1; zero vectors stay zero.

    Args:
        vectors: [n, d].
        name: name of the vectors in error messages.

    Raises:
        ValueError: a vector is not finite.
    """
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    nonfinite = np.flatnonzero(~np.isfinite(norms))
    if len(nonfinite):
        raise UserError(
            f"{len(nonfinite)} {name} are not finite in float32, the first in row {nonfinite[0]}"
        )
    norms[norms == 0] = 1
    return np.divide(vectors, norms[:, None], out=np.empty_like(vectors), casting="same_kind")


def kmeans(
    embeddings: Float32[np.ndarray, "n d"], clusters: int, *, gpu: bool = False, seed: int = 0
) -> Int64[np.ndarray, " n"]:
    """Returns a k-means clustering of embeddings (Euclidean, 25 iterations).

    Args:
        embeddings: [n, d].
        clusters: number of clusters, at most n.
        gpu: whether to run on the first GPU.
        seed: seed of the initial centroids.

    Returns:
        [n] cluster numbers in 0..clusters-1.
    """
    model = faiss.Kmeans(
        embeddings.shape[1],
        clusters,
        niter=25,
        seed=seed,
        # Disables the warning about small clusters and the subsampling of large ones.
        min_points_per_centroid=1,
        max_points_per_centroid=len(embeddings),
    )
    if gpu:
        # Kmeans(gpu=1) would use all GPUs, since 1 == True.
        model.index = _to_gpu(model.index)
    model.train(embeddings)
    return model.assign(embeddings)[1]


def _to_gpu(index: Any) -> Any:
    """Returns a copy of a faiss index on the first GPU."""
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(_GPU_SCRATCH_BYTES)
    return faiss.index_cpu_to_gpu(resources, 0, index)
