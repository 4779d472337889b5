import numpy as np
import pytest

from dml_jax.retrieval import exact


def unit(rng, n, d=8):
    x = rng.standard_normal((n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("k", [1, 5, 150, 299])
def test_neighbours_against_full_sort(k):
    gallery = unit(np.random.default_rng(0), 300)
    queries = unit(np.random.default_rng(1), 40)
    got = exact.Searcher(gallery).nearest(queries, k)
    expected = np.argsort(-(queries.astype(np.float64) @ gallery.T.astype(np.float64)))[:, :k]
    assert got.shape == (40, k)
    # Neighbours closer to each other than float32 can tell may change places.
    same = np.take_along_axis(queries @ gallery.T, got, axis=1)
    np.testing.assert_allclose(
        same, np.take_along_axis(queries @ gallery.T, expected, axis=1), atol=1e-6
    )
    assert (got == expected).mean() > 0.99


def test_a_query_is_left_out_by_index_among_its_copies():
    rng = np.random.default_rng(0)
    base = unit(rng, 10)
    gallery = np.concatenate([base, np.repeat(base[:1], 30, axis=0)])
    own = np.arange(len(gallery))
    ids = exact.Searcher(gallery).nearest(gallery, 3, own=own)
    assert ids.shape == (40, 3)
    assert (ids != own[:, None]).all()
    # Image 0 has 30 copies: with so many before it, it may not even be among its 4 nearest.
    copies = np.array([0, *range(10, 40)])
    assert np.isin(ids[copies], copies).all()


def test_a_query_missing_among_its_nearest_costs_the_last_one(monkeypatch):
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


def test_gpu_searches_up_to_its_limit_and_the_cpu_beyond(monkeypatch):
    asked = []

    class GpuIndex:
        def search(self, queries, k):
            asked.append(k)
            return None, np.tile(np.arange(k), (len(queries), 1))

    monkeypatch.setattr(exact, "_to_gpu", lambda index: GpuIndex())
    gallery = unit(np.random.default_rng(0), exact.GPU_MAX_K + 2, 4)
    searcher = exact.Searcher(gallery, gpu=True)
    own = np.arange(2)
    searcher.nearest(gallery[:2], exact.GPU_MAX_K - 1, own=own)
    ids = searcher.nearest(gallery[:2], exact.GPU_MAX_K, own=own)
    assert asked == [exact.GPU_MAX_K]
    assert ids[0, 0] == np.argsort(-(gallery @ gallery[0]))[1]


@pytest.mark.parametrize("k, own", [(0, False), (6, False), (5, True)])
def test_more_neighbours_than_images_are_refused(k, own):
    gallery = unit(np.random.default_rng(0), 5)
    with pytest.raises(ValueError, match=f"{k} neighbours asked for.*gallery holds 5"):
        exact.Searcher(gallery).nearest(gallery, k, own=np.arange(5) if own else None)


@pytest.mark.parametrize(
    "gpus, jax_has, chosen",
    [(1, "gpu", "gpu"), (0, "tpu", "jax"), (0, "gpu", "jax"), (0, "cpu", "cpu")],
)
def test_auto_takes_faiss_on_a_gpu_before_jax_on_its_devices(monkeypatch, gpus, jax_has, chosen):
    monkeypatch.setattr(exact.faiss, "get_num_gpus", lambda: gpus)
    monkeypatch.setattr(exact.jax, "default_backend", lambda: jax_has)
    assert exact.choose("auto") == chosen
    assert exact.choose("cpu") == "cpu"
    assert exact.choose("jax") == "jax"
    with pytest.raises(ValueError, match="one of auto, cpu, gpu, jax, got 'tpu'"):
        exact.choose("tpu")
    if gpus:
        assert exact.choose("gpu") == "gpu"
    else:
        with pytest.raises(ValueError, match="faiss sees no GPU"):
            exact.choose("gpu")


def test_kmeans_finds_separate_clusters_repeatably(capfd):
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


@pytest.mark.skipif(exact.faiss.get_num_gpus() == 0, reason="faiss sees no GPU")
def test_gpu_finds_the_same_neighbours():
    gallery = unit(np.random.default_rng(0), 500, 64)
    own = np.arange(500)
    cpu, gpu = (exact.Searcher(gallery, gpu=on).nearest(gallery, 20, own=own) for on in (0, 1))
    assert (cpu == gpu).mean() > 0.99
    assert len(np.unique(exact.kmeans(gallery, 10, gpu=True))) == 10
