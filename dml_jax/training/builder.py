"""From a configuration to what it names: images, network, loss, optimizer, and what they give."""

import functools
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import clu.parameter_overview
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from dml_jax import data, losses, memvir
from dml_jax._utils import sharding
from dml_jax._utils.errors import UserError
from dml_jax.data import device_cache
from dml_jax.data.splits import load_splits
from dml_jax.evaluation import network as networks
from dml_jax.evaluation.network import Network
from dml_jax.evaluation.scoring import Evaluator
from dml_jax.models import pretrained
from dml_jax.models.config import ModelConfig
from dml_jax.training import optimizer, state, step
from dml_jax.training.config import Config


class Experiment(NamedTuple):
    """All that a run is made of, besides its state."""

    config: Config
    sources: Mapping[str, data.Source]
    inspection: data.InspectionReport
    """What was found in the images before some were left out."""
    selection_split: str
    """The split that epochs are scored on in training, and that the best one is chosen by."""
    mesh: jax.sharding.Mesh
    steps_per_epoch: int
    step_config: step.StepConfig
    take_step: step.Step
    """The step_config's step, sharded as the state and a batch are."""
    learning_rate: Callable[[int], tuple[float, float]]
    """Of the embedder and of the proxies, at a step."""
    init: Callable[[], state.TrainState]
    """Makes the state before the first step, sharded; reads pretrained weights where there are."""
    state_shape: state.TrainState
    """The shape and type of every array of the state."""
    state_sharding: PyTree
    """The sharding of every array of the state."""
    network: Network
    evaluator: Evaluator
    cache: Callable[[str], device_cache.Cache | None]
    """The images of a split on the devices, put there when first asked for; None if the config
    wants none there."""


def build(
    config: Config, mesh: jax.sharding.Mesh, inspection: data.InspectionReport | None = None
) -> Experiment:
    """Makes everything that a configuration names, and refuses what cannot work.

    Args:
        config: a whole config.
        mesh: the devices to run on.
        inspection: what the run found in its images when it began; by default they are looked at
            now, every one of them.

    Returns:
        The experiment; nothing is computed yet, and nothing written.

    Raises:
        ValueError: a setting, or an image, is wrong.
        FileNotFoundError: the images are not where the config says.
    """
    parts = config.micro_batches
    if config.batch_size // parts % mesh.size:
        in_parts = f" in {parts} parts (config.micro_batches)" if parts > 1 else ""
        raise UserError(
            f"config.batch_size is {config.batch_size}, which the {mesh.size} devices cannot share "
            f"evenly{in_parts}; choose a multiple of {parts * mesh.size}"
        )
    sources, inspection = load_splits(config.data, config.evaluation.recall_at, inspection)
    train = sources["train"]
    steps_per_epoch = data.steps_per_epoch(
        train.labels, batch_size=config.batch_size, n_instance=config.data.n_instance
    )
    _check_lengths(config, steps_per_epoch)
    network = make_network(config, mesh)
    transformation, learning_rate = optimizer.create(
        config.optimizer,
        steps_per_epoch=steps_per_epoch,
        freeze_bn_affine=config.model.freeze_bn_affine,
    )
    loss = config.loss
    num_classes = len(train.class_names)
    step_config = step.StepConfig(
        embedder=network.embedder,
        loss=loss,
        optimizer=transformation,
        seed=config.seed,
        steps_per_epoch=steps_per_epoch,
        mixing_alpha=config.proxy_synthesis.alpha,
        mixing_ratio=config.proxy_synthesis.ratio,
        memory_warmup_steps=config.memvir.warmup_epochs * steps_per_epoch,
        frozen_steps=config.optimizer.frozen_epochs * steps_per_epoch,
        micro_batches=parts,
        images=_images(config, mesh),
    )

    @functools.cache
    def cache(split: str) -> device_cache.Cache | None:
        if config.data.cache != "device":
            return None
        return device_cache.load(sources[split], mesh, config.data.cache_size)

    def initial_state(backbone: PyTree | None = None) -> state.TrainState:
        return state.create(
            jax.random.key(config.seed),
            embedder=network.embedder,
            optimizer=transformation,
            image_size=config.data.image_size,
            proxy_shape=loss.proxy_shape(num_classes, config.model.dim),
            proxy_init=config.proxy_init,
            memory=_memory(config, loss, num_classes, mesh.size),
            backbone=backbone,
        )

    everywhere = sharding.replicated_sharding(mesh)
    state_shape = jax.eval_shape(initial_state)
    state_sharding = jax.tree.map(lambda _: everywhere, state_shape)
    if state_shape.memory is not None:
        state_sharding = state_sharding._replace(memory=memvir.shardings(state_shape.memory, mesh))
    init = jax.jit(initial_state, out_shardings=state_sharding)
    return Experiment(
        config=config,
        sources=sources,
        inspection=inspection,
        selection_split="validation" if "validation" in sources else "test",
        mesh=mesh,
        steps_per_epoch=steps_per_epoch,
        step_config=step_config,
        take_step=step.compile_step(step_config, state_sharding, sharding.batch_sharding(mesh)),
        learning_rate=learning_rate,
        init=lambda: init(load_pretrained(config.model)),
        state_shape=state_shape,
        state_sharding=state_sharding,
        network=network,
        evaluator=Evaluator(
            network=network,
            sources=sources,
            cache=cache,
            recall_at=config.evaluation.recall_at,
            nmi=config.evaluation.nmi,
        ),
        cache=cache,
    )


