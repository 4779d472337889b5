import itertools

import numpy as np
import pytest
import scipy.stats

from dml_jax import retrieval
from dml_jax.retrieval import collapse, diagnostics, exact

LABELS = np.asarray([5, 3, 3, 5, 9, 5, 3, 7, 7, 5])  # 9 has one image.


def make_embeddings(seed=0, dim=6):
    centres = np.random.default_rng(seed).normal(size=(10, dim))
    noise = np.random.default_rng(seed + 1).normal(size=(len(LABELS), dim))
    return exact.unit_rows((centres[LABELS] + noise).astype(np.float32))


def by_loops(unit, labels):
    """Returns the diagnostics from their definitions, one pair at a time."""
    pairs = list(itertools.combinations(range(len(unit)), 2))
    squared = {(i, j): float(((unit[i] - unit[j]) ** 2).sum()) for i, j in pairs}
    within = {
        c: [1 - float(unit[i] @ unit[j]) for i, j in pairs if labels[i] == labels[j] == c]
        for c in set(labels.tolist())
    }
    intra = np.mean([np.mean(found) for found in within.values() if found])
    means = [unit[labels == c].mean(axis=0) for c in within]
    inter = np.mean(
        [
            1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y)
            for x, y in itertools.combinations(means, 2)
        ]
    )
    values = np.sqrt(np.linalg.eigvalsh(unit.astype(np.float64).T @ unit))
    return {
        "alignment": np.mean([squared[i, j] for i, j in pairs if labels[i] == labels[j]]),
        "uniformity": np.log(np.mean([np.exp(-2 * x) for x in squared.values()])),
        "pi_intra": intra,
        "pi_inter": inter,
        "pi_ratio": intra / inter,
        "spectral_decay": scipy.stats.entropy(np.ones(len(values)), values),
        "effective_rank": np.exp(scipy.stats.entropy(values)),
    }


@pytest.mark.parametrize("rows", [3, 4, 100])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_diagnostics_are_those_of_their_definitions(seed, rows):
    unit = make_embeddings(seed)
    found = diagnostics.diagnose(unit, LABELS, rows=rows)._asdict()
    assert found == pytest.approx(by_loops(unit, LABELS), rel=1e-5, abs=1e-6)
    assert found["effective_rank"] == pytest.approx(collapse.spread(unit).effective_rank)


def test_diagnostics_of_known_embeddings():
    # Two opposite points, each a class of two images, in two dimensions.
    unit = np.asarray([[1, 0], [1, 0], [-1, 0], [-1, 0]], np.float32)
    found = diagnostics.diagnose(unit, np.asarray([0, 0, 1, 1]))
    assert found.alignment == found.pi_intra == found.pi_ratio == 0
    assert found.pi_inter == pytest.approx(2)
    assert found.uniformity == pytest.approx(np.log((2 + 4 * np.exp(-8)) / 6))
    assert np.isfinite(found.spectral_decay) and found.spectral_decay > 5
    even = diagnostics.diagnose(np.eye(4, dtype=np.float32), np.asarray([0, 0, 1, 1]))
    assert even.spectral_decay == pytest.approx(0, abs=1e-6)
    assert even.effective_rank == pytest.approx(4)
    assert even.alignment == pytest.approx(2) and even.uniformity == pytest.approx(-4)


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]])
def test_too_few_classes_or_images_raise(labels):
    with pytest.raises(ValueError, match="two classes and a class with two images"):
        diagnostics.diagnose(np.eye(3, dtype=np.float32), np.asarray(labels))


def test_evaluate_adds_the_diagnostics_of_normalised_queries():
    unit = make_embeddings()
    plain = retrieval.evaluate(3 * unit, LABELS, recall_at=(1,))
    found = retrieval.evaluate(3 * unit, LABELS, recall_at=(1,), diagnostics=True)
    expected = diagnostics.diagnose(unit, LABELS)._asdict()
    assert found == pytest.approx({**plain, **expected}, rel=1e-5, abs=1e-6)
