import json

import numpy as np
import pytest

from dml_jax.evaluation.embedding_files import Embeddings
from dml_jax.retrieval import exact as retrieval_exact
from dml_jax.retrieval import reranking
from dml_jax.search import index
from dml_jax.search.gallery import search


def embeddings(count, dim=16, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 5
    vectors = rng.standard_normal((5, dim))[labels] + rng.standard_normal((count, dim))
    names = tuple(f"{label}/{row}.png" for row, label in enumerate(labels))
    return Embeddings(vectors.astype(np.float32), labels, names, tuple("abcde"))


PER_IMAGE = ("embeddings", "labels", "names")


def exact(images, query, k):
    unit = images.embeddings / np.linalg.norm(images.embeddings, axis=1, keepdims=True)
    similarities = unit @ (query[0] / np.linalg.norm(query[0]))
    order = np.argsort(-similarities)[:k]
    return order.tolist(), similarities[order]


@pytest.mark.parametrize(
    "count, kind", [(1, "flat"), (50_000, "flat"), (50_001, "hnsw"), (200_001, "ivf")]
)
def test_kind_depends_on_the_number_of_images(count, kind):
    assert index.kind_for(count) == kind


def test_flat_index_is_exact_and_can_be_saved(tmp_path):
    images = embeddings(300)
    built, measurements = index.build(images)
    assert [(x.effort, x.recall) for x in measurements] == [(0, 1.0)]
    index.save(built, tmp_path / "new" / "index")
    gallery = index.load(tmp_path / "new" / "index")
    assert gallery[1:] == built[1:]
    query = embeddings(1, seed=1).embeddings * 7
    found = gallery.nearest(query, 9)
    rows, similarities = exact(images, query, 9)
    assert [neighbour.row for neighbour in found] == rows
    np.testing.assert_allclose([neighbour.similarity for neighbour in found], similarities, 1e-5)
    assert [x.name for x in found] == [images.names[row] for row in rows]
    assert [x.class_name for x in found] == ["abcde"[row % 5] for row in rows]
    assert gallery.facts == "300 images, flat index (exact)"


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_effort_is_the_smallest_that_reaches_the_target_recall(kind, tmp_path):
    all_images = embeddings(4100, dim=24)
    images = all_images._replace(**{x: getattr(all_images, x)[:4000] for x in PER_IMAGE})
    built, measurements = index.build(images, kind=kind)
    recalls = [x.recall for x in measurements]
    assert recalls[-1] >= index.TARGET_RECALL > max([0, *recalls[:-1]])
    assert built.recall == recalls[-1]
    index.save(built, tmp_path / "index")
    gallery = index.load(tmp_path / "index")
    # The effort is saved, and the measured recall holds for other queries.
    queries = all_images.embeddings[4000:, None]
    hits = [
        len({x.row for x in gallery.nearest(query, 10)} & set(exact(images, query, 10)[0]))
        for query in queries
    ]
    assert abs(np.mean(hits) / 10 - built.recall) < 0.05


def test_recall_excludes_the_query_and_accepts_any_copy():
    images = embeddings(40)
    copies = images._replace(embeddings=np.repeat(images.embeddings[:1], 40, axis=0))
    assert index.build(copies, kind="hnsw")[0].recall == 1.0
    unit = np.eye(4, dtype=np.float32)
    queries, true = np.array([0, 1]), np.array([[1.0, 0.0], [1.0, 0.0]], np.float32)
    assert index._recall(unit, queries, np.array([[0, 2], [1, -1]]), true) == 0.5


def test_index_of_one_image():
    gallery, _ = index.build(embeddings(1))
    assert [x.row for x in gallery.nearest(embeddings(1).embeddings, 12)] == [0]


def test_only_files_inside_the_folder_belong_to_the_gallery(tmp_path):
    folder = tmp_path / "images"
    (folder / "0").mkdir(parents=True)
    names = ("0/0.png", "0/../../secret.png", str(tmp_path / "secret.png"), "0/gone.png")
    for path in (folder / "0" / "0.png", tmp_path / "secret.png", folder / "0" / "gone.png"):
        path.write_text("x")
    images = embeddings(4)._replace(names=names)
    gallery, _ = index.build(images, folder=str(folder))
    (folder / "0" / "gone.png").unlink()
    assert [gallery.file(row) for row in range(4)] == [folder / "0" / "0.png", None, None, None]
    assert index.build(images)[0].file(0) is None
    with pytest.raises(FileNotFoundError, match=r"1 of the 4 images .*such as 0/gone\.png"):
        index.build(images, folder=str(folder))


def test_another_network_is_rejected():
    images = embeddings(30)
    gallery, _ = index.build(images)
    gallery.check_network(images.embeddings[:1] * 3)
    for other in (images.embeddings[1:2], images.embeddings[:1, :8]):
        with pytest.raises(ValueError, match=r"embedding of 0/0\.png differs"):
            gallery.check_network(other)
    with pytest.raises(ValueError, match="have 8 dimensions, the index's 16"):
        gallery.nearest(images.embeddings[:1, :8], 3)


def test_invalid_embeddings_are_rejected():
    images = embeddings(3)
    with pytest.raises(ValueError, match="no embeddings to index"):
        index.build(images._replace(embeddings=np.zeros((0, 4), np.float32)))
    images.embeddings[1, 2] = np.nan
    with pytest.raises(
        ValueError, match="1 embeddings are not finite in float32, the first in row 1"
    ):
        index.build(images)


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "index"
    index.save(index.build(embeddings(20))[0], folder)
    return folder


def test_index_is_not_overwritten(saved):
    with pytest.raises(FileExistsError, match="remove it, or choose another --out"):
        index.save(index.build(embeddings(3))[0], saved)
    assert len(index.load(saved).names) == 20
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize("file", [index.VECTORS, index.METADATA])
def test_missing_index_is_rejected(saved, file):
    (saved / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"no index: there is no .*{file}"):
        index.load(saved)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip])
