"""Exact nearest neighbours in JAX, for devices that faiss does not know, such as TPUs.

The gallery is split by row over the mesh. Each device compares the queries with its share, a piece
at a time, and keeps the best; the devices then merge what they found, each for its part of the
queries. So the memory beside gallery and result is bounded, however large the gallery is.
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

_PIECE_ROWS = 8192  # Of the gallery, at the most, that a device compares with at a time.
# Of a block of queries with a piece, and with the best so far; there are a few such arrays.
_BLOCK_SIMILARITIES = 1 << 23


class MeshSearcher:
    """Exact inner-product search in a gallery of embeddings, split over devices.

    Of equal similarities the one of the lower index comes first.
    """

    def __init__(self, gallery: Float32[np.ndarray, "n d"], mesh: Mesh | None = None) -> None:
        """Copies the gallery to the devices.

        Args:
            gallery: [n, d] embeddings, finite. Every process passes all of them.
            mesh: with the axis `data`; by default of all devices.
        """
        self._mesh = sharding.make_mesh() if mesh is None else mesh
        self._count, dim = gallery.shape
        share = -(-self._count // self._mesh.size)
        pieces = -(-share // _PIECE_ROWS)
        self._rows = -(-share // pieces)

        shape = (pieces * self._mesh.size, self._rows, dim)
        missing = shape[0] * self._rows - self._count
        padded = np.pad(gallery, ((0, missing), (0, 0))).reshape(shape)
        self._gallery = _put(padded, sharding.batch_sharding(self._mesh))

    def nearest(
        self,
        queries: Float32[np.ndarray, "q d"],
        k: int,
        *,
        own: Int64[np.ndarray, " q"] | None = None,
    ) -> Int64[np.ndarray, "q k"]:
        """The gallery indices of the k nearest neighbours of each query, nearest first.

        Of several processes each must ask for the same.

        Args:
            queries: [q, d] embeddings, finite.
            k: number of neighbours, at most n, or n - 1 with `own`.
            own: [q] the gallery index of each query itself, to be left out.

        Returns:
            [q, k] indices.

        Raises:
            ValueError: if the gallery holds fewer than k (other) images.
        """
        check_depth(k, self._count, own=own is not None)
        # A program is compiled for each shape; so there are few of them.
        depth = min(_power_of_two(k), self._count)
        most = max(1, _BLOCK_SIMILARITIES // (self._rows + depth))
        rows = min(1 << (most.bit_length() - 1), _power_of_two(len(queries)))
        rows = -(-rows // self._mesh.size) * self._mesh.size
        own = np.full(len(queries), -1) if own is None else own
        result = np.empty((len(queries), k), np.int64)
        pending: deque[tuple[int, jax.Array]] = deque()
        for start in range(0, len(queries), rows):
            pending.append((start, self._block(queries, own, start, rows, depth)))
            if len(pending) == 2:
                _fetch(*pending.popleft(), result)
        while pending:
            _fetch(*pending.popleft(), result)
        return result

    def _block(
        self,
        queries: Float32[np.ndarray, "q d"],
        own: Int64[np.ndarray, " q"],
        start: int,
        rows: int,
        depth: int,
    ) -> jax.Array:
        """Begins to search the neighbours of some rows of the queries."""
        some = queries[start : start + rows]
        missing = rows - len(some)
        block = np.pad(some, ((0, missing), (0, 0)))
        block_own = np.pad(own[start : start + rows], (0, missing)).astype(np.int32)
        everywhere = sharding.replicated_sharding(self._mesh)
        placed = _put(block, everywhere), _put(block_own, everywhere)
        return _nearest(self._gallery, *placed, k=depth, count=self._count, mesh=self._mesh)


class _Best(NamedTuple):
    """The best gallery rows so far, the nearest first."""

    similarities: jax.Array
    rows: jax.Array


def check_depth(k: int, count: int, *, own: bool) -> None:
    """Raises ValueError unless a gallery has k images, or with `own` k beside the query's own."""
    if not 1 <= k <= count - own:
        raise ValueError(
            f"{k} neighbours asked for{' beside the query' if own else ''}, "
            f"but the gallery holds {count} images"
        )


def _put(array: np.ndarray, where: NamedSharding) -> jax.Array:
    """Copies an array to devices, of which each process fills its own; nothing is compared."""
    # JAX takes this for an implicit transfer, which training forbids.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def _power_of_two(count: int) -> int:
    """The least that is not below the count."""
    return 1 << max(0, count - 1).bit_length()


def _fetch(start: int, found: jax.Array, result: Int64[np.ndarray, "q k"]) -> None:
    """Waits for the neighbours of a block of queries, and puts them into the result."""
    into = result[start : start + len(found)]
    into[:] = jax.device_get(found)[: len(into), : result.shape[1]]


@functools.partial(jax.jit, static_argnames=("k", "count", "mesh"))
def _nearest(
    gallery: Float[Array, "pieces rows d"],
    queries: Float[Array, "q d"],
    own: Int[Array, " q"],
    *,
    k: int,
    count: int,
    mesh: Mesh,
) -> Int[Array, "q k"]:
    """The k nearest neighbours among the gallery's first `count` rows, but for each query's own."""

    def in_share(share: jax.Array, queries: jax.Array, own: jax.Array) -> jax.Array:
        pieces, rows, _ = share.shape
        starts = (jax.lax.axis_index("data") * pieces + jnp.arange(pieces, dtype=jnp.int32)) * rows
        depth = min(k, pieces * rows)

        def compare(best: _Best, piece: tuple[jax.Array, jax.Array]) -> tuple[_Best, None]:
            start, vectors = piece
            similarities = jnp.einsum("qd,rd->qr", queries, vectors, precision="highest")
            index = (start + jnp.arange(rows, dtype=jnp.int32))[None]
            hidden = (index >= count) | (index == own[:, None])
            similarities = jnp.where(hidden, -jnp.inf, similarities)
            # The best so far come first, since of equals the first is chosen.
            values, at = jax.lax.top_k(jnp.concatenate([best.similarities, similarities], 1), depth)
            kept = jnp.take_along_axis(best.rows, jnp.minimum(at, depth - 1), axis=1)
            return _Best(values, jnp.where(at < depth, kept, start + at - depth)), None

        shape = (len(queries), depth)
        nothing = _Best(jnp.full(shape, -jnp.inf, jnp.float32), jnp.full(shape, -1, jnp.int32))
        nothing = jax.lax.pcast(nothing, "data", to="varying")
        best, _ = jax.lax.scan(compare, nothing, (starts, share))
        # Each device gets what all have found for its part of the queries.
        best = jax.lax.all_to_all(best, "data", split_axis=0, concat_axis=1, tiled=True)
        _, at = jax.lax.top_k(best.similarities, k)
        return jnp.take_along_axis(best.rows, at, axis=1)

    split, whole = PartitionSpec("data"), PartitionSpec()
    found = jax.shard_map(in_share, mesh=mesh, in_specs=(split, whole, whole), out_specs=split)(
        gallery, queries, own
    )
    return jax.lax.with_sharding_constraint(found, sharding.replicated_sharding(mesh))
