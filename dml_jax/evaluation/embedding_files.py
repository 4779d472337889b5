"""Files of embeddings: writing them atomically, and reading them without trusting them."""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Integer

from dml_jax._utils import files, storage
from dml_jax._utils.errors import UserError
from dml_jax.evaluation import embedding_tables

_MAX_RATIO = 100  # Unpacked over packed size; embeddings compress far less.
_ALWAYS_ALLOWED = 1 << 28  # Bytes that a file may unpack to whatever the ratio.


class Embeddings(NamedTuple):
    """The contents of an embeddings file.

    Attributes:
        embeddings: [n, d] float32, not normalised.
        labels: [n] integer indices into `class_names`.
        names: names of the n images.
        class_names: names of the classes.
    """

    embeddings: Float32[np.ndarray, "n d"]
    labels: Integer[np.ndarray, " n"]
    names: tuple[str, ...]
    class_names: tuple[str, ...]


def save_embeddings(
    path: str | os.PathLike[str],
    embeddings: Float32[np.ndarray, "n d"],
    labels: Integer[np.ndarray, " n"],
    names: Sequence[str],
    class_names: Sequence[str],
) -> None:
    """Writes embeddings atomically to a Parquet file, or an .npz file without pickles.

    Args:
        path: the file, Parquet if it ends in .parquet; an existing one is replaced when the new
            one is complete.
        embeddings: [n, d] embeddings.
        labels: [n] indices into `class_names`.
        names: names of the n images.
        class_names: names of the classes.

    Raises:
        ValueError: the numbers of embeddings, labels and names differ, or a label has no name.
        ModuleNotFoundError: Parquet needs pyarrow.
    """
    path = Path(path)
    # An empty sequence without dtype=str would become float64.
    arrays: dict[str, Any] = {
        "embeddings": np.asarray(embeddings, dtype=np.float32),
        "labels": np.asarray(labels),
        "names": np.asarray(names, dtype=str),
        "class_names": np.asarray(class_names, dtype=str),
    }
    _check(arrays, path)
    with files.errors_with_path(path), files.atomic_write(path) as part:
        if path.suffix == embedding_tables.SUFFIX:
            embedding_tables.write(part, arrays)
        else:
            with part.open("wb") as file:
                np.savez(file, **arrays)


def load_embeddings(path: str | os.PathLike[str]) -> Embeddings:
    """Reads a file that `save_embeddings` wrote; nothing in it is executed.

    Args:
        path: path or URL of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a file of embeddings, damaged, pickled, or inconsistent.
        ModuleNotFoundError: Parquet needs pyarrow.
    """
    path = storage.local(path)
    if not path.exists():
        raise FileNotFoundError(f"no embeddings file {path}")
    arrays = embedding_tables.read(path) if path.suffix == embedding_tables.SUFFIX else _read(path)
    _check(arrays, path)
    return Embeddings(
        arrays["embeddings"].astype(np.float32, copy=False),
        arrays["labels"],
        tuple(arrays["names"].tolist()),
        tuple(arrays["class_names"].tolist()),
    )


def _read(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of an .npz file."""
    content = path.read_bytes()
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            _check_size(archive, len(content))
            return {key: archive[key] for key in Embeddings._fields if key in archive}
    except Exception as error:  # numpy's and zipfile's parsers raise nearly any exception.
        raise UserError(
            f"{path} is not an embeddings file (.npz without pickles): {error}"
        ) from error


def _check_size(archive: Any, size: int) -> None:
    """Raises ValueError if a small file would unpack to arrays that fill the memory."""
    unpacked = sum(file.file_size for file in archive.zip.infolist())
    if unpacked > max(_ALWAYS_ALLOWED, _MAX_RATIO * size):
        raise UserError(
            f"its {size} bytes unpack to {unpacked}, which is implausible for embeddings"
        )


def _check(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Raises ValueError unless all four arrays exist and are consistent."""
    missing = [key for key in Embeddings._fields if key not in arrays]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} missing")
    embeddings, labels, names, class_names = (arrays[key] for key in Embeddings._fields)
    expected = {
        "embeddings": (2, np.floating),
        "labels": (1, np.integer),
        "names": (1, np.str_),
        "class_names": (1, np.str_),
    }
    for key, (ndim, kind) in expected.items():
        array = arrays[key]
        if array.ndim != ndim or not np.issubdtype(array.dtype, kind):
            raise UserError(
                f"{path}: {key} has shape {array.shape} of {array.dtype}, "
                f"expected {ndim} dimension(s) of {kind.__name__}"
            )
    if not len(embeddings) == len(labels) == len(names):
        raise UserError(
            f"{path}: {len(embeddings)} embeddings, {len(labels)} labels and {len(names)} names"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):
        raise UserError(
            f"{path}: labels {labels.min()}..{labels.max()} for {len(class_names)} class names"
        )
