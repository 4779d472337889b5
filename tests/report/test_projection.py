import numpy as np
import pytest

from dml_jax.report import projection
from dml_jax.retrieval import exact


def clusters(count):
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 4
    vectors = rng.normal(size=(4, 10))[labels] + 0.2 * rng.normal(size=(count, 10))
    return exact.unit_rows(vectors.astype(np.float32)), labels


def nearest_labels(positions, labels):
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    return labels[distances.argmin(axis=1)]


def test_project_keeps_neighbours_and_follows_the_start():
    vectors, labels = clusters(120)
    positions = projection.project(vectors)
    assert positions.min() >= 0 and positions.max() <= 1
    assert (nearest_labels(positions, labels) == labels).mean() > 0.95
    np.testing.assert_array_equal(positions, projection.project(vectors))
    again = projection.project(vectors, start=positions)
    for axis in range(2):
        assert np.corrcoef(positions[:, axis], again[:, axis])[0, 1] > 0.8


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9])
def test_project_accepts_few_points(count):
    positions = projection.project(clusters(count)[0])
    assert positions.shape == (count, 2) and np.isfinite(positions).all()
