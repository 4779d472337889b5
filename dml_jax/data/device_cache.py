"""A data set in the devices' memory: decoded once, cropped inside compiled programs.

All images have one shape there, whatever theirs was, and are split over the devices by row. A crop
is drawn in the pixels of the image as it is encoded, and cut out of the same part of the smaller
one; so its shape comes out right, however the image was squeezed.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Int32, PRNGKeyArray, UInt8

from dml_jax import data
from dml_jax._utils import sharding
from dml_jax.data import images as host_images

_TRIES = 10  # As many as on the host.


class Cache(NamedTuple):
    """The images of a split."""

    images: UInt8[Array, "n height width 3"]
    """Split by row; the last rows may be black, so that all devices have as many."""
    sides: Int32[np.ndarray, "n 2"]
    """Height and width of each image as it is encoded, on the host."""


def load(source: data.Source, mesh: Mesh, shorter: int) -> Cache:
    """Decodes all images, in as many threads as there are cores, each process those of its devices.

    Args:
        source: the images.
        mesh: where to put them.
        shorter: length of an image's shorter side there, pixels, or less where all are smaller.

    Raises:
        ValueError: they do not fit, or one cannot be decoded.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def sides_of(index: int) -> tuple[int, int]:
            picture = source.picture(index)
            return picture.height, picture.width

        sides = np.array([*pool.map(sides_of, range(len(source)))], np.int32)
        height, width = common_shape(sides, shorter)
        rows = -(-len(source) // mesh.size) * mesh.size
        _check_room(rows * height * width * 3, mesh)

        def of_rows(place: tuple[slice, ...] | None) -> np.ndarray:
            start, stop, _ = (place or (slice(None),))[0].indices(rows)
            part = np.zeros((stop - start, height, width, 3), np.uint8)

            def fill(index: int) -> None:
                picture = source.picture(index)
                scales = (x for x in picture.scales if picture.height >= x * height)
                scale = max((x for x in scales if picture.width >= x * width), default=1)
                # One side after the other: one may shrink while the other grows.
                lower = host_images.resize(
                    picture.pixels(scale), height, -(-picture.width // scale)
                )
                host_images.resize(lower, height, width, part[index - start])

            list(pool.map(fill, range(start, min(stop, len(source)))))
            return part

        shape = (rows, height, width, 3)
        # With several processes JAX takes this for an implicit transfer.
        with jax.transfer_guard_host_to_device("allow"):
            placed = jax.make_array_from_callback(shape, sharding.batch_sharding(mesh), of_rows)
    return Cache(placed, sides)


def common_shape(sides: Int[np.ndarray, "n 2"], shorter: int) -> tuple[int, int]:
    """The height and width that images get in the cache: the ratio of their sides is the median.

    Args:
        sides: their heights and widths, pixels.
        shorter: the shorter side, pixels; at most that of the image in which it is longest, so that
            images of equal shape that are small stay as they are.
    """
    shorter = min(shorter, int(sides.min(axis=1).max()))
    ratio = float(np.median(sides[:, 1] / sides[:, 0]))
    if ratio >= 1:
        return shorter, round(shorter * ratio)
    return round(shorter / ratio), shorter


def _check_room(size: int, mesh: Mesh) -> None:
    told = mesh.local_devices[0].memory_stats() or {}
    free = told.get("bytes_limit", np.inf) - told.get("bytes_in_use", 0)
    if size / mesh.size > free:
        raise ValueError(
            f"config.data.cache is 'device', but {size / mesh.size / 1e9:.1f} GB of images do not "
            f"fit into a device with {free / 1e9:.1f} GB free; lower config.data.cache_size, or "
            "choose 'host' or 'none'"
        )


def train_views(
    batch: Mapping[str, Array],
    key: PRNGKeyArray,
    *,
    mesh: Mesh,
    size: int,
    augmentation: data.Augmentation,
) -> UInt8[Array, "batch {size} {size} 3"]:
    """Random views as `data.images.random_view` makes them.

    Args:
        batch: `cache` `[n, height, width, 3]`; `index` `[batch]` and `sides` `[batch, 2]` of the
            images, all split by row.
        key: of this batch.
        mesh: where they are.
        size: side of a view, pixels.
        augmentation: how far a view may differ from its image.
    """
    pixels, sides = taken(batch["cache"], batch["index"], mesh=mesh), batch["sides"]
    move_key, box_key, flip_key = jax.random.split(key, 3)
    if augmentation.rotation or augmentation.zoom or augmentation.shift:
        pixels = _moved(move_key, pixels, sides, augmentation)
    boxes = random_boxes(box_key, sides, scale=augmentation.crop_scale)
    views = crop(pixels, boxes / jnp.tile(sides, 2), size=size)
    if not augmentation.flip:
        return views
    flipped = jax.random.bernoulli(flip_key, shape=(len(views), 1, 1, 1))
    return jnp.where(flipped, views[:, :, ::-1], views)


@partial(jax.jit, static_argnames=("mesh", "size"))
def test_views(
    cache: UInt8[Array, "n h w 3"],
    index: Int32[Array, " batch"],
    boxes: Float[Array, "batch 4"],
    *,
    mesh: Mesh,
    size: int,
) -> UInt8[Array, "batch {size} {size} 3"]:
    """Given views; where the index is -1 they are black.

    Args:
        cache: the images, split by row.
        index: which of them.
        boxes: see `crop`.
        mesh: where they are.
        size: side of a view, pixels.
    """
    views = crop(taken(cache, index, mesh=mesh), boxes, size=size)
    return jax.lax.with_sharding_constraint(views, sharding.batch_sharding(mesh))


def centre_boxes(
    sides: Int[np.ndarray, "n 2"], *, size: int, resize_to: int
) -> Float[np.ndarray, "n 4"]:
    """What `data.centre_view` crops, as fractions of the image; see `crop`.

    Args:
        sides: heights and widths, pixels.
        size: side of the crop, pixels.
        resize_to: length of the shorter side before the crop, at least `size`.
    """
    resized = sides.astype(np.int64) * resize_to // sides.min(axis=1, keepdims=True)
    places = np.round((resized - size) / 2)
    return np.hstack([places / resized, size / resized]).astype(np.float32)


def taken(
    cache: UInt8[Array, "n h w 3"], index: Int32[Array, " batch"], *, mesh: Mesh
) -> UInt8[Array, "batch h w 3"]:
    """Some of the images, each on the device that has its row of the batch; black for -1."""

    def of_device(own: Array, index: Array) -> Array:
        wanted = jax.lax.all_gather(index, "data", tiled=True)
        here = wanted - jax.lax.axis_index("data") * len(own)
        is_here = (here >= 0) & (here < len(own)) & (wanted >= 0)
        rows = jnp.where(
            is_here[:, None, None, None], own[here.clip(0, len(own) - 1)], jnp.uint8(0)
        )
        # Of each row one device has something, the others zeros.
        return jax.lax.psum_scatter(rows, "data", tiled=True)

    split = PartitionSpec("data")
    return jax.shard_map(of_device, mesh=mesh, in_specs=(split, split), out_specs=split)(
        cache, index
    )


def random_boxes(
    key: PRNGKeyArray, sides: Int[Array, "batch 2"], *, scale: Sequence[float]
) -> Float[Array, "batch 4"]:
    """Draws crops as `data.images.random_crop_box` does.

    Args:
        key: a random key.
        sides: heights and widths of the images, pixels.
        scale: least and greatest area of a crop as a fraction of the image's.

    Returns:
        Top, left, height and width of each, whole pixels.
    """
    (low, high), (least, most) = host_images.CROP_RATIO, scale
    size_key, ratio_key, place_key = jax.random.split(key, 3)
    sides = sides.astype(jnp.float32)
    tries = (len(sides), _TRIES if least < 1 else 0)
    area = sides.prod(axis=1)[:, None] * jax.random.uniform(
        size_key, tries, minval=least, maxval=most
    )
    ratio = jnp.exp(jax.random.uniform(ratio_key, tries, minval=jnp.log(low), maxval=jnp.log(high)))
    drawn = jnp.round(jnp.sqrt(jnp.stack([area / ratio, area * ratio], axis=-1)))
    fits = ((drawn > 0) & (drawn <= sides[:, None])).all(axis=-1)
    # Behind the tries, the largest central crop, which always fits.
    other = sides[:, ::-1] * jnp.array([[1 / low, high]])
    central = jnp.minimum(sides, jnp.maximum(1, jnp.round(other)))
    first = jnp.argmax(jnp.pad(fits, ((0, 0), (0, 1)), constant_values=True), axis=1)
    crops = jnp.concatenate([drawn, central[:, None]], axis=1)
    crops = jnp.take_along_axis(crops, first[:, None, None], axis=1)[:, 0]
    room = sides - crops
    random = jnp.floor(jax.random.uniform(place_key, sides.shape) * (room + 1))
    is_central = first == tries[1]
    places = jnp.where(is_central[:, None], jnp.floor(room / 2), jnp.minimum(random, room))
    return jnp.concatenate([places, crops], axis=1)


def _moved(
    key: PRNGKeyArray,
    images: UInt8[Array, "batch h w 3"],
    sides: Int[Array, "batch 2"],
    augmentation: data.Augmentation,
) -> Float[Array, "batch h w 3"]:
    """Images turned and zoomed about their middles, and shifted; their borders go on outside."""
    height, width = images.shape[1:3]
    drawn = jax.random.uniform(key, (4, len(images)), minval=-1.0, maxval=1.0)
    turns, zooms = jnp.radians(augmentation.rotation) * drawn[0], 1 + augmentation.zoom * drawn[1]

    def one(image: Array, pixel: Array, turn: Array, zoom: Array, shift: Array) -> Array:
        # From the result's pixels, by their distance from the middle, back to the image's; in
        # pixels of the encoded image, in which a turn keeps its shape.
        down = ((jnp.arange(height) + 0.5) / height - 0.5 - shift[0]) * pixel[0]
        right = ((jnp.arange(width) + 0.5) / width - 0.5 - shift[1]) * pixel[1]
        down, right = jnp.meshgrid(down, right, indexing="ij")
        cos, sin = jnp.cos(turn) / zoom, jnp.sin(turn) / zoom
        row = ((sin * right + cos * down) / pixel[0] + 0.5) * height - 0.5
        column = ((cos * right - sin * down) / pixel[1] + 0.5) * width - 0.5
        look = partial(
            jax.scipy.ndimage.map_coordinates, coordinates=[row, column], order=1, mode="nearest"
        )
        return jax.vmap(look, in_axes=2, out_axes=2)(image.astype(jnp.float32))

    shifts = augmentation.shift * drawn[:1:-1].T  # Down and right.
    return jax.vmap(one)(images, sides.astype(jnp.float32), turns, zooms, shifts)


def crop(
    images: UInt8[Array, "batch h w 3"] | Float[Array, "batch h w 3"],
    boxes: Float[Array, "batch 4"],
    *,
    size: int,
) -> UInt8[Array, "batch {size} {size} 3"]:
    """Cuts a box out of each image and resizes it, as `data.images.resize` would.

    Args:
        images: all of one shape.
        boxes: top, left, height and width, as fractions of the image's sides.
        size: side of the result, pixels.
    """
    rows = _weights(images.shape[1], boxes[:, 0], boxes[:, 2], size)
    columns = _weights(images.shape[2], boxes[:, 1], boxes[:, 3], size)
    lower = jnp.einsum("bph,bhwc->bpwc", rows, images.astype(jnp.float32))
    views = jnp.einsum("bqw,bpwc->bpqc", columns, lower)
    return jnp.round(views).clip(0, 255).astype(jnp.uint8)


def _weights(
    length: int, start: Float[Array, " batch"], extent: Float[Array, " batch"], size: int
) -> Float[Array, "batch {size} {length}"]:
    """How much of each pixel along a side is in each of the result's.

    Args:
        length: of the side, pixels.
        start: where the box begins, as a fraction.
        extent: of the box, as a fraction.
        size: pixels of the result.
    """
    first, step = (start * length)[:, None, None], (extent * length / size)[:, None, None]
    begin = first + step * jnp.arange(size)[None, :, None]
    pixel = jnp.arange(length)[None, None, :]
    covered = jnp.minimum(pixel + 1, begin + step) - jnp.maximum(pixel, begin)
    # Enlarged: between the two pixels whose middles are nearest, and none beyond the box.
    middle = (begin + (step - 1) / 2).clip(first, first + step * size - 1)
    weights = jnp.where(step >= 1, covered, 1 - jnp.abs(pixel - middle)).clip(0)
    return weights / weights.sum(axis=-1, keepdims=True)
