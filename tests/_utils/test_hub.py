import http.server
import json
import threading

import pytest
from huggingface_hub import constants

from dml_jax._utils import hub
from tests.helpers.hub import COMMIT, CONVERTED, snapshot


def put(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet"))


@pytest.mark.parametrize(
    "location",
    [
        "hf:datasets/a/b",
        "hf:datasets/a/b.c-d@v1",
        "hf:datasets/a/b/data/full",
        "hf:datasets/a/b@refs/convert/parquet",
    ],
)
def test_valid_locations(location):
    assert hub.is_data_set(location)


@pytest.mark.parametrize(
    "location",
    [
        "",
        "a/b",
        "hf:a/b",
        "hf:datasets/a",
        "hf:datasets/a/../b",
        "hf:datasets/a/b/..",
        "hf:datasets/a/b@../../x",
        "hf:datasets/a/b@/etc",
    ],
)
def test_invalid_locations(location):
    assert not hub.is_data_set(location)


def test_files_are_read_from_the_cache_of_the_hub():
    put(snapshot("cars"), {"data/train-00000-of-00001.parquet": b"1", "README.md": b""})
    for location in ("hf:datasets/somebody/cars", f"hf:datasets/somebody/cars@{COMMIT}"):
        folder = hub.data_set(location, ".parquet")
        assert below(folder) == ["data/train-00000-of-00001.parquet"]
    assert below(hub.data_set("hf:datasets/somebody/cars/data", ".parquet")) == [
        "train-00000-of-00001.parquet"
    ]
    for location, reason in (
        ("hf:datasets/somebody/cars@v2", "Cannot find an appropriate cached snapshot"),
        ("hf:datasets/somebody/none", "Cannot find an appropriate cached snapshot"),
        ("hf:datasets/somebody/cars/full", r"its main branch has no full/\*.parquet"),
    ):
        with pytest.raises(FileNotFoundError, match=f"{location} .*{reason}.*hf download somebody"):
            hub.data_set(location, ".parquet")
    with pytest.raises(FileNotFoundError, match=r"its main branch has no \*.tar\); check"):
        hub.data_set("hf:datasets/somebody/cars", ".tar")


def test_parquet_files_of_other_formats_are_those_that_the_hub_converted():
    put(snapshot("photos"), {"train.zip": b""})
    files = {"default/train/0000.parquet": b"1"}
    put(snapshot("photos", revision="refs/convert/parquet", commit=CONVERTED), files)
    folder = hub.data_set("hf:datasets/somebody/photos", ".parquet")
    assert below(folder) == ["default/train/0000.parquet"]
    with pytest.raises(FileNotFoundError, match="main has no"):
        hub.data_set("hf:datasets/somebody/photos@main", ".parquet")


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that downloads use."""

    files = {
        "data/train-00000-of-00001.parquet": b"train",
        "data/test-00000-of-00001.parquet": b"test",
        "README.md": b"not downloaded",
    }
    requested: list[str] = []

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.requested.append(self.path)
        path = self.path.partition("?")[0]
        if not path.startswith(("/api/datasets/somebody/served", "/datasets/somebody/served")):
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in path:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": f"{number:040}"}
                for number, (name, content) in enumerate(self.files.items())
            ]
            self.answer(200, json.dumps(entries).encode())
        elif path.startswith("/api/"):
            info = {"id": "somebody/served", "sha": COMMIT, "siblings": []}
            self.answer(200, json.dumps(info).encode())
        else:
            name = path.partition(f"/resolve/{COMMIT}/")[2]
            headers = {"ETag": f'"{name.replace("/", "-")}"', "X-Repo-Commit": COMMIT}
            self.answer(200, self.files[name], headers)

    def answer(self, code, content, headers=()):
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(content))} | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def served(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.requested.clear()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    yield
    server.shutdown()
    server.server_close()


def test_files_are_downloaded_once_and_then_read_without_a_network(served, monkeypatch):
    location = "hf:datasets/somebody/served"
    folder = hub.data_set(location, ".parquet")
    assert {path.name: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()} == {
        "train-00000-of-00001.parquet": b"train",
        "test-00000-of-00001.parquet": b"test",
    }
    assert any("/resolve/" in path for path in Hub.requested)
    Hub.requested.clear()
    assert hub.data_set(location, ".parquet") == folder
    assert not any("/resolve/" in path for path in Hub.requested)
    with pytest.raises(FileNotFoundError, match="somebody/missing cannot be read .404 .*check the"):
        hub.data_set("hf:datasets/somebody/missing", ".parquet")

    Hub.requested.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.data_set(location, ".parquet") == folder
    # A file that is missing from the cache is noticed.
    next(folder.rglob("test-*")).unlink()
    with pytest.raises(FileNotFoundError, match="served cannot be read .*HF_HUB_OFFLINE=1"):
        hub.data_set(location, ".parquet")
    assert not Hub.requested


def test_an_unreachable_hub_is_named(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FileNotFoundError, match="somebody/far cannot be read .*Without a network"):
        hub.data_set("hf:datasets/somebody/far", ".parquet")
