"""Writes a data set as TensorFlow Datasets does, without TensorFlow and without re-encoding."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import tensorflow_datasets as tfds
from rich.progress import Progress
from tensorflow_datasets.core.dataset_info import DatasetIdentity

from dml_jax.data import images, records
from dml_jax.data.prepare.layouts import Contents, Picture

_VERSION = "1.0.0"  # Of what is written; TFDS wants one.
_SHARD = 4096  # Images in a file.
_CHUNK = 256  # Images that are read and decoded at a time.


def write(data_set: str, contents: Contents, directory: Path, progress: Progress) -> list[str]:
    """Writes the readable pictures of a data set, in the order given, and an index of them.

    Args:
        data_set: its name, in lower case.
        contents: what to write.
        directory: a new directory to write into.
        progress: shows how far it is.

    Returns:
        What is wrong with each picture that cannot be read or decoded.
    """
    directory.mkdir(parents=True)
    info = _info(data_set, contents.class_names, directory)
    writer = tfds.core.SequentialWriter(info, _SHARD, file_format="array_record")
    found = {picture.split for picture in contents.pictures}
    splits = [split for split in ("train", "test", "gallery") if split in found]
    writer.initialize_splits(splits)
    labels = {name: label for label, name in enumerate(contents.class_names)}
    task = progress.add_task("read, decode, write", total=len(contents.pictures))
    index: dict[str, records.Split] = {}
    wrong = []
    for split in splits:
        written: list[Picture] = []
        for chunk in _read(picture for picture in contents.pictures if picture.split == split):
            good = [(picture, data) for picture, data, problem in chunk if not problem]
            wrong += [problem for _, _, problem in chunk if problem]
            examples = [
                {"image": data, "label": labels[picture.class_name], "name": picture.name}
                for picture, data in good
            ]
            writer.add_examples({split: examples})
            written += [picture for picture, _ in good]
            progress.advance(task, len(chunk))
        writer.close_splits([split])
        index[split] = records.Split(
            files=tuple(path.name for path in info.splits[split].filepaths),
            labels=tuple(labels[picture.class_name] for picture in written),
            names=tuple(picture.name for picture in written),
        )
    records.write_index(directory, records.Index(data_set, contents.class_names, index))
    return wrong


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


def _read(pictures: Iterator[Picture]) -> Iterator[list[tuple[Picture, bytes, str]]]:
    """Chunks of pictures, each with its encoded image and what is wrong with that."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(islice(pictures, _CHUNK)):
            yield list(pool.map(_read_one, chunk))


def _read_one(picture: Picture) -> tuple[Picture, bytes, str]:
    try:
        data = picture.file.read_bytes()
        images.decode(data, picture.name)
    except (OSError, ValueError) as error:
        return picture, b"", str(error)
    return picture, data, ""
