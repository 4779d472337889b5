"""Files in object storage (gs://, s3:// and every other URL of fsspec), copied to the local disk.

All other modules work on local files. Objects are read and written whole here, since object storage
knows neither rename nor append: an object appears complete or not at all.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dml_jax._utils import extras, locks
from dml_jax._utils.errors import UserError
from dml_jax._utils.files import (
    PART_SUFFIX,
    cache_folder,
    read_json,
    write_json,
)

_PORTION = 500  # Files that are copied before the record is written.
_ONLY = "file"  # Stands for the name of a URL that is a file.
_ATTEMPTS = 5  # To copy a folder whose files another process replaces meanwhile.
_IN_CACHE = "storage"


def is_url(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is a URL of object storage.

    Raises:
        ValueError: it was one before `pathlib.Path` removed a slash.
    """
    text = os.fspath(path)
    scheme, separator, rest = text.partition(":/")
    if separator and scheme.isalnum() and not rest.startswith("/"):
        raise UserError(f"{text} lacks a slash: give a URL as a string, not as a pathlib.Path")
    return bool(separator) and scheme.isalnum()


def join(path: str | os.PathLike[str], name: str) -> str:
    """Returns the path or URL of a file in a folder."""
    return f"{os.fspath(path).rstrip('/')}/{name}"


def absolute(path: str | os.PathLike[str]) -> str:
    """Returns a path that is valid in any working directory; a URL is one already."""
    return os.fspath(path).rstrip("/") if is_url(path) else str(Path(path).absolute())


def names(url: str) -> dict[str, str]:
    """Returns the files below a URL, each with a text that changes when the file does.

    Objects that stand for folders, such as the consoles of clouds make, are left out. The name of a
    URL that is a file itself is "".

    Raises:
        ValueError: a name would lead out of the folder of a copy.
        OSError: the storage cannot be reached.
        ModuleNotFoundError: the package for its protocol is not installed.
    """
    with _described(url):
        system, root = _open(url)
        found = system.find(root, detail=True)
    root = root.rstrip("/")
    files = [path for path in found if not path.endswith("/")]
    states = {path[len(root) + 1 :]: _state(found[path]) for path in files}
    for name in states:
        if os.path.isabs(name) or os.pardir in name.split("/"):
            raise UserError(f"{url} holds an object of the name {name!r}; rename or delete it")
    return states


def read(url: str) -> bytes:
    """Returns the contents of an object.

    Raises:
        FileNotFoundError: it does not exist.
        OSError: the storage cannot be reached.
    """
    with _described(url):
        system, path = _open(url)
        return system.cat_file(path)


def write(url: str, contents: bytes) -> None:
    """Writes an object.

    Raises:
        OSError: it cannot be written.
    """
    with _described(url):
        system, path = _open(url)
        system.pipe_file(path, contents)


def create(url: str, contents: bytes) -> bool:
    """Writes an object that does not exist; returns False if it does.

    Of several processes one succeeds: the storage checks it (a generation of zero on GCS,
    `If-None-Match: *` on S3).

    Raises:
        OSError: it cannot be written.
    """
    with _described(url):
        system, path = _open(url)
        try:
            system.pipe_file(path, contents, mode="create")
        except FileExistsError:
            return False
    return True


def upload(folder: Path, url: str, files: Iterable[str]) -> None:
    """Copies files of a local folder to the same names below a URL.

    Raises:
        OSError: a file cannot be written.
    """
    files = sorted(files)
    with _described(url):
        system, root = _open(url)
        if files:
            system.put([str(folder / x) for x in files], [join(root, x) for x in files])


def download(url: str, folder: Path, files: Iterable[str]) -> None:
    """Copies files below a URL to the same names of a local folder.

    Raises:
        FileNotFoundError: one does not exist.
        OSError: the storage cannot be reached.
    """
    files = sorted(files)
    with _described(url):
        system, root = _open(url)
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if files:
            system.get([join(root, name) for name in files], [str(folder / x) for x in files])


def delete(url: str, files: Iterable[str]) -> None:
    """Deletes files below a URL; those that do not exist are ignored.

    Raises:
        OSError: the storage cannot be reached.
    """
    with _described(url):
        system, root = _open(url)
        for name in sorted(files):
            with contextlib.suppress(FileNotFoundError):
                system.rm_file(join(root, name))


