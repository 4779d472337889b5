"""Where arrays live: one mesh axis, `data`, over which batches and MemVir's memory are split.

Everything else in the state is on every device. The compiled step sees the global batch, so that
losses, synthetic pairs and batch statistics are the same on any number of devices.
"""

import collections
import socket
import zlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dml_jax._utils.sharding import put_batch, replicated_sharding


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
        ValueError: only some of the last three are given, or both ways are, or the processes are
            not to be found.
    """
    explicit = (coordinator, num_processes, process_id)
    if explicit != (None, None, None) and (None in explicit or detect):
        raise ValueError(
            "give --coordinator, --num_processes and --process_id together, or --distributed alone"
        )
    if detect or coordinator is not None:
        try:
            jax.distributed.initialize(coordinator, num_processes, process_id)
        except ValueError as error:
            raise ValueError(f"the other processes cannot be joined: {error}") from error


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


def in_first_process(work: Callable[[], None]) -> None:
    """Does something in the first process, while the others wait; fails in all if it fails.

    Args:
        work: what to do, on files that all processes share.

    Raises:
        ValueError: in the others, when the first has failed; in the first, whatever it raised.
    """
    failure: Exception | None = None
    if is_first_process():
        try:
            work()
        except (ValueError, OSError) as error:
            failure = error
    failed = from_first_process({"failed": float(failure is not None)})["failed"]
    if failure is not None:
        raise failure
    if failed:
        raise ValueError("the first process has stopped, and said why")


class Agreement:
    """Whether one process wants all to stop; all come to know it after the same step.

    Every process says at every step whether it wants to. The devices find out whether any does, and
    what they found is read a few steps later, so that nobody waits.
    """

    def __init__(self, mesh: Mesh, steps_late: int) -> None:
        """Begins with nobody wanting to stop.

        Args:
            mesh: of all devices.
            steps_late: after how many steps an answer is read.
        """
        self._mesh, self._steps_late = mesh, steps_late
        self._answers: collections.deque[jax.Array] = collections.deque()
        self._any = jax.jit(jnp.any, out_shardings=replicated_sharding(mesh))

    def after(self, step: int, wanted: bool) -> bool:
        """Whether to stop after a step; to be asked in every process, once a step.

        Args:
            step: steps done.
            wanted: whether this process wants to stop.
        """
        # A preemption that JAX was told of before, or otherwise than by a signal.
        wanted = wanted or multihost_utils.reached_preemption_sync_point(step)
        if jax.process_count() == 1:
            return wanted
        said = put_batch(self._mesh, {"": np.full(len(self._mesh.local_devices), wanted)})
        self._answers.append(self._any(said[""]))
        if len(self._answers) <= self._steps_late:
            return False
        return bool(jax.device_get(self._answers.popleft()))


def any_process(wanted: bool) -> bool:
    """Whether any process wants something; all wait until each has said whether it does."""
    if jax.process_count() == 1:
        return wanted
    with jax.transfer_guard("allow"):
        return bool(np.any(multihost_utils.process_allgather(np.bool_(wanted))))


def least(value: int | float) -> int | float:
    """The smallest of the numbers that the processes give, as float32; all wait for each other."""
    if jax.process_count() == 1:
        return value
    with jax.transfer_guard("allow"):
        return float(np.min(multihost_utils.process_allgather(np.float32(value))))


def processes_on_this_host() -> int:
    """How many of the processes run on this host, this one included; all wait for each other."""
    if jax.process_count() == 1:
        return 1
    name = np.uint32(zlib.crc32(socket.gethostname().encode()))
    with jax.transfer_guard("allow"):
        return int(np.sum(multihost_utils.process_allgather(name) == name))


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
