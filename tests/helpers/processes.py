"""Processes that a test has started."""

from pathlib import Path


def marked(mark):
    """Returns the processes with a mark in their environment: a run and all its children."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdecimal() and mark.encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue  # The process has ended.
    return found
