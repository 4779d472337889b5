import numpy as np
import pytest

from dml_jax.retrieval import exact


def unit(rng, n, d=8):
    x = rng.standard_normal((n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("k", [1, 5, 150, 299])
def test_neighbours_equal_those_of_a_full_sort(k):
    gallery = unit(np.random.default_rng(0), 300)
    queries = unit(np.random.default_rng(1), 40)
    got = exact.Searcher(gallery).nearest(queries, k)
    expected = np.argsort(-(queries.astype(np.float64) @ gallery.T.astype(np.float64)))[:, :k]
    assert got.shape == (40, k)
    # Neighbours whose similarities are equal in float32 may be in another order.
    ours = np.take_along_axis(queries @ gallery.T, got, axis=1)
    np.testing.assert_allclose(
        ours, np.take_along_axis(queries @ gallery.T, expected, axis=1), atol=1e-6
    )
    assert (got == expected).mean() > 0.99


def test_a_query_with_copies_is_excluded_by_its_index():
    rng = np.random.default_rng(0)
    base = unit(rng, 10)
    gallery = np.concatenate([base, np.repeat(base[:1], 30, axis=0)])
    own = np.arange(len(gallery))
    ids = exact.Searcher(gallery).nearest(gallery, 3, own=own)
    assert ids.shape == (40, 3)
    assert (ids != own[:, None]).all()
    # Image 0 has 30 copies, so it may not be among its own 4 nearest neighbours.
    copies = np.array([0, *range(10, 40)])
    assert np.isin(ids[copies], copies).all()


def test_the_last_neighbour_is_dropped_if_the_query_is_not_among_them(monkeypatch):
    searcher = exact.Searcher(unit(np.random.default_rng(0), 6))
    found = np.array([[3, 4, 5], [1, 0, 2]])

    class Index:
        ntotal = 6

        def search(self, queries, k):
            return None, found

    monkeypatch.setattr(searcher, "_cpu_index", Index())
    monkeypatch.setattr(searcher, "_index", Index())
    ids = searcher.nearest(np.zeros((2, 8), np.float32), 2, own=np.array([0, 0]))
    np.testing.assert_array_equal(ids, [[3, 4], [1, 2]])


def test_searches_beyond_the_gpu_limit_run_on_the_cpu(monkeypatch):
    depths = []

    class GpuIndex:
        def search(self, queries, k):
            depths.append(k)
            return None, np.tile(np.arange(k), (len(queries), 1))

    monkeypatch.setattr(exact, "_to_gpu", lambda index: GpuIndex())
    gallery = unit(np.random.default_rng(0), exact.GPU_MAX_K + 2, 4)
    searcher = exact.Searcher(gallery, gpu=True)
    own = np.arange(2)
    searcher.nearest(gallery[:2], exact.GPU_MAX_K - 1, own=own)
    ids = searcher.nearest(gallery[:2], exact.GPU_MAX_K, own=own)
    assert depths == [exact.GPU_MAX_K]
    assert ids[0, 0] == np.argsort(-(gallery @ gallery[0]))[1]


@pytest.mark.parametrize("k, own", [(0, False), (6, False), (5, True)])
def test_more_neighbours_than_images_raise(k, own):
    gallery = unit(np.random.default_rng(0), 5)
    with pytest.raises(ValueError, match=f"cannot find {k} neighbours.*gallery of 5"):
        exact.Searcher(gallery).nearest(gallery, k, own=np.arange(5) if own else None)


@pytest.mark.parametrize(
    "gpus, platform, expected",
    [(1, "gpu", "gpu"), (0, "tpu", "jax"), (0, "gpu", "jax"), (0, "cpu", "cpu")],
)
def test_auto_prefers_faiss_on_a_gpu_to_jax(monkeypatch, gpus, platform, expected):
    monkeypatch.setattr(exact.faiss, "get_num_gpus", lambda: gpus)
    monkeypatch.setattr(exact.jax, "default_backend", lambda: platform)
    assert exact.choose("auto") == expected
    assert exact.choose("cpu") == "cpu"
    assert exact.choose("jax") == "jax"
    with pytest.raises(ValueError, match="one of auto, cpu, gpu, jax, got 'tpu'"):
        exact.choose("tpu")
    if gpus:
        assert exact.choose("gpu") == "gpu"
    else:
        with pytest.raises(ValueError, match="faiss finds no GPU"):
            exact.choose("gpu")


def test_kmeans_finds_separate_clusters_deterministically(capfd):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 6)
    points = (np.eye(3, 8, dtype=np.float32)[labels] * 10 + unit(rng, 18) / 10).astype(np.float32)
    best = exact.kmeans(points, 3, seed=2)
    np.testing.assert_array_equal(best, exact.kmeans(points, 3, seed=2))
    assert len(set(zip(labels, best, strict=True))) == 3
    np.testing.assert_array_equal(np.sort(exact.kmeans(points, 18)), np.arange(18))
    out, err = capfd.readouterr()
    assert not out
    assert not err


@pytest.mark.skipif(exact.faiss.get_num_gpus() == 0, reason="faiss finds no GPU")
def test_gpu_and_cpu_find_the_same_neighbours():
    gallery = unit(np.random.default_rng(0), 500, 64)
    own = np.arange(500)
    cpu, gpu = (exact.Searcher(gallery, gpu=on).nearest(gallery, 20, own=own) for on in (0, 1))
    assert (cpu == gpu).mean() > 0.99
    assert len(np.unique(exact.kmeans(gallery, 10, gpu=True))) == 10
