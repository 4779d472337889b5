"""Writes a data set in the format of TensorFlow Datasets, without TensorFlow or re-encoding."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from rich.progress import Progress

from dml_jax._utils import extras
from dml_jax.data import images, records
from dml_jax.data.prepare.layouts import Contents, ImageEntry

with extras.required_by("prepare"):
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

_VERSION = "1.0.0"  # Of the written data set; TFDS requires one.
_SHARD_SIZE = 4096  # Images per file.
_CHUNK = 256  # Images read and decoded at a time.


def write(data_set: str, contents: Contents, directory: Path, progress: Progress) -> list[str]:
    """Writes the readable images of a data set, in the given order, and their manifest.

    Args:
        data_set: name of the data set, in lower case.
        contents: the listed data set.
        directory: a new directory to write to.
        progress: the progress display.

    Returns:
        The reason for each image that cannot be read or decoded.
    """
    directory.mkdir(parents=True)
    info = _info(data_set, contents.class_names, directory)
    writer = tfds.core.SequentialWriter(info, _SHARD_SIZE, file_format="array_record")
    found = {entry.split for entry in contents.entries}
    splits = [split for split in ("train", "test", "gallery") if split in found]
    writer.initialize_splits(splits)
    labels = {name: label for label, name in enumerate(contents.class_names)}
    task = progress.add_task("read, decode, write", total=len(contents.entries))
    written_splits: dict[str, records.Split] = {}
    problems = []
    for split in splits:
        written: list[ImageEntry] = []
        for chunk in _read(entry for entry in contents.entries if entry.split == split):
            readable = [(entry, encoded) for entry, encoded, problem in chunk if not problem]
            problems += [problem for _, _, problem in chunk if problem]
            examples = [
                {"image": encoded, "label": labels[entry.class_name], "name": entry.name}
                for entry, encoded in readable
            ]
            writer.add_examples({split: examples})
            written += [entry for entry, _ in readable]
            progress.advance(task, len(chunk))
        writer.close_splits([split])
        written_splits[split] = records.Split(
            files=tuple(path.name for path in info.splits[split].filepaths),
            labels=tuple(labels[entry.class_name] for entry in written),
            names=tuple(entry.name for entry in written),
        )
    manifest = records.Manifest(data_set, contents.class_names, written_splits)
    records.write_manifest(directory, manifest)
    return problems


def _info(data_set: str, class_names: tuple[str, ...], directory: Path) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=DatasetIdentity(
            name=data_set,
            version=tfds.core.Version(_VERSION),
            data_dir=str(directory),
            module_name="dml_jax.data.prepare",
        ),
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(),
                "label": tfds.features.ClassLabel(names=class_names),
                "name": tfds.features.Text(),
            }
        ),
        supervised_keys=("image", "label"),
    )


def _read(entries: Iterator[ImageEntry]) -> Iterator[list[tuple[ImageEntry, bytes, str]]]:
    """Yields chunks of entries, each with its encoded image and the reason if it is unreadable."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(islice(entries, _CHUNK)):
            yield list(pool.map(_read_one, chunk))


def _read_one(entry: ImageEntry) -> tuple[ImageEntry, bytes, str]:
    try:
        encoded = entry.file.read_bytes()
        images.decode(encoded, entry.name)
    except (OSError, ValueError) as error:
        return entry, b"", str(error)
    return entry, encoded, ""
