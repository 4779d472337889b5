import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dml_jax.retrieval import metrics

MATCHES = np.array(
    [
        [1, 0, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1],
    ],
    dtype=bool,
)


def test_recall_of_an_example():
    got = metrics.recall(MATCHES, (1, 2, 5))
    np.testing.assert_array_equal(got, [[1, 1, 1], [0, 1, 1], [0, 0, 0], [0, 0, 1]])


def test_recall_keeps_the_order_of_k():
    np.testing.assert_array_equal(metrics.recall(MATCHES, (5, 1))[1], [True, False])


def test_recall_at_more_than_the_neighbours_raises():
    with pytest.raises(ValueError, match="recall@6 needs more than 5"):
        metrics.recall(MATCHES, (1, 6))


def test_r_precision_of_an_example():
    got = metrics.r_precision(MATCHES, np.array([3, 3, 1, 2]))
    np.testing.assert_allclose(got, [2 / 3, 2 / 3, 0, 0])


def test_average_precision_divides_by_r_and_not_by_hits():
    got = metrics.average_precision(MATCHES, np.array([3, 4, 1, 2]))
    np.testing.assert_allclose(got, [(1 + 2 / 3) / 3, (1 / 2 + 2 / 3 + 3 / 4) / 4, 0, 0])


@pytest.mark.parametrize("relevant", [[1, 1, 1, 6], [1, 0, 1, 1]])
@pytest.mark.parametrize("metric", [metrics.r_precision, metrics.average_precision])
def test_an_invalid_r_raises(metric, relevant):
    with pytest.raises(ValueError, match=r"R must be in 1\.\.5"):
        metric(MATCHES, np.array(relevant))


@given(seed=st.integers(0, 2**32 - 1), q=st.integers(1, 12), k=st.integers(1, 15))
def test_metrics_equal_those_of_loops(seed, q, k):
    rng = np.random.default_rng(seed)
    matches = rng.random((q, k)) < rng.random()
    relevant = rng.integers(1, k + 1, size=q)
    precision, average = [], []
    for row, r in zip(matches, relevant, strict=True):
        hits, total = 0, 0.0
        for rank in range(r):
            hits += row[rank]
            total += hits / (rank + 1) if row[rank] else 0
        precision.append(hits / r)
        average.append(total / r)
    np.testing.assert_allclose(metrics.r_precision(matches, relevant), precision)
    np.testing.assert_allclose(metrics.average_precision(matches, relevant), average)
    levels = range(1, k + 1)
    expected = [[any(row[:level]) for level in levels] for row in matches]
    np.testing.assert_array_equal(metrics.recall(matches, levels), expected)


def dense_nmi(labels, clusters):
    """Returns the NMI from H(X) + H(Y) - H(X, Y) of a dense table."""
    table = np.zeros((labels.max() + 1, clusters.max() + 1))
    np.add.at(table, (labels, clusters), 1 / len(labels))

    def entropy(p):
        return -sum(v * np.log(v) for v in p.ravel() if v > 0)

    x, y = entropy(table.sum(axis=1)), entropy(table.sum(axis=0))
    return (x + y - entropy(table)) / ((x + y) / 2)


@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(4, 60),
    classes=st.integers(2, 6),
    clusters=st.integers(2, 6),
)
def test_nmi_equals_the_form_with_entropies(seed, n, classes, clusters):
    rng = np.random.default_rng(seed)
    # The first two labels differ, so that no entropy is 0.
    x = np.concatenate([[0, 1], rng.integers(classes, size=n - 2)])
    y = np.concatenate([[0, 1], rng.integers(clusters, size=n - 2)])
    got = metrics.normalized_mutual_information(x, y)
    assert got == pytest.approx(dense_nmi(x, y), abs=1e-12)
    renamed = rng.permutation(classes)[x] * 7 - 3
    assert metrics.normalized_mutual_information(renamed, y) == pytest.approx(got)
    assert metrics.normalized_mutual_information(y, x) == pytest.approx(got)


def test_nmi_of_equal_independent_and_single_partitions():
    labels = np.repeat(np.arange(4), 25)
    assert metrics.normalized_mutual_information(labels, 3 - labels) == pytest.approx(1)
    # Every cluster contains all classes in equal parts.
    independent = np.tile(np.arange(5), 20)
    assert metrics.normalized_mutual_information(labels, independent) == pytest.approx(0, abs=1e-12)
    alone = np.zeros(3, dtype=int)
    assert metrics.normalized_mutual_information(alone, alone) == 1
