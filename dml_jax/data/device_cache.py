"""A data set in device memory: decoded once, cropped and resized inside compiled programs.

All cached images are resized to one shape and sharded over the devices along the first axis. A crop
box is drawn in the pixels of the encoded image and cut out of the same region of the cached image,
so the aspect ratio of the crop is right although the cached image is distorted.
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

from dml_jax._utils import sharding
from dml_jax._utils.errors import UserError
from dml_jax.data import images as host_images
from dml_jax.data.images import Augmentation
from dml_jax.data.sources import Source

_MAX_ATTEMPTS = 10  # As in `data.images.random_crop_box`.


class Cache(NamedTuple):
    """The images of a split."""

    images: UInt8[Array, "n height width 3"]
    """Sharded along the first axis, padded with black images to a multiple of the devices."""
    sides: Int32[np.ndarray, "n 2"]
    """Height and width of each encoded image, on the host."""


def load(source: Source, mesh: Mesh, shorter: int) -> Cache:
    """Decodes all images in one thread per core; each process decodes those of its own devices.

    Args:
        source: the images.
        mesh: the devices.
        shorter: length of the shorter side of cached images, pixels; less if all images are
            smaller.

    Raises:
        ValueError: the images do not fit into device memory, or one cannot be decoded.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def sides_of(index: int) -> tuple[int, int]:
            image = source.image(index)
            return image.height, image.width

        sides = np.array([*pool.map(sides_of, range(len(source)))], np.int32)
        height, width = common_shape(sides, shorter)
        rows = -(-len(source) // mesh.size) * mesh.size
        _check_free_memory(rows * height * width * 3, mesh)

        def load_shard(index: tuple[slice, ...] | None) -> np.ndarray:
            start, stop, _ = (index or (slice(None),))[0].indices(rows)
            shard = np.zeros((stop - start, height, width, 3), np.uint8)

            def fill(row: int) -> None:
                image = source.image(row)
                scales = (x for x in image.scales if image.height >= x * height)
                scale = max((x for x in scales if image.width >= x * width), default=1)
                # Each axis on its own, because one may shrink while the other grows.
                resized = host_images.resize(image.pixels(scale), height, -(-image.width // scale))
                host_images.resize(resized, height, width, shard[row - start])

            list(pool.map(fill, range(start, min(stop, len(source)))))
            return shard

        shape = (rows, height, width, 3)
        # With several processes JAX considers this an implicit transfer.
        with jax.transfer_guard_host_to_device("allow"):
            cached = jax.make_array_from_callback(shape, sharding.batch_sharding(mesh), load_shard)
    return Cache(cached, sides)


def common_shape(sides: Int[np.ndarray, "n 2"], shorter: int) -> tuple[int, int]:
    """Returns the height and width of cached images; their aspect ratio is the median of all.

    Args:
        sides: heights and widths of the encoded images, pixels.
        shorter: length of the shorter side, pixels. It is reduced to the largest shorter side of
            all images, so that small images of equal shape are not resized.
    """
    shorter = min(shorter, int(sides.min(axis=1).max()))
    ratio = float(np.median(sides[:, 1] / sides[:, 0]))
    if ratio >= 1:
        return shorter, round(shorter * ratio)
    return round(shorter / ratio), shorter


def _check_free_memory(size: int, mesh: Mesh) -> None:
    stats = mesh.local_devices[0].memory_stats() or {}
    free = stats.get("bytes_limit", np.inf) - stats.get("bytes_in_use", 0)
    if size / mesh.size > free:
        raise UserError(
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
    augmentation: Augmentation,
) -> UInt8[Array, "batch {size} {size} 3"]:
    """Returns random views of cached images, as `data.images.random_view` does.

    Args:
        batch: the arrays `cache` `[n, height, width, 3]`, and `index` `[batch]` and `sides`
            `[batch, 2]` of the images, all sharded along the first axis.
        key: random key of the batch.
        mesh: the devices.
        size: side of a view, pixels.
        augmentation: ranges of the random changes.
    """
    pixels, sides = gather(batch["cache"], batch["index"], mesh=mesh), batch["sides"]
    affine_key, box_key, flip_key = jax.random.split(key, 3)
    if augmentation.rotation or augmentation.zoom or augmentation.shift:
        pixels = _random_affine(affine_key, pixels, sides, augmentation)
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
    """Returns the crops of cached images; they are black where the index is -1.

    Args:
        cache: the images, sharded along the first axis.
        index: indices of the images.
        boxes: crop boxes; see `crop`.
        mesh: the devices.
        size: side of a view, pixels.
    """
    views = crop(gather(cache, index, mesh=mesh), boxes, size=size)
    return jax.lax.with_sharding_constraint(views, sharding.batch_sharding(mesh))


def centre_boxes(
    sides: Int[np.ndarray, "n 2"], *, size: int, resize_to: int
) -> Float[np.ndarray, "n 4"]:
    """Returns the boxes that `data.centre_view` crops, as fractions of the image; see `crop`.

    Args:
        sides: heights and widths of the images, pixels.
        size: side of the crop, pixels.
        resize_to: length of the shorter side before the crop, at least `size`.
    """
    resized = sides.astype(np.int64) * resize_to // sides.min(axis=1, keepdims=True)
    corners = np.round((resized - size) / 2)
    return np.hstack([corners / resized, size / resized]).astype(np.float32)


def gather(
    cache: UInt8[Array, "n h w 3"], index: Int32[Array, " batch"], *, mesh: Mesh
) -> UInt8[Array, "batch h w 3"]:
    """Returns images by index, sharded along the batch axis; black where the index is -1."""
    exchanges = mesh.size > 1 and not sharding.on_cpu(mesh)  # Not implemented for CPUs.
    spec = PartitionSpec("data")
    return jax.shard_map(
        _exchange_rows if exchanges else _add_rows,
        mesh=mesh,
        in_specs=(spec, spec),
        out_specs=spec,
        check_vma=not exchanges,
    )(cache, index)


def _exchange_rows(shard: Array, index: Array) -> Array:
    """Returns the images of this device's rows of the batch, which their devices send to it."""
    plan = exchange(
        jax.lax.all_gather(index, "data"), jax.lax.axis_index("data"), shard_size=len(shard)
    )
    black = jnp.zeros((len(index), *shard.shape[1:]), shard.dtype)
    return jax.lax.ragged_all_to_all(shard, black, *plan, axis_name="data")


def _add_rows(shard: Array, index: Array) -> Array:
    """Returns the same as a sum over devices, of which at most one has a row."""
    global_index = jax.lax.all_gather(index, "data", tiled=True)
    local = global_index - jax.lax.axis_index("data") * len(shard)
    is_local = (local >= 0) & (local < len(shard)) & (global_index >= 0)
    rows = jnp.where(
        is_local[:, None, None, None], shard[local.clip(0, len(shard) - 1)], jnp.uint8(0)
    )
    return jax.lax.psum_scatter(rows, "data", tiled=True)


class Exchange(NamedTuple):
    """The arguments of `jax.lax.ragged_all_to_all` on one device, a row for each row of a batch."""

    input_offsets: Int[Array, " batch"]
    send_sizes: Int[Array, " batch"]
    output_offsets: Int[Array, " batch"]
    recv_sizes: Int[Array, " batch"]


def exchange(
    index: Int[Array, "devices rows"], device: Int[Array, ""], *, shard_size: int
) -> Exchange:
    """Returns what a device sends and receives so that each device has the rows of its index.

    Args:
        index: for each device, the global indices of the rows that it gets; -1 for none.
        device: number of this device.
        shard_size: number of rows that each device has.
    """
    devices, rows = index.shape
    owner = index // shard_size  # -1 for none.
    sends = owner == device
    from_device = jnp.arange(devices)[:, None]
    return Exchange(
        input_offsets=jnp.where(sends, index % shard_size, 0).reshape(-1),
        send_sizes=sends.astype(jnp.int32).reshape(-1),
        output_offsets=jnp.tile(jnp.arange(rows), devices),
        recv_sizes=(owner[device][None] == from_device).astype(jnp.int32).reshape(-1),
    )


def random_boxes(
    key: PRNGKeyArray, sides: Int[Array, "batch 2"], *, scale: Sequence[float]
) -> Float[Array, "batch 4"]:
    """Draws crops as `data.images.random_crop_box` does.

    Args:
        key: a random key.
        sides: heights and widths of the images, pixels.
        scale: minimum and maximum area of a crop as a fraction of the image's area.

    Returns:
        Top, left, height and width of each crop, integers in pixels.
    """
    (low, high), (smallest, largest) = host_images.CROP_RATIO, scale
    area_key, ratio_key, corner_key = jax.random.split(key, 3)
    sides = sides.astype(jnp.float32)
    shape = (len(sides), _MAX_ATTEMPTS if smallest < 1 else 0)
    area = sides.prod(axis=1)[:, None] * jax.random.uniform(
        area_key, shape, minval=smallest, maxval=largest
    )
    ratio = jnp.exp(jax.random.uniform(ratio_key, shape, minval=jnp.log(low), maxval=jnp.log(high)))
    drawn = jnp.round(jnp.sqrt(jnp.stack([area / ratio, area * ratio], axis=-1)))
    fits = ((drawn > 0) & (drawn <= sides[:, None])).all(axis=-1)
    # The last candidate is the largest central crop, which always fits.
    limits = sides[:, ::-1] * jnp.array([[1 / low, high]])
    central = jnp.minimum(sides, jnp.maximum(1, jnp.round(limits)))
    first = jnp.argmax(jnp.pad(fits, ((0, 0), (0, 1)), constant_values=True), axis=1)
    candidates = jnp.concatenate([drawn, central[:, None]], axis=1)
    crops = jnp.take_along_axis(candidates, first[:, None, None], axis=1)[:, 0]
    margin = sides - crops
    random = jnp.floor(jax.random.uniform(corner_key, sides.shape) * (margin + 1))
    is_central = first == shape[1]
    corners = jnp.where(is_central[:, None], jnp.floor(margin / 2), jnp.minimum(random, margin))
    return jnp.concatenate([corners, crops], axis=1)


def _random_affine(
    key: PRNGKeyArray,
    images: UInt8[Array, "batch h w 3"],
    sides: Int[Array, "batch 2"],
    augmentation: Augmentation,
) -> Float[Array, "batch h w 3"]:
    """Returns images rotated and zoomed about their centres and shifted, with replicated borders.

    Args:
        key: a random key.
        images: the cached images.
        sides: heights and widths of the encoded images, pixels.
        augmentation: ranges of the random changes.
    """
    height, width = images.shape[1:3]
    drawn = jax.random.uniform(key, (4, len(images)), minval=-1.0, maxval=1.0)
    angles, zooms = jnp.radians(augmentation.rotation) * drawn[0], 1 + augmentation.zoom * drawn[1]

    def transform(image: Array, sides: Array, angle: Array, zoom: Array, shift: Array) -> Array:
        # Maps the pixels of the result back to those of the image, relative to the centre and in
        # pixels of the encoded image, because a rotation of the cached image would distort it.
        down = ((jnp.arange(height) + 0.5) / height - 0.5 - shift[0]) * sides[0]
        right = ((jnp.arange(width) + 0.5) / width - 0.5 - shift[1]) * sides[1]
        down, right = jnp.meshgrid(down, right, indexing="ij")
        cos, sin = jnp.cos(angle) / zoom, jnp.sin(angle) / zoom
        row = ((sin * right + cos * down) / sides[0] + 0.5) * height - 0.5
        column = ((cos * right - sin * down) / sides[1] + 0.5) * width - 0.5
        interpolate = partial(
            jax.scipy.ndimage.map_coordinates, coordinates=[row, column], order=1, mode="nearest"
        )
        return jax.vmap(interpolate, in_axes=2, out_axes=2)(image.astype(jnp.float32))

    shifts = augmentation.shift * drawn[:1:-1].T  # Down and right.
    return jax.vmap(transform)(images, sides.astype(jnp.float32), angles, zooms, shifts)


def crop(
    images: UInt8[Array, "batch h w 3"] | Float[Array, "batch h w 3"],
    boxes: Float[Array, "batch 4"],
    *,
    size: int,
) -> UInt8[Array, "batch {size} {size} 3"]:
    """Crops a box of each image and resizes it, as `data.images.resize` does.

    Args:
        images: images of one shape.
        boxes: top, left, height and width, as fractions of the sides of the image.
        size: side of the result, pixels.
    """
    rows = _resize_weights(images.shape[1], boxes[:, 0], boxes[:, 2], size)
    columns = _resize_weights(images.shape[2], boxes[:, 1], boxes[:, 3], size)
    resized_rows = jnp.einsum("bph,bhwc->bpwc", rows, images.astype(jnp.float32))
    views = jnp.einsum("bqw,bpwc->bpqc", columns, resized_rows)
    return jnp.round(views).clip(0, 255).astype(jnp.uint8)


def _resize_weights(
    length: int, start: Float[Array, " batch"], extent: Float[Array, " batch"], size: int
) -> Float[Array, "batch {size} {length}"]:
    """Returns the weight of each input pixel along one axis in each output pixel.

    Args:
        length: length of the axis, pixels.
        start: start of the box, as a fraction of the length.
        extent: extent of the box, as a fraction of the length.
        size: number of output pixels.
    """
    first, step = (start * length)[:, None, None], (extent * length / size)[:, None, None]
    begin = first + step * jnp.arange(size)[None, :, None]
    pixel = jnp.arange(length)[None, None, :]
    covered = jnp.minimum(pixel + 1, begin + step) - jnp.maximum(pixel, begin)
    # An enlarged box is interpolated between the two nearest pixel centres inside it.
    centre = (begin + (step - 1) / 2).clip(first, first + step * size - 1)
    weights = jnp.where(step >= 1, covered, 1 - jnp.abs(pixel - centre)).clip(0)
    return weights / weights.sum(axis=-1, keepdims=True)
