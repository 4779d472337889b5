"""Archives: downloaded whole or not at all, unpacked nowhere but where they should be."""

import errno
import gzip
import hashlib
import http.client
import io
import shutil
import stat
import tarfile
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from rich.progress import Progress

from dml_jax._utils import files
from dml_jax.data import records

SUFFIXES = (".zip", ".tgz", ".tar.gz", ".tar")
"""What the names of archives end in, in lower case."""

# An OSError is gzip's, a RuntimeError a zip's that needs a password.
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)
_CHUNK = 1 << 20
_RATIO = 100  # No archive of images unpacks to as many times its size; one of zeros does.
_HARMLESS = 1 << 28  # Bytes that may be unpacked in any case.
_TIMEOUT = 60  # Seconds without a byte.


class Address(NamedTuple):
    """Where an archive is published.

    Attributes:
        url: its address (https or ftp).
        file_name: what to store it as.
        sha256: checksum, in hexadecimal.
    """

    url: str
    file_name: str
    sha256: str


def is_archive(path: Path) -> bool:
    """Whether a path is a file named like an archive."""
    return path.is_file() and path.name.lower().endswith(SUFFIXES)


def download(address: Address, directory: Path, progress: Progress) -> Path:
    """Downloads an archive into a directory, from its beginning, unless it is already there.

    Returns:
        Where it is.

    Raises:
        OSError: the address cannot be read, or the connection broke.
        ValueError: what came is not what was published.
    """
    path = directory / address.file_name
    if path.exists():
        return path
    directory.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    try:
        with (
            urllib.request.urlopen(address.url, timeout=_TIMEOUT) as response,
            files.atomic_write(path, keep_part=True) as part,
        ):
            size = int(response.headers.get("Content-Length") or 0)
            task = progress.add_task(f"download {path.name}", total=size or None)
            with part.open("wb") as file:
                while chunk := response.read(_CHUNK):
                    file.write(chunk)
                    digest.update(chunk)
                    progress.advance(task, len(chunk))
            if size and part.stat().st_size != size:
                raise OSError(f"the connection ended after {part.stat().st_size} of {size} bytes")
            if digest.hexdigest() != address.sha256:
                raise ValueError(
                    f"what {address.url} sent is not what was published: its SHA-256 is "
                    f"{digest.hexdigest()}, not {address.sha256}; it is in {part}"
                )
    except (OSError, EOFError, http.client.HTTPException) as error:  # EOFError is ftplib's.
        raise OSError(
            f"cannot download {address.url} ({error}); run the same command again, which starts "
            f"over, or put the file from elsewhere at {path}"
        ) from error
    return path


def unpack(archive: Path, directory: Path, progress: Progress) -> None:
    """Unpacks an archive's files and directories into a directory.

    Everything is looked at before anything is written.

    Raises:
        ValueError: the archive is broken; or a member is a link, a device or the like, or would
            lie outside the directory; or it would unpack to far more than images do, or to more
            than there is room for.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        if archive.name.lower().endswith(".zip"):
            _unpack_zip(archive, directory, progress)
        else:
            _unpack_tar(archive, directory, progress)
    except _BROKEN as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # The disk's fault. EINVAL is the archive's, which sends its reader nowhere.
        raise ValueError(f"{archive} cannot be unpacked ({error}); get it again") from error


def _unpack_zip(archive: Path, directory: Path, progress: Progress) -> None:
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        for member in members:
            # The upper half holds the mode where the archive was made on a Unix, else zero.
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _refusal(archive, member.filename, "is a link or a device")
            _check_path(archive, member.filename)
        _check_size(archive, sum(member.file_size for member in members), directory)
        for member in progress.track(members, description=f"unpack {archive.name}"):
            path = directory / member.filename
            if member.is_dir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with file.open(member) as content, path.open("wb") as copy:
                shutil.copyfileobj(content, copy)


def _unpack_tar(archive: Path, directory: Path, progress: Progress) -> None:
    with _Bounded(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as file:
        members = file.getmembers()
        _check_size(archive, sum(member.size for member in members), directory)
        for member in members:
            if not (member.isreg() or member.isdir()):
                raise _refusal(archive, member.name, "is a link or a device")
            _check_path(archive, member.name)
        for member in progress.track(members, description=f"unpack {archive.name}"):
            file.extract(member, directory, filter="data")


class _Bounded(io.BufferedReader):
    """A tar file, compressed or not, that is read no further than an archive may be long.

    Its list of members is known only when all of it is read, and its headers are read into memory.
    """

    def __init__(self, archive: Path):
        with archive.open("rb") as file:
            is_packed = file.read(2) == b"\x1f\x8b"
        super().__init__(gzip.GzipFile(archive) if is_packed else io.FileIO(archive))
        self._archive = archive

    def read(self, size: int | None = -1, /) -> bytes:
        end = self.tell() + (size or 0)
        if end > _most(self._archive):
            raise _too_large(self._archive, end)
        return super().read(size)


def _most(archive: Path) -> int:
    return max(_HARMLESS, _RATIO * archive.stat().st_size)


def _too_large(archive: Path, size: int) -> ValueError:
    return ValueError(
        f"{archive} is not unpacked: its {archive.stat().st_size} bytes become {size} or more, as "
        "no images do"
    )


def _check_size(archive: Path, size: int, directory: Path) -> None:
    if size > _most(archive):
        raise _too_large(archive, size)
    if size > (free := shutil.disk_usage(directory).free):
        raise ValueError(
            f"{archive} unpacks to {size} bytes, but {directory} has room for {free}; make room, "
            "or choose another --out"
        )


def _check_path(archive: Path, name: str) -> None:
    if records.leads_elsewhere(name):
        raise _refusal(archive, name, "would lie outside the directory it is unpacked into")


def _refusal(archive: Path, name: str, why: str) -> ValueError:
    return ValueError(f"{archive} is not unpacked: {name!r} in it {why}")
