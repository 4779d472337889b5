import os
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest

from dml_jax._utils import files, leases, storage
from dml_jax._utils.errors import LockedError
from tests.helpers import object_storage


@pytest.fixture(scope="module", autouse=True)
def served():
    with object_storage.served():
        yield


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(params=object_storage.SCHEMES)
def url(request):
    return object_storage.new_bucket(request.param) + "/a/b"


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_urls_are_told_from_paths():
    assert storage.is_url("gs://bucket/run") and storage.is_url("s3://bucket")
    assert not any(map(storage.is_url, ("run", "/a/b", Path("/a"), "a:b", "C:/a/b"[1:])))
    with pytest.raises(ValueError, match="give a URL as a string"):
        storage.is_url(Path("gs://bucket/run"))
    assert storage.absolute("gs://bucket/run") == "gs://bucket/run"
    assert storage.absolute("run") == str(Path("run").absolute())
    assert storage.local("run") == Path("run")


def test_a_local_copy_follows_the_objects(url):
    for name, value in (("x", b"1"), ("y/z", b"2"), ("gone", b"3")):
        storage.write(storage.join(url, name), value)
    copy = storage.local(url)
    assert copy.name == "b"
    assert contents(copy) == {"x": b"1", "y/z": b"2", "gone": b"3"}

    # Only what has changed is read again.
    (copy / "y/z").write_bytes(b"h")
    storage.write(storage.join(url, "x"), b"10")
    storage.delete(url, ["gone", "never there"])
    assert storage.local(url) == copy
    assert contents(copy) == {"x": b"10", "y/z": b"h"}
    # What a power failure may have left is read again, too.
    (copy / "y/z").write_bytes(b"")
    assert contents(storage.local(url))["y/z"] == b"2"
    (copy / "y/z").unlink()
    assert contents(storage.local(url))["y/z"] == b"2"
    assert contents(storage.local(url, lambda names: [x for x in names if x != "x"])) == {
        "y/z": b"2"
    }

    file = storage.local(storage.join(url, "x"))
    assert file.name == "x" and file.read_bytes() == b"10"
    storage.write(storage.join(url, "x"), b"11")
    assert storage.local(storage.join(url, "x")).read_bytes() == b"11"
    with pytest.raises(FileNotFoundError, match=f"nothing at {url}/missing"):
        storage.local(f"{url}/missing")


def test_folders_come_and_go(url):
    for name in ("a/b/c", "d"):
        storage.write(storage.join(url, name), b"1")
    storage.local(url)
    storage.delete(url, ["a/b/c", "d"])
    storage.write(storage.join(url, "a"), b"2")
    storage.write(storage.join(url, "d/e"), b"3")
    copy = storage.local(url)
    assert contents(copy) == {"a": b"2", "d/e": b"3"}
    assert {path.name for path in copy.rglob("*")} == {"a", "d", "e"}


def test_objects_that_stand_for_folders_are_left_out():
    url = object_storage.new_bucket("s3") + "/images"
    for key in ("images/", "images/train/", "images/.leases/"):
        system = fsspec.filesystem("s3")
        system.call_s3("put_object", Bucket=url.split("/")[2], Key=key, Body=b"")
    assert not storage.names(url)
    with storage.writing(url, last="x") as folder, leases.held(url):
        folder.mkdir()
        files.write_json(folder / "x", {})
    assert list(storage.names(url)) == ["x"]


def test_names_of_a_copy_do_not_meet_those_of_records(url):
    values = {name: name.encode() for name in ("p", "p.json", "p.lock", "p.record")}
    if not url.startswith("memory"):  # It knows no names with two colons.
        values["a::b"] = b"2"
    for name, value in values.items():
        storage.write(storage.join(url, name), value)
    for name, value in values.items():
        assert storage.local(storage.join(url, name)).read_bytes() == value
    assert contents(storage.local(url)) == values


def test_a_copy_of_many_files_is_continued(url, monkeypatch):
    monkeypatch.setattr(storage, "_PORTION", 2)
    for number in range(5):
        storage.write(storage.join(url, str(number)), b"1")
    downloads, download = [], storage.download

    def fail_at_the_second(*given):
        downloads.append(sorted(given[2]))
        if len(downloads) == 2:
            raise OSError("the network is down")
        download(url, given[1], downloads[-1])

    monkeypatch.setattr(storage, "download", fail_at_the_second)
    with pytest.raises(OSError, match="network"):
        storage.local(url)
    copy = storage.local(url)
    assert downloads == [["0", "1"], ["2", "3"], ["2", "3"], ["4"]]
    assert len(contents(copy)) == 5
    assert [path.name for path in copy.parent.iterdir()] == ["b"]


