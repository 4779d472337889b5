"""Images for people to look at, and from people who are not known."""

import io

import numpy as np
import simplejpeg
from PIL import Image

from dml_jax.data.images import FORMATS, check_size, decode, resize


def check_upload(encoded: bytes) -> None:
    """Looks at an image's header, whatever it is said to be.

    Raises:
        ValueError: it is of none of the formats `FORMATS`, or too large to be decoded.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except Exception as error:  # Pillow's parsers raise nearly anything on broken input.
        raise ValueError(f"this is no image; {', '.join(FORMATS)} are read") from error
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
