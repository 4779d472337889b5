"""Asked to stop: SIGTERM, as schedulers and preempted machines send it, or SIGINT (Ctrl-C)."""

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
"""Of a program that was asked to stop, and goes on when it is started again (EX_TEMPFAIL)."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ONE_REQUEST = 1.0  # Seconds. `timeout` and some schedulers signal a process and then its group.


class Stopped(Exception):
    """The run was asked to stop and has saved its state."""


class StopRequest(threading.Event):
    """Set when the process is asked to stop.

    Attributes:
        unsaved: whether there is something that stopping at once would lose. As long as there is
            not, the process ends at the first signal.
    """

    unsaved: bool = False


def expect(module: str) -> None:
    """Lets a program be asked to stop while it is still importing, until `listening` takes over.

    Args:
        module: the `__name__` of the program, which its worker processes import, too.
    """
    for number in _SIGNALS:
        if module == "__main__":
            signal.signal(number, _leave)
        elif module == "__mp_main__":  # They may reach all; the main process acts.
            signal.signal(number, signal.SIG_IGN)


def _leave(*_: object) -> NoReturn:
    os.write(2, b"asked to stop; start again to go on\n")
    os._exit(EXIT_CODE)


@contextlib.contextmanager
def listening() -> Iterator[StopRequest]:
    """Takes the first signal for a request, and ends the process at the second, wherever it is.

    Must be entered in the main thread.

    Yields:
        What is set by the first signal; while nothing is unsaved, that one ends the process too,
        unless it is an interactive one, as of a notebook.
    """
    asked = StopRequest()
    # Python calls its handlers between two steps of the main thread, which may be compiling for
    # minutes; but the number of a signal is in this pipe at once.
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    watcher = threading.Thread(target=_watch, args=(reading, asked), daemon=True)
    watcher.start()
    pipe = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in handlers.items():
            # None was no handler of Python's: JAX's own, which has nothing left to tell.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(pipe)
        os.close(writing)
        watcher.join()
        os.close(reading)


def _watch(pipe: int, asked: StopRequest) -> None:
    first = 0.0
    while number := os.read(pipe, 1):
        if number[0] not in _SIGNALS:
            continue
        if not asked.is_set():
            first = time.monotonic()
            asked.set()  # Before a look at `unsaved`: whoever has just saved looks the other way.
            # Whoever types into this interpreter has more to lose than the run.
            if not asked.unsaved and not hasattr(sys, "ps1"):
                logging.warning("asked to stop: nothing is unsaved; start again to go on")
                os._exit(EXIT_CODE)
            logging.warning("asked to stop: finishes the step and saves; once more stops at once")
        elif time.monotonic() - first > _ONE_REQUEST:
            os._exit(128 + number[0])
