"""Embedding whole sources of images with a network, over the device mesh."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32, PyTree

from dml_jax import data
from dml_jax._utils import sharding
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
    """Embed all images, in padded batches spread over the mesh axis "data".

    Accelerators have the next batch before the previous result is awaited; see `in_flight`. All
    transfers are explicit. With several processes each passes its own rows of every batch, and
    each gets all the embeddings.

    Args:
        embed_fn: jitted (variables, images [B, H, W, 3] uint8) -> [B, d] float32.
        variables: of the network; copied to every device of the mesh unless there already.
        batches: {"image": [b, h, w, 3] uint8, "index": [b] int32}; index -1 marks padding. The
            rows of all processes together must divide by the number of devices.
        count: number of images n; each index 0..n-1 must come up.
        mesh: device mesh with the axis "data".

    Returns:
        [n, d] float32 embeddings in the order of the indices.

    Raises:
        ValueError: if an index exceeds the count, or an image is missing.
    """
    seen = np.zeros(count, dtype=bool)
    result = np.zeros((count, 0), dtype=np.float32)
    for rows, index in _outputs(embed_fn, variables, batches, mesh):
        if index.max() >= count:
            raise ValueError(f"a batch holds image {index.max()}, but there are {count} images")
        if result.shape[1] == 0:
            result = np.zeros((count, rows.shape[1]), dtype=np.float32)
        real = index >= 0
        result[index[real]] = rows[real]
        seen[index[real]] = True
    if not seen.all():
        raise ValueError(f"the batches hold {seen.sum()} of {count} images")
    return result


def in_flight(mesh: Mesh) -> int:
    """Returns how many batches are sent to the devices of a mesh before a result is awaited.

    On CPUs each would hold its own temporary memory from the time when it is dispatched.
    """
    return 1 if on_cpu(mesh) else 2


def _outputs(
    embed_fn: Callable[[Any, jax.Array], jax.Array],
    variables: Any,
    batches: Iterable[Mapping[str, Any]],
    mesh: Mesh,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the embeddings [B, d] and indices [B] of each global batch, one batch behind."""
    everywhere = replicated_sharding(mesh)
    variables = jax.device_put(variables, everywhere)
    # Not device_put, which would reshard by way of the host, and wait.
    gather = jax.jit(_same, out_shardings=everywhere)
    pending: deque[tuple[jax.Array, jax.Array]] = deque()
    for batch in batches:
        # Indices travel with their images, so that both are gathered in the same order.
        placed = put_batch(mesh, batch)
        pending.append(gather((embed_fn(variables, placed["image"]), placed["index"])))
        if len(pending) == in_flight(mesh):
            yield jax.device_get(pending.popleft())
    while pending:
        yield jax.device_get(pending.popleft())


def _same(tree: Any) -> Any:
    """The identity, compiled once because it is one function."""
    return tree


def embed_images(
    network: Network,
    variables: dict[str, PyTree],
    source: data.Source,
    cache: device_cache.Cache | None = None,
) -> Float32[np.ndarray, "images dim"]:
    """Embeds images, cropped as for testing.

    Args:
        network: the network.
        variables: the network's.
        source: the images.
        cache: the same images on the devices; by default they are read.

    Returns:
        Raw embeddings in the order of the source.
    """
    batches = _test_batches(network, source, cache)
    try:
        return embed(network.embed, variables, batches, len(source), network.mesh)
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
            image_size=config.image_size,
            resize=config.resize,
            num_workers=config.num_workers,
            **process,
        )
    boxes = device_cache.centre_boxes(cache.sides, size=config.image_size, resize_to=config.resize)
    view = partial(device_cache.test_views, mesh=mesh, size=config.image_size)

    def views() -> Generator[dict[str, Array | np.ndarray]]:
        for index in data.test_indices(len(source), batch_size=network.rows, **process):
            placed = sharding.put_batch(mesh, {"index": index, "box": boxes[index]})
            yield {"image": view(cache.images, placed["index"], placed["box"]), "index": index}

    return views()
