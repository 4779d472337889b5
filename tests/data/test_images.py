import io

import numpy as np
import pytest
from PIL import Image

from dml_jax.data import images


def encode(image, file_format, **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def random_view(pixels, seed, size, augmentation):
    view = np.empty((size, size, 3), np.uint8)
    image = images.LazyImage(encode(Image.fromarray(pixels), "PNG"), "x")
    rng = np.random.default_rng(seed)
    images.random_view(image, rng, augmentation=augmentation, out=view)
    return view


@pytest.fixture
def photograph():
    """A smooth [24, 40, 3] image without symmetry, which JPEG hardly changes."""
    rows, columns = np.mgrid[:24, :40]
    return np.stack([rows * 10, columns * 6, 255 - rows * 5 - columns * 3], -1).astype(np.uint8)


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "PPM", "WEBP", "JPEG"])
def test_formats_decode_to_the_same_rgb(photograph, file_format):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 98, "subsampling": 0}}
    data = encode(Image.fromarray(photograph), file_format, **options.get(file_format, {}))
    decoded = images.decode(data, "x")
    assert decoded.dtype == np.uint8
    np.testing.assert_allclose(decoded, photograph, atol=6 if file_format == "JPEG" else 0)


@pytest.mark.parametrize("file_format", ["PNG", "PPM", "JPEG"])
def test_grey_becomes_rgb(photograph, file_format):
    grey = photograph[..., 0]
    decoded = images.decode(encode(Image.fromarray(grey), file_format), "x")
    np.testing.assert_allclose(decoded, np.repeat(grey[..., None], 3, -1), atol=6)


def test_one_bit_becomes_black_and_white():
    bits = np.eye(8, dtype=bool)
    decoded = images.decode(encode(Image.fromarray(bits), "PNG"), "x")
    np.testing.assert_array_equal(decoded[..., 1], bits * np.uint8(255))


@pytest.mark.parametrize("file_format", ["PNG", "PPM"])
def test_sixteen_bit_grey_is_scaled(file_format):
    levels = np.array([[0, 257, 32896, 65535]], np.uint16)
    decoded = images.decode(encode(Image.fromarray(levels), file_format), "x")
    np.testing.assert_array_equal(decoded[0, :, 0], [0, 1, 128, 255])


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_transparent_pixels_are_blended_with_white(file_format):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = [255, 128, 0]
    decoded = images.decode(encode(Image.fromarray(rgba), file_format, lossless=True), "x")
    np.testing.assert_array_equal(decoded[0, :, 0], [0, 127, 255])


def test_palettes_with_and_without_transparency():
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "L").convert("P")
    palette.putpalette([250, 0, 0, 0, 250, 0, 0, 0, 250])
    opaque = images.decode(encode(palette, "PNG"), "x")
    np.testing.assert_array_equal(opaque[0], 250 * np.eye(3))
    transparent = images.decode(encode(palette, "PNG", transparency=1), "x")
    np.testing.assert_array_equal(transparent[0], [[250, 0, 0], [255, 255, 255], [0, 0, 250]])


def test_cmyk_jpeg(photograph):
    cmyk = Image.fromarray(photograph).convert("CMYK")
    decoded = images.decode(encode(cmyk, "JPEG", quality=98, subsampling=0), "x")
    np.testing.assert_allclose(decoded, photograph, atol=12)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [(1, lambda x: x), (3, lambda x: x[::-1, ::-1]), (6, lambda x: np.rot90(x, -1))],
)
def test_exif_orientation_is_applied(photograph, file_format, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 98} | ({"subsampling": 0} if file_format == "JPEG" else {})
    data = encode(Image.fromarray(photograph), file_format, exif=exif, **options)
    np.testing.assert_allclose(images.decode(data, "x"), upright(photograph), atol=12)


