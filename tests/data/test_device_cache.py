"""Views from the device cache against those of the host, and runs with a device cache."""

import functools
import io
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from dml_jax import data
from dml_jax._utils import sharding
from dml_jax.data import device_cache
from dml_jax.data import images as host_images
from dml_jax.training import builder, run, run_directory, step
from dml_jax.training.batches import device_batches
from dml_jax.training.config import parse
from tests.helpers import tiny

SIDES = ((480, 700), (500, 333), (64, 64))


def pattern(height, width):
    """Returns a smooth image without symmetry."""
    rows, columns = np.mgrid[:height, :width] / max(height, width)
    waves = 128 + 60 * np.sin(9 * rows + 4 * columns) + 60 * np.cos(7 * columns - 3 * rows)
    return np.stack([waves, waves[::-1], waves[:, ::-1]], -1).astype(np.uint8)


def source_of(images):
    records = []
    for pixels in images:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        records.append(file.getvalue())
    names = tuple(map(str, range(len(records))))
    return data.Source(tuple(records), np.zeros(len(records), np.int32), ("x",), names)


def mesh_of(devices):
    return sharding.make_mesh(jax.devices()[:devices])


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0)])
def test_crop_boxes_have_the_distribution_of_the_host(scale):
    rng, count = np.random.default_rng(0), 3000
    sides = jnp.repeat(jnp.array(SIDES), count, axis=0)
    drawn = np.float64(device_cache.random_boxes(jax.random.key(0), sides, scale=scale))
    for (height, width), ours in zip(SIDES, np.split(drawn, len(SIDES)), strict=True):
        theirs = [
            host_images.random_crop_box(height, width, rng, scale=scale) for _ in range(count)
        ]
        for axis in range(4):
            a, b = ours[:, axis], np.array(theirs)[:, axis]
            assert stats.ks_2samp(a, b, method="asymp").pvalue > 1e-3
        for combine in (lambda x: x[:, 2] * x[:, 3], lambda x: x[:, 2] / x[:, 3]):
            a, b = combine(ours), combine(np.array(theirs))
            assert stats.ks_2samp(a, b, method="asymp").pvalue > 1e-3


@pytest.mark.parametrize("sides", [(100, 1000), (1000, 100), (50, 50), (1, 1)])
def test_largest_crop_box_equals_the_host(sides):
    boxes = device_cache.random_boxes(jax.random.key(0), jnp.array([sides]), scale=(1.0, 1.0))
    rng = np.random.default_rng(0)
    expected = host_images.random_crop_box(*sides, rng, scale=(1.0, 1.0))
    np.testing.assert_array_equal(boxes[0], expected)


@pytest.mark.parametrize("box", [(0, 0, 60, 80), (3, 10, 41, 50), (20, 31, 11, 9), (1, 1, 32, 32)])
def test_crop_equals_the_host_within_rounding(box):
    image, (top, left, height, width) = pattern(60, 80), box
    fractions = np.array([box], np.float32) / np.array([60, 80, 60, 80], np.float32)
    ours = device_cache.crop(jnp.array(image[None]), jnp.array(fractions), size=32)[0]
    theirs = host_images.resize(image[top : top + height, left : left + width], 32, 32)
    assert np.abs(np.asarray(ours, np.int32) - theirs).max() <= 1


def test_small_images_of_equal_shape_are_cached_unchanged():
    source = source_of([np.roll(pattern(40, 48), i, axis=1) for i in range(10)])
    mesh = mesh_of(4)
    cache = device_cache.load(source, mesh, 320)
    assert cache.images.shape == (12, 40, 48, 3)
    assert {shard.data.shape[0] for shard in cache.images.addressable_shards} == {3}
    for index in range(10):
        np.testing.assert_array_equal(cache.images[index], source.image(index).pixels())
    boxes = device_cache.centre_boxes(cache.sides, size=30, resize_to=40)
    index = np.array([9, 0, -1, 4], np.int32)
    on_device = sharding.put_batch(mesh, {"index": index, "box": boxes[index]})
    views = device_cache.test_views(
        cache.images, on_device["index"], on_device["box"], mesh=mesh, size=30
    )
    assert not views[2].any()
    for row in (0, 1, 3):
        pixels = source.image(int(index[row])).pixels()
        expected = host_images.centre_view(pixels, size=30, resize_to=40)
        np.testing.assert_array_equal(views[row], expected)


@pytest.mark.parametrize("devices", [2, 5])
def test_the_exchange_gives_each_device_its_rows(devices):
    """Carries out the plans of all devices as XLA specifies `ragged_all_to_all`."""
    rows, shard_size = 7, 4
    rng = np.random.default_rng(0)
    index = rng.integers(-1, devices * shard_size, (devices, rows)).astype(np.int32)
    shards = np.arange(devices * shard_size).reshape(devices, shard_size)
    plans = [
        device_cache.exchange(jnp.asarray(index), jnp.asarray(i), shard_size=shard_size)
        for i in range(devices)
    ]
    received = np.full((devices, rows), -1)
    for sender, plan in enumerate(plans):
        for update, (start, size, to, _) in enumerate(zip(*map(np.asarray, plan), strict=True)):
            receiver = update // rows
            received[receiver, to : to + size] = shards[sender, start : start + size]
            expected = plans[receiver].recv_sizes[sender * rows + update % rows]
            assert size == expected
    np.testing.assert_array_equal(received, index)


