import numpy as np
import pytest

from benchmarks import soak

# Higher at the beginning, with noise and peaks, like the curves of a run.
FLAT = (
    100
    + np.where(np.arange(200) < 10, 50, 0)
    + np.arange(200) % 7
    + 80 * (np.arange(200) % 20 == 0)
)


def test_grown_ignores_the_beginning_and_peaks():
    assert soak.grown(dict.fromkeys(soak.BOUNDS, FLAT)) == []


@pytest.mark.parametrize("name", soak.BOUNDS)
def test_grown_names_the_quantity_that_grows(name):
    series = dict.fromkeys(soak.BOUNDS, FLAT)
    assert soak.grown(series | {name: FLAT + np.arange(200) / 3}) == [name]
