"""Small pictures of thousands of images, many to a file."""

import base64
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict
from PIL import Image

from dml_jax import data

COLUMNS = 20
"""Pictures side by side on a sheet, and below each other."""

_LARGE, _SMALL = 64, 48
# So that a page stays below 25 MB.
_MOST_LARGE = 6000


class Thumbnail(NamedTuple):
    """An image of a data set, by its number there."""

    source: data.Source
    number: int


class Sheets(NamedTuple):
    """Pictures in rows, `COLUMNS` a row and as many rows a sheet.

    Attributes:
        side: of a picture, pixels.
        files: base64 of WebP.
    """

    side: int
    files: list[str]


def draw(pictures: Sequence[Thumbnail], config: ConfigDict) -> Sheets:
    """Draws thumbnails of what the network sees of images: their centre.

    Args:
        pictures: at least one.
        config: the run's, for how test images are cropped.

    Raises:
        ValueError: an image cannot be decoded.
    """
    side = _LARGE if len(pictures) <= _MOST_LARGE else _SMALL
    resize = max(side, round(side * config.data.resize / config.data.image_size))

    def small(picture: Thumbnail) -> UInt8[np.ndarray, "h w 3"]:
        source, number = picture
        # Of a JPEG twice the pixels are enough to average.
        pixels = data.decode(source[number], source.names[number], min_side=2 * resize)
        return data.centre_view(pixels, size=side, resize_to=resize)

    per_sheet = COLUMNS**2
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = []
        for start in range(0, len(pictures), per_sheet):
            drawn = list(pool.map(small, pictures[start : start + per_sheet]))
            files.append(pool.submit(_sheet, drawn, side))
        return Sheets(side, [file.result() for file in files])


def _sheet(drawn: Sequence[UInt8[np.ndarray, "side side 3"]], side: int) -> str:
    rows = -(-len(drawn) // COLUMNS)
    sheet = np.full((rows * side, COLUMNS * side, 3), 255, np.uint8)
    for place, picture in enumerate(drawn):
        top, left = side * (place // COLUMNS), side * (place % COLUMNS)
        sheet[top : top + side, left : left + side] = picture
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, "WEBP", quality=70, method=3)
    return base64.b64encode(file.getvalue()).decode()
