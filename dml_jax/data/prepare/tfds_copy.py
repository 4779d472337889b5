"""Reads a data set that TensorFlow Datasets wrote, as ArrayRecord or TFRecord files."""

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tensorflow_datasets.proto import tf_example_pb2

from dml_jax.data import records

_HEADER = struct.Struct("<QI")  # Of a TFRecord: its length, and a checksum of that.
_CHECKSUM = 4  # Bytes behind it.


@dataclasses.dataclass(frozen=True)
class _Place:
    """A serialized example in a TFRecord file."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclasses.dataclass(frozen=True)
class _Item:
    """A serialized example in an ArrayRecord file."""

    examples: ArrayRecordDataSource
    index: int

    def read(self) -> bytes:
        return self.examples[self.index]


@dataclasses.dataclass(frozen=True)
class CopiedImage:
    """The encoded image in an example."""

    example: _Place | _Item

    def is_file(self) -> bool:
        """Whether it exists: an example was there when it was listed."""
        return True

    def read_bytes(self) -> bytes:
        """The encoded image."""
        return records.bytes_feature(self.example.read(), "image")


def read(
    directory: Path, splits: tuple[str, ...] = ()
) -> tuple[tuple[str, ...], list[tuple[str, str, str, CopiedImage]]]:
    """Lists the images of a TFDS data set with a feature "label".

    Args:
        directory: of the data set, where its `dataset_info.json` is.
        splits: the splits to list; all of them if none is named.

    Returns:
        The names of all classes, and each image's split, class, name and place.

    Raises:
        ValueError: there is no such split, or the files are of another kind.
    """
    info = tfds.builder_from_directory(directory).info
    class_names = tuple(info.features["label"].names)
    listed = []
    for split in splits or info.splits:
        if split not in info.splits:
            raise ValueError(f"{directory} has no split {split!r}, only {sorted(info.splits)}")
        places = (place for path in info.splits[split].filepaths for place in _places(Path(path)))
        for number, place in enumerate(places):
            feature = tf_example_pb2.Example.FromString(place.read()).features.feature["label"]
            class_name = class_names[feature.int64_list.value[0]]
            listed.append((split, class_name, f"{split}/{number:06}", CopiedImage(place)))
    return class_names, listed


def _places(path: Path) -> Iterator[_Place | _Item]:
    if ".array_record" in path.name:
        examples = ArrayRecordDataSource(str(path))
        yield from (_Item(examples, index) for index in range(len(examples)))
    elif ".tfrecord" in path.name:
        yield from _tfrecord_places(path)
    else:
        raise ValueError(f"{path} is neither an ArrayRecord nor a TFRecord file")


def _tfrecord_places(path: Path) -> Iterator[_Place]:
    with path.open("rb") as file:
        end, at = path.stat().st_size, 0
        while at < end:
            file.seek(at)
            header = file.read(_HEADER.size)
            size = _HEADER.unpack(header)[0] if len(header) == _HEADER.size else end
            at += _HEADER.size + size + _CHECKSUM
            if at > end:
                raise ValueError(f"{path} is cut short; copy it again")
            yield _Place(path, at - size - _CHECKSUM, size)
