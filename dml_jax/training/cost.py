"""What a run costs, before it is trained: steps, images and operations."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, PyTree

from dml_jax import data
from dml_jax._utils import sharding
from dml_jax.data.config import DataConfig
from dml_jax.data.prepare import DATA_SETS
from dml_jax.data.splits import load_sources
from dml_jax.training import builder, compile_ahead
from dml_jax.training.config import Config
from dml_jax.training.state import merge, split


class Amount(NamedTuple):
    """The work of a run."""

    epochs: int
    steps_per_epoch: int
    trained_images: int
    """Images of all steps."""
    evaluated_images: int
    """Images that all evaluations embed."""


class Operations(NamedTuple):
    """Floating-point operations of a network for an image."""

    training: float
    """Forward and backward pass."""
    evaluation: float


PEAKS = {
    "a100": {"float32": 156e12, "bfloat16": 312e12},
    "h100": {"float32": 495e12, "bfloat16": 989e12},
    "h200": {"float32": 495e12, "bfloat16": 989e12},
    "v5e": {"float32": 197e12, "bfloat16": 197e12},
    "v5p": {"float32": 459e12, "bfloat16": 459e12},
    "v6e": {"float32": 918e12, "bfloat16": 918e12},
}
"""Published operations a second by device and `model.dtype`, without sparsity. By default JAX
convolves float32 in TF32 on these GPUs and in bfloat16 on TPUs."""


def sources(config: DataConfig) -> tuple[Mapping[str, data.Source], bool]:
    """Returns the images by split, and whether they were found.

    Images that are not found are replaced by placeholders, as many as were published.

    Raises:
        FileNotFoundError: the images are not found, and their published number is not known.
        ValueError: see `load_sources`.
    """
    try:
        found, is_found = dict(load_sources(config)), True
    except FileNotFoundError:
        known = DATA_SETS.get(config.name)
        if known is None or not known.counts:
            raise
        counts = known.counts
        found, is_found = {x: compile_ahead.placeholder(*counts[x]) for x in counts}, False
    if config.validation_classes:
        found["train"], found["validation"] = data.split_classes(
            found["train"], config.validation_classes, seed=0, fold=config.validation_fold
        )
    return found, is_found


def amount(config: Config, found: Mapping[str, data.Source]) -> Amount:
    """Returns the work of a run that does not stop early.

    Args:
        config: configuration of the run.
        found: its images by split; see `sources`.

    Raises:
        ValueError: there are too few images or classes for a batch.
    """
    steps = data.steps_per_epoch(
        found["train"].labels, batch_size=config.batch_size, n_instance=config.data.n_instance
    )
    selected = ("validation",) if "validation" in found else ("test", "gallery")
    evaluations = -(-config.epochs // config.evaluation.every_epochs)
    return Amount(
        epochs=config.epochs,
        steps_per_epoch=steps,
        trained_images=config.epochs * steps * config.batch_size,
        evaluated_images=evaluations * sum(len(found[x]) for x in selected if x in found),
    )


def operations(config: Config) -> Operations:
    """Returns the operations of the network as XLA counts them before it optimises.

    Loss and optimizer are not counted. On CARS196 they add less than half a percent to a step of
    BN-Inception, also with MemVir; on Stanford Online Products, SoftTriple with its ten centres of
    each class and MemVir adds 35 percent.

    Args:
        config: configuration of a run.
    """
    mesh = sharding.make_mesh(jax.devices()[:1])
    network = builder.make_network(config, mesh)
    variables = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), network.variables_shape
    )
    images, test_images = (
        jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
        for size in (config.data.image_size, config.data.test_side)
    )

    def embed(variables: PyTree, images: Num[Array, "b h w 3"]) -> Any:
        return network.embedder.apply(variables, images, train=False)

    def gradient(variables: PyTree, images: Num[Array, "b h w 3"]) -> PyTree:
        frozen = network.embedder.apply(variables, images, method="frozen")
        trained, fixed = split({"embedder": variables["params"]}, network.fixed)

        def total(trained: PyTree) -> Float[Array, ""]:
            embeddings, _ = network.embedder.apply(
                {**variables, "params": merge(trained, fixed)["embedder"]},
                frozen,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(0)},
                method="trained",
            )
            return embeddings.sum()

        return jax.grad(total)(trained)

    counted = [
        (jax.jit(f).lower(variables, x).cost_analysis() or {})["flops"]
        for f, x in ((gradient, images), (embed, test_images))
    ]
    return Operations(*counted)
