"""Locks between processes, by files; the system releases those of a process that is killed."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from absl import logging


def acquire(file: IO, path: Path) -> bool:
    """Locks an open file until it is closed; returns False if another process holds the lock.

    On a file system without locks, it warns and returns True.

    Args:
        file: the open file.
        path: what is locked, for the warning.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logging.warning("%s cannot be locked (%s): do not start another process in it", path, error)
    return True


@contextlib.contextmanager
def exclusive(path: Path, warning: str = "") -> Iterator[None]:
    """Locks a file for the duration of the body; waits while another process holds the lock.

    Args:
        path: the file, which is created if needed.
        warning: logged before waiting, where that may take long.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        if not acquire(file, path):
            if warning:
                logging.warning(warning)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_held(path: Path) -> bool:
    """Returns whether another process, or another open file of this one, holds a file's lock."""
    if not path.exists():
        return False
    with path.open("a") as file:
        return not acquire(file, path)