def test_images_of_other_shapes_are_distorted_in_the_cache_only():
    source = source_of([pattern(200, 300), pattern(200, 300), pattern(300, 200)])
    cache = device_cache.load(source, mesh_of(1), 100)
    assert cache.images.shape == (3, 100, 150, 3)
    boxes = device_cache.centre_boxes(cache.sides, size=64, resize_to=80)
    views = device_cache.crop(cache.images, jnp.array(boxes), size=64)
    for index in range(3):
        theirs = host_images.centre_view(source.image(index).pixels(), size=64, resize_to=80)
        assert np.abs(np.asarray(views[index], np.int32) - theirs).mean() < 2


def transformed_square(pixels, sides, count, **changes):
    """Returns the centre (down, right) and the side of a white square in random views, pixels."""
    augmentation = data.Augmentation(crop_scale=(1.0, 1.0), flip=False, **changes)
    batch = {
        "cache": jnp.array(pixels[None]),
        "index": jnp.zeros(count, jnp.int32),
        "sides": jnp.repeat(jnp.array([sides]), count, axis=0),
    }
    view = functools.partial(
        device_cache.train_views, mesh=mesh_of(1), size=80, augmentation=augmentation
    )
    views = jax.jit(view)(batch, jax.random.key(0))
    weight = np.asarray(views, np.float64)[..., 0] / 255
    total = weight.sum((1, 2))
    down, right = np.indices((80, 80))
    return (weight * down).sum((1, 2)) / total, (weight * right).sum((1, 2)) / total, total**0.5


def test_views_are_rotated_zoomed_and_shifted_within_their_ranges():
    image = np.zeros((80, 80, 3), np.uint8)
    image[30:50, 50:70] = 255
    sides = (80, 80)
    for positions, centre in zip(
        transformed_square(image, sides, 50, shift=0.1), (39.5, 59.5), strict=False
    ):
        assert 6 < np.abs(positions - centre).max() < 8.1
    *_, side = transformed_square(image, sides, 50, zoom=0.2)
    assert 15.9 < side.min() < 17 and 23 < side.max() < 24.1
    down, right, side = transformed_square(image, sides, 50, rotation=30.0)
    angles = np.degrees(np.arctan2(down - 39.5, right - 39.5))
    assert -30.5 < angles.min() < -25 and 25 < angles.max() < 30.5
    np.testing.assert_allclose(side, 20, atol=0.3)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images"))


AFFINE = {"data__augmentation__rotation": 10.0, "data__augmentation__shift": 0.1}


def test_batches_do_not_depend_on_the_number_of_devices(images):
    config = tiny.config(images, data__cache="device", **AFFINE)
    batches = {}
    for devices in (1, 2, 4, 8):
        built = builder.build(parse(config), mesh_of(devices))
        views = jax.jit(built.step_config.images)
        for done, batch in device_batches(built, 0, 2):
            batches[devices, done] = np.asarray(views(batch, jax.random.key(done)))
            assert batch["cache"].sharding.is_equivalent_to(sharding.batch_sharding(built.mesh), 4)
    for (_, done), pixels in batches.items():
        np.testing.assert_array_equal(pixels, batches[1, done])
    assert (batches[1, 1] != batches[1, 2]).any()


def test_host_cache_changes_no_batch(images):
    read = {}
    for cache, workers in (("none", 0), ("host", 0), ("host", 3)):
        config = tiny.config(images, data__cache=cache, data__num_workers=workers)
        built = builder.build(parse(config), mesh_of(1))
        cached = built.sources["train"].cache
        read[cache, workers] = [jax.device_get(batch) for _, batch in device_batches(built, 0, 8)]
        assert cached is None if cache == "none" else len(cached) == len(built.sources["train"])
    for batches in read.values():
        chex.assert_trees_all_equal(batches, read["none", 0])


@pytest.mark.slow
def test_killed_and_resumed_run_equals_an_uninterrupted_one(images, tmp_path, monkeypatch):
    mesh = mesh_of(2)
    monkeypatch.setattr(sharding, "make_mesh", lambda: mesh)
    config = tiny.config(images, "ps", data__cache="device", epochs=2)
    run.train(config, tmp_path / "uninterrupted")

    class Killed(BaseException):
        pass

    class KilledAtStepSeven(step.Step):
        taken = 0

        def __call__(self, state, batch):
            if self.taken == 6:
                raise Killed
            self.taken += 1
            return super().__call__(state, batch)

    with monkeypatch.context() as patch:
        patch.setattr(step, "Step", KilledAtStepSeven)
        with pytest.raises(Killed):
            run.train(config, tmp_path / "killed")
    run.train(config, tmp_path / "killed")
    for name in (run_directory.METRICS, run_directory.RESULT):
        contents = [
            (tmp_path / folder / name).read_bytes() for folder in ("uninterrupted", "killed")
        ]
        assert contents[0] == contents[1]
    arrays = [
        np.load(tmp_path / f / run_directory.EMBEDDINGS)["embeddings"]
        for f in ("uninterrupted", "killed")
    ]
    np.testing.assert_array_equal(*arrays)
    lines = (tmp_path / "uninterrupted" / run_directory.METRICS).read_text().splitlines()
    assert len({json.loads(line)["loss"] for line in lines}) == 2