def test_jpeg_with_trailing_bytes_is_read(photograph):
    data = encode(Image.fromarray(photograph), "JPEG", quality=98)
    np.testing.assert_allclose(images.decode(data + b"appended", "x"), photograph, atol=12)


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff"])
def test_data_that_is_not_an_image_is_named_in_the_error(data):
    with pytest.raises(ValueError, match="cat/7.jpg: not a readable image"):
        images.decode(data, "cat/7.jpg")


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_truncated_image_is_named_in_the_error(photograph, file_format):
    data = encode(Image.fromarray(photograph), file_format)
    with pytest.raises(ValueError, match="cat/7: not a readable image"):
        images.decode(data[: len(data) // 2], "cat/7")


def test_distribution_of_random_crop_boxes():
    height, width, scale = 300, 400, (0.1, 0.5)
    rng = np.random.default_rng(0)
    boxes = [images.random_crop_box(height, width, rng, scale=scale) for _ in range(4000)]
    top, left, crop_h, crop_w = np.transpose(boxes)
    assert (top >= 0).all() and (top + crop_h <= height).all()
    assert (left >= 0).all() and (left + crop_w <= width).all()
    area, log_ratio = crop_h * crop_w / (height * width), np.log(crop_w / crop_h)
    assert area.min() > 0.098 and area.max() < 0.505
    assert abs(np.mean(area) - 0.3) < 0.01
    assert abs(log_ratio).max() < np.log(4 / 3) + 0.01
    assert abs(log_ratio.mean()) < 0.01
    assert abs(log_ratio.std() - 2 * np.log(4 / 3) / np.sqrt(12)) < 0.01
    assert abs(np.mean(top / (height - crop_h)) - 0.5) < 0.02
    assert abs(np.mean(left / (width - crop_w)) - 0.5) < 0.02


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (100, 1000, (0, 434, 100, 133)),  # No crop of the full area fits within the aspect ratios.
        (1000, 100, (434, 0, 133, 100)),
        (50, 50, (0, 0, 50, 50)),
    ],
)
def test_largest_central_crop_if_no_random_crop_fits(height, width, box):
    rng = np.random.default_rng(0)
    top, left, crop_h, crop_w = images.random_crop_box(height, width, rng, scale=(1.0, 1.0))
    assert (crop_h, crop_w) == box[2:]
    assert abs(top - box[0]) <= 1 and abs(left - box[1]) <= 1


def test_random_views_are_deterministic_given_the_generator(photograph):
    def view(seed, flip=True):
        augmentation = images.Augmentation(crop_scale=(0.3, 1.0), flip=flip)
        return random_view(photograph, seed, 16, augmentation)

    assert view(0).shape == (16, 16, 3)
    np.testing.assert_array_equal(view(5), view(5))
    assert (view(5) != view(6)).any()
    # The green channel increases to the right, unless the view is mirrored.
    mirrored = [bool(view(seed)[0, 0, 1] > view(seed)[0, -1, 1]) for seed in range(100)]
    assert 30 < sum(mirrored) < 70
    assert not any(view(seed, False)[0, 0, 1] > view(seed, False)[0, -1, 1] for seed in range(100))


def transformed_square(seed, **changes):
    """Returns the centre (down, right) and the side of a white square in a random view, pixels."""
    image = np.zeros((80, 80, 3), np.uint8)
    image[30:50, 50:70] = 255
    augmentation = images.Augmentation(crop_scale=(1.0, 1.0), flip=False, **changes)
    view = random_view(image, seed, 80, augmentation)
    weight = view[:, :, 0] / 255
    centre = np.array([(weight * axis).sum() for axis in np.indices((80, 80))]) / weight.sum()
    return *centre, weight.sum() ** 0.5


def test_views_are_rotated_zoomed_and_shifted_within_their_ranges():
    assert transformed_square(0) == (39.5, 59.5, 20)
    shifted = np.array([transformed_square(seed, shift=0.1) for seed in range(50)])
    for axis, centre in ((0, 39.5), (1, 59.5)):
        assert 6 < np.abs(shifted[:, axis] - centre).max() < 8.1
    zoomed = np.array([transformed_square(seed, zoom=0.2) for seed in range(50)])
    assert 15.9 < zoomed[:, 2].min() < 17 and 23 < zoomed[:, 2].max() < 24.1
    rotated = np.array([transformed_square(seed, rotation=30.0) for seed in range(50)])
    angles = np.degrees(np.arctan2(rotated[:, 0] - 39.5, rotated[:, 1] - 39.5))
    assert -30.5 < angles.min() < -25 and 25 < angles.max() < 30.5
    np.testing.assert_allclose(rotated[:, 2], 20, atol=0.3)


