import cv2
import numpy as np
import pytest
import scipy.ndimage

from dml_jax.data.deformations import DEFORMATIONS, deformed

SIDES = 40, 56


def smooth_image(sides=SIDES):
    """Returns an image that bilinear interpolation changes little."""
    y, x = np.mgrid[: sides[0], : sides[1]]
    channels = [np.sin(x / 9 + c) + np.cos(y / 7 - c) for c in range(3)]
    return np.uint8(128 + 55 * np.stack(channels, axis=-1))


def deform(name, strength, image=None, seed=0):
    image = smooth_image() if image is None else image
    return DEFORMATIONS[name].apply(image, strength, np.random.default_rng(seed))


def sampled(image, y, x):
    """Returns the image at real coordinates, by another library."""
    return np.stack(
        [
            scipy.ndimage.map_coordinates(channel, [y, x], order=1, mode="nearest")
            for channel in np.moveaxis(image.astype(float), -1, 0)
        ],
        axis=-1,
    )


def from_centre():
    y, x = np.mgrid[: SIDES[0], : SIDES[1]].astype(float)
    return y - (SIDES[0] - 1) / 2, x - (SIDES[1] - 1) / 2


def at(y, x):
    return sampled(smooth_image(), y + (SIDES[0] - 1) / 2, x + (SIDES[1] - 1) / 2)


def test_zooms_sample_the_image_nearer_to_and_farther_from_its_centre():
    y, x = from_centre()
    assert np.abs(deform("zoom_in", 1.5) - at(y / 1.5, x / 1.5)).max() < 2
    assert np.abs(deform("zoom_out", 1.5) - at(y * 1.5, x * 1.5)).max() < 2


@pytest.mark.parametrize("name", ["rotation", "shear"])
def test_rotation_and_shear_have_both_directions(name):
    y, x = from_centre()
    angle = np.radians(30)
    expected = {
        "rotation": lambda sign: at(
            np.cos(angle) * y - sign * np.sin(angle) * x,
            np.cos(angle) * x + sign * np.sin(angle) * y,
        ),
        "shear": lambda sign: at(y, x - sign * 0.4 * y),
    }[name]
    strength = {"rotation": 30.0, "shear": 0.4}[name]
    found = set()
    for seed in range(8):
        errors = [
            np.abs(deform(name, strength, seed=seed) - expected(s)).max() < 3 for s in (1, -1)
        ]
        assert sum(errors) == 1
        found.add(errors.index(True))
    assert found == {0, 1}


def test_blur_is_a_gaussian_of_a_share_of_the_shorter_side():
    image = np.random.default_rng(0).integers(0, 256, (*SIDES, 3), np.uint8)
    sigma = 0.05 * SIDES[0]
    expected = scipy.ndimage.gaussian_filter(
        image.astype(float), (sigma, sigma, 0), mode="nearest", truncate=3
    )
    assert np.abs(deform("blur", 0.05, image) - expected).max() < 2


def test_noise_has_the_standard_deviation_and_is_clipped():
    grey = np.full((100, 100, 3), 128, np.uint8)
    difference = deform("noise", 0.1, grey).astype(float) - 128
    assert abs(difference.mean()) < 0.6
    assert abs(difference.std() - 25.5) < 0.6
    white = deform("noise", 0.1, np.full((100, 100, 3), 255, np.uint8))
    assert abs((white == 255).mean() - 0.5) < 0.02  # 255.5 would be rounded up, too.


def test_a_cutout_is_one_black_rectangle_anywhere_in_the_image():
    white = np.full((*SIDES, 3), 255, np.uint8)
    corners = set()
    for seed in range(200):
        rows, columns = np.nonzero((deform("cutout", 0.25, white, seed) == 0).all(axis=-1))
        corners.add((rows.min(), columns.min()))
        assert len(rows) == 10 * 14
        assert np.ptp(rows) == 9 and np.ptp(columns) == 13
    tops, lefts = zip(*corners, strict=True)
    assert (min(tops), max(tops)) == (0, 30) and min(lefts) <= 1 and max(lefts) >= 41


@pytest.mark.parametrize("name", DEFORMATIONS)
def test_deformations_keep_the_shape_and_are_reproducible(name):
    image = smooth_image((224, 224))
    before = image.copy()
    strengths = DEFORMATIONS[name].strengths
    changes = []
    for strength in strengths:
        one, again = deform(name, strength, image), deform(name, strength, image)
        assert one.shape == image.shape and one.dtype == np.uint8
        assert (one == again).all() and (image == before).all()
        changes.append(np.abs(one.astype(int) - image).mean())
    assert min(changes) > 0 and len(set(changes)) == len(strengths)


def test_batches_are_deformed_by_index_and_padding_is_left():
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    batch = {"image": images, "index": np.array([7, 2, -1])}
    (found,) = deformed([batch], "noise", 0.1)
    for row, index in enumerate((7, 2)):
        assert (found["image"][row] == deform("noise", 0.1, images[row], seed=index)).all()
    assert (found["image"][2] == images[2]).all() and found["index"] is batch["index"]
    (other,) = deformed([{"image": images[1:2], "index": np.array([2])}], "noise", 0.1)
    assert (other["image"][0] == found["image"][1]).all()


def test_a_rotation_by_a_right_angle_moves_pixels():
    image = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    found = deform("rotation", 90.0, image)
    ways = [cv2.ROTATE_90_CLOCKWISE, cv2.ROTATE_90_COUNTERCLOCKWISE]
    assert any(np.abs(found.astype(int) - cv2.rotate(image, way)).max() <= 1 for way in ways)
