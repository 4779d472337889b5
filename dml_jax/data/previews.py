"""Images for people to look at, and from people who are not known."""

import io

import numpy as np
import simplejpeg
from PIL import Image

from dml_jax.data.images import check_size, decode, resize

UPLOADED = ("BMP", "JPEG", "PNG", "PPM", "WEBP")
"""Formats that are taken from strangers; Pillow reads more, some of them with other programs."""


def check_upload(encoded: bytes) -> None:
    """Looks at an image's header, whatever it is said to be.

    Raises:
        ValueError: it is of none of the formats `UPLOADED`, or too large to be decoded.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=UPLOADED)
    except Exception as error:  # Pillow's parsers raise nearly anything on broken input.
        raise ValueError(f"this is no image; {', '.join(UPLOADED)} are read") from error
    check_size(image)


def preview(encoded: bytes, name: str, *, side: int) -> bytes:
    """A JPEG of an image that fits into a square; one that is smaller keeps its size.

    Args:
        encoded: the image.
        name: what to call it in an error.
        side: of the square, pixels.

    Returns:
        The JPEG, upright, with nothing of what else was in the file.

    Raises:
        ValueError: the image cannot be decoded.
    """
    image = decode(encoded, name, enough=side)
    height, width = image.shape[:2]
    scale = min(1.0, side / max(height, width))
    if scale < 1:
        image = resize(image, max(1, round(height * scale)), max(1, round(width * scale)))
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=85)
