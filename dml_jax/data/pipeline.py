"""Batches for training and testing, read by Grain in this process or in worker processes.

An element of the Grain data set is one process's share of a global batch. It depends on the number
of the batch alone: the order of an epoch and every random crop are pure functions of the seed and a
position. So neither the number of workers nor that of processes changes a batch, and a run resumes
at any step without stored iterator state.

Worker processes are spawned: a program that uses them needs the usual
`if __name__ == "__main__":`, and the first batch takes some seconds for their imports.
"""

import atexit
import dataclasses
import gc
import multiprocessing
import multiprocessing.util
import os
import queue
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from multiprocessing.process import BaseProcess
from typing import TypedDict, TypeVar

import cv2
import grain
import numpy as np
from absl import flags
from jaxtyping import Int32, UInt8

from dml_jax._utils.errors import UserError
from dml_jax.data import images, sampling
from dml_jax.data.sources import Source

T = TypeVar("T")
_POLL_SECONDS = 1  # Wait for a batch before checking whether the workers are alive.
# Wait before a worker with exit code 0 counts as dead. Earlier it may just have sent its last batch
# before the other workers did.
_CLEAN_EXIT_SECONDS = 300
_THREADS = 2  # Decoding releases the GIL, so a second thread helps.


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


class Batches(Iterator[T]):
    """Iterator over prefetched batches.

    Its worker processes end with `close()`, with the last reference to it, or with the program.
    """

    def __init__(self, dataset: grain.IterDataset, num_workers: int):
        """Starts reading `dataset`, with `num_workers` worker processes if there are any."""
        self._iterators = [iter(dataset)]
        self._workers = _Workers(num_workers) if num_workers else None
        self.close = weakref.finalize(self, _close, self._iterators)

    def __next__(self) -> T:
        """Returns the next batch.

        Raises:
            ValueError: an image cannot be decoded; the message has its path.
            OSError: an image cannot be read; the message has its path.
            ChildProcessError: a worker process died.
        """
        if not self._iterators:
            raise StopIteration
        if self._workers is None:
            return next(self._iterators[0])
        try:
            return self._workers.next_of(self._iterators[0])
        except ChildProcessError:
            self.close.detach()
            _leak(self._iterators)
            self._workers.kill()
            raise


class _Workers:
    """The worker processes of an iterator, monitored while it waits for their batches.

    Grain notices a dead worker only between two batches. A worker that is killed while it sends a
    batch, which is what a worker does most of the time, would leave the reader waiting forever.
    """

    def __init__(self, count: int):
        self._count = count
        self._others = {process.pid for process in multiprocessing.active_children()}
        self._own: dict[int | None, BaseProcess] = {}

    def next_of(self, iterator: Iterator[T]) -> T:
        """Returns the next element of an iterator.

        Raises:
            ChildProcessError: a worker died.
        """
        results: queue.SimpleQueue[Future[T]] = queue.SimpleQueue()
        threading.Thread(target=_put_next, args=(iterator, results), daemon=True).start()
        start = time.monotonic()
        while True:
            self._find()
            try:
                return results.get(timeout=_POLL_SECONDS).result()
            except queue.Empty:
                self._check(clean_exits=time.monotonic() > start + _CLEAN_EXIT_SECONDS)
            except RuntimeError:  # Raised by Grain when it notices a dead worker itself.
                self._check()
                raise

    def kill(self) -> None:
        """Kills all workers; they ignore SIGTERM."""
        for process in self._own.values():
            process.kill()

    def _find(self) -> None:
        """Identifies the worker processes, which Grain starts without returning them."""
        if len(self._own) < self._count:
            found = {process.pid: process for process in multiprocessing.active_children()}
            self._own |= {pid: found[pid] for pid in found.keys() - self._others}

    def _check(self, *, clean_exits: bool = False) -> None:
        """Raises ChildProcessError if a worker failed, or with `clean_exits` if it ended at all."""
        for pid, process in self._own.items():
            code = process.exitcode
            if code or (code == 0 and clean_exits):
                raise ChildProcessError(
                    f"process {pid}, which read images, was ended by {_describe_exit(code)}; if "
                    "the machine ran out of memory, lower config.data.num_workers"
                )


def _describe_exit(code: int) -> str:
    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:  # Real-time signals have no names.
        return f"signal {-code}"


def _leak(iterators: list[grain.DatasetIterator]) -> None:
    """Keeps iterators of dead workers from being closed or freed, even at the program's end.

    Closing them would wait forever for data that the dead workers did not send.
    """
    # A thread that never ends keeps its arguments alive.
    forever = threading.Event()
    threading.Thread(target=lambda _: forever.wait(), args=(iterators,), daemon=True).start()
    atexit.register(multiprocessing.util._finalizer_registry.clear)  # type: ignore[attr-defined]


def _put_next(iterator: Iterator[T], results: "queue.SimpleQueue[Future[T]]") -> None:
    result: Future[T] = Future()
    try:
        result.set_result(next(iterator))
    except BaseException as error:  # Raised again in the thread that waits for the batch.
        result.set_exception(error)
    results.put(result)


def _close(iterators: list[grain.DatasetIterator]) -> None:
    # Removed, because an iterator that still exists at interpreter shutdown raises an error there.
    while iterators:
        iterators.pop().close()


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
        n_instance: images of each class in a batch; 1 ignores the classes.
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
        An iterator of images [batch_size / process_count, image_size, image_size, 3] and labels.

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
    return _read(grain.MapDataset.range(start_step, num_steps).map(load), num_workers, source)


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
    return _read(grain.MapDataset.range(start_batch, steps).map(load), num_workers, source)


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
    return _read(grain.MapDataset.range(start_batch, steps).map(load), num_workers, source)


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


def _read(batches: grain.MapDataset, num_workers: int, source: Source) -> Batches:
    """Prefetches batches in worker processes, or in threads.

    Threads are used if there are no workers, or if the source caches its images: each worker would
    decode and cache all of them.
    """
    if num_workers < 0:
        raise UserError(f"num_workers must not be negative, got {num_workers}")
    if num_workers == 0 or source.cache is not None:
        threads = max(num_workers, _THREADS)
        read_options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        return Batches(batches.to_iter_dataset(read_options), 0)
    if not flags.FLAGS.is_parsed():  # Grain reads absl flags, even if the program parses none.
        flags.FLAGS.mark_as_parsed()
    # Batches are sent through pipes. Shared memory would save a copy, but a container may have less
    # of it than the batches need, and Grain leaks some of it when it stops early.
    without_shared_memory = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
    dataset = grain.experimental.WithOptionsIterDataset(
        batches.to_iter_dataset(grain.ReadOptions(num_threads=0)), without_shared_memory
    )
    options = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2)
    gc.collect()  # Freeing an old iterator while a new one is created can cause a warning.
    prefetched = dataset.mp_prefetch(options, worker_init_fn=_init_worker)
    return Batches(prefetched, num_workers)


def _init_worker(index: int, count: int) -> None:
    """Limits a worker to one core, and ends it when the main process is killed."""
    del index, count
    cv2.setNumThreads(0)
    # The signals may reach all processes of a group; only the main process handles them.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)  # Otherwise Grain's worker waits forever for a reader of its batches.

    threading.Thread(target=exit_with_parent, daemon=True).start()
