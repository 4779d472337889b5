import io

import numpy as np
import pytest
from PIL import Image

from dml_jax import data
from dml_jax.data import images


def encoded(width, height, format="PNG", **options):
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 60)).save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "size, expected", [((80, 40), (20, 10)), ((9, 900), (1, 20)), ((7, 5),) * 2]
)
def test_preview_fits_and_is_not_enlarged(size, expected):
    preview = Image.open(io.BytesIO(data.preview(encoded(*size), "x", side=20)))
    assert (preview.format, preview.size) == ("JPEG", expected)
    assert np.abs(np.asarray(preview).mean((0, 1)) - (200, 30, 60)).max() < 4


def test_preview_is_upright_without_metadata():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = (
        6,
        "a camera",
    )  # Orientation (rotated by 90 degrees) and camera maker.
    preview = Image.open(io.BytesIO(data.preview(encoded(8, 4, "JPEG", exif=exif), "x", side=8)))
    assert preview.size == (4, 8)
    assert not preview.getexif()


@pytest.mark.parametrize("format", images.FORMATS)
def test_supported_formats_may_be_uploaded(format):
    data.check_upload(encoded(4, 4, format))


@pytest.mark.parametrize("content", [b"", b"<svg/>", encoded(4, 4, "EPS"), encoded(4, 4)[:20]])
def test_upload_that_is_not_an_image_is_rejected(content):
    with pytest.raises(ValueError, match="not an image; BMP, GIF, JPEG"):
        data.check_upload(content)


def test_small_file_of_many_pixels_is_rejected():
    bomb = b"P6 16384 5000 255\n" + bytes(16)
    for read in (data.check_upload, lambda x: images.from_pillow(Image.open(io.BytesIO(x)))):
        with pytest.raises(ValueError, match="16384 x 5000 pixels; up to"):
            read(bomb)
