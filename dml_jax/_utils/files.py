"""Atomic writes of files and folders, and readers of JSON files."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dml_jax._utils.errors import UserError

PART_SUFFIX = ".part"
"""Suffix of a file or folder that is being written."""


@contextlib.contextmanager
def atomic_write(path: Path, *, keep_part: bool = False) -> Iterator[Path]:
    """Yields a temporary path, and at the end renames the file or folder there to `path`.

    The temporary path is `path` with `PART_SUFFIX`; leftovers of an earlier process there are
    removed. The caller creates a file or a folder. After an error, `path` is unchanged. Two
    processes must not write the same path at the same time.

    Args:
        path: the file or folder to write. A file is replaced; a folder must be absent or empty.
        keep_part: whether to keep the temporary file or folder after an error.
    """
    part = path.absolute().with_name(path.absolute().name + PART_SUFFIX)
    _remove(part)
    try:
        yield part
        with errors_with_path(path):
            # Without this, a power failure could leave an empty file of the final name.
            for file in part.rglob("*") if part.is_dir() else [part]:
                _flush_to_disk(file)
            os.replace(part, path)
    except BaseException:
        if not keep_part:
            _remove(part)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    with errors_with_path(path), atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def errors_with_path(path: Path) -> Iterator[None]:
    """Adds a path to each `OSError` of the body that has none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns the contents of a JSON file, or None if the file does not exist.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a file with one JSON object per line, or [] if it does not exist.

    Ignores an incomplete last line, which a killed process may leave.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def cache_folder() -> Path:
    """Returns the folder for everything that can be computed or copied again.

    Raises:
        RuntimeError: there is no home folder.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dml_jax"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush_to_disk(path: Path) -> None:
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())
