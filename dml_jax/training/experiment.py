"""From a configuration to what it names: images, network, loss, optimizer."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import clu.parameter_overview
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, PyTree
from ml_collections import ConfigDict

from dml_jax import config as configs
from dml_jax import data, losses, memvir, retrieval, sharding
from dml_jax.models import create_embedder, pretrained
from dml_jax.retrieval import embed
from dml_jax.training import checkpoint, optimizer, state, step


class Experiment(NamedTuple):
    """All that a run is made of, besides its state."""

    config: ConfigDict
    sources: Mapping[str, data.Source]
    mesh: jax.sharding.Mesh
    steps_per_epoch: int
    recipe: step.Recipe
    learning_rate: Callable[[int], tuple[float, float]]
    """Of the embedder and of the proxies, at a step."""
    init: Callable[[], state.TrainState]
    """Makes the state before the first step, sharded; reads pretrained weights where there are."""
    state_shape: state.TrainState
    """The shape and type of every array of the state."""
    state_sharding: PyTree
    """The sharding of every array of the state."""
    embed: Callable[[PyTree, Array], Array]
    """Compiled: the network's variables and images `[batch, ...]` to embeddings."""


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """Makes everything that a configuration names, and refuses what cannot work.

    Args:
        config: a whole config.
        mesh: the devices to run on.

    Returns:
        The experiment; nothing is computed yet, and nothing written.

    Raises:
        ValueError: a setting, or an image, is wrong.
        FileNotFoundError: the images are not where the config says.
    """
    configs.validate(config)
    if config.batch_size % mesh.size:
        raise ValueError(
            f"config.batch_size is {config.batch_size}, which the {mesh.size} devices cannot share "
            f"evenly; choose a multiple of {mesh.size}"
        )
    sources = _sources(config)
    train = sources["train"]
    steps_per_epoch = data.steps_per_epoch(
        train.labels, batch_size=config.batch_size, n_instance=config.data.n_instance
    )
    embedder = create_embedder(
        **{name: value for name, value in config.model.items() if name != "pretrained"}
    )
    transformation, learning_rate = optimizer.create(
        **config.optimizer, steps_per_epoch=steps_per_epoch
    )
    recipe = step.Recipe(
        embedder=embedder,
        loss=losses.create(**config.loss),
        optimizer=transformation,
        seed=config.seed,
        steps_per_epoch=steps_per_epoch,
        mixing_alpha=config.proxy_synthesis.alpha,
        mixing_ratio=config.proxy_synthesis.ratio,
        memory_warmup_steps=config.memvir.warmup_epochs * steps_per_epoch,
    )

    def initial_state(backbone: PyTree | None = None) -> state.TrainState:
        return state.create(
            jax.random.key(config.seed),
            embedder=embedder,
            optimizer=transformation,
            image_size=config.data.image_size,
            num_classes=len(train.class_names),
            proxy_init=config.proxy_init,
            memory=_memory(config, num_classes=len(train.class_names)),
            backbone=backbone,
        )

    everywhere = sharding.replicated(mesh)
    state_shape = jax.eval_shape(initial_state)
    state_sharding = jax.tree.map(lambda _: everywhere, state_shape)
    init = jax.jit(initial_state, out_shardings=state_sharding)
    return Experiment(
        config=config,
        sources=sources,
        mesh=mesh,
        steps_per_epoch=steps_per_epoch,
        recipe=recipe,
        learning_rate=learning_rate,
        init=lambda: init(load_weights(config)),
        state_shape=state_shape,
        state_sharding=state_sharding,
        embed=jax.jit(
            lambda variables, images: embedder.apply(variables, images, train=False),
            in_shardings=(everywhere, sharding.by_row(mesh)),
        ),
    )


