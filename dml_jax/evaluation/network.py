"""The network of a run, compiled for embedding; its variables are kept apart."""

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
    """An embedder with the settings of its images."""

    model: ModelConfig
    data: DataConfig
    mesh: jax.sharding.Mesh
    rows: int
    """Images that are embedded at once, over all devices."""
    embedder: Embedder
    variables_shape: dict[str, PyTree]
    """The shape, type and sharding of every variable."""
    embed: jax.stages.Wrapped
    """Compiled: variables and images `[batch, ...]` to embeddings."""


def make(
    model: ModelConfig, data: DataConfig, mesh: jax.sharding.Mesh, *, batch_size: int
) -> Network:
    """Makes the network of a configuration; none of its images is needed.

    Args:
        model: settings of the network.
        data: settings of its images.
        mesh: the devices to run on.
        batch_size: images to embed at once; rounded up to a multiple of the devices.
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

    everywhere = sharding.replicated_sharding(mesh)
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
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes
        ),
        embed=jax.jit(embed_batch, in_shardings=(everywhere, sharding.batch_sharding(mesh))),
    )


def _backbone_options(model: ModelConfig) -> dict[str, Any]:
    """Returns the settings that are options of the backbone; not every backbone has all."""
    known = BACKBONES.options(model.backbone)
    names = ("width", "stem", "freeze_bn", "dtype", "remat")
    return {name: getattr(model, name) for name in names if name in known}
