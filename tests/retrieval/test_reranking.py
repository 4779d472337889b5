"""Re-ranking against the formulas, one image at a time in float64."""

import numpy as np
import pytest

from dml_jax import retrieval
from dml_jax.retrieval import reranking


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def clustered(seed, count, classes=6, dim=12, noise=0.9):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count)
    centres = unit(rng.standard_normal((classes, dim)))
    return unit(centres[labels] + noise * unit(rng.standard_normal((count, dim)))), labels


def slow_expansion(query, neighbours, alpha):
    total = query.copy()
    for neighbour in neighbours:
        total += max(query @ neighbour, 0) ** alpha * neighbour
    return total / np.linalg.norm(total)


def test_expanded_queries_are_weighted_sums():
    points, _ = clustered(0, 24)
    queries, neighbours = points[:4], points[4:].reshape(4, 5, -1)
    found = reranking.expand(queries.astype(np.float32), neighbours.astype(np.float32), alpha=2.0)
    expected = [slow_expansion(*x, 2) for x in zip(queries, neighbours, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    zero = np.zeros((1, 3), np.float32)
    np.testing.assert_array_equal(reranking.expand(zero, np.ones((1, 2, 3), np.float32)), zero)


def slow_k_reciprocal(points, k1, k2, weight):
    """Returns the distances of the first point to the others, with sets, as the paper writes it."""
    count = len(points)
    distance = 1 - points @ points.T

    def nearest(i, k):
        others = sorted((j for j in range(count) if j != i), key=lambda j: distance[i, j])
        return [i, *others][:k]

    def reciprocal(i, k):
        return {j for j in nearest(i, k + 1) if i in nearest(j, k + 1)}

    encodings = np.zeros((count, count))
    for i in range(count):
        members = reciprocal(i, k1)
        for candidate in reciprocal(i, k1):
            brought = reciprocal(candidate, k1 // 2)
            if len(brought & reciprocal(i, k1)) >= 2 / 3 * len(brought) - 1e-9:
                members |= brought
        for j in members:
            encodings[i, j] = np.exp(-distance[i, j])
    averaged = np.array([encodings[nearest(i, k2)].mean(axis=0) for i in range(count)])
    final = []
    for j in range(1, count):
        least, most = 0.0, 0.0
        for a, b in zip(averaged[0], averaged[j], strict=True):
            least, most = least + min(a, b), most + max(a, b)
        final.append((1 - weight) * (1 - least / most) + weight * distance[0, j])
    return np.array(final)


@pytest.mark.parametrize(("k1", "k2", "size"), [(5, 3, 18), (8, 1, 25), (20, 6, 12)])
def test_k_reciprocal_order_is_that_of_the_paper(k1, k2, size):
    changed = 0
    for seed in range(5):
        points, _ = clustered(seed, size)
        rest = points[1:][np.argsort(-points[1:] @ points[0])]
        expected = slow_k_reciprocal(np.concatenate([points[:1], rest]), k1, k2, 0.3)
        (order,) = reranking.k_reciprocal(
            points[:1].astype(np.float32), rest[None].astype(np.float32), k1=k1, k2=k2
        )
        # Equal up to rounding, even if two distances are nearly so.
        np.testing.assert_allclose(expected[order], np.sort(expected), atol=1e-6)
        changed += order.tolist() != list(range(size - 1))
    assert changed or k1 > size


@pytest.mark.parametrize("split", [False, True])
def test_evaluate_searches_again_with_expanded_queries(split):
    points, labels = clustered(1, 90)
    embeddings = points.astype(np.float32)
    queries = embeddings[:30] if split else embeddings
    targets, of = (embeddings[30:], labels[30:]) if split else (embeddings, labels)
    hits, r_precision = [], []
    for i, query in enumerate(queries):
        allowed = np.array([j for j in range(len(targets)) if split or j != i])
        near = allowed[np.argsort(-(targets[allowed] @ query))][: reranking.EXPANSION]
        expanded = slow_expansion(query.astype(np.float64), targets[near], 3)
        correct = of[allowed[np.argsort(-(targets[allowed] @ expanded))]] == labels[i]
        hits.append(correct[0])
        r_precision.append(correct[: correct.sum()].mean())
    result = retrieval.evaluate(
        queries,
        labels[: len(queries)],
        gallery=(targets, of) if split else None,
        rerank="aqe",
    )
    assert result["recall@1"] == pytest.approx(np.mean(hits), abs=1e-9)
    assert result["r_precision"] == pytest.approx(np.mean(r_precision), abs=1e-9)


def test_evaluate_reorders_the_shortlist(monkeypatch):
    points, labels = clustered(2, 70, noise=1.2)
    embeddings = points.astype(np.float32)
    monkeypatch.setattr(reranking, "SHORTLIST", 15)
    monkeypatch.setattr(reranking, "_BATCH", 8)
    hits, r_precision = [], []
    for i, query in enumerate(embeddings):
        order = np.array([j for j in np.argsort(-(embeddings @ query)) if j != i])
        (new,) = reranking.k_reciprocal(query[None], embeddings[order[:15]][None])
        correct = labels[np.concatenate([order[:15][new], order[15:]])] == labels[i]
        hits.append(correct[0])
        r_precision.append(correct[: correct.sum()].mean())
    result = retrieval.evaluate(embeddings, labels, rerank="k_reciprocal")
    assert result["recall@1"] == pytest.approx(np.mean(hits), abs=1e-9)
    assert result["r_precision"] == pytest.approx(np.mean(r_precision), abs=1e-9)
    assert result != retrieval.evaluate(embeddings, labels)


@pytest.mark.parametrize("method", reranking.METHODS)
def test_re_ranking_helps_where_classes_are_manifolds(method):
    # Points on arcs: the ends of an arc are farther apart than neighbouring arcs.
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 40)
    angle = np.tile(np.linspace(0, 1.4, 40), 3) + rng.normal(0, 0.01, 120)
    height = 0.45 * labels + rng.normal(0, 0.05, 120)
    points = np.stack([np.cos(angle), np.sin(angle), height], axis=1).astype(np.float32)
    plain = retrieval.evaluate(points, labels)
    assert retrieval.evaluate(points, labels, rerank=method)["map@r"] > plain["map@r"] + 0.01


@pytest.mark.parametrize("method", reranking.METHODS)
def test_few_images_can_be_re_ranked(method):
    embeddings = np.float32([[1, 0], [0.9, 0.1], [0, 1], [0, 0]])
    result = retrieval.evaluate(embeddings, np.array([0, 0, 1, 1]), recall_at=(1,), rerank=method)
    assert 0 < result["recall@1"] <= 1
