"""Where arrays live: one mesh axis, `data`, over which batches and MemVir's memory are split.

Everything else in the state is on every device. The compiled step sees the global batch, so that
losses, synthetic pairs and batch statistics are the same on any number of devices.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
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


def gathered(x: jax.Array) -> jax.Array:
    """The same array, whole on every device of the mesh that is in use; of no effect without one.

    It tells the compiler what to send when it multiplies two arrays that are both split.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


def join_processes(
    *,
    detect: bool = False,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Makes this process one of several that run the same program on their own devices.

    Must come before JAX is used. Without arguments it does nothing.

    Args:
        detect: whether to ask SLURM, the TPU pod or MPI, whichever started the processes.
        coordinator: else, "HOST:PORT" of the first process.
        num_processes: how many there are.
        process_id: which of them this is, from 0.

    Raises:
        ValueError: only some of the last three are given, or both ways are.
    """
    explicit = (coordinator, num_processes, process_id)
    if explicit != (None, None, None) and (None in explicit or detect):
        raise ValueError(
            "give --coordinator, --num_processes and --process_id together, or --distributed alone"
        )
    if detect or coordinator is not None:
        jax.distributed.initialize(coordinator, num_processes, process_id)


def is_first_process() -> bool:
    """Whether this is the process that writes what is written once: logs, results, exports."""
    return jax.process_index() == 0


def from_first_process(values: Mapping[str, float]) -> dict[str, float]:
    """The numbers that the first process has, in every process.

    Args:
        values: by name; the names must be the same everywhere.
    """
    if jax.process_count() == 1:
        return dict(values)
    # As pairs of integers: JAX would round 64-bit numbers to 32 bits.
    bits = np.array(list(values.values()), np.float64).view(np.uint32)
    with jax.transfer_guard("allow"):
        bits = multihost_utils.broadcast_one_to_all(bits)
    return dict(zip(values, np.asarray(bits).view(np.float64).tolist(), strict=True))


def bytes_from_first_process(message: bytes) -> bytes:
    """What the first process has to say, in every process; the others' own does not count."""
    if jax.process_count() == 1:
        return message
    with jax.transfer_guard("allow"):
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
        told = np.frombuffer(message, np.uint8) if is_first_process() else np.zeros(size, np.uint8)
        return np.asarray(multihost_utils.broadcast_one_to_all(told)).tobytes()


def wait_for_all(what: str) -> None:
    """Waits until every process has come to the same point.

    Args:
        what: a name of that point.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


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
