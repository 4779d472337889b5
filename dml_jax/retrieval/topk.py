"""Exact nearest neighbours in JAX, for devices that faiss does not support, such as TPUs.

The rows of the gallery are sharded over the mesh. Each device compares the queries with its shard,
one chunk at a time, and keeps the nearest neighbours so far. The devices then merge their results,
each for a part of the queries. So the temporary memory does not grow with the gallery.
"""

import functools
from collections import deque
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int, Int64

from dml_jax._utils import sharding
from dml_jax._utils.errors import UserError

_CHUNK_ROWS = 8192  # Maximum number of gallery rows that a device compares with at a time.
# Maximum number of similarities in an array, for a block of queries with a chunk and the nearest
# neighbours so far; there are a few such arrays.
_BLOCK_SIMILARITIES = 1 << 23


class MeshSearcher:
    """Exact inner-product search in a gallery of embeddings, sharded over devices.

    Neighbours of equal similarity are in the order of their indices.
    """

    def __init__(self, gallery: Float32[np.ndarray, "n d"], mesh: Mesh | None = None) -> None:
        """Copies the gallery to the devices.

        Args:
            gallery: [n, d] embeddings, finite. Every process passes the whole gallery.
            mesh: a mesh with the axis `data`; by default all devices.
        """
        self._mesh = sharding.make_mesh() if mesh is None else mesh
        self._count, dim = gallery.shape
        shard_rows = -(-self._count // self._mesh.size)
        chunks = -(-shard_rows // _CHUNK_ROWS)
        self._rows = -(-shard_rows // chunks)

        shape = (chunks * self._mesh.size, self._rows, dim)
        padding = shape[0] * self._rows - self._count
        padded = np.pad(gallery, ((0, padding), (0, 0))).reshape(shape)
        self._gallery = _put(padded, sharding.batch_sharding(self._mesh))

    def nearest(
        self,
        queries: Float32[np.ndarray, "q d"],
        k: int,
        *,
        own: Int64[np.ndarray, " q"] | None = None,
    ) -> Int64[np.ndarray, "q k"]:
        """Returns the gallery indices of the k nearest neighbours of each query, nearest first.

        With several processes, all must call this with the same arguments.

        Args:
            queries: [q, d] embeddings, finite.
            k: number of neighbours, at most n, or n - 1 with `own`.
            own: [q] gallery index of each query, which is excluded.

        Returns:
            [q, k] indices.

        Raises:
            ValueError: the gallery has fewer than k (other) images.
        """
        check_depth(k, self._count, own=own is not None)
        # Each shape is compiled, so powers of two limit their number.
        depth = min(_next_power_of_two(k), self._count)
        limit = max(1, _BLOCK_SIMILARITIES // (self._rows + depth))
        rows = min(1 << (limit.bit_length() - 1), _next_power_of_two(len(queries)))
        rows = -(-rows // self._mesh.size) * self._mesh.size
        own = np.full(len(queries), -1) if own is None else own
        result = np.empty((len(queries), k), np.int64)
        pending: deque[tuple[int, jax.Array]] = deque()
        for start in range(0, len(queries), rows):
            pending.append((start, self._search_block(queries, own, start, rows, depth)))
            if len(pending) == 2:
                _fetch(*pending.popleft(), result)
        while pending:
            _fetch(*pending.popleft(), result)
        return result

    def _search_block(
        self,
        queries: Float32[np.ndarray, "q d"],
        own: Int64[np.ndarray, " q"],
        start: int,
        rows: int,
        depth: int,
    ) -> jax.Array:
        """Dispatches the search of a block of queries, padded to `rows`."""
        block = queries[start : start + rows]
        padding = rows - len(block)
        block = np.pad(block, ((0, padding), (0, 0)))
        block_own = np.pad(own[start : start + rows], (0, padding)).astype(np.int32)
        replicated = sharding.replicated_sharding(self._mesh)
        arguments = _put(block, replicated), _put(block_own, replicated)
        return _nearest(self._gallery, *arguments, k=depth, count=self._count, mesh=self._mesh)


class _Best(NamedTuple):
    """Nearest gallery rows so far, nearest first."""

    similarities: jax.Array
    rows: jax.Array


def check_depth(k: int, count: int, *, own: bool) -> None:
    """Raises ValueError unless a gallery has k images or, with `own`, k other than the query."""
    if not 1 <= k <= count - own:
        raise UserError(
            f"cannot find {k} neighbours{' besides the query' if own else ''} "
            f"in a gallery of {count} images"
        )


def _put(array: np.ndarray, placement: NamedSharding) -> jax.Array:
    """Copies an array to devices; each process fills its own, without a comparison of values."""
    # JAX counts this as an implicit transfer, which the training loop disallows.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_callback(array.shape, placement, lambda index: array[index])


def _next_power_of_two(count: int) -> int:
    """Returns the smallest power of two that is at least `count`."""
    return 1 << max(0, count - 1).bit_length()


def _fetch(start: int, found: jax.Array, result: Int64[np.ndarray, "q k"]) -> None:
    """Waits for the neighbours of a block of queries and writes them into the result."""
    block = result[start : start + len(found)]
    block[:] = jax.device_get(found)[: len(block), : result.shape[1]]


@functools.partial(jax.jit, static_argnames=("k", "count", "mesh"))
def _nearest(
    gallery: Float[Array, "chunks rows d"],
    queries: Float[Array, "q d"],
    own: Int[Array, " q"],
    *,
    k: int,
    count: int,
    mesh: Mesh,
) -> Int[Array, "q k"]:
    """Returns the k nearest of the gallery's first `count` rows, without each query's own row."""

    def search_shard(shard: jax.Array, queries: jax.Array, own: jax.Array) -> jax.Array:
        chunks, rows, _ = shard.shape
        starts = (jax.lax.axis_index("data") * chunks + jnp.arange(chunks, dtype=jnp.int32)) * rows
        depth = min(k, chunks * rows)

        def update(best: _Best, chunk: tuple[jax.Array, jax.Array]) -> tuple[_Best, None]:
            start, vectors = chunk
            similarities = jnp.einsum("qd,rd->qr", queries, vectors, precision="highest")
            index = (start + jnp.arange(rows, dtype=jnp.int32))[None]
            excluded = (index >= count) | (index == own[:, None])
            similarities = jnp.where(excluded, -jnp.inf, similarities)
            # Earlier rows come first, since top_k prefers the first of equal values.
            values, at = jax.lax.top_k(jnp.concatenate([best.similarities, similarities], 1), depth)
            earlier = jnp.take_along_axis(best.rows, jnp.minimum(at, depth - 1), axis=1)
            return _Best(values, jnp.where(at < depth, earlier, start + at - depth)), None

        shape = (len(queries), depth)
        empty = _Best(jnp.full(shape, -jnp.inf, jnp.float32), jnp.full(shape, -1, jnp.int32))
        empty = jax.lax.pcast(empty, "data", to="varying")
        best, _ = jax.lax.scan(update, empty, (starts, shard))
        # Each device receives the results of all devices for its part of the queries.
        best = jax.lax.all_to_all(best, "data", split_axis=0, concat_axis=1, tiled=True)
        _, at = jax.lax.top_k(best.similarities, k)
        return jnp.take_along_axis(best.rows, at, axis=1)

    sharded, replicated = PartitionSpec("data"), PartitionSpec()
    found = jax.shard_map(
        search_shard, mesh=mesh, in_specs=(sharded, replicated, replicated), out_specs=sharded
    )(gallery, queries, own)
    return jax.lax.with_sharding_constraint(found, sharding.replicated_sharding(mesh))
