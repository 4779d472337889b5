"""Colour jitter and random erasing of a batch of training images, inside the training step.

They come after the crop, so that they are the same for images of the host and of the device cache.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from dml_jax.data.images import COLOURS, Augmentation

AREA = (0.02, 1 / 3)
"""Range of an erased rectangle's area as a fraction of the image's area."""

RATIO = (0.3, 3.3)
"""Range of its height / width, drawn uniformly on a logarithmic scale."""

_MAX_ATTEMPTS = 10
_LUMA = (0.299, 0.587, 0.114)  # Of ITU-R 601, as in Pillow.


def changed(
    images: UInt8[Array, "b h w 3"], key: PRNGKeyArray, *, augmentation: Augmentation
) -> UInt8[Array, "b h w 3"]:
    """Returns the images with random colours, and rectangles of noise in some of them.

    Args:
        images: the images.
        key: random key of the batch.
        augmentation: strengths of the changes, and probability of a rectangle.
    """
    jitter_key, erasing_key = jax.random.split(key)
    if any(getattr(augmentation, name) for name in COLOURS):
        images = _jittered(images, jitter_key, augmentation)
    return erased(images, erasing_key, augmentation.erasing) if augmentation.erasing else images


def _jittered(
    images: UInt8[Array, "b h w 3"], key: PRNGKeyArray, augmentation: Augmentation
) -> UInt8[Array, "b h w 3"]:
    """Returns images with random factors in random order, as torchvision's ColorJitter."""
    factor_key, order_key = jax.random.split(key)
    strengths = jnp.array([getattr(augmentation, name) for name in COLOURS])
    shape = len(images), len(COLOURS)
    factors = jax.random.uniform(
        factor_key, shape, minval=jnp.maximum(0, 1 - strengths)[None], maxval=1 + strengths[None]
    )
    order = jnp.argsort(jax.random.uniform(order_key, shape), axis=1)
    return jitter(images, factors, order)


def jitter(
    images: UInt8[Array, "b h w 3"], factors: Float[Array, "b 3"], order: Array
) -> UInt8[Array, "b h w 3"]:
    """Returns images of other brightness, contrast and saturation.

    Each change is f x + (1 - f) y, cut to 0..255, with a factor f and for y black (brightness), the
    image's mean grey (contrast) or the grey of each pixel (saturation).

    Args:
        images: the images.
        factors: factors of each image in the order of `COLOURS`; 1 changes nothing.
        order: numbers of the changes of each image in the order in which they are made.
    """
    x = images.astype(jnp.float32)
    for number in order.T:
        grey = jnp.sum(x * jnp.array(_LUMA).reshape(1, 1, 1, 3), axis=-1, keepdims=True)
        factor = jnp.take_along_axis(factors, number[:, None], axis=1).reshape(-1, 1, 1, 1)
        number = number.reshape(-1, 1, 1, 1)
        mean = grey.mean(axis=(1, 2), keepdims=True)
        target = jnp.where(number == 1, mean, jnp.where(number == 2, grey, 0))
        x = (factor * x + (1 - factor) * target).clip(0, 255)
    return jnp.round(x).astype(jnp.uint8)


def erased(
    images: UInt8[Array, "b h w 3"], key: PRNGKeyArray, probability: float
) -> UInt8[Array, "b h w 3"]:
    """Returns images of which some have a rectangle of noise, uniform in each value.

    Source: Zhong et al., Random erasing data augmentation, AAAI 2020, arXiv 1708.04896, with its
    random values; as in torchvision, ratios are drawn on a logarithmic scale. A rectangle that does
    not fit is drawn again, up to ten times.

    Args:
        images: the images.
        key: random key of the batch.
        probability: probability that an image gets a rectangle.
    """
    chance_key, area_key, ratio_key, corner_key, noise_key = jax.random.split(key, 5)
    count, *sides, _ = images.shape
    shape = count, _MAX_ATTEMPTS
    area = sides[0] * sides[1] * jax.random.uniform(area_key, shape, minval=AREA[0], maxval=AREA[1])
    low, high = map(math.log, RATIO)
    ratio = jnp.exp(jax.random.uniform(ratio_key, shape, minval=low, maxval=high))
    drawn = jnp.round(jnp.sqrt(jnp.stack([area * ratio, area / ratio], axis=-1)))
    fits = (drawn < jnp.array(sides).reshape(1, 1, 2)).all(axis=-1)
    first = jnp.argmax(fits, axis=1)
    rectangle = jnp.take_along_axis(drawn, first[:, None, None], axis=1)[:, 0]
    margin = jnp.array(sides)[None] - rectangle
    corner = jnp.floor(jax.random.uniform(corner_key, margin.shape) * (margin + 1))
    corner = jnp.minimum(corner, margin)
    inside = [
        (jnp.arange(side)[None] >= corner[:, axis, None])
        & (jnp.arange(side)[None] < (corner + rectangle)[:, axis, None])
        for axis, side in enumerate(sides)
    ]
    chosen = jax.random.bernoulli(chance_key, probability, (count,)) & fits.any(axis=1)
    hidden = inside[0][:, :, None] & inside[1][:, None] & chosen[:, None, None]
    noise = jax.random.bits(noise_key, images.shape, jnp.uint8)
    return jnp.where(hidden[..., None], noise, images)
