"""The network of a run, jitted for embedding, without its variables."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from dml_jax._utils import sharding
from dml_jax.data.config import DataConfig
from dml_jax.models import BACKBONES, Embedder, create_embedder
from dml_jax.models.config import ModelConfig


class Network(NamedTuple):
    """An embedder with the settings of the network and of its images."""

    model: ModelConfig
    data: DataConfig
    mesh: jax.sharding.Mesh
    rows: int
    """Number of images in an embedding batch, over all devices."""
    embedder: Embedder
    variables_shape: dict[str, PyTree]
    """Shape, dtype and sharding of every variable."""
    embed: jax.stages.Wrapped
    """Jitted function of the variables and images `[batch, ...]` that returns embeddings."""


def make(
    model: ModelConfig, data: DataConfig, mesh: jax.sharding.Mesh, *, batch_size: int
) -> Network:
    """Returns the network of a configuration, without reading any image.

    Args:
        model: settings of the network.
        data: settings of its images.
        mesh: the devices to run on.
        batch_size: number of images to embed at a time, rounded up to a multiple of the devices.
    """
    embedder = create_embedder(
        backbone=model.backbone,
        pooling=model.pooling,
        dim=model.dim,
        head_init=model.head_init,
        channels=model.channels,
        **_backbone_options(model),
    )

    def embed_batch(variables: PyTree, images: Array) -> PyTree:
        return embedder.apply(variables, images, train=False)

    replicated = sharding.replicated_sharding(mesh)
    image = jax.ShapeDtypeStruct((1, data.image_size, data.image_size, 3), jnp.uint8)
    init = partial(embedder.init, train=False)
    # A network without batch normalisation has no statistics.
    shapes = {"batch_stats": {}, **jax.eval_shape(init, jax.random.key(0), image)}
    return Network(
        model=model,
        data=data,
        mesh=mesh,
        rows=-(-batch_size // mesh.size) * mesh.size,
        embedder=embedder,
        variables_shape=jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), shapes
        ),
        embed=jax.jit(embed_batch, in_shardings=(replicated, sharding.batch_sharding(mesh))),
    )


def _backbone_options(model: ModelConfig) -> dict[str, Any]:
    """Returns the settings that the backbone has as options; not every backbone has all."""
    known = BACKBONES.options(model.backbone)
    names = ("width", "stem", "freeze_bn", "dtype", "remat")
    return {name: getattr(model, name) for name in names if name in known}
