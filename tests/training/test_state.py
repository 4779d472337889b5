import jax
import numpy as np
import pytest
from scipy import stats

from dml_jax._utils import sharding
from dml_jax.training import builder, state
from dml_jax.training.config import parse
from tests.helpers import tiny

DIM = 512


def uniform(size):
    return stats.uniform(-(size**-0.5), 2 * size**-0.5)


# The initialisers of the official programs.
DISTRIBUTIONS = {
    "uniform_dim": uniform(DIM),
    "uniform_classes": uniform(tiny.TRAIN_CLASSES),
    "normal_dim": stats.norm(scale=(2 / DIM) ** 0.5),
    "normal_classes": stats.norm(scale=(2 / tiny.TRAIN_CLASSES) ** 0.5),
}


@pytest.mark.parametrize("init", state.PROXY_INITS)
def test_initial_proxies_have_the_configured_distribution(init, tmp_path):
    config = tiny.config(tiny.write_images(tmp_path), proxy_init=init, model__dim=DIM)
    built = builder.build(parse(config), sharding.make_mesh(jax.devices()[:1]))
    proxies = np.asarray(built.init().params["proxies"])
    assert proxies.shape == (tiny.TRAIN_CLASSES, DIM)

    expected, count = DISTRIBUTIONS[init], proxies.size
    lowest, highest = np.float32(expected.support())
    assert lowest <= proxies.min() and proxies.max() <= highest
    # Five standard errors of the mean and of the standard deviation (that of a normal sample).
    assert abs(proxies.mean()) < 5 * expected.std() / count**0.5
    assert abs(proxies.std() / expected.std() - 1) < 5 / (2 * count) ** 0.5
    assert stats.kstest(proxies.ravel(), expected.cdf).pvalue > 1e-6
