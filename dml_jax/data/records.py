"""Prepared data sets: encoded images in ArrayRecord files, beside an index of their labels.

`dml_jax.data.prepare` writes them as TensorFlow Datasets does, so that TFDS reads them too. The
index lets a run know all labels and names without reading images, or importing TFDS.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PureWindowsPath

from array_record.python.array_record_data_source import ArrayRecordDataSource

INDEX = "index.json"


@dataclasses.dataclass(frozen=True)
class Split:
    """What the index knows of a split.

    Attributes:
        files: names of its ArrayRecord files, in order.
        labels: each image's class, as a place in the data set's class names.
        names: what to call each image, unique in the split.
    """

    files: tuple[str, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Index:
    """What a prepared data set holds.

    Attributes:
        data_set: its name.
        class_names: the classes of all splits.
        splits: its splits by name.
    """

    data_set: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]


def write_index(directory: Path, index: Index) -> None:
    """Writes the index of a prepared data set."""
    text = json.dumps(dataclasses.asdict(index), ensure_ascii=False)
    (directory / INDEX).write_text(text + "\n", encoding="utf-8")


def read_index(directory: Path) -> Index:
    """Reads the index of a prepared data set.

    Raises:
        FileNotFoundError: there is no prepared data set in the directory.
        ValueError: its index is damaged.
    """
    try:
        text = (directory / INDEX).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{directory} holds no prepared data set (there is no {INDEX} in it); "
            "scripts/prepare_data.py makes one"
        ) from None
    except UnicodeDecodeError as error:
        raise _damaged(directory, error) from None
    try:
        index = json.loads(text)
        splits = {
            name: Split(tuple(split["files"]), tuple(split["labels"]), tuple(split["names"]))
            for name, split in index["splits"].items()
        }
        read = Index(index["data_set"], tuple(index["class_names"]), splits)
        _check(read)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise _damaged(directory, error) from None
    return read


def _check(index: Index) -> None:
    """Raises ValueError or TypeError unless everything is of its type and in its range."""
    if not {"train", "test"} <= index.splits.keys() <= {"train", "test", "gallery"}:
        raise ValueError(f"its splits are {sorted(index.splits)}")
    for split in index.splits.values():
        labels = split.labels
        if not labels or not all(type(label) is int for label in labels):
            raise ValueError("labels that are no whole numbers")
        if not 0 <= min(labels) <= max(labels) < len(index.class_names):
            raise ValueError("labels without a class")
        if len(set(split.names)) != len(split.names):
            raise ValueError("names that are not unique")
    split_strings = [[*split.files, *split.names] for split in index.splits.values()]
    if not all(isinstance(s, str) for s in itertools.chain(index.class_names, *split_strings)):
        raise ValueError("names that are no text")
    if any(leads_elsewhere(file) for split in index.splits.values() for file in split.files):
        raise ValueError("files in other directories")


def _damaged(directory: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{directory / INDEX} is damaged: {error!r}; remove {directory} and prepare the data set "
        "again"
    )


def leads_elsewhere(name: str) -> bool:
    """Whether a relative path, from a file that may be anybody's, leaves the directory it is in."""
    path = PureWindowsPath(name)  # Knows both kinds of slashes, and drives.
    return bool(path.anchor) or ".." in path.parts or "\0" in name


class Images(Sequence[bytes]):
    """The encoded images of ArrayRecord files, read on access; pickled as the files' names."""

    def __init__(self, directory: Path, files: Sequence[str]):
        """Looks into the files, but reads no image.

        Raises:
            ValueError: a file is missing or cut short.
        """
        try:
            self._examples = ArrayRecordDataSource([str(directory / file) for file in files])
        except Exception as error:  # The reader, in C++, raises RuntimeError and others.
            raise ValueError(
                f"cannot read the ArrayRecord files in {directory}; "
                f"remove that directory and prepare the data set again ({error})"
            ) from error

    def __len__(self) -> int:
        """Number of images."""
        return len(self._examples)

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override]  # Nobody takes slices.
        """The encoded image at `index`."""
        return bytes_feature(self._examples[index], "image")


def bytes_feature(example: bytes, name: str) -> bytes:
    """The bytes in a serialized `tf.train.Example` under a name.

    An Example is a map from names to lists of values. This takes the one value that is needed out
    of it: the generated parser comes only with the whole of TFDS or TensorFlow, seconds to import.

    Raises:
        KeyError: there is nothing of that name.
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
    """The fields of a protocol buffer that has only messages, strings and bytes, in order."""
    at = 0
    while at < len(message):
        size, at = _varint(message, at + 1)  # Past the tag, one byte for a field's number to 15.
        yield message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number at a place, seven bits a byte from the lowest, and the place behind it."""
    number = shift = 0
    while message[at] >= 0x80:
        number |= (message[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return number | message[at] << shift, at + 1
