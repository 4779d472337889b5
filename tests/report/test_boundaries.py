"""The confidence between two classes, against one computed for each pair and position."""

import jax.numpy as jnp
import numpy as np
import pytest

from dml_jax import losses
from dml_jax.report import boundaries

PAIRS, DIM = 7, 5


def unit(vector):
    return vector / np.linalg.norm(vector)


def norm_softmax(e, p):
    return 9.0 * unit(e) @ unit(p[0])


def proxy_nca(e, p):
    return -4.0 * ((unit(e) - unit(p[0])) ** 2).sum()


def softmax(e, p):
    return e @ p[0][:-1] + p[0][-1]


def soft_triple(e, p):
    cosines = np.array([unit(e) @ unit(one) for one in p])
    weights = np.exp(cosines / 0.2)
    return 6.0 * (weights * cosines).sum() / weights.sum()


@pytest.mark.parametrize(
    ("loss", "logit", "mixes_units"),
    [
        (losses.NormSoftmax(scale=9.0), norm_softmax, True),
        (losses.CosFace(scale=9.0, margin=0.3), norm_softmax, True),
        (losses.ProxyNCA(scale=4.0), proxy_nca, True),
        (losses.Softmax(bias=True), softmax, False),
        (losses.SoftTriple(la=6.0, gamma=0.2, centers_per_class=3), soft_triple, True),
    ],
)
def test_the_confidence_is_the_mean_of_each_pair(loss, logit, mixes_units):
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, PAIRS, DIM))
    shape = PAIRS, loss.proxies_per_class, loss.proxy_shape(1, DIM)[1]
    of_first, of_second = rng.normal(size=(2, *shape))
    positions = np.array([0.0, 0.3, 1.0])
    expected = np.zeros(3)
    for a, b, p, q in zip(first, second, of_first, of_second, strict=True):
        a, b = (unit(a), unit(b)) if mixes_units else (a, b)
        for i, t in enumerate(positions):
            e = (1 - t) * a + t * b
            expected[i] += 1 / (1 + np.exp(logit(e, q) - logit(e, p))) / PAIRS
    given = (first, second, of_first, of_second, positions)
    found = boundaries.confidence(loss, *(jnp.asarray(x, jnp.float32) for x in given))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_pairs_are_of_different_classes_even_if_one_class_has_nearly_all_images():
    labels = np.zeros(1000, np.int32)
    labels[-2:] = 1, 2
    images, pairs = boundaries.choose(labels)
    assert len(images) <= 200 and {998, 999} < set(images) and len(set(images)) == len(images)
    of_pair = labels[images][pairs]
    assert len(pairs) > 10 and (of_pair[:, 0] != of_pair[:, 1]).all()
    balanced = np.repeat(np.arange(50), 20)
    images, pairs = boundaries.choose(balanced)
    assert 150 < len(images) <= 200 and len(pairs) > 3800
