"""Previews of images for display, and checks of uploaded images."""

import io

import numpy as np
import simplejpeg
from PIL import Image

from dml_jax._utils.errors import UserError
from dml_jax.data.images import FORMATS, check_size, decode, resize


def check_upload(encoded: bytes) -> None:
    """Checks the header of an uploaded image, whatever its declared type.

    Raises:
        ValueError: it has none of the formats `FORMATS`, or is too large to be decoded.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except Exception as error:  # Pillow's parsers raise nearly any exception on damaged input.
        raise UserError(f"this is not an image; {', '.join(FORMATS)} are read") from error
    check_size(image)


def preview(encoded: bytes, name: str, *, side: int) -> bytes:
    """Returns a JPEG of an image that fits into a square; smaller images are not enlarged.

    Args:
        encoded: the image.
        name: name of the image in error messages.
        side: side of the square, pixels.

    Returns:
        The upright JPEG, without metadata of the original.

    Raises:
        ValueError: the image cannot be decoded.
    """
    image = decode(encoded, name, min_side=side)
    height, width = image.shape[:2]
    scale = min(1.0, side / max(height, width))
    if scale < 1:
        image = resize(image, max(1, round(height * scale)), max(1, round(width * scale)))
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=85)