def _sources(config: ConfigDict) -> dict[str, data.Source]:
    sources = data.create(config.data.name, root=config.data.root or None)
    for source in sources.values():
        data.check(source)
    test, furthest = sources["test"], max(config.evaluation.recall_at)
    if furthest >= len(test) or np.bincount(test.labels).max() < 2:
        raise ValueError(
            f"the {len(test)} test images in {len(test.class_names)} classes are too few to search "
            f"in: config.evaluation.recall_at asks for {furthest} neighbours, and some class needs "
            "two images"
        )
    return sources


def _memory(config: ConfigDict, *, num_classes: int) -> memvir.Memory | None:
    if not config.memvir.num_steps:
        return None
    return memvir.init(
        num_steps=config.memvir.num_steps,
        step_gap=config.memvir.step_gap,
        batch_size=config.batch_size,
        num_classes=num_classes,
        dim=config.model.dim,
        dtype=jnp.dtype(config.memvir.dtype),
    )


def load_weights(config: ConfigDict) -> dict[str, PyTree] | None:
    """The backbone's pretrained variables; None if the config names none.

    Raises:
        ValueError: they are not the backbone's.
        FileNotFoundError: they are not where the config says.
    """
    if config.model.pretrained == pretrained.NONE:
        return None
    return pretrained.load(config.model.backbone, config.model.pretrained)


def abstract_state(experiment: Experiment) -> state.TrainState:
    """The shapes, types and places of the state, for `Checkpoints.restore`."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        experiment.state_shape,
        experiment.state_sharding,
    )


def parameter_overview(experiment: Experiment) -> str:
    """A table of all parameters with their shapes and sizes."""
    return clu.parameter_overview.get_parameter_overview(
        experiment.state_shape.params, include_stats=False
    )


def network(train_state: state.TrainState) -> dict[str, PyTree]:
    """The network's variables in a state, as `Experiment.embed` takes them."""
    return {"params": train_state.params["embedder"], "batch_stats": train_state.batch_stats}


def load_network(experiment: Experiment, folder: Path, name: str) -> dict[str, PyTree]:
    """The network's variables in a run's checkpoint, without the rest of it.

    Args:
        experiment: the run's.
        folder: the run's.
        name: of the checkpoint: `last`, or a key of `checkpoint.BEST`.

    Raises:
        FileNotFoundError: there is no such checkpoint.
    """
    everything = abstract_state(experiment)
    skipped = jax.tree.map(lambda _: checkpoint.SKIPPED, everything)
    wanted = skipped._replace(
        params={**skipped.params, "embedder": everything.params["embedder"]},
        batch_stats=everything.batch_stats,
    )
    with checkpoint.Checkpoints(folder) as checkpoints:
        return network(checkpoints.restore(checkpoints.find(name), wanted))


def embed_images(
    experiment: Experiment, variables: dict[str, PyTree], source: data.Source
) -> Float32[np.ndarray, "images dim"]:
    """Embeds images, cropped as for testing.

    Args:
        experiment: gives the network.
        variables: the network's.
        source: the images.

    Returns:
        Raw embeddings in the order of the source.
    """
    config = experiment.config
    batches = data.test_batches(
        source,
        batch_size=config.batch_size,
        image_size=config.data.image_size,
        resize=config.data.resize,
        num_workers=config.data.num_workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    try:
        return embed.embed(experiment.embed, variables, batches, len(source), experiment.mesh)
    finally:
        batches.close()


def evaluate(
    experiment: Experiment, embeddings: Float32[np.ndarray, "images dim"]
) -> dict[str, float]:
    """Scores embeddings of the test images by retrieval, as the config says.

    Args:
        experiment: whose images.
        embeddings: `[images, dim]`.

    Returns:
        Metrics by name; see `dml_jax.retrieval.evaluate`.
    """
    return retrieval.evaluate(
        embeddings,
        experiment.sources["test"].labels,
        recall_at=tuple(experiment.config.evaluation.recall_at),
        nmi=experiment.config.evaluation.nmi,
    )
