"""A run in object storage: trained in a local folder, published to a URL.

Every process works in a local folder of its own, so none needs a disk that it shares. It writes its
part of a checkpoint there and uploads it; the parts together are the whole checkpoint. What is
published of a run is always consistent:

- A checkpoint counts once the object `digests.json` exists in its folder, which the first process
  writes last. Without it, the other objects are the rest of an interrupted upload or deletion.
- Metrics and logs up to a checkpoint are published before it, `result.json` after everything else.
- One process at a time works on a run; see `dml_jax._utils.leases`.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
from absl import logging

from dml_jax._utils import leases, locks, processes, storage
from dml_jax._utils.errors import LockedError, UserError
from dml_jax._utils.files import PART_SUFFIX
from dml_jax.training import integrity, run_directory


class Bucket:
    """The published copy of a run that this process trains."""

    def __init__(self, url: str, folder: Path, check: Callable[[], None]) -> None:
        """Starts from a local folder that holds what is published, without checkpoints.

        Args:
            url: URL of the run.
            folder: local folder of the run in this process.
            check: raises an error if this process may no longer publish.
        """
        self.url, self.folder = url, folder
        self._check = check
        self._identity = folder.stat().st_ino
        self._published = self._states()
        self._has_checkpoints = False

    def publish(self, saving: int | None = None) -> None:
        """Publishes changed files other than checkpoints, and deletes what was deleted locally.

        Only the first process does.

        Args:
            saving: step of a checkpoint that is being published.

        Raises:
            LockedError: another process has taken over the run.
            OSError: a file cannot be written.
        """
        if not processes.is_first_process():
            return
        self._check()
        if not self.folder.exists() or self.folder.stat().st_ino != self._identity:
            raise FileNotFoundError(
                f"the local folder {self.folder} was deleted during the run; what is published at "
                f"{self.url} is unchanged: start again to resume"
            )
        states = self._states()
        changed = {name for name in states if states[name] != self._published.get(name)}
        storage.upload(self.folder, self.url, changed - {run_directory.RESULT})
        storage.upload(self.folder, self.url, changed & {run_directory.RESULT})
        storage.delete(self.url, self._published.keys() - states.keys())
        self._published = states
        if not self._has_checkpoints:
            return
        kept = {path.name for path in (self.folder / run_directory.CHECKPOINTS).glob("*")}
        published = storage.names(self._checkpoint())
        gone = {name for name in published if name.partition("/")[0] not in kept | {str(saving)}}
        seals = {name for name in gone if name.endswith(f"/{integrity.SEAL}")}
        storage.delete(self._checkpoint(), seals)  # First: what remains must not look complete.
        storage.delete(self._checkpoint(), gone - seals)

    def share(self) -> None:
        """Publishes the files of the first process, and copies to all folders what they lack.

        These are the checkpoints, which a run that is finished does not need, and for processes
        other than the first the files that it has just written.

        Raises:
            ValueError, OSError: see `publish`.
        """
        processes.in_first_process(self.publish)
        is_first = processes.is_first_process()
        found = published(storage.names(self.url))
        storage.download(
            self.url, self.folder, [x for x in found if not (is_first and _is_small(x))]
        )
        self._has_checkpoints = True
        processes.wait_for_all("checkpoints copied")

    def publish_checkpoint(self, written: Path, step: int) -> None:
        """Publishes a checkpoint, of which each process has written its part, and seals it.

        May be called on any thread.

        Args:
            written: local folder of the checkpoint.
            step: its step.

        Raises:
            LockedError: another process has taken over the run.
            OSError: a file cannot be written.
        """
        self._check()  # The other processes wait for the first below.
        own = integrity.digests(written)
        key = f"{self.url} {step}"
        # Replicated arrays and the structure are equal in all processes; those of the first count.
        of_first = json.loads(processes.exchange(f"{key} written", json.dumps(own))[0])
        if processes.is_first_process():
            files = {x.relative_to(written).as_posix() for x in written.rglob("*") if x.is_file()}
        else:
            own = {name: own[name] for name in own.keys() - of_first.keys()}
            files = set(own)
        storage.upload(written, self._checkpoint(step), files)
        parts = processes.exchange(f"{key} uploaded", json.dumps(own))
        digests = {name: x for part in parts for name, x in json.loads(part).items()}
        integrity.write(written, digests)
        if processes.is_first_process():
            self.publish(step)
            self._check()
            storage.upload(written, self._checkpoint(step), [integrity.SEAL])

    def complete(self, step: int) -> None:
        """Copies the parts of a checkpoint that other processes have written.

        Raises:
            OSError: the storage cannot be reached.
        """
        folder = self.folder / run_directory.CHECKPOINTS / str(step)
        storage.download(self._checkpoint(step), folder, integrity.missing(folder))

    def _checkpoint(self, step: int | None = None) -> str:
        folder = storage.join(self.url, run_directory.CHECKPOINTS)
        return folder if step is None else storage.join(folder, str(step))

    def _states(self) -> dict[str, tuple[int, int]]:
        """Returns size and time of change of each file other than checkpoints."""
        states = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if _is_small(name) and path.is_file() and not name.endswith(PART_SUFFIX):
                states[name] = (path.stat().st_size, path.stat().st_mtime_ns)
        return states


@contextlib.contextmanager
def opened(url: str) -> Iterator[Bucket]:
    """Holds a run in object storage: copies it to a local folder, and publishes what changes there.

    All processes of a run call it.

    Args:
        url: URL of the run; there need not be one.

    Raises:
        LockedError: another process trains there.
        OSError: the storage cannot be reached.
    """
    url = url.rstrip("/")
    if url.partition("://")[2].count("/") == 0:
        raise UserError(f"--workdir={url} is a whole bucket; choose a folder in it")
    # The first collective has a short timeout, and the first process may wait for a lease.
    processes.wait_for_all("start")
    folder = storage.local_folder(url, f"runs/{jax.process_index()}")
    with contextlib.ExitStack() as stack:
        checks: list[Callable[[], None]] = [lambda: None]
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context(folder.with_name(f"{folder.name}.lock").open("a"))
        is_free = locks.acquire(lock, folder)

        def lease() -> None:
            if is_free:
                checks.append(stack.enter_context(leases.held(url)).check)

        processes.in_first_process(lease)
        if processes.any_process(not is_free):
            raise LockedError(
                f"another process of this host is training in {url}, or is suspended; end it, or "
                "choose another --workdir"
            )
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        storage.download(url, folder, filter(_is_small, storage.names(url)))
        processes.wait_for_all("run copied")
        bucket = Bucket(url, folder, checks[-1])
        try:
            yield bucket
        except BaseException as error:
            try:
                bucket.publish()
            except (UserError, OSError) as other:
                logging.warning("the latest logs are not published: %s", other)
            if isinstance(error, UserError):  # Its message has the path of the copy.
                raise type(error)(str(error).replace(str(folder), url)) from error
            raise
        bucket.publish()


def published(names: Iterable[str]) -> list[str]:
    """Returns those of the objects of a run that count; see the top of this module.

    Args:
        names: names of all objects below the URL of the run.
    """
    names = set(names)
    return [
        name for name in names if _is_small(name) or f"{_folder(name)}/{integrity.SEAL}" in names
    ]


def copy(path: str) -> Path:
    """Returns a local folder of a run to read; for a URL, a copy that is brought up to date.

    Args:
        path: folder or URL of the run, which may be training.

    Raises:
        FileNotFoundError: there is nothing at the URL.
        OSError: the storage cannot be reached.
    """
    return storage.local(path, published)


@contextlib.contextmanager
def small_files(path: str) -> Iterator[Path]:
    """Yields a local folder of a run to read, which for a URL has its settings and result alone.

    Args:
        path: folder or URL of the run; it need not exist.

    Raises:
        OSError: the storage cannot be reached.
    """
    if not storage.is_url(path):
        yield Path(path)
        return
    wanted = {run_directory.CONFIG, run_directory.RESULT, run_directory.FORK}
    with tempfile.TemporaryDirectory() as folder:
        storage.download(path, Path(folder), wanted & storage.names(path).keys())
        try:
            yield Path(folder)
        except UserError as error:  # Its message has the path of the copy.
            raise type(error)(str(error).replace(folder, path)) from error


def _folder(name: str) -> str:
    """Returns the folder of the checkpoint that an object belongs to."""
    return "/".join(name.split("/")[:2])


def _is_small(name: str) -> bool:
    """Returns whether an object of a run is no part of a checkpoint, a lock or a lease."""
    others = (run_directory.CHECKPOINTS, run_directory.LOCK, leases.FOLDER)
    return name.partition("/")[0] not in others
