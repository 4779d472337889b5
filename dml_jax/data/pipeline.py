"""Batches for training and testing, read by Grain in this process or in worker processes.

An element of the Grain data set is one process's part of a whole batch, made from nothing but the
batch's number: the order of an epoch and every random crop are pure functions of the seed and a
position. So neither the number of workers nor of processes changes a batch, and a run continues
at any step without stored state.

Worker processes are spawned: a program that asks for them needs the usual
`if __name__ == "__main__":`, and the first batch waits some seconds for their imports.
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

from dml_jax.data import images, sampling
from dml_jax.data.sources import Source

T = TypeVar("T")
_PATIENCE = 1  # Seconds without a batch, after which the workers are looked at.
# Seconds, after which one that has ended well is taken for gone: it may only have been the first to
# have sent all that it had to.
_LONG_PATIENCE = 300
_THREADS = 2  # Decoders let go of Python's lock, so a second one gains.


class TrainBatch(TypedDict):
    """One process's rows of a training batch."""

    image: UInt8[np.ndarray, "b h w 3"]
    label: Int32[np.ndarray, " b"]


class IndexBatch(TypedDict):
    """One process's rows of a training batch, whose images are elsewhere."""

    index: Int32[np.ndarray, " b"]
    label: Int32[np.ndarray, " b"]


class TestBatch(TypedDict):
    """One process's rows of a test batch; index -1 marks rows that only fill it up."""

    image: UInt8[np.ndarray, "b h w 3"]
    index: Int32[np.ndarray, " b"]


class Batches(Iterator[T]):
    """Iterator over batches that are read ahead.

    Its worker processes end with `close()`, with the last reference to it, or with the program.
    """

    def __init__(self, dataset: grain.IterDataset, num_workers: int):
        """Begins with the first batch of `dataset`, which that many processes read."""
        self._iterators = [iter(dataset)]
        self._workers = _Workers(num_workers) if num_workers else None
        self.close = weakref.finalize(self, _close, self._iterators)

    def __next__(self) -> T:
        """The next batch.

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
            return self._workers.watch(self._iterators[0])
        except ChildProcessError:
            self.close.detach()
            _abandon(self._iterators)
            self._workers.kill()
            raise


class _Workers:
    """Knows the processes that an iterator starts, and waits for its elements while they live.

    Grain notices that a worker is gone only between two batches. One that is killed while it sends
    a batch, and a worker mostly waits to send, would let the reader wait for the rest for ever.
    """

    def __init__(self, count: int):
        self._count = count
        self._others = {process.pid for process in multiprocessing.active_children()}
        self._own: dict[int | None, BaseProcess] = {}

    def watch(self, iterator: Iterator[T]) -> T:
        """The next element; ChildProcessError if a worker died."""
        answers: queue.SimpleQueue[Future[T]] = queue.SimpleQueue()
        threading.Thread(target=_answer, args=(iterator, answers), daemon=True).start()
        began = time.monotonic()
        while True:
            self._find()
            try:
                return answers.get(timeout=_PATIENCE).result()
            except queue.Empty:
                self._check(even_well=time.monotonic() > began + _LONG_PATIENCE)
            except RuntimeError:  # What Grain raises when it notices itself.
                self._check()
                raise

    def kill(self) -> None:
        """Ends them all; they do not listen to anything less."""
        for process in self._own.values():
            process.kill()

    def _find(self) -> None:
        if len(self._own) < self._count:
            found = {process.pid: process for process in multiprocessing.active_children()}
            self._own |= {pid: found[pid] for pid in found.keys() - self._others}

    def _check(self, *, even_well: bool = False) -> None:
        """Raises ChildProcessError if one has ended, with `even_well` also if by itself."""
        for pid, process in self._own.items():
            code = process.exitcode
            if code or (code == 0 and even_well):
                raise ChildProcessError(
                    f"process {pid}, which read images, was ended by {_ended_by(code)}; if the "
                    "machine ran out of memory, lower config.data.num_workers"
                )


def _ended_by(code: int) -> str:
    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:  # Real-time signals have no names.
        return f"signal {-code}"


def _abandon(iterators: list[grain.DatasetIterator]) -> None:
    """Lets nobody close or free iterators of dead workers, not even at the program's end.

    They wait for what the dead did not send, and so would whoever closes them.
    """
    # A thread that never ends keeps its arguments for ever.
    forever = threading.Event()
    threading.Thread(target=lambda _: forever.wait(), args=(iterators,), daemon=True).start()
    atexit.register(multiprocessing.util._finalizer_registry.clear)  # type: ignore[attr-defined]


def _answer(iterator: Iterator[T], answers: "queue.SimpleQueue[Future[T]]") -> None:
    answer: Future[T] = Future()
    try:
        answer.set_result(next(iterator))
    except BaseException as error:  # Raised where the batch is waited for.
        answer.set_exception(error)
    answers.put(answer)


def _close(iterators: list[grain.DatasetIterator]) -> None:
    # Popped, because one that lives until Python takes its modules apart fails noisily there.
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
    """Training batches `start_step` .. `num_steps - 1` of a run; `close()` ends the workers.

    Args:
        source: the training images.
        batch_size: images in a global batch.
        n_instance: images of each class in a batch; 1 samples without regard to class.
        image_size: side of the square images, pixels.
        augmentation: how images are varied at random.
        seed: seed of the run, non-negative.
        start_step: first batch to read, counted from the beginning of the run.
        num_steps: batches in the whole run, not only from `start_step` on.
        num_workers: worker processes, or threads of this one if the source keeps its images;
            0 is a few threads.
        process_index: which part of every batch to read.
        process_count: parts into which a batch is cut, row by row in order.

    Returns:
        An iterator of images [batch_size / process_count, image_size, image_size, 3] and labels.

    Raises:
        ValueError: no such batch exists. The iterator raises one that names the image when an
            image cannot be decoded.
    """
    sampling.steps_per_epoch(source.labels, batch_size=batch_size, n_instance=n_instance)
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
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
    """Which images `train_batches` would read, with the same arguments, and their labels."""
    rows = _rows(batch_size, process_index, process_count)
    order = sampling.Order(source.labels, batch_size, n_instance, seed)
    for step in range(start_step, num_steps):
        indices = order(step)[rows.start : rows.stop]
        yield {"index": indices.astype(np.int32), "label": source.labels[indices]}


def test_indices(
    count: int, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Int32[np.ndarray, " b"]]:
    """Which of so many images are in each of `test_batches`; -1 fills up the last."""
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
    process_index: int = 0,
    process_count: int = 1,
) -> Batches[TestBatch]:
    """All images once and in order, in batches of equal shape; `close()` ends the workers.

    Args:
        source: the test images.
        batch_size: images in a global batch.
        image_size: side of the centre crop, pixels.
        resize: length of an image's shorter side before the crop, at least `image_size`.
        num_workers: worker processes, or threads of this one if the source keeps its images;
            0 is a few threads.
        process_index: which part of every batch to read.
        process_count: parts into which a batch is cut, row by row in order.

    Returns:
        An iterator of images [batch_size / process_count, image_size, image_size, 3] and their
        indices in the source; rows that fill up the last batch are black and have index -1.

    Raises:
        ValueError: no such batch exists. The iterator raises one that names the image when an
            image cannot be decoded.
    """
    if resize < image_size:
        raise ValueError(f"resize {resize} is smaller than image_size {image_size}")
    rows = _rows(batch_size, process_index, process_count)
    load = _TestLoader(source, batch_size, rows, image_size, resize)
    steps = -(-len(source) // batch_size)
    return _read(grain.MapDataset.range(steps).map(load), num_workers, source)


def _rows(batch_size: int, process_index: int, process_count: int) -> range:
    """The rows of a global batch that belong to a process."""
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} must be a positive multiple of the number of processes, "
            f"{process_count}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not below {process_count}")
    share = batch_size // process_count
    return range(process_index * share, (process_index + 1) * share)


@dataclasses.dataclass(eq=False)
class _TrainLoader:
    """Makes one process's part of the training batch of a given number."""

    source: Source
    order: sampling.Order
    rows: range
    image_size: int
    augmentation: images.Augmentation

    def __call__(self, step: int) -> TrainBatch:
        indices = self.order(step)[self.rows.start : self.rows.stop]
        image = np.empty((len(indices), self.image_size, self.image_size, 3), np.uint8)
        for i, (row, index) in enumerate(zip(self.rows, indices.tolist(), strict=True)):
            # A counter-based generator: its stream is given by the two numbers of its key.
            key = np.array([self.order.seed, step * self.order.batch_size + row], np.uint64)
            images.random_view(
                self.source.picture(index),
                np.random.Generator(np.random.Philox(key=key)),
                augmentation=self.augmentation,
                out=image[i],
            )
        return {"image": image, "label": self.source.labels[indices]}


