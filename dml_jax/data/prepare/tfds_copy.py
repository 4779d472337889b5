"""Reads a data set that TensorFlow Datasets wrote, as ArrayRecord or TFRecord files."""

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path

from array_record.python.array_record_data_source import ArrayRecordDataSource

from dml_jax._utils import extras
from dml_jax._utils.errors import UserError
from dml_jax.data import records

with extras.required_by("prepare"):
    import tensorflow_datasets as tfds
    from tensorflow_datasets.proto import tf_example_pb2

_HEADER = struct.Struct("<QI")  # Of a TFRecord: the length of its data, and a checksum of that.
_CHECKSUM_SIZE = 4  # Bytes after the data.


@dataclasses.dataclass(frozen=True)
class _TFRecordExample:
    """A serialized example in a TFRecord file."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclasses.dataclass(frozen=True)
class _ArrayRecordExample:
    """A serialized example in an ArrayRecord file."""

    examples: ArrayRecordDataSource
    index: int

    def read(self) -> bytes:
        return self.examples[self.index]


@dataclasses.dataclass(frozen=True)
class CopiedImage:
    """The encoded image in an example."""

    example: _TFRecordExample | _ArrayRecordExample

    def is_file(self) -> bool:
        """Returns True: the example existed when it was listed."""
        return True

    def read_bytes(self) -> bytes:
        """Returns the encoded image."""
        return records.bytes_feature(self.example.read(), "image")


def read(
    directory: Path, splits: tuple[str, ...] = ()
) -> tuple[tuple[str, ...], list[tuple[str, str, str, CopiedImage]]]:
    """Lists the images of a TFDS data set with a feature "label".

    Args:
        directory: the directory of the data set, with its `dataset_info.json`.
        splits: the splits to list; all if none is named.

    Returns:
        The names of all classes, and the split, class, name and file of each image.

    Raises:
        ValueError: there is no such split, or the files have another format.
    """
    info = tfds.builder_from_directory(directory).info
    class_names = tuple(info.features["label"].names)
    listed = []
    for split in splits or info.splits:
        if split not in info.splits:
            raise UserError(f"{directory} has no split {split!r}, only {sorted(info.splits)}")
        paths = map(Path, info.splits[split].filepaths)
        examples = (example for path in paths for example in _examples(path))
        for number, example in enumerate(examples):
            feature = tf_example_pb2.Example.FromString(example.read()).features.feature["label"]
            class_name = class_names[feature.int64_list.value[0]]
            listed.append((split, class_name, f"{split}/{number:06}", CopiedImage(example)))
    return class_names, listed


def _examples(path: Path) -> Iterator[_TFRecordExample | _ArrayRecordExample]:
    if ".array_record" in path.name:
        examples = ArrayRecordDataSource(str(path))
        yield from (_ArrayRecordExample(examples, index) for index in range(len(examples)))
    elif ".tfrecord" in path.name:
        yield from _tfrecord_examples(path)
    else:
        raise UserError(f"{path} is neither an ArrayRecord nor a TFRecord file")


def _tfrecord_examples(path: Path) -> Iterator[_TFRecordExample]:
    with path.open("rb") as file:
        end, position = path.stat().st_size, 0
        while position < end:
            file.seek(position)
            header = file.read(_HEADER.size)
            size = _HEADER.unpack(header)[0] if len(header) == _HEADER.size else end
            position += _HEADER.size + size + _CHECKSUM_SIZE
            if position > end:
                raise UserError(f"{path} is truncated; copy it again")
            yield _TFRecordExample(path, position - size - _CHECKSUM_SIZE, size)