def local(
    path: str | os.PathLike[str],
    wanted: Callable[[Mapping[str, str]], Iterable[str]] = lambda found: found,
) -> Path:
    """Returns a local path; for a URL, that of a copy, which is brought up to date.

    Copies are kept in `cache_folder()`, so that only changed files are read again. An interrupted
    copy is continued.

    Args:
        path: a path, or the URL of a file or folder.
        wanted: selects from the names of the files below the URL; by default, all are copied.

    Raises:
        FileNotFoundError: there is nothing at the URL.
        OSError: the storage cannot be reached.
        ModuleNotFoundError: the package for its protocol is not installed.
    """
    if not is_url(path):
        return Path(path)
    url = os.fspath(path).rstrip("/")
    copy, record = local_folder(url), local_folder(url, "records")
    with locks.exclusive(record.with_name(f"{record.name}.lock")):
        for attempt in range(_ATTEMPTS):
            found = names(url)
            chosen = {name: found[name] for name in wanted(found)}
            if not chosen:
                raise FileNotFoundError(f"there is nothing at {url}")
            try:
                _bring_up_to_date(copy, record.with_name(f"{record.name}.record"), url, chosen)
                break
            except FileNotFoundError:  # Another process has replaced or deleted a file.
                if attempt == _ATTEMPTS - 1:
                    raise
    return copy


def _bring_up_to_date(copy: Path, record: Path, url: str, chosen: Mapping[str, str]) -> None:
    known, current = read_json(record) or {}, {}
    for name, state in known.items():
        file = copy / name
        # The size differs after a power failure, for example.
        is_whole = file.is_file() and file.stat().st_size == _size(state)
        if is_whole and state == chosen.get(name):
            current[name] = state
    _delete_others(copy, current)
    write_json(record, current)
    missing = sorted(chosen.keys() - current.keys())
    part = copy.with_name(f"{copy.name}{PART_SUFFIX}")
    copy.parent.mkdir(parents=True, exist_ok=True)
    # In portions, so that an interrupted copy of many files can be continued.
    for start in range(0, len(missing), _PORTION):
        portion = missing[start : start + _PORTION]
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for name in portion:
            if not name:
                (part / _ONLY).write_bytes(read(url))
        download(url, part, filter(None, portion))
        for name in portion:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(part / (name or _ONLY), copy / name)
        current |= {name: chosen[name] for name in portion}
        write_json(record, current)
    shutil.rmtree(part, ignore_errors=True)


def _delete_others(copy: Path, current: Collection[str]) -> None:
    """Deletes what is in a copy besides current files, empty folders too."""
    if copy.is_file():
        if "" not in current:
            copy.unlink()
        return
    for folder, _, files in os.walk(copy, topdown=False):
        for file in files:
            if Path(folder, file).relative_to(copy).as_posix() not in current:
                Path(folder, file).unlink()
        with contextlib.suppress(OSError):
            os.rmdir(folder)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], last: str = "") -> Iterator[Path]:
    """Yields a local path to write a file or a folder to; for a URL it is uploaded at the end.

    Args:
        path: a path, or a URL.
        last: the file of a folder that readers need; it is uploaded after all others.

    Raises:
        FileExistsError: the URL of a folder, or a file below it, exists.
        OSError: the storage cannot be reached.
    """
    if not is_url(path):
        yield Path(path)
        return
    url = os.fspath(path).rstrip("/")
    if last and names(url):
        raise FileExistsError(f"{url} exists already; remove it, or choose another URL")
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, url.rpartition("/")[2])
        yield written
        if written.is_file():
            upload(written.parent, url.rpartition("/")[0], [written.name])
        else:
            made = [file.relative_to(written).as_posix() for file in _files(written)]
            upload(written, url, [name for name in made if name != last])
            upload(written, url, [name for name in made if name == last])


def local_folder(url: str, purpose: str = "copies") -> Path:
    """Returns a path in the cache folder for what is stored at a URL; its name is that of the URL.

    Args:
        url: the URL.
        purpose: keeps apart what must not share a folder.
    """
    parent, _, name = url.rstrip("/").rpartition("/")
    digest = hashlib.sha256(parent.encode()).hexdigest()[:16]
    return cache_folder() / _IN_CACHE / purpose / digest / name


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _state(info: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(repr(sorted((key, str(info[key])) for key in info)).encode())
    return f"{info['size']} {digest.hexdigest()}"


def _size(state: str) -> int:
    return int(state.partition(" ")[0])


def _open(url: str) -> tuple[Any, str]:
    """Returns fsspec's file system of a URL, and the path of the URL in it."""
    with extras.required_by("storage"):
        import fsspec  # Not needed for local files.
    scheme = url.partition("://")[0]
    if scheme in ("file", "local"):
        raise UserError(f"{url} is a local file: give its path")
    try:
        # Not `url_to_fs`: it takes a name with two colons for a chain of file systems.
        system = fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError as error:
        raise ModuleNotFoundError(
            f'the package for {scheme}:// is not installed: pip install "dml_jax[storage]" has '
            f"those for gs:// and s3:// ({error})"
        ) from None
    except ValueError as error:
        raise UserError(f"{url}: {error}") from None
    return system, system._strip_protocol(url)


@contextlib.contextmanager
def _described(url: str) -> Iterator[None]:
    """Raises errors of a storage's client, which may be of any type, as an OSError with the URL."""
    try:
        yield
    except (UserError, ModuleNotFoundError):
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{url}: not found: {error}") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{url}: {reason:.300}") from error
