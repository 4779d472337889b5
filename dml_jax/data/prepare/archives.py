"""Download and safe unpacking of archives.

Downloads are atomic and verified by checksum, if one is published. Unpacking never writes outside
the target directory.
"""

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
from dml_jax._utils.errors import UserError
from dml_jax.data import records

SUFFIXES = (".zip", ".tgz", ".tar.gz", ".tar")
"""Extensions of archives, in lower case."""

# gzip raises OSError, and a zip file that needs a password RuntimeError.
_UNPACK_ERRORS = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)
_CHUNK = 1 << 20
_MAX_RATIO = 100  # Unpacked over packed size; images compress far less, decompression bombs more.
_ALWAYS_ALLOWED = 1 << 28  # Bytes that may be unpacked whatever the ratio.
_TIMEOUT = 60  # Seconds without data.


class Address(NamedTuple):
    """The address of a published archive.

    Attributes:
        url: its URL (https or ftp).
        file_name: name of the downloaded file.
        sha256: its checksum, in hexadecimal; None if none is published. (GitHub does not promise
            that the archive of a commit always has the same bytes.)
    """

    url: str
    file_name: str
    sha256: str | None


def is_archive(path: Path) -> bool:
    """Returns whether a path is a file named like an archive."""
    return path.is_file() and path.name.lower().endswith(SUFFIXES)


def download(address: Address, directory: Path, progress: Progress) -> Path:
    """Downloads an archive to a directory unless it is already there.

    An interrupted download starts over.

    Returns:
        The path of the archive.

    Raises:
        OSError: the address cannot be read, or the connection broke.
        ValueError: the checksum differs from the published one.
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
            if address.sha256 not in (None, digest.hexdigest()):
                raise UserError(
                    f"{address.url} is not the published file: its SHA-256 is "
                    f"{digest.hexdigest()}, not {address.sha256}; the download is kept in {part}"
                )
    except (OSError, EOFError, http.client.HTTPException) as error:  # EOFError is ftplib's.
        raise OSError(
            f"cannot download {address.url} ({error}); run the same command again, which starts "
            f"over, or copy the file to {path}"
        ) from error
    return path


def unpack(archive: Path, directory: Path, progress: Progress) -> None:
    """Unpacks the files and directories of an archive to a directory.

    All members are checked before any is written.

    Raises:
        ValueError: the archive is damaged; a member is a link or a device, or lies outside the
            directory; or the unpacked size is implausible for images or exceeds the free space.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        if archive.name.lower().endswith(".zip"):
            _unpack_zip(archive, directory, progress)
        else:
            _unpack_tar(archive, directory, progress)
    except _UNPACK_ERRORS as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # A disk error. EINVAL comes from a damaged archive with invalid offsets.
        raise UserError(f"{archive} cannot be unpacked ({error}); get it again") from error


def _unpack_zip(archive: Path, directory: Path, progress: Progress) -> None:
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        for member in members:
            # The upper half holds the file mode if the archive was made on Unix, else zero.
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _rejection(archive, member.filename, "is a link or a device")
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
    with _BoundedReader(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as file:
        members = file.getmembers()
        _check_size(archive, sum(member.size for member in members), directory)
        for member in members:
            if not (member.isreg() or member.isdir()):
                raise _rejection(archive, member.name, "is a link or a device")
            _check_path(archive, member.name)
        for member in progress.track(members, description=f"unpack {archive.name}"):
            file.extract(member, directory, filter="data")


class _BoundedReader(io.BufferedReader):
    """Reader of a tar file, compressed or not, that raises beyond the maximum unpacked size.

    The members of a tar file are known only after reading all of it, and tarfile reads its headers
    into memory.
    """

    def __init__(self, archive: Path):
        with archive.open("rb") as file:
            is_compressed = file.read(2) == b"\x1f\x8b"
        super().__init__(gzip.GzipFile(archive) if is_compressed else io.FileIO(archive))
        self._archive = archive

    def read(self, size: int | None = -1, /) -> bytes:
        end = self.tell() + (size or 0)
        if end > _max_size(self._archive):
            raise _too_large(self._archive, end)
        return super().read(size)


def _max_size(archive: Path) -> int:
    return max(_ALWAYS_ALLOWED, _MAX_RATIO * archive.stat().st_size)


def _too_large(archive: Path, size: int) -> ValueError:
    return UserError(
        f"{archive} is not unpacked: its {archive.stat().st_size} bytes become {size} or more, "
        "which is implausible for images"
    )


def _check_size(archive: Path, size: int, directory: Path) -> None:
    if size > _max_size(archive):
        raise _too_large(archive, size)
    if size > (free := shutil.disk_usage(directory).free):
        raise UserError(
            f"{archive} unpacks to {size} bytes, but {directory} has {free} free; free some space, "
            "or choose another --out"
        )


def _check_path(archive: Path, name: str) -> None:
    if records.escapes_directory(name):
        raise _rejection(archive, name, "would lie outside the directory it is unpacked to")


def _rejection(archive: Path, name: str, reason: str) -> ValueError:
    return UserError(f"{archive} is not unpacked: {name!r} in it {reason}")
