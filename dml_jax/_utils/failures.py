"""Failures of one of several processes: all end, with the reason and the exit code of the first.

A process that fails reports it in the store of JAX's coordination service, which the others watch.
One that is killed, or loses the network, reports nothing; the service misses its heartbeats and
ends the others. Without this, they would wait for the failed one in their next collective.
"""

import json
import os
import sys
import threading
import time
from typing import Any, NoReturn

import jax
from orbax.checkpoint import multihost

HEARTBEAT_TIMEOUT = 30
"""Seconds without a heartbeat after which a process counts as lost."""

_FAILURE, _ENDING = "dml_jax/failure", "dml_jax/ending/"  # Keys in the store.
_PAUSE = 1.0  # Seconds between two looks at the store.
_GRACE = 10.0  # Seconds that the first process, which hosts the store, waits for the others.


def watch() -> None:
    """Starts a thread that ends this process soon after another reports a failure."""
    threading.Thread(target=_watch, name="failures", daemon=True).start()


def end_all(message: str, code: int) -> None:
    """Reports a failure and ends all processes; a no-op if there is only this one.

    Args:
        message: the reason.
        code: exit code of all processes, unless another one failed before.
    """
    if not jax.distributed.is_initialized():
        return
    store = client()
    failure = {"process": jax.process_index(), "message": message, "code": code}
    try:
        store.key_value_set(_FAILURE, json.dumps(failure))
    except jax.errors.JaxRuntimeError:  # Another process has reported one.
        failure = json.loads(store.key_value_try_get(_FAILURE))
    _end(store, failure)


def client() -> Any:
    """Returns the client of JAX's coordination service, whose store all processes share."""
    return multihost.get_jax_distributed_client()


def _watch() -> None:
    try:
        store = client()
        while True:
            time.sleep(_PAUSE)
            try:
                failure = store.key_value_try_get(_FAILURE)
            except jax.errors.JaxRuntimeError as error:
                if "NOT_FOUND" in str(error):
                    continue
                return  # The service is lost, and ends this process.
            failure = json.loads(failure)
            if failure["process"] != jax.process_index():
                _end(store, failure)
            return
    except (ValueError, AttributeError):
        return  # The processes have parted at the end of the run.


def _end(store: Any, failure: dict[str, Any]) -> NoReturn:
    """Ends this process without waiting for the others, as a normal exit would."""
    if failure["process"] != jax.process_index():
        reason = failure["message"]
        print(f"error: process {failure['process']} failed: {reason}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        store.key_value_set(f"{_ENDING}{jax.process_index()}", "")
        deadline = time.monotonic() + _GRACE
        while jax.process_index() == 0 and time.monotonic() < deadline:
            if len(store.key_value_dir_get(_ENDING)) == jax.process_count():
                time.sleep(_PAUSE)  # Until they have exited: without the store they would abort.
                break
            time.sleep(_PAUSE / 10)
    finally:
        os._exit(failure["code"])
