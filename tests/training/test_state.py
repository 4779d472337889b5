import jax
import numpy as np
import pytest

from dml_jax.training import state

SHAPE = (1000, 32)  # Proxies and dimensions.


@pytest.mark.parametrize(
    ("init", "bound"), [("uniform_dim", 32**-0.5), ("uniform_classes", 1000**-0.5)]
)
def test_uniform_proxies_fill_their_bounds(init, bound):
    proxies = state.initial_proxies(jax.random.key(0), init=init, shape=SHAPE)
    assert 0.999 * bound < abs(proxies).max() <= bound
    np.testing.assert_allclose(proxies.std(), bound / 3**0.5, rtol=0.02)
    np.testing.assert_allclose(proxies.mean(), 0, atol=0.02 * bound)


@pytest.mark.parametrize(("init", "count"), [("normal_dim", 32), ("normal_classes", 1000)])
def test_normal_proxies_have_the_deviation_of_their_fan(init, count):
    proxies = np.asarray(state.initial_proxies(jax.random.key(0), init=init, shape=SHAPE))
    deviation = (2 / count) ** 0.5
    np.testing.assert_allclose(proxies.std(), deviation, rtol=0.02)
    # Of normal numbers 4.6 % lie beyond two deviations, of uniform ones none.
    assert 0.04 < (abs(proxies) > 2 * deviation).mean() < 0.05


def test_every_initialiser_is_tested():
    assert set(state.PROXY_INITS) == {
        "uniform_dim",
        "uniform_classes",
        "normal_dim",
        "normal_classes",
    }
