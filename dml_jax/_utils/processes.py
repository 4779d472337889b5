"""Communication between the processes of a run on several hosts."""

import collections
import socket
import zlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dml_jax._utils import failures
from dml_jax._utils.errors import UserError
from dml_jax._utils.sharding import put_batch, replicated_sharding

_EXCHANGE_TIMEOUT = 3600  # Seconds; a process that fails ends the others sooner.


def join_processes(
    *,
    detect: bool = False,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Connects this process to the others of a run; a no-op without arguments.

    From then on, a failure of one process ends all; see `dml_jax._utils.failures`. Call it before
    any other use of JAX.

    Args:
        detect: whether to detect the processes from SLURM, the TPU pod or MPI.
        coordinator: otherwise, "HOST:PORT" of the first process.
        num_processes: number of processes.
        process_id: index of this process.

    Raises:
        ValueError: the last three are not given together, or are given with `detect`, or the
            connection fails.
    """
    explicit = (coordinator, num_processes, process_id)
    if explicit != (None, None, None) and (None in explicit or detect):
        raise UserError(
            "give --coordinator, --num_processes and --process_id together, or --distributed alone"
        )
    if detect or coordinator is not None:
        try:
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                heartbeat_timeout_seconds=failures.HEARTBEAT_TIMEOUT,
            )
            failures.watch()
        except ValueError as error:
            raise UserError(f"cannot connect to the other processes: {error}") from error


def is_first_process() -> bool:
    """Returns whether this is the process that writes logs, results and exports."""
    return jax.process_index() == 0


def from_first_process(values: Mapping[str, float]) -> dict[str, float]:
    """Returns the numbers of the first process in every process.

    Args:
        values: numbers by name; the names must be the same in all processes.
    """
    if jax.process_count() == 1:
        return dict(values)
    # Sent as pairs of integers, since JAX would round 64-bit numbers to 32 bits.
    bits = np.array(list(values.values()), np.float64).view(np.uint32)
    with jax.transfer_guard("allow"):
        bits = multihost_utils.broadcast_one_to_all(bits)
    return dict(zip(values, np.asarray(bits).view(np.float64).tolist(), strict=True))


def in_first_process(work: Callable[[], None]) -> None:
    """Calls a function in the first process while the others wait; a failure stops all.

    Args:
        work: the function, which works on files that all processes share.

    Raises:
        ValueError: in the other processes, if the first failed. The first raises its own error.
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
        raise UserError("the first process failed; see its error message")


class Agreement:
    """Lets any process stop all of them after the same step.

    At every step each process states whether it wants to stop. The devices reduce the answers, and
    the result is read a few steps later, so that no process waits for it.
    """

    def __init__(self, mesh: Mesh, steps_late: int) -> None:
        """Creates an agreement without pending answers.

        Args:
            mesh: all devices.
            steps_late: number of steps after which an answer is read.
        """
        self._mesh, self._steps_late = mesh, steps_late
        self._answers: collections.deque[jax.Array] = collections.deque()
        self._any = jax.jit(jnp.any, out_shardings=replicated_sharding(mesh))

    def after(self, step: int, wanted: bool) -> bool:
        """Returns whether to stop after a step; every process must call it at every step.

        Args:
            step: number of the step.
            wanted: whether this process wants to stop.
        """
        # JAX may know of a preemption that this process received no signal for.
        wanted = wanted or multihost_utils.reached_preemption_sync_point(step)
        if jax.process_count() == 1:
            return wanted
        answers = put_batch(self._mesh, {"": np.full(len(self._mesh.local_devices), wanted)})
        self._answers.append(self._any(answers[""]))
        if len(self._answers) <= self._steps_late:
            return False
        return bool(jax.device_get(self._answers.popleft()))


def any_process(value: bool) -> bool:
    """Returns whether the value is true in any process; blocks until all have called it."""
    if jax.process_count() == 1:
        return value
    with jax.transfer_guard("allow"):
        return bool(np.any(multihost_utils.process_allgather(np.bool_(value))))


def minimum(value: int | float) -> int | float:
    """Returns the minimum of a number over the processes, as float32; blocks until all called."""
    if jax.process_count() == 1:
        return value
    with jax.transfer_guard("allow"):
        return float(np.min(multihost_utils.process_allgather(np.float32(value))))


def processes_on_this_host() -> int:
    """Returns the number of processes on this host; blocks until all have called it."""
    if jax.process_count() == 1:
        return 1
    name = np.uint32(zlib.crc32(socket.gethostname().encode()))
    with jax.transfer_guard("allow"):
        return int(np.sum(multihost_utils.process_allgather(name) == name))


def bytes_from_first_process(message: bytes) -> bytes:
    """Returns the first process's message in every process; other messages are ignored."""
    if jax.process_count() == 1:
        return message
    with jax.transfer_guard("allow"):
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
        own = np.frombuffer(message, np.uint8) if is_first_process() else np.zeros(size, np.uint8)
        return np.asarray(multihost_utils.broadcast_one_to_all(own)).tobytes()


def exchange(key: str, text: str) -> list[str]:
    """Returns the texts of all processes, by index; blocks until all have called it.

    Unlike the other functions, it may be called on any thread: it uses no device.

    Args:
        key: identifies the call; the same in all processes, and used once.
        text: that of this process.
    """
    if jax.process_count() == 1:
        return [text]
    client = failures.client()
    client.key_value_set(f"{key}/{jax.process_index()}", text)
    timeout = 1000 * _EXCHANGE_TIMEOUT
    return [
        client.blocking_key_value_get(f"{key}/{i}", timeout) for i in range(jax.process_count())
    ]


def wait_for_all(name: str) -> None:
    """Blocks until every process has reached the same point of the program.

    Args:
        name: name of that point.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
