import jax
import numpy as np
import pytest

from dml_jax._utils import sharding
from dml_jax.retrieval import exact, topk


def unit(seed, n, d=16):
    return exact.unit_rows(np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32))


def searcher(gallery, devices):
    return topk.MeshSearcher(gallery, sharding.make_mesh(jax.devices()[:devices]))


def assert_equal_neighbours(found, expected, similarities):
    """Checks that neighbours are equal, up to the order of equal similarities in float32."""
    assert found.dtype == np.int64
    assert found.shape == expected.shape
    ours, theirs = (np.take_along_axis(similarities, ids, axis=1) for ids in (found, expected))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    assert (found == expected).mean() > 0.99
    assert (np.diff(np.sort(found, axis=1), axis=1) > 0).all()


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("k", [1, 5, 96, 100])
@pytest.mark.parametrize("exclude", [False, True])
def test_neighbours_equal_those_of_faiss_and_of_a_full_sort(monkeypatch, devices, k, exclude):
    # Shards of 101, 51, 26 and 13 rows, in chunks of at most 8; blocks of at most 16 queries.
    monkeypatch.setattr(topk, "_CHUNK_ROWS", 8)
    monkeypatch.setattr(topk, "_BLOCK_SIMILARITIES", 1 << 11)
    gallery = unit(0, 101)
    own = np.random.default_rng(1).permutation(101)[:37] if exclude else None
    queries = gallery[own] if exclude else unit(2, 37)
    found = searcher(gallery, devices).nearest(queries, k, own=own)
    similarities = queries.astype(np.float64) @ gallery.T.astype(np.float64)
    if exclude:
        similarities[np.arange(37), own] = -np.inf
        assert (found != own[:, None]).all()
    assert_equal_neighbours(found, np.argsort(-similarities, axis=1)[:, :k], similarities)
    assert_equal_neighbours(
        found, exact.Searcher(gallery).nearest(queries, k, own=own), similarities
    )


@pytest.mark.parametrize("devices", [1, 8])
def test_fewer_images_than_devices(devices):
    gallery = unit(0, 5)
    found = searcher(gallery, devices).nearest(gallery, 4, own=np.arange(5))
    np.testing.assert_array_equal(np.sort(found), [np.delete(np.arange(5), i) for i in range(5)])
    found = searcher(gallery, devices).nearest(gallery, 5)
    np.testing.assert_array_equal(found[:, 0], np.arange(5))


@pytest.mark.parametrize("devices", [1, 8])
def test_equal_similarities_are_in_index_order_and_only_the_query_is_excluded(monkeypatch, devices):
    monkeypatch.setattr(topk, "_CHUNK_ROWS", 4)
    gallery = np.tile(np.eye(3, 8, dtype=np.float32), (20, 1))
    own = np.arange(60)
    found = searcher(gallery, devices).nearest(gallery, 19, own=own)
    copies = [[j for j in range(i % 3, 60, 3) if j != i] for i in own]
    np.testing.assert_array_equal(found, copies)


def test_memory_does_not_grow_with_the_gallery():
    mesh = sharding.make_mesh(jax.devices()[:2])

    def temporary(chunks):
        sharded, replicated = sharding.batch_sharding(mesh), sharding.replicated_sharding(mesh)
        gallery = jax.ShapeDtypeStruct((2 * chunks, 64, 32), np.float32, sharding=sharded)
        queries = jax.ShapeDtypeStruct((16, 32), np.float32, sharding=replicated)
        own = jax.ShapeDtypeStruct((16,), np.int32, sharding=replicated)
        lowered = topk._nearest.lower(gallery, queries, own, k=8, count=128 * chunks, mesh=mesh)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    few, many = temporary(4), temporary(400)
    assert few > 0
    # Only the start of each chunk, and no copy of the 3.3 MB of vectors on each device.
    assert many - few < 400 * 16


def test_the_gallery_is_sharded_and_few_shapes_are_compiled(monkeypatch):
    shapes = set()
    nearest = topk._nearest

    def spy(gallery, queries, own, **options):
        shapes.add((*queries.shape, options["k"]))
        assert {shard.data.shape for shard in gallery.addressable_shards} == {(2, 7, 16)}
        return nearest(gallery, queries, own, **options)

    monkeypatch.setattr(topk, "_CHUNK_ROWS", 8)
    monkeypatch.setattr(topk, "_nearest", spy)
    ours = searcher(unit(0, 105), 8)
    for k in (5, 6, 7, 8):
        assert ours.nearest(unit(1, 20 + k), k).shape == (20 + k, k)
    assert shapes == {(32, 16, 8)}


@pytest.mark.parametrize("k, own", [(0, False), (6, False), (5, True)])
def test_more_neighbours_than_images_raise(k, own):
    gallery = unit(0, 5)
    with pytest.raises(ValueError, match=f"cannot find {k} neighbours.*gallery of 5"):
        searcher(gallery, 1).nearest(gallery, k, own=np.arange(5) if own else None)
