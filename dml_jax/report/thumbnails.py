"""Thumbnails of test images, encoded as sheets of many thumbnails."""

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
from dml_jax.data.config import test_side

COLUMNS = 20
"""Thumbnails in a row of a sheet, and maximum number of rows."""

_LARGE, _SMALL = 64, 48
# Keeps the page below 25 MB.
_MOST_LARGE = 6000


class Thumbnail(NamedTuple):
    """An image to draw a thumbnail of: its data source and its number there."""

    source: data.Source
    number: int


class Sheets(NamedTuple):
    """Thumbnails in sheets of `COLUMNS` columns and at most as many rows.

    Attributes:
        side: side length of a thumbnail in pixels.
        files: the sheets as base64-encoded WebP files.
    """

    side: int
    files: list[str]


def draw(thumbnails: Sequence[Thumbnail], config: ConfigDict) -> Sheets:
    """Returns thumbnails of the centre crops that the network sees.

    Args:
        thumbnails: at least one.
        config: the run's configuration, which determines the crop of test images.

    Raises:
        ValueError: an image cannot be decoded.
    """
    side = _LARGE if len(thumbnails) <= _MOST_LARGE else _SMALL
    resize = max(side, round(side * config.data.resize / test_side(config.data)))

    def view(thumbnail: Thumbnail) -> UInt8[np.ndarray, "h w 3"]:
        source, number = thumbnail
        # A JPEG is decoded at a reduced scale with at least twice the pixels needed.
        pixels = data.decode(source[number], source.names[number], min_side=2 * resize)
        return data.centre_view(pixels, size=side, resize_to=resize)

    per_sheet = COLUMNS**2
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = []
        for start in range(0, len(thumbnails), per_sheet):
            views = list(pool.map(view, thumbnails[start : start + per_sheet]))
            files.append(pool.submit(_sheet, views, side))
        return Sheets(side, [file.result() for file in files])


def _sheet(views: Sequence[UInt8[np.ndarray, "side side 3"]], side: int) -> str:
    rows = -(-len(views) // COLUMNS)
    sheet = np.full((rows * side, COLUMNS * side, 3), 255, np.uint8)
    for position, view in enumerate(views):
        top, left = side * (position // COLUMNS), side * (position % COLUMNS)
        sheet[top : top + side, left : left + side] = view
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, "WEBP", quality=70, method=3)
    return base64.b64encode(file.getvalue()).decode()
