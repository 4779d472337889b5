"""Atomic writes of text and JSON files, and reading them back."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PARTIAL = ".part"


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    part = _partial(path)
    with naming_the_file(path), part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # Or after a power failure the name might be there without it.
    os.replace(part, path)


@contextlib.contextmanager
def naming_the_file(path: Path) -> Iterator[None]:
    """Names the file that could not be written, as where the disk is full Python does not.

    Args:
        path: the file's.

    Raises:
        OSError: as what is raised within, with the path.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a file of one JSON object a line; none if there is no file.

    A last line that was cut short, as by a kill, is left out.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
