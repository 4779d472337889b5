import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from dml_jax._utils import sharding
from dml_jax.data import colour
from dml_jax.data.images import COLOURS, Augmentation

ENHANCE = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
ORDERS = list(itertools.permutations(range(3)))


def pictures(count, size=24):
    """Returns smooth pictures with other colours in each."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    large = [np.asarray(Image.fromarray(x).resize((size, size), 2)) for x in small]
    return np.stack(large)


def test_the_changes_are_pillows_in_any_order():
    images = pictures(len(ORDERS))
    factors = np.random.default_rng(1).uniform(0.3, 1.7, (len(ORDERS), 3)).astype(np.float32)
    changed = jax.jit(colour.jitter)(images, factors, jnp.array(ORDERS))
    for image, ours, factor, order in zip(images, changed, factors, ORDERS, strict=True):
        theirs = Image.fromarray(image)
        for number in order:
            theirs = ENHANCE[number](theirs).enhance(float(factor[number]))
        # Pillow rounds down after each change, and rounds its greys.
        np.testing.assert_allclose(ours.astype(int), np.asarray(theirs).astype(int), atol=5)
        assert np.abs(ours.astype(int) - image).mean() > 10
    for number in range(3):
        single = np.ones((len(images), 3), np.float32)
        single[:, number] = factors[:, number]
        ours = jax.jit(colour.jitter)(images, single, jnp.array(ORDERS))
        factor = [float(x) for x in factors[:, number]]
        theirs = [
            np.asarray(ENHANCE[number](Image.fromarray(image)).enhance(x))
            for image, x in zip(images, factor, strict=True)
        ]
        np.testing.assert_allclose(ours.astype(int), np.stack(theirs).astype(int), atol=2)


def test_factors_and_orders_have_their_distributions(monkeypatch):
    drawn = {}

    def record(images, factors, order):
        drawn.update(factors=np.asarray(factors), order=np.asarray(order))
        return images

    monkeypatch.setattr(colour, "jitter", record)
    strengths = (0.4, 1.5, 0.0)
    augmentation = Augmentation(**dict(zip(COLOURS, strengths, strict=True)))
    count = 6000
    images = jnp.zeros((count, 1, 1, 3), jnp.uint8)
    colour.changed(images, jax.random.key(0), augmentation=augmentation)
    ranges = [(0.6, 1.4), (0.0, 2.5), (1.0, 1.0)]
    for factors, (low, high) in zip(drawn["factors"].T, ranges, strict=True):
        assert low <= factors.min() and factors.max() <= high
        quantiles = np.linspace(low, high, 11)
        error = 5 * (high - low) * 0.5 / count**0.5
        np.testing.assert_allclose(
            np.quantile(factors, np.linspace(0, 1, 11)), quantiles, atol=error
        )
    found, counts = np.unique(drawn["order"], axis=0, return_counts=True)
    assert found.tolist() == sorted(map(list, ORDERS))
    np.testing.assert_allclose(counts, count / 6, atol=5 * (count * 5 / 36) ** 0.5)
    assert abs(np.corrcoef(drawn["factors"][:, 0], drawn["factors"][:, 1])[0, 1]) < 5 / count**0.5


def test_erased_rectangles_have_their_distribution():
    count, (height, width) = 4000, (40, 60)
    images = jnp.full((count, height, width, 3), 7, jnp.uint8)
    erased = np.asarray(jax.jit(partial(colour.erased, probability=0.3))(images, jax.random.key(0)))
    noise = (erased != 7).any(axis=3)
    rows, columns = noise.any(axis=2), noise.any(axis=1)
    chosen = rows.any(axis=1)
    np.testing.assert_allclose(chosen.mean(), 0.3, atol=5 * (0.21 / count) ** 0.5)
    rows, columns = rows[chosen], columns[chosen]
    # A rectangle is full of noise, up to the 1 of 2^24 that is 7 in all three channels.
    sides = np.stack([rows.sum(axis=1), columns.sum(axis=1)])
    assert noise.sum() >= (sides[0] * sides[1]).sum() - 2
    areas, ratios = sides[0] * sides[1] / (height * width), sides[0] / sides[1]
    # Up to the rounding of the sides to pixels.
    assert 0.015 < areas.min() < 0.03 and 0.31 < areas.max() < 0.35
    assert 0.25 < ratios.min() < 0.35 and 2.8 < ratios.max() < 3.7
    # Against a plain loop, one image at a time.
    rng = np.random.default_rng(0)
    expected = []
    while len(expected) < 4000:
        area = height * width * rng.uniform(0.02, 1 / 3)
        ratio = 0.3 * (3.3 / 0.3) ** rng.uniform()
        h, w = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if h < height and w < width:
            top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            expected.append((h, w, top, left))
    top, left = rows.argmax(axis=1), columns.argmax(axis=1)
    for ours, theirs in zip((*sides, top, left), np.transpose(expected), strict=True):
        error = 5 * theirs.std() * (1 / len(ours) + 1 / len(theirs)) ** 0.5
        np.testing.assert_allclose(ours.mean(), theirs.mean(), atol=error)
        np.testing.assert_allclose(ours.std(), theirs.std(), rtol=0.1)
    values = erased[noise]
    np.testing.assert_allclose(values.mean(), 127.5, atol=0.5)
    np.testing.assert_allclose(values.std(), 73.9, atol=0.5)


@pytest.mark.parametrize("devices", [2, 8])
def test_the_numbers_do_not_depend_on_the_devices(devices):
    images = pictures(16)
    augmentation = Augmentation(brightness=0.5, contrast=0.5, saturation=0.5, erasing=0.5)
    change = jax.jit(partial(colour.changed, augmentation=augmentation))
    alone = np.asarray(change(images, jax.random.key(3)))
    mesh = sharding.make_mesh(jax.devices()[:devices])
    rows = jax.device_put(images, sharding.batch_sharding(mesh))
    together = change(rows, jax.random.key(3))
    # The mean grey of an image may be rounded otherwise.
    assert np.abs(np.asarray(together).astype(int) - alone).max() <= 1
    assert (np.asarray(change(images, jax.random.key(4))) != alone).any(axis=(1, 2, 3)).all()
