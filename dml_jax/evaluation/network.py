"""The network of a run, jitted for embedding, without its variables."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from dml_jax._utils import sharding
from dml_jax.data.config import DataConfig
from dml_jax.models import BACKBONES, Embedder, adapters, create_embedder
from dml_jax.models.config import ModelConfig

VariablePath = tuple[str, ...]


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
    frozen: frozenset[VariablePath]
    """Paths of the variables of the frozen part, in `variables_shape`."""
    fixed: frozenset[VariablePath]
    """Paths of the parameters that never change, below `variables_shape["params"]`."""
    features_shape: jax.ShapeDtypeStruct
    """Shape and dtype of the result of the frozen part for one image of training."""
    test_features_shape: jax.ShapeDtypeStruct
    """The same for a test image."""
    embed: jax.stages.Wrapped
    """Jitted function of the variables and images `[batch, ...]` that returns embeddings."""
    freeze: jax.stages.Wrapped
    """Jitted function of the variables and images that returns the results of the frozen part."""
    embed_features: jax.stages.Wrapped
    """Jitted function of the variables and results of the frozen part that returns embeddings."""


def make(
    model: ModelConfig, data: DataConfig, mesh: jax.sharding.Mesh, *, batch_size: int
) -> Network:
    """Returns the network of a configuration, without reading any image.

    Args:
        model: settings of the network.
        data: settings of its images.
        mesh: the devices to run on.
        batch_size: number of images to embed at a time, rounded up to a multiple of the devices.

    Raises:
        ValueError: the network cannot embed images of these sizes.
    """
    embedder = create_embedder(
        backbone=model.backbone,
        pooling=model.pooling,
        dim=model.dim,
        head_init=model.head_init,
        train_from=model.train_from,
        channels=model.channels,
        normalisation=model.normalisation,
        **_backbone_options(model),
    )

    replicated = sharding.replicated_sharding(mesh)

    def jitted(function: Callable[..., PyTree]) -> jax.stages.Wrapped:
        return jax.jit(function, in_shardings=(replicated, sharding.batch_sharding(mesh)))

    def embed_batch(variables: PyTree, images: Array) -> PyTree:
        return embedder.apply(variables, images, train=False)

    def freeze_batch(variables: PyTree, images: Array) -> PyTree:
        return embedder.apply(variables, images, method="frozen")

    def embed_features(variables: PyTree, x: Array) -> PyTree:
        x = x.astype(features.dtype)
        return embedder.apply(variables, x, train=False, method="trained")

    init = partial(embedder.init, train=False)
    frozen_init = partial(embedder.init_with_output, method="frozen")

    def shapes_of(side: int) -> tuple[PyTree, PyTree, PyTree]:
        image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
        key = jax.random.key(0)
        return jax.eval_shape(init, key, image), *jax.eval_shape(frozen_init, key, image)

    shapes, features, frozen = shapes_of(data.image_size)
    # A network without batch normalisation has no statistics.
    shapes = {"batch_stats": {}, **shapes}
    # Also refuses a size that the network cannot embed.
    test_features = shapes_of(data.test_side)[1] if data.test_size else features
    frozen_paths = frozenset(flax.traverse_util.flatten_dict(frozen))
    fixed = {path[1:] for path in frozen_paths if path[0] == "params"}
    if model.lora_rank or model.prompts:
        fixed |= _beside_adapters(shapes)
    return Network(
        model=model,
        data=data,
        mesh=mesh,
        rows=-(-batch_size // mesh.size) * mesh.size,
        embedder=embedder,
        variables_shape=jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), shapes
        ),
        frozen=frozen_paths,
        fixed=frozenset(fixed) | (_affine(shapes) if model.freeze_bn_affine else frozenset()),
        features_shape=_of_one(features),
        test_features_shape=_of_one(test_features),
        embed=jitted(embed_batch),
        freeze=jitted(freeze_batch),
        embed_features=jitted(embed_features),
    )


def _of_one(batch: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(batch.shape[1:], batch.dtype)


def _affine(shapes: dict[str, PyTree]) -> frozenset[VariablePath]:
    """Returns the paths of scale and bias of all batch normalisations."""
    flat = flax.traverse_util.flatten_dict(shapes["params"])
    # Other normalisations have no statistics.
    batch_norms = {path[:-1] for path in flax.traverse_util.flatten_dict(shapes["batch_stats"])}
    return frozenset(path for path in flat if path[:-1] in batch_norms)


def _beside_adapters(shapes: dict[str, PyTree]) -> frozenset[VariablePath]:
    """Returns the paths of the backbone's parameters that are not those of an adapter."""
    flat = flax.traverse_util.flatten_dict(shapes["params"])
    return frozenset(x for x in flat if x[0] == "backbone" and not adapters.is_adapter(x))


def _backbone_options(model: ModelConfig) -> dict[str, Any]:
    """Returns the settings that the backbone has as options; not every backbone has all."""
    known = BACKBONES.options(model.backbone)
    names = ("width", "stem", "freeze_bn", "dtype", "remat", "drop_path", "lora_rank", "prompts")
    return {name: getattr(model, name) for name in names if name in known}
