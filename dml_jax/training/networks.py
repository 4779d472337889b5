"""The network that a configuration names: made, read from a checkpoint, and used."""

from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, PyTree
from ml_collections import ConfigDict

from dml_jax import config as configs
from dml_jax import data, device_cache, sharding
from dml_jax.models import Embedder, create_embedder, pretrained
from dml_jax.retrieval import embed
from dml_jax.training import checkpoint, state, workdir


class Network(NamedTuple):
    """What makes embeddings of images; its variables are kept apart."""

    config: ConfigDict
    mesh: jax.sharding.Mesh
    embedder: Embedder
    variables_shape: dict[str, PyTree]
    """The shape, type and place of every variable."""
    embed: jax.stages.Wrapped
    """Compiled: variables and images `[batch, ...]` to embeddings."""


def make(config: ConfigDict, mesh: jax.sharding.Mesh) -> Network:
    """Makes the network that a configuration names; it needs none of the images.

    Args:
        config: a whole config.
        mesh: the devices to run on.
    """
    # The weights come later, and whether scale and bias train is up to the optimizer.
    elsewhere = ("pretrained", "freeze_bn_affine")
    options = {name: value for name, value in config.model.items() if name not in elsewhere}
    # A backbone that cannot compute activations again is not asked whether it should.
    embedder = create_embedder(**options | {"remat": options["remat"] or None})

    def embed_batch(variables: PyTree, images: Array) -> PyTree:
        return embedder.apply(variables, images, train=False)

    everywhere = sharding.replicated(mesh)
    image = jax.ShapeDtypeStruct((1, *(config.data.image_size,) * 2, 3), jnp.uint8)
    shapes = jax.eval_shape(partial(embedder.init, train=False), jax.random.key(0), image)
    return Network(
        config=config,
        mesh=mesh,
        embedder=embedder,
        variables_shape=jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes
        ),
        embed=jax.jit(embed_batch, in_shardings=(everywhere, sharding.by_row(mesh))),
    )


def variables(train_state: state.TrainState) -> dict[str, PyTree]:
    """The network's variables in a state, as `Network.embed` takes them."""
    return {"params": train_state.params["embedder"], "batch_stats": train_state.batch_stats}


def load_pretrained(config: ConfigDict) -> dict[str, PyTree] | None:
    """The backbone's pretrained variables; None if the config names none.

    Raises:
        ValueError: they are not the backbone's.
        FileNotFoundError: they are not where the config says.
    """
    if config.model.pretrained == pretrained.NONE:
        return None
    return pretrained.load(config.model.backbone, config.model.pretrained)


def load(network: Network, folder: Path, name: str) -> dict[str, PyTree]:
    """The network's variables in a run's checkpoint, without the rest of it.

    Args:
        network: the run's.
        folder: the run's.
        name: of the checkpoint: `last`, or a key of `checkpoint.BEST`.

    Raises:
        FileNotFoundError: there is no such checkpoint.
    """
    return _load(network, folder, name)[1]


def _load(network: Network, folder: Path, name: str) -> tuple[int, dict[str, PyTree]]:
    """With the step, which a run that goes on may have another of a moment later."""
    shapes = network.variables_shape
    wanted = {"params": {"embedder": shapes["params"]}, "batch_stats": shapes["batch_stats"]}
    step, found = checkpoint.read(folder, name, wanted)
    return step, {"params": found["params"]["embedder"], "batch_stats": found["batch_stats"]}


def trained(
    folder: Path, name: str, mesh: jax.sharding.Mesh
) -> tuple[Network, dict[str, PyTree], int]:
    """A run's network, of which only the configuration and the checkpoint must still be there.

    Args:
        folder: the run's.
        name: of the checkpoint: `last`, or a key of `checkpoint.BEST`.
        mesh: the devices to run on.

    Returns:
        The network, its variables, and the step of the checkpoint.

    Raises:
        FileNotFoundError: there is no run, or no such checkpoint.
        ValueError: its configuration is damaged.
    """
    config = workdir.read_config(folder)
    configs.validate(config)
    network = make(config, mesh)
    step, variables = _load(network, folder, name)
    return network, variables, step


def embed_images(
    network: Network,
    variables: dict[str, PyTree],
    source: data.Source,
    cache: device_cache.Cache | None = None,
) -> Float32[np.ndarray, "images dim"]:
    """Embeds images, cropped as for testing.

    Args:
        network: the network.
        variables: its.
        source: the images.
        cache: the same images on the devices; by default they are read.

    Returns:
        Raw embeddings in the order of the source.
    """
    batches = _test_batches(network, source, cache)
    try:
        return embed.embed(network.embed, variables, batches, len(source), network.mesh)
    finally:
        batches.close()


def rows_at_once(network: Network) -> int:
    """How many images are embedded at once: a part of a training batch, or the whole of it."""
    config, devices = network.config, network.mesh.size
    # Here may be other devices than those that the run's batches were shared by.
    return -(-config.batch_size // (config.micro_batches * devices)) * devices


def _test_batches(
    network: Network, source: data.Source, cache: device_cache.Cache | None
) -> data.Batches | Generator[dict[str, Array | np.ndarray]]:
    config, mesh = network.config.data, network.mesh
    batch_size = rows_at_once(network)
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    if cache is None:
        return data.test_batches(
            source,
            batch_size=batch_size,
            image_size=config.image_size,
            resize=config.resize,
            num_workers=config.num_workers,
            **process,
        )
    boxes = device_cache.centre_boxes(cache.sides, size=config.image_size, resize_to=config.resize)
    view = partial(device_cache.test_views, mesh=mesh, size=config.image_size)

    def views() -> Generator[dict[str, Array | np.ndarray]]:
        for index in data.test_indices(len(source), batch_size=batch_size, **process):
            placed = sharding.put_batch(mesh, {"index": index, "box": boxes[index]})
            yield {"image": view(cache.images, placed["index"], placed["box"]), "index": index}

    return views()
