"""The network that a configuration names."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from dml_jax._utils import sharding
from dml_jax.models import Embedder, create_embedder, pretrained


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

    everywhere = sharding.replicated_sharding(mesh)
    image = jax.ShapeDtypeStruct((1, *(config.data.image_size,) * 2, 3), jnp.uint8)
    shapes = jax.eval_shape(partial(embedder.init, train=False), jax.random.key(0), image)
    return Network(
        config=config,
        mesh=mesh,
        embedder=embedder,
        variables_shape=jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes
        ),
        embed=jax.jit(embed_batch, in_shardings=(everywhere, sharding.batch_sharding(mesh))),
    )


def load_pretrained(config: ConfigDict) -> dict[str, PyTree] | None:
    """The backbone's pretrained variables; None if the config names none.

    Raises:
        ValueError: they are not the backbone's.
        FileNotFoundError: they are not where the config says.
    """
    if config.model.pretrained == pretrained.NONE:
        return None
    return pretrained.load(config.model.backbone, config.model.pretrained)
