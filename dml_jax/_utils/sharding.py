"""The device mesh, the shardings of arrays on it, and transfers of batches to it."""

import resource
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices, or of those given, along the axis `data`."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(
        (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=list(devices)
    )


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicate(x: jax.Array) -> jax.Array:
    """The same array, whole on every device of the mesh that is in use; of no effect without one.

    It tells the compiler what to send when it multiplies two arrays that are both split.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


def on_cpu(mesh: Mesh) -> bool:
    """Whether the devices of a mesh are CPUs, whose memory is the host's."""
    return mesh.local_devices[0].platform == "cpu"


def peak_memory() -> int:
    """Bytes in use on this process's first device when it was fullest.

    Where the device does not tell, as CPUs do not, those of the whole process.
    """
    told = jax.local_devices()[0].memory_stats() or {}
    of_process = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in kB.
    return told.get("peak_bytes_in_use", of_process)


def put_batch(mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Moves this process's share of a batch to its devices, without waiting for it.

    Args:
        mesh: of the devices.
        batch: arrays `[batch / processes, ...]`; what is on the devices already stays as it is.

    Returns:
        Global arrays `[batch, ...]`, split by row.
    """
    # With several processes JAX takes this for an implicit transfer, which the loop forbids.
    with jax.transfer_guard_host_to_device("allow"):
        return {
            name: rows
            if isinstance(rows, jax.Array)
            else jax.make_array_from_process_local_data(batch_sharding(mesh), rows)
            for name, rows in batch.items()
        }