def test_border_is_replicated_outside_the_image():
    grey = np.full((20, 20, 3), 77, np.uint8)
    augmentation = images.Augmentation(rotation=45.0, zoom=0.5, shift=0.5)
    assert (random_view(grey, 0, 8, augmentation) == 77).all()


@pytest.mark.parametrize(
    "wrong", [{"crop_scale": (0.5, 0.2)}, {"zoom": 1.0}, {"shift": -0.1}, {"rotation": 360.0}]
)
def test_invalid_augmentation_is_rejected(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*; it must be"):
        images.Augmentation(**wrong)


def test_large_jpeg_is_decoded_at_a_fraction_of_its_size(photograph):
    large = encode(Image.fromarray(photograph).resize((800, 640)), "JPEG", quality=95)
    full, small = images.decode(large, "x"), images.decode(large, "x", min_side=150)
    assert full.shape == (640, 800, 3) and 150 <= small.shape[0] < 640
    assert images.decode(large, "x", min_side=641).shape == full.shape
    shrunk = images.resize(full, *small.shape[:2])
    assert np.abs(small - shrunk.astype(float)).mean() < 3


@pytest.fixture(scope="module")
def large():
    """A JPEG of 650 x 810 pixels, smooth and without symmetry."""
    rows, columns = np.mgrid[:650, :810]
    waves = 128 + 60 * np.sin(rows / 90 + columns / 180) + 60 * np.cos(columns / 110 - rows / 260)
    pixels = np.stack([waves, waves[::-1], waves[:, ::-1]], -1).astype(np.uint8)
    return encode(Image.fromarray(pixels), "JPEG", quality=95)


def test_lazy_image_is_decoded_once_at_each_scale(large):
    image = images.LazyImage(large, "x")
    assert (image.height, image.width) == (650, 810)
    for scale in image.scales:
        assert image.pixels(scale).shape == (-(-650 // scale), -(-810 // scale), 3)
        assert image.pixels(scale) is image.pixels(scale)
    np.testing.assert_array_equal(image.pixels(), Image.open(io.BytesIO(large)))
    scales = [image.scale_for(side, 500, 100) for side in (50, 199, 200, 399, 400, 800)]
    assert scales == [1, 1, 2, 2, 4, 4]
    png = images.LazyImage(encode(Image.open(io.BytesIO(large)), "PNG"), "x")
    assert png.scales == (1,) and png.scale_for(650, 650, 1) == 1


def test_crops_hardly_depend_on_the_decoding_scale(large):
    full = images.LazyImage(large, "x").pixels()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        top, left, height, width = images.random_crop_box(650, 810, rng, scale=(0.08, 1.0))
        crop = full[top : top + height, left : left + width]
        expected = images.resize(crop, 60, 60)[:, :: -1 if rng.random() < 0.5 else 1]
        view = np.empty((60, 60, 3), np.uint8)
        image = images.LazyImage(large, "x")
        images.random_view(
            image, np.random.default_rng(seed), augmentation=images.Augmentation(), out=view
        )
        difference = np.abs(view.astype(float) - expected)
        assert difference.mean() < 2 and difference.max() < 12
        if min(height, width) < 120:
            np.testing.assert_array_equal(view, expected)


def test_centre_view_resizes_the_shorter_side_and_crops_the_centre():
    image = np.zeros((60, 120, 3), np.uint8)
    image[20:40, 50:70] = 255
    view = images.centre_view(image, size=20, resize_to=30)
    expected = np.zeros((20, 20, 3), np.uint8)
    expected[5:15, 5:15] = 255
    np.testing.assert_array_equal(view, expected)
    tall = images.centre_view(image.transpose(1, 0, 2), size=20, resize_to=30)
    np.testing.assert_array_equal(tall, expected)


def test_centre_view_of_an_image_of_the_target_size_is_the_image(photograph):
    square = photograph[:24, :24]
    np.testing.assert_array_equal(images.centre_view(square, size=24, resize_to=24), square)


def test_resize_averages_to_shrink_and_interpolates_to_enlarge():
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[::2] = 200
    np.testing.assert_allclose(images.resize(stripes, 4, 4), 100, atol=1)
    edge = np.zeros((2, 2, 3), np.uint8)
    edge[:, 1] = 100
    np.testing.assert_array_equal(images.resize(edge, 4, 4)[0, :, 0], [0, 25, 75, 100])