def test_damaged_vectors_are_rejected(saved, damage):
    damage(saved / index.VECTORS)
    with pytest.raises(ValueError, match="damaged .*checksum of .* differs.*build it again"):
        index.load(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"names": ["too few"]},
        {"labels": [7] * 20},
        {"labels": ["x"] * 20},
        {"names": None},
        {"kind": ...},
        {"more": 1},
    ],
)
def test_damaged_list_of_images_is_rejected(saved, changes):
    metadata = json.loads((saved / index.METADATA).read_text()) | changes
    (saved / index.METADATA).write_text(
        json.dumps({name: value for name, value in metadata.items() if value is not ...})
    )
    with pytest.raises(ValueError, match="is damaged"):
        index.load(saved)


def test_truncated_list_of_images_is_rejected(saved):
    truncate(saved / index.METADATA)
    with pytest.raises(ValueError, match="is damaged"):
        index.load(saved)


def test_threshold_is_saved_and_an_index_without_one_still_loads(saved, tmp_path):
    assert index.load(saved).threshold is None
    index.save(index.build(embeddings(20), threshold=0.5)[0], tmp_path / "other")
    assert index.load(tmp_path / "other").threshold == 0.5
    metadata = json.loads((saved / index.METADATA).read_text())
    del metadata["threshold"]  # As in indexes that were built before there were thresholds.
    (saved / index.METADATA).write_text(json.dumps(metadata))
    assert index.load(saved).threshold is None
    (saved / index.METADATA).write_text(json.dumps(metadata | {"threshold": "high"}))
    with pytest.raises(ValueError, match="the threshold in images.json is no number"):
        index.load(saved)


@pytest.mark.parametrize("kind", index.KINDS)
@pytest.mark.parametrize("rerank", ["aqe", "k_reciprocal"])
def test_re_ranked_search_is_that_of_evaluate(kind, rerank):
    images = embeddings(400, dim=8)
    gallery, _ = index.build(images, kind=kind)
    queries, unit = embeddings(9, dim=8, seed=3).embeddings, retrieval_exact.unit_rows
    find = reranking.searcher(unit(images.embeddings), "cpu", rerank, exclude_query=False)
    expected = find(unit(queries), np.arange(9), 12)
    hits = []
    for query, rows in zip(queries[:, None], expected, strict=True):
        found = search(gallery, query, 12, rerank=rerank)
        hits.append(len({x.row for x in found} & set(rows.tolist())) / 12)
        if kind == "flat":
            assert [x.row for x in found] == rows.tolist()
        cosines = unit(images.embeddings[[x.row for x in found]]) @ unit(query)[0]
        np.testing.assert_allclose([x.similarity for x in found], cosines, atol=0.03)
    assert np.mean(hits) > 0.8