@dataclasses.dataclass(frozen=True, eq=False)
class _TestLoader:
    """Makes one process's part of the test batch of a given number."""

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
                decoded = self.source.picture(i).pixels()
                view[:] = images.centre_view(decoded, size=self.image_size, resize_to=self.resize)
        return {"image": image, "index": index}


def _read(batches: grain.MapDataset, num_workers: int, source: Source) -> Batches:
    """Reads ahead in worker processes, or without them in threads.

    In threads too if images are kept: each process would decode, and keep, all of them.
    """
    if num_workers < 0:
        raise ValueError(f"num_workers must not be negative, got {num_workers}")
    if num_workers == 0 or source.kept is not None:
        threads = max(num_workers, _THREADS)
        ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        return Batches(batches.to_iter_dataset(ahead), 0)
    if not flags.FLAGS.is_parsed():  # Grain reads its flags, also in programs that parse none.
        flags.FLAGS.mark_as_parsed()
    # Batches come through pipes. Grain's shared memory would save a copy, but a container may
    # have less of it than the batches need, and Grain leaves some behind when it stops early.
    through_pipes = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
    dataset = grain.experimental.WithOptionsIterDataset(
        batches.to_iter_dataset(grain.ReadOptions(num_threads=0)), through_pipes
    )
    options = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2)
    gc.collect()  # Python can warn if it frees an old iterator while it makes a new one.
    prefetched = dataset.mp_prefetch(options, worker_init_fn=_start_worker)
    return Batches(prefetched, num_workers)


def _start_worker(index: int, count: int) -> None:
    """Runs first in a worker: one core for it, and an end when the main process is killed."""
    del index, count
    cv2.setNumThreads(0)
    for number in (signal.SIGINT, signal.SIGTERM):  # They may reach all; the main process acts.
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)  # Grain's worker would wait for a reader of its batches for ever.

    threading.Thread(target=watch, daemon=True).start()
