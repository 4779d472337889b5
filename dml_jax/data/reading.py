"""Reading of batches ahead of their use, in worker processes or in threads of this process.

Worker processes are spawned: a program that uses them needs the usual
`if __name__ == "__main__":`, and the first batch takes some seconds for their imports.
"""

import atexit
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
from typing import TypeVar

import cv2
import grain
from absl import flags

from dml_jax._utils.errors import UserError
from dml_jax.data.sources import Source

T = TypeVar("T")
_POLL_SECONDS = 1  # Wait for a batch before checking whether the workers are alive.
# Wait before a worker with exit code 0 counts as dead. Earlier it may just have sent its last batch
# before the other workers did.
_CLEAN_EXIT_SECONDS = 300
_THREADS = 2  # Decoding releases the GIL, so a second thread helps.


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


def read(batches: grain.MapDataset, num_workers: int, source: Source) -> Batches:
    """Returns batches, prefetched in worker processes or in threads.

    Threads are used if there are no workers, or if the source caches its images: each worker would
    decode and cache all of them.

    Args:
        batches: the batches, in order; each element loads one.
        num_workers: number of worker processes, or of threads if the source caches its images; 0
            means a few threads.
        source: the images that the batches are loaded from.

    Raises:
        ValueError: the number of workers is negative.
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