def test_a_copy_that_was_interrupted_is_completed(url, monkeypatch):
    for name in ("x", "y"):
        storage.write(storage.join(url, name), b"old")
    storage.local(url)
    storage.write(storage.join(url, "x"), b"new")

    def fail(*_):
        raise OSError("the network is down")

    with monkeypatch.context() as down:
        down.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="network"):
            storage.local(url)
    assert contents(storage.local(url)) == {"x": b"new", "y": b"old"}


def test_what_is_written_appears_at_the_end_with_the_last_file_last(url, monkeypatch):
    uploads = []
    upload = storage.upload
    monkeypatch.setattr(
        storage, "upload", lambda *given: uploads.append(list(given[2])) or upload(*given)
    )
    with storage.writing(url, last="last.json") as folder:
        (folder / "sub").mkdir(parents=True)
        (folder / "last.json").write_bytes(b"1")
        (folder / "sub/first").write_bytes(b"2")
        assert not storage.names(url)
    assert uploads == [["sub/first"], ["last.json"]]
    assert contents(storage.local(url)) == {"last.json": b"1", "sub/first": b"2"}
    with pytest.raises(FileExistsError, match="exists already"), storage.writing(url, last="x"):
        pass

    file = storage.join(url, "report.html")
    with storage.writing(file) as path:
        files.write_text(path, "page")
    assert storage.read(file) == b"page"
    with pytest.raises(ZeroDivisionError), storage.writing(file) as path:
        files.write_text(path, "other")
        _ = 1 / 0
    assert storage.read(file) == b"page"


def test_one_of_several_creates_an_object(url):
    if url.startswith("gs"):
        pytest.skip("the emulator of GCS ignores preconditions")
    created = []

    def create(number):
        created.append(storage.create(storage.join(url, "lock"), str(number).encode()))

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(created) == [False] * 7 + [True]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(leases, "EXPIRY", 1.0)
    monkeypatch.setattr(leases, "_RENEWAL", 0.1)


def test_a_folder_has_one_holder(url, quick):
    with leases.held(url) as lease:
        lease.check()
        refused = pytest.raises(LockedError, match=f"another process is training in {url}")
        with refused, leases.held(url):
            pass
    assert not storage.names(url)
    with leases.held(url):
        pass


def abandoned(url, monkeypatch, **identity):
    """Leaves a lease like a process that was killed."""
    with monkeypatch.context() as other:
        known = leases._identity
        other.setattr(leases, "_identity", lambda process: known(process) | identity)
        storage.write(storage.join(url, f"{leases.FOLDER}/7"), leases._contents())


def test_the_lease_of_a_dead_process_of_this_host_is_taken_at_once(url, monkeypatch):
    abandoned(url, monkeypatch, started="0")
    start = time.monotonic()
    with leases.held(url):
        assert list(storage.names(url)) == [f"{leases.FOLDER}/8"]
    assert time.monotonic() - start < leases.EXPIRY / 2


@pytest.mark.parametrize("place", [{"host": "elsewhere"}, {"numbering": "of another container"}])
def test_a_lease_of_another_host_is_taken_when_it_expires(url, quick, monkeypatch, place):
    abandoned(url, monkeypatch, started="0", **place)
    start = time.monotonic()
    with leases.held(url):
        assert time.monotonic() - start >= leases.EXPIRY


def test_a_holder_that_was_suspended_stops(url, quick, monkeypatch):
    monkeypatch.setattr(leases, "_RENEWAL", 1000.0)  # It does not renew.
    with leases.held(url) as suspended, leases.held(url) as now:
        with pytest.raises(LockedError, match="taken over"):
            suspended.check()
        now.check()


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "/etc/outside"])
def test_an_object_cannot_be_copied_out_of_the_folder(name):
    url = object_storage.new_bucket("s3") + "/a"
    storage.write(storage.join(url, "inside"), b"")
    system = fsspec.filesystem("s3")
    system.call_s3("put_object", Bucket=url.split("/")[2], Key=f"a/{name}", Body=b"")
    with pytest.raises(ValueError, match="holds an object of the name"):
        storage.local(url)


def test_errors_name_the_url(monkeypatch):
    for url, message in (
        ("s3://no-such-bucket-here/a", "s3://no-such-bucket-here/a"),
        ("nonsense://a/b", "nonsense://a/b: Protocol not known"),
        ("file:///a/b", "is a local file: give its path"),
    ):
        with pytest.raises((OSError, ValueError), match=message):
            storage.write(url, b"")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(ModuleNotFoundError, match=r'for abfs:// is not .* "dml_jax\[storage\]"'):
        storage.names("abfs://container/x")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "dml_jax\[storage\]"'):
        storage.names("gs://bucket/x")
