"""The metrics and timings files: a JSON object per line and epoch."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from dml_jax._utils import files
from dml_jax.training import run_directory
from dml_jax.training.trackers.base import Tracker


class JsonlTracker(Tracker):
    """Appends each epoch to `metrics.jsonl` and `timings.jsonl`.

    Timings have a file of their own, so that equal runs have metrics files of equal bytes.
    """

    def __init__(self, folder: Path, *, step: int) -> None:
        """Opens both files, and drops lines of later steps from them.

        Args:
            folder: the run's.
            step: steps done.
        """
        self._files: list[TextIO] = []
        with contextlib.ExitStack() as opened:
            for path in (folder / run_directory.METRICS, folder / run_directory.TIMINGS):
                file = _open_up_to(path, step)
                opened.callback(_close, file)
                self._files.append(file)
            self._opened = opened.pop_all()

    def epoch(self, metrics: Mapping[str, Any], timings: Mapping[str, Any]) -> None:
        """Appends a line to each file.

        Raises:
            OSError: a file cannot be written; the message has its path.
        """
        for file, line in zip(self._files, (metrics, timings), strict=True):
            with files.errors_with_path(Path(file.name)):
                file.write(json.dumps(line) + "\n")
                file.flush()
                # The line must be on disk before the checkpoint of its epoch is.
                os.fsync(file.fileno())

    def close(self, failed: bool) -> None:
        """Closes both files."""
        self._opened.close()


def _close(file: TextIO) -> None:
    with files.errors_with_path(Path(file.name)):
        file.close()


def _open_up_to(path: Path, step: int) -> TextIO:
    """Opens a file of JSON lines to append to, without lines of later steps."""
    kept = [line for line in files.read_json_lines(path) if line["step"] <= step]
    files.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return path.open("a", encoding="utf-8")
