import dataclasses
import functools
import gzip
import hashlib
import http.server
import io
import shutil
import stat
import tarfile
import threading
import urllib.request
import zipfile

import pytest
from rich.progress import Progress

from dml_jax.data import prepare
from dml_jax.data.prepare import archives
from tests.helpers import public_data


@pytest.fixture
def progress():
    with Progress(disable=True) as progress:
        yield progress


def make_tar(path, *members):
    """Writes an archive of members (name, type, content or link target)."""
    with tarfile.open(path, "w:gz") as file:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == tarfile.REGTYPE:
                info.size = len(content)
            else:
                info.linkname = content
            file.addfile(info, io.BytesIO(content.encode()))
    return path


def make_zip(path, *members):
    """Writes an archive of members (name, file type, content)."""
    with zipfile.ZipFile(path, "w") as file:
        for name, kind, content in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = kind << 16
            file.writestr(info, content)
    return path


@pytest.mark.parametrize("kind", ["zip", "tgz"])
def test_unpack_zip_and_tar(kind, tmp_path, progress):
    if kind == "zip":
        members = [("a/", stat.S_IFDIR, ""), ("a/b/1.txt", stat.S_IFREG, "1"), ("2.txt", 0, "2")]
        archive = make_zip(tmp_path / "x.ZIP", *members)
    else:
        members = [("a", tarfile.DIRTYPE, ""), ("a/b/1.txt", tarfile.REGTYPE, "1")]
        archive = make_tar(tmp_path / "x.tgz", *members, ("2.txt", tarfile.REGTYPE, "2"))
    assert archives.is_archive(archive)
    archives.unpack(archive, tmp_path / "to", progress)
    assert (tmp_path / "to/a/b/1.txt").read_text() == "1"
    assert (tmp_path / "to/2.txt").read_text() == "2"


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("../out", stat.S_IFREG, "would lie outside"),
        ("a/../../out", 0, "would lie outside"),
        ("/elsewhere/out", 0, "would lie outside"),
        ("..\\out", 0, "would lie outside"),
        ("C:out", 0, "would lie outside"),
        ("a", stat.S_IFLNK, "is a link or a device"),
        ("a", stat.S_IFCHR, "is a link or a device"),
    ],
)
def test_malicious_zip_writes_nothing(name, kind, message, tmp_path, progress):
    archive = make_zip(tmp_path / "x.zip", ("good.txt", 0, "good"), (name, kind, "/etc/passwd"))
    with pytest.raises(ValueError, match=message):
        archives.unpack(archive, tmp_path / "to", progress)
    assert not list((tmp_path / "to").iterdir())


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("../out", tarfile.REGTYPE, "would lie outside"),
        ("/elsewhere/out", tarfile.REGTYPE, "would lie outside"),
        ("a", tarfile.SYMTYPE, "is a link or a device"),
        ("a", tarfile.LNKTYPE, "is a link or a device"),
        ("a", tarfile.CHRTYPE, "is a link or a device"),
        ("a", tarfile.FIFOTYPE, "is a link or a device"),
    ],
)
def test_malicious_tar_writes_nothing(name, kind, message, tmp_path, progress):
    good = ("good.txt", tarfile.REGTYPE, "good")
    archive = make_tar(tmp_path / "x.tar.gz", good, (name, kind, "/etc/passwd"))
    with pytest.raises(ValueError, match=message):
        archives.unpack(archive, tmp_path / "to", progress)
    assert not list((tmp_path / "to").iterdir())


