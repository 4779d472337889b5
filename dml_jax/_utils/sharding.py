"""The device mesh, the shardings of arrays on it, and transfers of batches to it.

The mesh has one axis, `data`, which splits batches by row, proxies and their optimizer state by
class, and MemVir's memory by both; all other arrays are replicated. The compiled step sees the
global batch, so losses, synthetic pairs and batch statistics are the same on any number of devices.
"""

import math
import resource
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with the axis `data`, of the given devices or of all."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(
        (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=list(devices)
    )


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that is replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array whose first axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def shardings_of(tree: PyTree) -> PyTree:
    """Returns the shardings of arrays or of abstract arrays."""
    return jax.tree.map(lambda x: x.sharding, tree)


def bytes_per_device(tree: PyTree) -> int:
    """Returns the bytes that abstract arrays with shardings take on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def replicate(x: jax.Array) -> jax.Array:
    """Returns the array, replicated over the current mesh; a no-op without a mesh.

    It determines which array the compiler sends when it multiplies two sharded arrays.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


def split(x: jax.Array) -> jax.Array:
    """Returns the array, its first axis split over the current mesh; a no-op without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec("data"))


def shards() -> int:
    """Returns the number of devices that batches are split over in the current mesh, or 1."""
    return jax.sharding.get_abstract_mesh().shape.get("data", 1)


def padded(length: int, shards: int) -> int:
    """Returns the smallest multiple of `shards` that is not below `length`."""
    return -(-length // shards) * shards


def join(x: jax.Array, y: jax.Array, shards: int) -> jax.Array:
    """Returns two split arrays as one, without moving rows between devices.

    Each device's rows of `x` are followed by its rows of `y`. For one device this is a
    concatenation.

    Args:
        x: array whose first axis is split over the devices.
        y: another one.
        shards: number of devices, which divides both lengths.
    """
    parts = [split(z.reshape(shards, len(z) // shards, *z.shape[1:])) for z in (x, y)]
    joined = split(jnp.concatenate(parts, axis=1))
    return split(joined.reshape(len(x) + len(y), *x.shape[1:]))


def joined_positions(first: jax.Array, x: int, y: int, shards: int) -> jax.Array:
    """Returns the positions in a joined array of elements of the first array.

    Args:
        first: positions in the first array.
        x: length of the first array.
        y: length of the second.
        shards: number of devices.
    """
    return first + first // (x // shards) * (y // shards)


def unjoined_positions(joined: jax.Array, x: int, y: int, shards: int) -> jax.Array:
    """Returns positions in the first array; the inverse of `joined_positions`."""
    return joined - joined // ((x + y) // shards) * (y // shards)


def unjoin(z: jax.Array, length: int, shards: int) -> tuple[jax.Array, jax.Array]:
    """Returns the two arrays that `join` joined.

    Args:
        z: the joined array.
        length: length of the first array.
        shards: number of devices.
    """
    of_device = z.reshape(shards, len(z) // shards, *z.shape[1:])
    first = of_device[:, : length // shards].reshape(length, *z.shape[1:])
    return first, of_device[:, length // shards :].reshape(len(z) - length, *z.shape[1:])


def on_cpu(mesh: Mesh) -> bool:
    """Returns whether the devices of a mesh are CPUs, which share the host's memory."""
    return mesh.local_devices[0].platform == "cpu"


def peak_memory() -> int:
    """Returns the peak memory use, in bytes, of this process's first device.

    For devices without memory statistics, such as CPUs, returns that of the whole process.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    of_process = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in kB.
    return stats.get("peak_bytes_in_use", of_process)


def put_batch(mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Transfers this process's part of a batch to its devices, asynchronously.

    Args:
        mesh: the devices.
        batch: arrays `[batch / processes, ...]`. Arrays that are on the devices are unchanged.

    Returns:
        Global arrays `[batch, ...]`, with batch sharding.
    """
    # With several processes JAX counts this as an implicit transfer, which the loop disallows.
    with jax.transfer_guard_host_to_device("allow"):
        return {
            name: array
            if isinstance(array, jax.Array)
            else jax.make_array_from_process_local_data(batch_sharding(mesh), array)
            for name, array in batch.items()
        }