def make_network(config: Config, mesh: jax.sharding.Mesh) -> Network:
    """Returns the network of a configuration, which embeds a part of a batch at once."""
    parts = config.micro_batches
    return networks.make(config.model, config.data, mesh, batch_size=-(-config.batch_size // parts))


def load_pretrained(model: ModelConfig) -> dict[str, PyTree] | None:
    """Returns the pretrained variables of the backbone; None if the settings name none.

    Raises:
        ValueError: they are not the backbone's.
        FileNotFoundError: they are not where the settings say.
    """
    if model.pretrained == pretrained.NONE:
        return None
    return pretrained.load(model.backbone, model.pretrained)


def _images(
    config: Config, mesh: jax.sharding.Mesh
) -> Callable[[Mapping[str, Array], PRNGKeyArray], Array]:
    """How a step comes by its images."""
    if config.data.cache != "device":
        return step.images_of_batch
    return partial(
        device_cache.train_views,
        mesh=mesh,
        size=config.data.image_size,
        augmentation=config.data.augmentation,
    )


def _check_lengths(config: Config, steps_per_epoch: int) -> None:
    if config.skip_nonfinite >= steps_per_epoch:
        raise UserError(
            f"config.skip_nonfinite is {config.skip_nonfinite}, but an epoch has only "
            f"{steps_per_epoch} steps; it must be fewer, so that each epoch has a loss"
        )
    of_optimizer = config.optimizer
    longest = max(
        config.epochs,
        of_optimizer.frozen_epochs,
        of_optimizer.decay_every,
        *of_optimizer.decay_epochs,
    )
    if longest * steps_per_epoch >= 2**31:
        raise UserError(
            f"{longest} epochs of {steps_per_epoch} steps are too many: steps are counted in 32 "
            "bits; see config.epochs and config.optimizer.frozen_epochs, .decay_epochs and "
            ".decay_every"
        )


def _memory(
    config: Config, loss: losses.ProxyLoss, num_classes: int, shards: int
) -> memvir.Memory | None:
    if not config.memvir.num_steps:
        return None
    return memvir.init(
        num_steps=config.memvir.num_steps,
        step_gap=config.memvir.step_gap,
        batch_size=config.batch_size,
        num_classes=num_classes,
        dim=config.model.dim,
        dtype=jnp.dtype(config.memvir.dtype),
        loss=loss,
        shards=shards,
    )


def abstract_state(experiment: Experiment) -> state.TrainState:
    """The shapes, types and places of the state, for `Checkpoints.restore`."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        experiment.state_shape,
        experiment.state_sharding,
    )


def abstract_batch(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes, types and places of what a step is given; loads the devices' cache of images."""
    rows, size = experiment.config.batch_size, experiment.config.data.image_size
    cache = experiment.cache("train")
    if cache is None:
        shapes = {"image": ((rows, size, size, 3), jnp.uint8), "label": ((rows,), jnp.int32)}
    else:
        shapes = {
            "cache": (cache.images.shape, jnp.uint8),
            "index": ((rows,), jnp.int32),
            "label": ((rows,), jnp.int32),
            "sides": ((rows, 2), jnp.int32),
        }
    place = sharding.batch_sharding(experiment.mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        for name, (shape, dtype) in shapes.items()
    }


def parameter_overview(experiment: Experiment) -> str:
    """A table of all parameters with their shapes and sizes."""
    return clu.parameter_overview.get_parameter_overview(
        experiment.state_shape.params, include_stats=False
    )
