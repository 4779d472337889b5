import numpy as np
import pytest

from dml_jax.report import projection
from dml_jax.retrieval import exact


def clusters(count):
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 4
    vectors = rng.normal(size=(4, 10))[labels] + 0.2 * rng.normal(size=(count, 10))
    return exact.unit_rows(vectors.astype(np.float32)), labels


def nearest_labels(places, labels):
    distances = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    return labels[distances.argmin(axis=1)]


def test_neighbours_stay_neighbours_and_maps_stay_alike():
    vectors, labels = clusters(120)
    places = projection.project(vectors)
    assert places.min() >= 0 and places.max() <= 1
    assert (nearest_labels(places, labels) == labels).mean() > 0.95
    np.testing.assert_array_equal(places, projection.project(vectors))
    again = projection.project(vectors, start=places)
    for axis in range(2):
        assert np.corrcoef(places[:, axis], again[:, axis])[0, 1] > 0.8


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9])
def test_a_few_points_have_places_too(count):
    places = projection.project(clusters(count)[0])
    assert places.shape == (count, 2) and np.isfinite(places).all()
