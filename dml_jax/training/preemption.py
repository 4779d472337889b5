"""Preemption: requests to stop by SIGTERM, from schedulers, or by SIGINT (Ctrl-C)."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from absl import logging

EXIT_CODE = 75
"""Exit code of a program that was asked to stop and can be resumed (EX_TEMPFAIL)."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Signals within this many seconds are one request: `timeout` and some schedulers signal a process
# and then its group.
_ONE_REQUEST = 1.0


class Stopped(Exception):
    """The run was asked to stop and has saved its state."""


class StopRequest(threading.Event):
    """Event that is set when the process is asked to stop.

    Attributes:
        unsaved: whether an immediate exit would lose work. If not, the first signal ends the
            process.
    """

    unsaved: bool = False


def expect(module: str) -> None:
    """Installs handlers for the time of the imports, before `listening` is entered.

    Args:
        module: the `__name__` of the program, which its worker processes import too.
    """
    for number in _SIGNALS:
        if module == "__main__":
            signal.signal(number, _leave)
        elif module == "__mp_main__":  # The main process stops its workers.
            signal.signal(number, signal.SIG_IGN)


def _leave(*_: object) -> NoReturn:
    os.write(2, b"asked to stop; start again to resume\n")
    os._exit(EXIT_CODE)


@contextlib.contextmanager
def listening() -> Iterator[StopRequest]:
    """Treats the first signal as a request to stop, and ends the process at the second.

    Must be entered in the main thread.

    Yields:
        The request, set by the first signal. If nothing is unsaved, the first signal ends the
        process, except in an interactive interpreter such as a notebook.
    """
    stop = StopRequest()
    # Python runs handlers between bytecodes of the main thread, which may be compiling for minutes;
    # the number of a signal is written to this pipe immediately.
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    watcher = threading.Thread(target=_watch, args=(reading, stop), daemon=True)
    watcher.start()
    pipe = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            # None is a handler not installed by Python: JAX's, which is not needed any more.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(pipe)
        os.close(writing)
        watcher.join()
        os.close(reading)


def _watch(pipe: int, stop: StopRequest) -> None:
    first = 0.0
    while number := os.read(pipe, 1):
        if number[0] not in _SIGNALS:
            continue
        if not stop.is_set():
            first = time.monotonic()
            # Set before `unsaved` is read; the main thread writes `unsaved` before it reads this.
            stop.set()
            # An interactive interpreter (`sys.ps1`) holds more than the run.
            if not stop.unsaved and not hasattr(sys, "ps1"):
                logging.warning("asked to stop: nothing is unsaved; start again to resume")
                os._exit(EXIT_CODE)
            logging.warning(
                "asked to stop: finishing the step and saving; a second signal stops immediately"
            )
        elif time.monotonic() - first > _ONE_REQUEST:
            os._exit(128 + number[0])
