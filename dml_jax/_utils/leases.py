"""Leases of folders in object storage, which unlike a local file has no lock that ends by itself.

The holder renews its lease while it works. A lease that is not renewed for `EXPIRY` seconds has
expired, and the next process may take over. Leases are numbered objects, each created only if it
does not exist, so that of several processes one gets the next number. A holder that was suspended
and returns finds a higher number, and stops.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging

from dml_jax._utils import storage
from dml_jax._utils.errors import LockedError

EXPIRY = 60.0
"""Seconds without renewal after which a lease has expired."""

FOLDER = ".leases"
"""Folder of the leases, below the leased folder."""

_RENEWAL = 10.0  # Seconds between two renewals.


class Lease:
    """A lease that this process holds."""

    def __init__(self, url: str, number: int) -> None:
        """Holds the lease of a number, which has been created."""
        self._url, self._number = url, number
        self._ended, self._lost = threading.Event(), ""
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Checks that no other process has taken over.

        Raises:
            LockedError: one has.
        """
        if not self._lost and any(number > self._number for number in _numbers(self._url)):
            self._lost = (
                f"another process has taken over {self._url}, since this one did not answer for "
                f"{EXPIRY:.0f} seconds; this one stops"
            )
        if self._lost:
            raise LockedError(self._lost)

    def release(self) -> None:
        """Ends the lease."""
        self._ended.set()
        self._thread.join()
        storage.delete(self._url, [_name(self._number)])

    def _renew(self) -> None:
        while not self._ended.wait(_RENEWAL):
            try:
                self.check()
                storage.write(_object(self._url, self._number), _contents())
            except LockedError:
                return
            except Exception as error:  # If the thread died, the lease would expire.
                logging.warning("the lease of %s could not be renewed: %s", self._url, error)


@contextlib.contextmanager
def held(url: str) -> Iterator[Lease]:
    """Holds a lease of a folder for the duration of the body.

    Waits for up to `EXPIRY` seconds if a process that was killed on another host has left one.

    Args:
        url: URL of the folder.

    Raises:
        LockedError: another process works in the folder.
        OSError: the storage cannot be reached.
    """
    lease = _acquire(url)
    try:
        yield lease
    finally:
        try:
            lease.release()
        except OSError as error:
            logging.warning("the lease of %s could not be released: %s", url, error)


def _acquire(url: str) -> Lease:
    while True:
        expired = _wait_for_expiry(url)
        number = max(expired, default=0) + 1
        if not storage.create(_object(url, number), _contents()):
            continue  # Another process was faster.
        # A holder may have returned and released its lease, and a third process begun anew.
        others = {x: _read(url, x) for x in _numbers(url) if x != number}
        if any(contents != expired.get(x) for x, contents in others.items()):
            storage.delete(url, [_name(number)])
            continue
        storage.delete(url, map(_name, expired))
        return Lease(url, number)


def _wait_for_expiry(url: str) -> dict[int, bytes]:
    """Returns the expired leases by number.

    Raises:
        LockedError: a lease is renewed.
    """
    before = {number: _read(url, number) for number in _numbers(url)}
    living = {number: text for number, text in before.items() if not _is_dead(text)}
    if not living:
        return before
    holder = _holder(living[max(living)])
    logging.warning("%s was left by %s, or is in use: waiting up to %d s", url, holder, EXPIRY)
    deadline = time.monotonic() + EXPIRY
    while time.monotonic() < deadline:
        time.sleep(EXPIRY / 60)
        now = {number: _read(url, number) for number in _numbers(url)}
        if any(now[number] != text for number, text in before.items() if number in now):
            raise LockedError(
                f"another process is training in {url} ({holder}); wait until it ends, or choose "
                "another --workdir"
            )
        if now != before:
            return _wait_for_expiry(url)
    return before


def _numbers(url: str) -> list[int]:
    return [int(x) for x in storage.names(storage.join(url, FOLDER)) if x.isdecimal()]


def _name(number: int) -> str:
    return f"{FOLDER}/{number}"


def _object(url: str, number: int) -> str:
    return storage.join(url, _name(number))


def _read(url: str, number: int) -> bytes:
    try:
        return storage.read(_object(url, number))
    except FileNotFoundError:
        return b""


def _contents() -> bytes:
    """Returns the contents of a lease of this process; each differs from all others."""
    return json.dumps(_identity(os.getpid()) | {"renewal": uuid.uuid4().hex}).encode()


def _identity(process: int) -> dict[str, Any]:
    """Returns what identifies a process on Linux: a number alone is given again after its end."""
    boot, status = Path("/proc/sys/kernel/random/boot_id"), Path(f"/proc/{process}/stat")
    numbering = Path("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else "",
        # Containers on a host number their processes by themselves.
        "numbering": os.readlink(numbering) if numbering.exists() else "",
        "process": process,
        # The 22nd field; the second is the name in parentheses, which may contain spaces.
        "started": status.read_text().rpartition(")")[2].split()[19] if status.exists() else "",
    }


def _is_dead(contents: bytes) -> bool:
    """Returns whether a lease is of a process of this host that has ended."""
    try:
        holder = json.loads(contents)
    except ValueError:
        return False
    now = _identity(holder["process"])
    place = ("host", "boot", "numbering")
    here = all(now[name] and now[name] == holder[name] for name in place)
    return here and holder["started"] != now["started"]


def _holder(contents: bytes) -> str:
    try:
        holder = json.loads(contents)
        return f"process {holder['process']} on {holder['host']}"
    except ValueError:
        return "an unknown process"
