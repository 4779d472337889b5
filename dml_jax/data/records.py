"""Prepared data sets: encoded images in ArrayRecord files, beside a manifest with their labels.

`dml_jax.data.prepare` writes them in the format of TensorFlow Datasets, so that TFDS reads them
too. From the manifest a run learns all labels and names without reading images or importing TFDS.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PureWindowsPath

from array_record.python.array_record_data_source import ArrayRecordDataSource

from dml_jax._utils.errors import UserError

MANIFEST = "index.json"
"""File name of the manifest."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Files and labels of a split.

    Attributes:
        files: names of its ArrayRecord files, in order.
        labels: the class of each image, an index into the class names of the data set.
        names: name of each image, unique in the split.
    """

    files: tuple[str, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Contents of a prepared data set.

    Attributes:
        data_set: name of the data set.
        class_names: the classes of all splits.
        splits: the splits by name.
    """

    data_set: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes the manifest of a prepared data set."""
    text = json.dumps(dataclasses.asdict(manifest), ensure_ascii=False)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> Manifest:
    """Reads the manifest of a prepared data set.

    Raises:
        FileNotFoundError: the directory holds no prepared data set.
        ValueError: its manifest is damaged.
    """
    try:
        text = (directory / MANIFEST).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{directory} holds no prepared data set (there is no {MANIFEST} in it); "
            "scripts/prepare_data.py makes one"
        ) from None
    except UnicodeDecodeError as error:
        raise _damaged(directory, error) from None
    try:
        content = json.loads(text)
        splits = {
            name: Split(tuple(split["files"]), tuple(split["labels"]), tuple(split["names"]))
            for name, split in content["splits"].items()
        }
        manifest = Manifest(content["data_set"], tuple(content["class_names"]), splits)
        _check(manifest)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise _damaged(directory, error) from None
    return manifest


def _check(manifest: Manifest) -> None:
    """Raises ValueError or TypeError unless all values have their types and ranges."""
    if not {"train", "test"} <= manifest.splits.keys() <= {"train", "test", "gallery"}:
        raise UserError(f"its splits are {sorted(manifest.splits)}")
    for split in manifest.splits.values():
        labels = split.labels
        if not labels or not all(type(label) is int for label in labels):
            raise UserError("a split without labels, or labels that are not integers")
        if not 0 <= min(labels) <= max(labels) < len(manifest.class_names):
            raise UserError("labels outside the range of the classes")
        if len(set(split.names)) != len(split.names):
            raise UserError("names that are not unique")
    split_strings = [[*split.files, *split.names] for split in manifest.splits.values()]
    if not all(isinstance(s, str) for s in itertools.chain(manifest.class_names, *split_strings)):
        raise UserError("names that are not strings")
    if any(escapes_directory(file) for split in manifest.splits.values() for file in split.files):
        raise UserError("files in other directories")


def _damaged(directory: Path, error: Exception) -> ValueError:
    return UserError(
        f"{directory / MANIFEST} is damaged: {error!r}; remove {directory} and prepare the data "
        "set again"
    )


def escapes_directory(name: str) -> bool:
    """Returns whether a path from an untrusted file leaves the directory that it is relative to."""
    path = PureWindowsPath(name)  # Recognises both kinds of slashes, and drives.
    return bool(path.anchor) or ".." in path.parts or "\0" in name


class EncodedImages(Sequence[bytes]):
    """The encoded images of ArrayRecord files, read on access; pickled as the file names."""

    def __init__(self, directory: Path, files: Sequence[str]):
        """Opens the files without reading an image.

        Raises:
            ValueError: a file is missing or truncated.
        """
        try:
            self._examples = ArrayRecordDataSource([str(directory / file) for file in files])
        except Exception as error:  # The reader, in C++, raises RuntimeError and others.
            raise UserError(
                f"cannot read the ArrayRecord files in {directory}; "
                f"remove that directory and prepare the data set again ({error})"
            ) from error

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._examples)

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override]  # No slices.
        """Returns the encoded image at `index`."""
        return bytes_feature(self._examples[index], "image")


def bytes_feature(example: bytes, name: str) -> bytes:
    """Returns the value of a bytes feature of a serialized `tf.train.Example`.

    An Example maps names to lists of values. The generated parser would do the same, but comes only
    with TFDS or TensorFlow, which take seconds to import.

    Raises:
        KeyError: there is no feature of that name.
    """
    (features,) = _fields(memoryview(example))
    for entry in _fields(features):
        key, feature = _fields(entry)
        if bytes(key) == name.encode():
            (values,) = _fields(feature)
            (value,) = _fields(values)
            return bytes(value)
    raise KeyError(name)


def _fields(message: memoryview) -> Iterator[memoryview]:
    """Yields the fields of a protocol buffer of messages, strings and bytes only, in order."""
    position = 0
    while position < len(message):
        # The tag takes one byte, because the field numbers are below 16.
        size, position = _varint(message, position + 1)
        yield message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """Returns the variable-length integer at a position, and the position after it.

    Each byte holds seven bits, the lowest first.
    """
    number = shift = 0
    while message[position] >= 0x80:
        number |= (message[position] & 0x7F) << shift
        position, shift = position + 1, shift + 7
    return number | message[position] << shift, position + 1