@pytest.mark.parametrize("name", ["x.zip", "x.tgz", "x.tar"])
def test_damaged_archive_is_named_in_the_error(name, tmp_path, progress):
    (tmp_path / name).write_bytes(b"not an archive" * 100)
    with pytest.raises(ValueError, match=rf"{name} cannot be unpacked (.|\n)*; get it again"):
        archives.unpack(tmp_path / name, tmp_path / "to", progress)
    whole = make_tar(tmp_path / "whole.tgz", ("1", tarfile.REGTYPE, "1" * 10_000)).read_bytes()
    (tmp_path / "half.tgz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="half.tgz cannot be unpacked"):
        archives.unpack(tmp_path / "half.tgz", tmp_path / "to", progress)


def test_prepare_from_an_archive(tmp_path):
    root = public_data.cub200(tmp_path / "cub")
    with tarfile.open(tmp_path / "any.tgz", "w:gz") as file:
        file.add(root, ".")
    published = dataclasses.replace(prepare.DATA_SETS["cub200"], counts=public_data.CUB_COUNTS)
    manifest = prepare.prepare(
        "cub200", source=tmp_path / "any.tgz", out=tmp_path / "out", published=published
    )
    assert len(manifest.splits["train"].labels) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["any.tgz", "cub", "out"]
    with pytest.raises(ValueError, match="is neither a directory nor named"):
        prepare.prepare("cub200", source=root / "attributes.txt", out=tmp_path / "other")


def test_prepare_sop_from_its_zip(tmp_path):
    (root := tmp_path / "source").mkdir()
    images = public_data.sop(tmp_path / "images")
    shutil.make_archive(str(root / "Stanford_Online_Products"), "zip", images)
    published = dataclasses.replace(prepare.DATA_SETS["sop"], counts=public_data.SOP_COUNTS)
    sources = {"a": root, "b": root / "Stanford_Online_Products.zip", "c": images}
    manifests = [
        prepare.prepare("sop", source=source, out=tmp_path / out, published=published)
        for out, source in sources.items()
    ]
    assert len(manifests[0].splits["train"].labels) == 22
    # Image names do not depend on the location of the archive.
    assert manifests[0] == manifests[1] == manifests[2]
    assert [path.name for path in root.iterdir()] == ["Stanford_Online_Products.zip"]


def test_cub_is_downloaded_once(tmp_path, monkeypatch):
    archive = tmp_path / "copy.tgz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(public_data.cub200(tmp_path / "cub") / "CUB_200_2011", "CUB_200_2011")
    requested = []

    def urlopen(url, timeout):
        requested.append(url)
        response = io.BytesIO(archive.read_bytes())
        response.headers = {"Content-Length": str(archive.stat().st_size)}
        return response

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    real = prepare.DATA_SETS["cub200"]
    (address,) = real.addresses

    def prepare_with_checksum(out, sha256):
        published = dataclasses.replace(
            real, counts=public_data.CUB_COUNTS, addresses=(address._replace(sha256=sha256),)
        )
        source = tmp_path / "downloads"
        return prepare.prepare("cub200", source=source, out=out, download=True, published=published)

    with pytest.raises(ValueError, match="is not the published file"):
        prepare_with_checksum(tmp_path / "out", address.sha256)
    assert not (tmp_path / "out").exists()
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    manifest = prepare_with_checksum(tmp_path / "out", digest)
    assert {split: len(x.labels) for split, x in manifest.splits.items()} == {"train": 6, "test": 6}
    assert prepare_with_checksum(tmp_path / "again", digest) == manifest
    assert requested == [address.url, address.url]
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == ["CUB_200_2011.tgz"]


@pytest.fixture
def server(tmp_path):
    """Serves a directory; returns its path and its URL."""
    root = tmp_path / "served"
    root.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def send_head(self):
            if self.path != "/short":
                return super().send_head()
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            return io.BytesIO(b"14 bytes only.")

    handler = functools.partial(Handler, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        yield root, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_downloads_are_atomic_and_verified(server, tmp_path, progress):
    root, url = server
    content = bytes(range(256)) * 10_000
    (root / "a.zip").write_bytes(content)
    address = archives.Address(f"{url}/a.zip", "b.zip", hashlib.sha256(content).hexdigest())
    into = tmp_path / "downloads"

    altered = address._replace(sha256="0" * 64)
    with pytest.raises(ValueError, match=r"a.zip is not the published file: its SHA-256 is"):
        archives.download(altered, into, progress)
    assert [path.name for path in into.iterdir()] == ["b.zip.part"]
    for name, message in [("none", "HTTP Error 404"), ("short", "ended after 14 of 1000 bytes")]:
        with pytest.raises(OSError, match=f"cannot download {url}/{name} .*{message}.*starts over"):
            archives.download(address._replace(url=f"{url}/{name}"), into, progress)
        assert [path.name for path in into.iterdir()] == ["b.zip.part"]

    assert archives.download(address, into, progress) == into / "b.zip"
    assert (into / "b.zip").read_bytes() == content
    assert [path.name for path in into.iterdir()] == ["b.zip"]
    (root / "a.zip").unlink()  # An existing file is not downloaded again.
    archives.download(address, into, progress)


def test_omniglot_is_downloaded_unpacked_and_prepared(server, tmp_path):
    root, url = server
    images = public_data.omniglot(tmp_path / "images")
    addresses = []
    for directory in sorted(images.iterdir()):
        path = root / f"{directory.name}.zip"
        with zipfile.ZipFile(path, "w") as file:
            for image in sorted(directory.rglob("*.png")):
                file.write(image, image.relative_to(images))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        addresses.append(archives.Address(f"{url}/{path.name}", path.name, digest))
    published = dataclasses.replace(
        prepare.DATA_SETS["omniglot"],
        counts=public_data.OMNIGLOT_COUNTS,
        addresses=tuple(addresses),
    )
    downloads, out = tmp_path / "downloads", tmp_path / "out"
    manifest = prepare.prepare(
        "omniglot", source=downloads, out=out, download=True, published=published
    )
    assert len(manifest.splits["train"].labels) == 10
    assert len(list(downloads.iterdir())) == 2
    again = prepare.prepare("omniglot", source=downloads, out=tmp_path / "o2", published=published)
    assert again == manifest
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--download needs a directory to download to"):
        prepare.prepare("omniglot", source=tmp_path / "file", out=tmp_path / "o3", download=True)


def zeros(path, size):
    """Writes an archive of one file of zeros, which compresses by a factor of 1000."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("zeros", bytes(size))
    else:
        with tarfile.open(path, "w:gz") as file:
            info = tarfile.TarInfo("zeros")
            info.size = size
            file.addfile(info, io.BytesIO(bytes(size)))
    return path


@pytest.mark.parametrize("name", ["x.zip", "x.tgz"])
def test_decompression_bomb_writes_nothing(name, tmp_path, progress, monkeypatch):
    archive = zeros(tmp_path / name, 1 << 20)
    archives.unpack(archive, tmp_path / "harmless", progress)
    monkeypatch.setattr(archives, "_ALWAYS_ALLOWED", 1 << 16)
    with pytest.raises(ValueError, match=rf"{name} is not unpacked: its \d+ bytes become 1\d+ or"):
        archives.unpack(archive, tmp_path / "to", progress)
    assert not list((tmp_path / "to").iterdir())


def test_tar_is_not_read_beyond_the_maximum_size(tmp_path, progress, monkeypatch):
    monkeypatch.setattr(archives, "_ALWAYS_ALLOWED", 1 << 16)
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = (
        tarfile.XHDTYPE,
        1 << 32,
    )  # tarfile would read this header into memory.
    with gzip.open(tmp_path / "x.tgz", "wb") as file:
        file.write(header.tobuf(tarfile.USTAR_FORMAT) + bytes(1 << 17))
    with pytest.raises(ValueError, match="x.tgz is not unpacked: its .* become 4294967808 or"):
        archives.unpack(tmp_path / "x.tgz", tmp_path / "to", progress)
    sparse = tarfile.TarInfo("sparse")
    sparse.size = 1 << 32  # More than follows, in an uncompressed archive.
    (tmp_path / "y.tar").write_bytes(sparse.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))
    with pytest.raises(ValueError, match="y.tar"):
        archives.unpack(tmp_path / "y.tar", tmp_path / "to", progress)
    assert not list((tmp_path / "to").iterdir())


def test_archive_larger_than_the_free_space_is_rejected(tmp_path, progress, monkeypatch):
    archive = zeros(tmp_path / "x.zip", 1000)
    usage = shutil.disk_usage(tmp_path)._replace(free=999)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        ValueError, match="x.zip unpacks to 1000 bytes, but .* has 999 free; free some"
    ):
        archives.unpack(archive, tmp_path / "to", progress)
