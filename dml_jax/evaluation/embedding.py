"""Embedding of all images of a source with a network, over the device mesh."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32, PyTree

from dml_jax import data
from dml_jax._utils.sharding import on_cpu, put_batch, replicated_sharding
from dml_jax.data import device_cache
from dml_jax.evaluation.network import Network


def embed(
    embed_fn: Callable[[Any, jax.Array], jax.Array],
    variables: Any,
    batches: Iterable[Mapping[str, Any]],
    count: int,
    mesh: Mesh,
) -> Float32[np.ndarray, "n d"]:
    """Embeds images in padded batches, sharded over the mesh axis "data".

    Accelerators receive the next batch before the previous result is fetched; see `in_flight`. All
    transfers are explicit. With several processes each passes its own rows of every batch and
    receives all embeddings.

    Args:
        embed_fn: jitted function (variables, images [B, H, W, 3] uint8) -> [B, d] float32.
        variables: variables of the network, replicated over the mesh unless they already are.
        batches: {"image": [b, h, w, 3] uint8, "index": [b] int32}; index -1 marks padding. The
            number of rows of all processes together must be a multiple of the number of devices.
        count: number of images n; each index 0..n-1 must occur.
        mesh: device mesh with the axis "data".

    Returns:
        [n, d] float32 embeddings in the order of the indices.

    Raises:
        ValueError: an index is too large, or an image is missing.
    """
    seen = np.zeros(count, dtype=bool)
    result = np.zeros((count, 0), dtype=np.float32)
    for rows, index in outputs(embed_fn, variables, batches, mesh):
        if index.max() >= count:
            raise ValueError(f"a batch holds image {index.max()}, but there are {count} images")
        if result.shape[1] == 0:
            result = np.zeros((count, rows.shape[1]), dtype=np.float32)
        is_image = index >= 0
        result[index[is_image]] = rows[is_image]
        seen[index[is_image]] = True
    if not seen.all():
        raise ValueError(f"{count - seen.sum()} of {count} images are missing from the batches")
    return result


def in_flight(mesh: Mesh) -> int:
    """Returns the number of batches sent to the devices of a mesh before a result is fetched.

    One on CPUs, where each batch holds its own temporary memory from the moment of its dispatch.
    """
    return 1 if on_cpu(mesh) else 2


def outputs(
    embed_fn: Callable[[Any, jax.Array], jax.Array],
    variables: Any,
    batches: Iterable[Mapping[str, Any]],
    mesh: Mesh,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the results and indices [B] of each global batch, in order, on the host.

    Args:
        embed_fn: jitted function of the variables and the images of a batch.
        variables: variables of the network.
        batches: see `embed`.
        mesh: device mesh with the axis "data".
    """
    replicated = replicated_sharding(mesh)
    variables = jax.device_put(variables, replicated)
    # Not device_put, which would block and transfer by way of the host.
    replicate = jax.jit(_identity, out_shardings=replicated)
    pending: deque[tuple[jax.Array, jax.Array]] = deque()
    for batch in batches:
        # The indices are sharded and replicated like their images, so that their orders agree.
        on_device = put_batch(mesh, batch)
        pending.append(replicate((embed_fn(variables, on_device["image"]), on_device["index"])))
        if len(pending) == in_flight(mesh):
            yield jax.device_get(pending.popleft())
    while pending:
        yield jax.device_get(pending.popleft())


def _identity(tree: Any) -> Any:
    """Returns its argument. Defined once, so that it is compiled once."""
    return tree


def embed_images(
    network: Network,
    variables: dict[str, PyTree],
    source: data.Source,
    cache: device_cache.Cache | None = None,
    change: Callable[[Iterable[Any]], Iterable[Any]] = _identity,
) -> Float32[np.ndarray, "images dim"]:
    """Embeds the images of a source, with the test-time crop.

    Args:
        network: the network.
        variables: variables of the network.
        source: the images.
        cache: the same images in device memory; by default they are read from the source.
        change: function of the batches that returns those to embed, with other images.

    Returns:
        Raw embeddings in the order of the source.
    """
    batches = _test_batches(network, source, cache)
    try:
        return embed(network.embed, variables, change(batches), len(source), network.mesh)
    finally:
        batches.close()


def _test_batches(
    network: Network, source: data.Source, cache: device_cache.Cache | None
) -> data.Batches | Generator[dict[str, Array | np.ndarray]]:
    config, mesh = network.data, network.mesh
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    if cache is None:
        return data.test_batches(
            source,
            batch_size=network.rows,
            image_size=config.test_side,
            resize=config.resize,
            num_workers=config.num_workers,
            **process,
        )
    boxes = device_cache.centre_boxes(cache.sides, size=config.test_side, resize_to=config.resize)
    crop = partial(device_cache.test_views, mesh=mesh, size=config.test_side)

    def cached_batches() -> Generator[dict[str, Array | np.ndarray]]:
        for index in data.test_indices(len(source), batch_size=network.rows, **process):
            on_device = put_batch(mesh, {"index": index, "box": boxes[index]})
            image = crop(cache.images, on_device["index"], on_device["box"])
            yield {"image": image, "index": index}

    return cached_batches()
