import numpy as np
import pytest

from dml_jax.retrieval import collapse


def slow_spread(embeddings):
    """Evaluates the definitions pair by pair, and with the eigenvalues of the Gram matrix."""
    unit = embeddings.astype(np.float64)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    cosines = [unit[i] @ unit[j] for i in range(len(unit)) for j in range(len(unit)) if i != j]
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(unit.T @ unit), 0))
    shares = [v / values.sum() for v in values if v > 0]
    return np.mean(cosines), np.exp(-sum(p * np.log(p) for p in shares))


@pytest.mark.parametrize("shift", [0, 1, 10])
def test_spread_equals_the_definitions(shift):
    rng = np.random.default_rng(0)
    embeddings = (rng.standard_normal((40, 6)) * rng.uniform(0.1, 9, (40, 1))).astype(np.float32)
    embeddings += np.float32(shift)
    np.testing.assert_allclose(collapse.spread(embeddings), slow_spread(embeddings), rtol=1e-5)


def test_rank_counts_directions():
    axes = np.eye(8, dtype=np.float32)
    assert collapse.spread(axes) == pytest.approx((0, 8))
    assert collapse.spread(np.repeat(axes[:3], 5, axis=0))[1] == pytest.approx(3)


def test_a_collapse_is_told_from_separate_classes():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((200, 32)).astype(np.float32)
    classes = rng.standard_normal((10, 32)).astype(np.float32)[np.arange(200) % 10]
    for healthy in (noise, classes, classes + 0.1 * noise, noise + 1):
        assert not collapse.spread(healthy).is_collapsed
    point, line = np.ones_like(noise), noise[:, :1] * np.ones_like(noise)
    for collapsed in (point + 0.05 * noise, point, line, np.zeros_like(noise)):
        assert collapse.spread(collapsed).is_collapsed


def test_a_sample_of_many_images_is_near_the_whole(monkeypatch):
    embeddings = np.random.default_rng(0).standard_normal((3000, 8)).astype(np.float32) + 1
    sampled = collapse.spread(embeddings)
    assert sampled == collapse.spread(embeddings)  # Equal runs have equal metrics.
    monkeypatch.setattr(collapse, "SAMPLE", 3000)
    np.testing.assert_allclose(sampled, collapse.spread(embeddings), rtol=0.05)
