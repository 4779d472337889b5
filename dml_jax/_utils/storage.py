"""Files in object storage (gs://, s3:// and every other URL of fsspec), copied to the local disk.

All other modules work on local files. Objects are read and written whole here, since object storage
knows neither rename nor append: an object appears complete or not at all.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dml_jax._utils import extras, locks
from dml_jax._utils.errors import UserError
from dml_jax._utils.files import (
    PART_SUFFIX,
    atomic_write,
    cache_folder,
    read_json,
    write_json,
)

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

    The name of a URL that is a file itself is "".

    Raises:
        ValueError: a name would lead out of the folder of a copy.
        OSError: the storage cannot be reached.
        ModuleNotFoundError: the package for its protocol is not installed.
    """
    with _described(url):
        system, root = _open(url)
        found = system.find(root, detail=True)
    root = root.rstrip("/")
    states = {path[len(root) + 1 :]: _state(found[path]) for path in found}
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

    Copies are kept in `cache_folder()`, so that only changed files are read again.

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
    copy = local_folder(url)
    with locks.exclusive(copy.with_name(f"{copy.name}.lock")):
        for attempt in range(_ATTEMPTS):
            found = names(url)
            chosen = {name: found[name] for name in wanted(found)}
            if not chosen:
                raise FileNotFoundError(f"there is nothing at {url}")
            try:
                _bring_up_to_date(copy, url, chosen)
                break
            except FileNotFoundError:
                if attempt == _ATTEMPTS - 1:
                    raise
    return copy


def _bring_up_to_date(copy: Path, url: str, chosen: Mapping[str, str]) -> None:
    record = copy.with_name(f"{copy.name}.json")
    known = read_json(record) or {}
    current = {name: known[name] for name in known if known[name] == chosen.get(name)}
    current = {name: state for name, state in current.items() if (copy / name).is_file()}
    for file in [copy] if copy.is_file() else _files(copy):
        if (file.relative_to(copy).as_posix() if file != copy else "") not in current:
            file.unlink()
    # Written first, so that a killed process leaves no record of a file that it has not copied.
    copy.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, current)
    missing = chosen.keys() - current.keys()
    if "" in chosen:
        if missing:
            with atomic_write(copy) as part:
                part.write_bytes(read(url))
    else:
        with tempfile.TemporaryDirectory(dir=copy.parent, suffix=PART_SUFFIX) as part:
            download(url, Path(part), missing)
            for name in missing:
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(part, name), copy / name)
    write_json(record, chosen)


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


def new_folder(folder: Path) -> None:
    """Makes an empty folder, or empties it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _state(info: Mapping[str, Any]) -> str:
    return hashlib.sha256(repr(sorted((key, str(info[key])) for key in info)).encode()).hexdigest()


def _open(url: str) -> tuple[Any, str]:
    """Returns fsspec's file system of a URL, and the path of the URL in it."""
    with extras.required_by("storage"):
        import fsspec  # Not needed for local files.
    try:
        system, path = fsspec.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        scheme = url.partition(":")[0]
        raise ModuleNotFoundError(
            f'the package for {scheme}:// is not installed: pip install "dml_jax[storage]" has '
            f"those for gs:// and s3:// ({error})"
        ) from None
    except ValueError as error:
        raise UserError(f"{url}: {error}") from None
    return system, path


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
