"""Batches for training and testing, read ahead by `dml_jax.data.reading`.

An element of the Grain data set is one process's share of a global batch. It depends on the number
of the batch alone: the order of an epoch and every random crop are pure functions of the seed and a
position. So neither the number of workers nor that of processes changes a batch, and a run resumes
at any step without stored iterator state.
"""

import dataclasses
from collections.abc import Iterator
from typing import TypedDict

import grain
import numpy as np
from jaxtyping import Int32, UInt8

from dml_jax._utils.errors import UserError
from dml_jax.data import images, sampling
from dml_jax.data.reading import Batches, read
from dml_jax.data.sources import Source


class TrainBatch(TypedDict):
    """One process's rows of a training batch."""

    image: UInt8[np.ndarray, "b h w 3"]
    label: Int32[np.ndarray, " b"]


class IndexBatch(TypedDict):
    """One process's rows of a training batch whose images are in the device cache."""

    index: Int32[np.ndarray, " b"]
    label: Int32[np.ndarray, " b"]


class TestBatch(TypedDict):
    """One process's rows of a test batch; index -1 marks padding."""

    image: UInt8[np.ndarray, "b h w 3"]
    index: Int32[np.ndarray, " b"]


def train_batches(
    source: Source,
    *,
    batch_size: int,
    n_instance: int,
    image_size: int,
    augmentation: images.Augmentation,
    seed: int,
    start_step: int,
    num_steps: int,
    num_workers: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches[TrainBatch]:
    """Returns the training batches `start_step` .. `num_steps - 1` of a run.

    The iterator's `close()` ends the workers.

    Args:
        source: the training images.
        batch_size: images in a global batch.
        n_instance: images of each class in a batch; 1 samples images regardless of class.
        image_size: side of the square images, pixels.
        augmentation: ranges of the random augmentation.
        seed: seed of the run, not negative.
        start_step: first batch to read, counted from the start of the run.
        num_steps: number of batches of the whole run, including those before `start_step`.
        num_workers: number of worker processes, or of threads if the source caches its images; 0
            means a few threads.
        process_index: index of the share of every batch to read.
        process_count: number of shares into which the rows of a batch are split, in order.

    Returns:
        An iterator of batches: uint8 `image` [batch_size / process_count, image_size, image_size,
        3] and int32 `label` [batch_size / process_count].

    Raises:
        ValueError: an argument is out of range. The iterator raises a ValueError that names the
            image if one cannot be decoded.
    """
    sampling.steps_per_epoch(source.labels, batch_size=batch_size, n_instance=n_instance)
    if seed < 0:
        raise UserError(f"seed must not be negative, got {seed}")
    rows = _rows(batch_size, process_index, process_count)
    order = sampling.Order(source.labels, batch_size, n_instance, seed)
    load = _TrainLoader(source, order, rows, image_size, augmentation)
    return read(grain.MapDataset.range(start_step, num_steps).map(load), num_workers, source)


def train_indices(
    source: Source,
    *,
    batch_size: int,
    n_instance: int,
    seed: int,
    start_step: int,
    num_steps: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[IndexBatch]:
    """Yields the image indices and labels of the batches of `train_batches`."""
    rows = _rows(batch_size, process_index, process_count)
    order = sampling.Order(source.labels, batch_size, n_instance, seed)
    for step in range(start_step, num_steps):
        indices = order(step)[rows.start : rows.stop]
        yield {"index": indices.astype(np.int32), "label": source.labels[indices]}


def test_indices(
    count: int, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Int32[np.ndarray, " b"]]:
    """Yields the image indices of the batches of `test_batches` for `count` images.

    The index is -1 in the padding of the last batch.
    """
    rows = _rows(batch_size, process_index, process_count)
    for step in range(-(-count // batch_size)):
        yield _test_index(count, rows, step * batch_size)


def _test_index(count: int, rows: range, start: int) -> Int32[np.ndarray, " b"]:
    index = np.arange(rows.start, rows.stop, dtype=np.int32) + start
    index[index >= count] = -1
    return index


def test_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    resize: int,
    num_workers: int,
    start_batch: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches[TestBatch]:
    """Returns all images once and in order, in batches of equal shape.

    The iterator's `close()` ends the workers.

    Args:
        source: the test images.
        batch_size: images in a global batch.
        image_size: side of the centre crop, pixels.
        resize: length of an image's shorter side before the crop, at least `image_size`.
        num_workers: number of worker processes, or of threads if the source caches its images; 0
            means a few threads.
        start_batch: number of batches to leave out.
        process_index: index of the share of every batch to read.
        process_count: number of shares into which the rows of a batch are split, in order.

    Returns:
        An iterator of images [batch_size / process_count, image_size, image_size, 3] and their
        indices in the source. Padding in the last batch is black and has index -1.

    Raises:
        ValueError: an argument is out of range. The iterator raises a ValueError that names the
            image if one cannot be decoded.
    """
    if resize < image_size:
        raise UserError(f"resize {resize} is smaller than image_size {image_size}")
    rows = _rows(batch_size, process_index, process_count)
    load = _TestLoader(source, batch_size, rows, image_size, resize)
    steps = -(-len(source) // batch_size)
    return read(grain.MapDataset.range(start_batch, steps).map(load), num_workers, source)


def view_batches(
    source: Source,
    *,
    views: int,
    batch_size: int,
    image_size: int,
    augmentation: images.Augmentation,
    start_batch: int,
    num_workers: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches[TestBatch]:
    """Returns random views of all images: the first view of each, in order, then the second, ...

    The views are the same in every run. The iterator's `close()` ends the workers.

    Args:
        source: the images.
        views: number of views of each image.
        batch_size: views in a global batch.
        image_size: side of a view, pixels.
        augmentation: ranges of the random augmentation.
        start_batch: number of batches to leave out.
        num_workers: see `test_batches`.
        process_index: index of the share of every batch to read.
        process_count: number of shares into which the rows of a batch are split, in order.

    Returns:
        An iterator like that of `test_batches`; view v of image i of n has the index v n + i.

    Raises:
        ValueError: an argument is out of range, or an image cannot be decoded.
    """
    rows = _rows(batch_size, process_index, process_count)
    load = _ViewLoader(source, views, batch_size, rows, image_size, augmentation)
    steps = -(-views * len(source) // batch_size)
    return read(grain.MapDataset.range(start_batch, steps).map(load), num_workers, source)


def _rows(batch_size: int, process_index: int, process_count: int) -> range:
    """Returns the rows of a global batch that belong to a process."""
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size} must be a positive multiple of the number of processes, "
            f"{process_count}"
        )
    if not 0 <= process_index < process_count:
        raise UserError(f"process_index {process_index} is not below {process_count}")
    share = batch_size // process_count
    return range(process_index * share, (process_index + 1) * share)


@dataclasses.dataclass(eq=False)
class _TrainLoader:
    """Loads one process's share of the training batch of a step."""

    source: Source
    order: sampling.Order
    rows: range
    image_size: int
    augmentation: images.Augmentation

    def __call__(self, step: int) -> TrainBatch:
        indices = self.order(step)[self.rows.start : self.rows.stop]
        image = np.empty((len(indices), self.image_size, self.image_size, 3), np.uint8)
        for i, (row, index) in enumerate(zip(self.rows, indices.tolist(), strict=True)):
            # A counter-based generator: its key of two numbers determines the stream.
            key = np.array([self.order.seed, step * self.order.batch_size + row], np.uint64)
            images.random_view(
                self.source.image(index),
                np.random.Generator(np.random.Philox(key=key)),
                augmentation=self.augmentation,
                out=image[i],
            )
        return {"image": image, "label": self.source.labels[indices]}


@dataclasses.dataclass(frozen=True, eq=False)
class _TestLoader:
    """Loads one process's share of the test batch of a given number."""

    source: Source
    batch_size: int
    rows: range
    image_size: int
    resize: int

    def __call__(self, step: int) -> TestBatch:
        image = np.zeros((len(self.rows), self.image_size, self.image_size, 3), np.uint8)
        index = _test_index(len(self.source), self.rows, step * self.batch_size)
        for view, i in zip(image, index.tolist(), strict=True):
            if i >= 0:
                decoded = self.source.image(i).pixels()
                view[:] = images.centre_view(decoded, size=self.image_size, resize_to=self.resize)
        return {"image": image, "index": index}


@dataclasses.dataclass(frozen=True, eq=False)
class _ViewLoader:
    """Loads one process's share of a batch of `view_batches`."""

    source: Source
    views: int
    batch_size: int
    rows: range
    image_size: int
    augmentation: images.Augmentation

    def __call__(self, step: int) -> TestBatch:
        image = np.zeros((len(self.rows), self.image_size, self.image_size, 3), np.uint8)
        count = self.views * len(self.source)
        index = _test_index(count, self.rows, step * self.batch_size)
        for view, i in zip(image, index.tolist(), strict=True):
            if i >= 0:
                number, of_image = divmod(i, len(self.source))
                key = np.array([number, of_image], np.uint64)
                images.random_view(
                    self.source.image(of_image),
                    np.random.Generator(np.random.Philox(key=key)),
                    augmentation=self.augmentation,
                    out=view,
                )
        return {"image": image, "index": index}
