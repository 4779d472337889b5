"""Embeddings of a whole data set: compute them over the mesh, save and load them."""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Integer

from dml_jax._utils import files

_RATIO = 100  # No file of embeddings unpacks to as many times its size.

_HARMLESS = 1 << 28  # Bytes that it may unpack to in any case.


class Embeddings(NamedTuple):
    """The contents of an embeddings file.

    Attributes:
        embeddings: [n, d] float32, as the network gave them (not normalised).
        labels: [n] integers that index `class_names`.
        names: identifiers of the n images.
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
    """Write embeddings to an .npz file that needs no pickle, all of it or nothing.

    Args:
        path: the file; one that exists is replaced once the new one is complete.
        embeddings: [n, d].
        labels: [n] indices into `class_names`.
        names: n identifiers of the images.
        class_names: names of the classes.

    Raises:
        ValueError: if the numbers of embeddings, labels and names differ or a label has no name.
    """
    path = Path(path)
    # dtype=str also for empty sequences, which would become float64.
    arrays: dict[str, Any] = {
        "embeddings": np.asarray(embeddings, dtype=np.float32),
        "labels": np.asarray(labels),
        "names": np.asarray(names, dtype=str),
        "class_names": np.asarray(class_names, dtype=str),
    }
    _check(arrays, path)
    with (
        files.errors_with_path(path),
        files.atomic_write(path) as part,
        part.open("wb") as file,
    ):
        np.savez(file, **arrays)


def load_embeddings(path: str | os.PathLike[str]) -> Embeddings:
    """Read a file that `save_embeddings` wrote; nothing in it is executed.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such file: damaged, pickled, keys missing, shapes that disagree.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no embeddings file {path}") from error
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            _check_size(archive, len(content))
            arrays = {key: archive[key] for key in Embeddings._fields if key in archive}
    except Exception as error:  # numpy's and zipfile's parsers raise nearly anything.
        raise ValueError(f"{path} is no embeddings file (.npz without pickles): {error}") from error
    _check(arrays, path)
    return Embeddings(
        arrays["embeddings"].astype(np.float32, copy=False),
        arrays["labels"],
        tuple(arrays["names"].tolist()),
        tuple(arrays["class_names"].tolist()),
    )


def _check_size(archive: Any, size: int) -> None:
    """Raise ValueError if a file of few bytes would become arrays that fill the memory."""
    unpacked = sum(file.file_size for file in archive.zip.infolist())
    if unpacked > max(_HARMLESS, _RATIO * size):
        raise ValueError(f"its {size} bytes become {unpacked}, as no embeddings do")


def _check(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Raise ValueError unless the four arrays are there and fit each other."""
    missing = [key for key in Embeddings._fields if key not in arrays]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} missing")
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
            raise ValueError(
                f"{path}: {key} has shape {array.shape} of {array.dtype}, "
                f"expected {ndim} dimension(s) of {kind.__name__}"
            )
    if not len(embeddings) == len(labels) == len(names):
        raise ValueError(
            f"{path}: {len(embeddings)} embeddings, {len(labels)} labels and {len(names)} names"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):
        raise ValueError(
            f"{path}: labels {labels.min()}..{labels.max()} for {len(class_names)} class names"
        )
