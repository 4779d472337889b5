"""Where arrays live: one mesh axis, `data`, over which batches and MemVir's memory are split.

Everything else in the state is on every device. The compiled step sees the global batch, so that
losses, synthetic pairs and batch statistics are the same on any number of devices.
"""

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


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def by_row(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def split_axis(mesh: Mesh, axis: int, ndim: int) -> NamedSharding:
    """The sharding of an array of which one axis is split over the devices.

    Args:
        mesh: of the devices.
        axis: which, counted from the last, -1.
        ndim: how many axes the array has.
    """
    return NamedSharding(mesh, PartitionSpec(*[None] * (ndim + axis), "data"))


def gathered(x: jax.Array) -> jax.Array:
    """The same array, whole on every device of the mesh that is in use; of no effect without one.

    It tells the compiler what to send when it multiplies two arrays that are both split.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


def put_batch(mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Moves this process's share of a batch to its devices, without waiting for it.

    Args:
        mesh: of the devices.
        batch: arrays `[batch / processes, ...]`.

    Returns:
        Global arrays `[batch, ...]`, split by row.
    """
    # With several processes JAX takes this for an implicit transfer, which the loop forbids.
    with jax.transfer_guard_host_to_device("allow"):
        return {
            name: jax.make_array_from_process_local_data(by_row(mesh), rows)
            for name, rows in batch.items()
        }
