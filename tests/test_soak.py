import numpy as np
import pytest

from benchmarks import soak

# As a run has them: more while it begins, some noise, some peaks.
FLAT = (
    100
    + np.where(np.arange(200) < 10, 50, 0)
    + np.arange(200) % 7
    + 80 * (np.arange(200) % 20 == 0)
)


def test_a_flat_run_is_found_flat_whatever_its_beginning_and_its_peaks():
    assert soak.grown(dict.fromkeys(soak.BOUNDS, FLAT)) == []


@pytest.mark.parametrize("name", soak.BOUNDS)
def test_what_grows_is_named(name):
    series = dict.fromkeys(soak.BOUNDS, FLAT)
    assert soak.grown(series | {name: FLAT + np.arange(200) / 3}) == [name]
