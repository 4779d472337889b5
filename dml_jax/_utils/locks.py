"""Locks between processes, by files; the system releases those of a process that is killed."""

import fcntl
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


def wait(file: IO) -> None:
    """Locks an open file until it is closed, once no other process holds the lock."""
    fcntl.flock(file, fcntl.LOCK_EX)
