"""Deformations of images, to measure how robust embeddings are; pure functions of 8-bit images.

Each is a function of an image, a strength and a random generator. Lengths are fractions of the
sides, so that a strength means the same for images of any size. Pixels beyond the border repeat
the border, except that a cutout is black.

Source: Gu, Ko and Kim, Proxy Synthesis, AAAI 2021 (arXiv 2103.15454), test images deformed by
cutout, zoom, rotation, shear, noise and blur. The functions and the strengths are our own.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Float64, UInt8

Image = UInt8[np.ndarray, "h w 3"]


class Deformation(NamedTuple):
    """A deformation and the strengths at which it is applied."""

    apply: Callable[[Image, float, np.random.Generator], Image]
    strengths: tuple[float, ...]


def cutout(image: Image, strength: float, generator: np.random.Generator) -> Image:
    """Returns the image with a black rectangle at a random place within it.

    Its sides are the fraction `strength` of the image's sides, rounded to pixels.
    """
    height, width = image.shape[:2]
    rows, columns = round(strength * height), round(strength * width)
    top = generator.integers(height - rows + 1)
    left = generator.integers(width - columns + 1)
    result = image.copy()
    result[top : top + rows, left : left + columns] = 0
    return result


def zoom_in(image: Image, strength: float, generator: np.random.Generator) -> Image:
    """Returns the image magnified about its centre, `strength` times."""
    del generator
    return _transformed(image, strength * np.eye(2))


def zoom_out(image: Image, strength: float, generator: np.random.Generator) -> Image:
    """Returns the image reduced about its centre, to 1 / `strength` of its size."""
    del generator
    return _transformed(image, np.eye(2) / strength)


def rotation(image: Image, strength: float, generator: np.random.Generator) -> Image:
    """Returns the image rotated about its centre by `strength` degrees, in a random direction."""
    angle = np.radians(strength) * generator.choice((-1, 1))
    cosine, sine = np.cos(angle), np.sin(angle)
    return _transformed(image, np.array([[cosine, -sine], [sine, cosine]]))


def shear(image: Image, strength: float, generator: np.random.Generator) -> Image:
    """Returns the image with rows shifted by `strength` times their distance from the middle row.

    The direction is random.
    """
    return _transformed(image, np.array([[1, strength * generator.choice((-1, 1))], [0, 1]]))


def noise(image: Image, strength: float, generator: np.random.Generator) -> Image:
    """Returns the image with Gaussian noise of a standard deviation of 255 `strength`, clipped."""
    noisy = image + 255 * strength * generator.standard_normal(image.shape)
    return noisy.round().clip(0, 255).astype(np.uint8)


def blur(image: Image, strength: float, generator: np.random.Generator) -> Image:
    """Returns the image blurred by a Gaussian whose sigma is `strength` times the shorter side."""
    del generator
    sigma = strength * min(image.shape[:2])
    return cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)


DEFORMATIONS: Mapping[str, Deformation] = {
    "cutout": Deformation(cutout, (0.25, 0.5)),
    "zoom_in": Deformation(zoom_in, (1.25, 1.5, 2.0)),
    "zoom_out": Deformation(zoom_out, (1.25, 1.5, 2.0)),
    "rotation": Deformation(rotation, (15.0, 30.0, 45.0)),
    "shear": Deformation(shear, (0.1, 0.2, 0.4)),
    "noise": Deformation(noise, (0.05, 0.1, 0.2)),
    "blur": Deformation(blur, (0.005, 0.01, 0.02)),
}
"""The deformations by name."""


def deformed(
    batches: Iterable[Mapping[str, Any]], name: str, strength: float
) -> Iterator[dict[str, Any]]:
    """Yields test batches with deformed images.

    The random numbers depend on the image's index alone, so that all runs, strengths and numbers of
    processes use the same.

    Args:
        batches: images [b, h, w, 3] uint8 and indices [b], -1 for padding, which is left as it is.
        name: one of `DEFORMATIONS`.
        strength: its strength.
    """
    apply = DEFORMATIONS[name].apply
    for batch in batches:
        images = [
            image if index < 0 else apply(image, strength, np.random.default_rng(int(index)))
            for image, index in zip(batch["image"], batch["index"], strict=True)
        ]
        yield {**batch, "image": np.stack(images)}


def _transformed(image: Image, linear: Float64[np.ndarray, "2 2"]) -> Image:
    """Returns the image under a linear map of (x, y) about its centre, bilinear."""
    height, width = image.shape[:2]
    centre = np.array([width - 1, height - 1]) / 2
    matrix = np.column_stack([linear, centre - linear @ centre])
    return cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE)
