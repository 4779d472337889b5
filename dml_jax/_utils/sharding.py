"""The device mesh, the shardings of arrays on it, and transfers of batches to it.

The mesh has one axis, `data`, which splits batches and MemVir's memory; all other arrays are
replicated. The compiled step sees the global batch, so losses, synthetic pairs and batch statistics
are the same on any number of devices.
"""

import math
import resource
from collections.abc import Mapping, Sequence
from typing import Any

import jax
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
