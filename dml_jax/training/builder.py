"""The builder: from a configuration to data sources, network, loss, optimizer and step."""

import functools
import os
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import logging
from jaxtyping import Array, PRNGKeyArray, PyTree

from dml_jax import data, losses, memvir, xbm
from dml_jax._utils import sharding, storage
from dml_jax._utils.errors import UserError
from dml_jax.data import colour, device_cache
from dml_jax.data.images import IN_STEP
from dml_jax.data.splits import load_splits
from dml_jax.evaluation import features
from dml_jax.evaluation import network as networks
from dml_jax.evaluation.features import Features
from dml_jax.evaluation.network import Network
from dml_jax.evaluation.scoring import Evaluator
from dml_jax.models import pretrained
from dml_jax.models.embedder import HEAD, parts_above
from dml_jax.training import optimizer, state, step
from dml_jax.training.config import Config

_COLOURS = 2**32 - 1  # Folded into the key of a step's views for their colours and erasing.


class Experiment(NamedTuple):
    """The parts of a run, except its state."""

    config: Config
    sources: Mapping[str, data.Source]
    inspection: data.InspectionReport
    """The inspection report of all images, including those that were left out."""
    selection_split: str
    """The split that is evaluated in training and selects the best epoch."""
    mesh: jax.sharding.Mesh
    steps_per_epoch: int
    step_config: step.StepConfig
    take_step: step.Step
    """The compiled training step."""
    learning_rate: Callable[[int], tuple[float, float]]
    """Returns the learning rates of embedder and proxies at a step."""
    init: Callable[[], state.TrainState]
    """Returns the sharded state before the first step; reads pretrained weights, if any."""
    abstract_state: state.TrainState
    """Shape, dtype and sharding of every array of the state."""
    network: Network
    evaluator: Evaluator
    cache: Callable[[str], device_cache.Cache | None]
    """Returns the images of a split on the devices, loaded by the first call; None if the config
    does not cache images there."""
    features: Mapping[str, Features] = MappingProxyType({})
    """Cached features by split, if the config caches them; see `with_features`."""


def build(
    config: Config,
    mesh: jax.sharding.Mesh,
    inspection: data.InspectionReport | None = None,
    sources: Mapping[str, data.Source] | None = None,
) -> Experiment:
    """Builds the experiment of a configuration, without computing or writing anything.

    Args:
        config: the configuration.
        mesh: the devices to run on.
        inspection: inspection report of the images; by default every image is inspected.
        sources: images by split, which are not inspected; by default those that the config names.

    Raises:
        ValueError: a setting or an image is invalid.
        FileNotFoundError: the images are not at the configured path.
    """
    _check_devices(config, mesh)
    if sources is None:
        sources, inspection = load_splits(config.data, config.evaluation.recall_at, inspection)
    elif inspection is None:
        inspection = data.InspectionReport({}, {})
    train = sources["train"]
    steps_per_epoch = data.steps_per_epoch(
        train.labels, batch_size=config.batch_size, n_instance=config.data.n_instance
    )
    _check_lengths(config, steps_per_epoch)
    _warn_about_memvir(config, steps_per_epoch)
    _warn_about_pairs(config)
    network = make_network(config, mesh)
    by_layer = config.optimizer.layer_decay != 1.0
    above = parts_above(network.embedder, config.data.image_size) if by_layer else {}
    transformation, learning_rate = optimizer.create(
        config.optimizer, steps_per_epoch=steps_per_epoch, parts_above=above
    )
    step_config = _step_config(
        config, network, transformation, steps_per_epoch, len(train.class_names)
    )

    @functools.cache
    def cache(split: str) -> device_cache.Cache | None:
        if config.data.cache != "device":
            return None
        return device_cache.load(sources[split], mesh, config.data.cache_size)

    initial_state = partial(_initial_state, config, step_config)
    abstract_state = _with_shardings(jax.eval_shape(initial_state), mesh)
    init = jax.jit(initial_state, out_shardings=sharding.shardings_of(abstract_state))
    return Experiment(
        config=config,
        sources=sources,
        inspection=inspection,
        selection_split="validation" if "validation" in sources else "test",
        mesh=mesh,
        steps_per_epoch=steps_per_epoch,
        step_config=step_config,
        take_step=step.compile_step(step_config, abstract_state, mesh),
        learning_rate=learning_rate,
        init=lambda: init(_pretrained(config, network)),
        abstract_state=abstract_state,
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


def _pretrained(config: Config, network: Network) -> PyTree | None:
    """Returns the pretrained variables of the backbone; None for random ones."""
    model, backbone = network.model, network.embedder.backbone
    size, resize = config.data.test_side, config.data.resize
    difference = pretrained.other_images(model.pretrained, size, resize)
    if difference is not None:
        logging.warning("%s", difference)
    return pretrained.load(model.backbone, model.pretrained, backbone.input_normalisation)


def _check_devices(config: Config, mesh: jax.sharding.Mesh) -> None:
    parts = config.micro_batches
    if config.batch_size // parts % mesh.size:
        in_parts = f" in {parts} micro-batches (config.micro_batches)" if parts > 1 else ""
        raise UserError(
            f"config.batch_size is {config.batch_size}, which {mesh.size} devices cannot share "
            f"evenly{in_parts}; choose a multiple of {parts * mesh.size}"
        )


def _step_config(
    config: Config,
    network: Network,
    transformation: optax.GradientTransformationExtraArgs,
    steps_per_epoch: int,
    num_classes: int,
) -> step.StepConfig:
    return step.StepConfig(
        embedder=network.embedder,
        loss=config.loss,
        optimizer=transformation,
        seed=config.seed,
        steps_per_epoch=steps_per_epoch,
        mixing=config.proxy_synthesis,
        remembering=config.memvir,
        memory_warmup_steps=_warmup_epochs(config) * steps_per_epoch,
        num_classes=num_classes,
        shards=network.mesh.size,
        frozen_steps=config.optimizer.frozen_epochs * steps_per_epoch,
        micro_batches=config.micro_batches,
        mixup=config.mixup,
        memory_weight=config.xbm.weight,
        average_decay=config.optimizer.average_decay,
        fixed=network.fixed,
        images=_images(config, network),
        cached_features=config.data.cache == "features",
    )


def _initial_state(
    config: Config,
    step_config: step.StepConfig,
    backbone: PyTree | None = None,
) -> state.TrainState:
    """Returns the state before the first step, with pretrained variables if they are given."""
    classes = step_config.num_classes
    padded = sharding.padded(classes, step_config.shards)
    shape = config.loss.proxy_shape(classes, config.model.dim)
    return state.create(
        jax.random.key(config.seed),
        embedder=step_config.embedder,
        optimizer=step_config.optimizer,
        image_size=config.data.image_size,
        proxy_shape=shape,
        proxy_init=config.proxy_init,
        padding=0 if shape is None else shape[0] // classes * (padded - classes),
        memory=_memory(config, padded),
        averaged=bool(step_config.average_decay),
        fixed=step_config.fixed,
        backbone=backbone,
    )


def make_network(config: Config, mesh: jax.sharding.Mesh) -> Network:
    """Returns the network of a configuration, which embeds one micro-batch at a time."""
    parts = config.micro_batches
    return networks.make(config.model, config.data, mesh, batch_size=-(-config.batch_size // parts))


def _images(
    config: Config, network: Network
) -> Callable[[Mapping[str, Array], PRNGKeyArray], Array]:
    """Returns the function that makes the images of a step, or their features, from its batch."""
    if config.data.cache == "features":
        return partial(step.features_of_batch, dtype=network.features_shape.dtype)
    augmentation, views = config.data.augmentation, step.images_of_batch
    if config.data.cache == "device":
        views = partial(
            device_cache.train_views,
            mesh=network.mesh,
            size=config.data.image_size,
            augmentation=augmentation,
        )
    if not any(getattr(augmentation, name) for name in IN_STEP):
        return views

    def changed(batch: Mapping[str, Array], key: PRNGKeyArray) -> Array:
        of_colours = jax.random.fold_in(key, _COLOURS)
        return colour.changed(views(batch, key), of_colours, augmentation=augmentation)

    return changed


def _check_lengths(config: Config, steps_per_epoch: int) -> None:
    if config.skip_nonfinite >= steps_per_epoch:
        raise UserError(
            f"config.skip_nonfinite is {config.skip_nonfinite}, but an epoch has only "
            f"{steps_per_epoch} steps; choose fewer, so that each epoch has a loss"
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
            f"{longest} epochs of {steps_per_epoch} steps exceed the 32-bit step counter; reduce "
            "config.epochs or config.optimizer.frozen_epochs, .decay_epochs or .decay_every"
        )


def _warn_about_memvir(config: Config, steps_per_epoch: int) -> None:
    """Warns of settings with which MemVir cannot have its effect; see docs/study.md."""
    memory = config.memvir
    if not memory.num_steps:
        return
    if config.model.train_from == HEAD:
        logging.warning(
            "config.memvir is used with config.model.train_from='head': MemVir hardly "
            "ever improved retrieval with frozen features (docs/study.md)"
        )
    filled = memory.num_steps * (memory.step_gap + 1)
    used = (config.epochs - memory.warmup_epochs) * steps_per_epoch
    if filled >= used:
        logging.warning(
            "config.memvir.num_steps=%d and .step_gap=%d fill the memory in %d steps, but the run "
            "has %d after the warm-up, so %s virtual classes never join; choose smaller ones",
            memory.num_steps,
            memory.step_gap,
            filled,
            used,
            "some" if memory.growth == "gradual" else "the",
        )


def _warmup_epochs(config: Config) -> int:
    """Returns the epochs before the memory of MemVir or XBM is used."""
    return config.xbm.warmup_epochs if config.xbm.num_steps else config.memvir.warmup_epochs


def _memory(config: Config, num_classes: int) -> state.Memory | None:
    if isinstance(config.loss, losses.ProxyLoss) and config.memvir.num_steps:
        return memvir.init(
            num_steps=config.memvir.num_steps,
            step_gap=config.memvir.step_gap,
            batch_size=config.batch_size,
            num_classes=num_classes,
            dim=config.model.dim,
            dtype=jnp.dtype(config.memvir.dtype),
            loss=config.loss,
            virtual=config.memvir.virtual,
        )
    if not config.xbm.num_steps:
        return None
    return xbm.init(
        num_steps=config.xbm.num_steps, batch_size=config.batch_size, dim=config.model.dim
    )


def _warn_about_pairs(config: Config) -> None:
    if isinstance(config.loss, losses.PairLoss) and config.data.n_instance == 1:
        logging.warning(
            "the loss is one of pairs, but config.data.n_instance is 1, so that a batch has pairs "
            "of one class only by chance; choose 2 or more"
        )


def _with_shardings(shapes: state.TrainState, mesh: jax.sharding.Mesh) -> state.TrainState:
    """Returns the shapes of the state with the shardings of a run on a mesh."""
    by_row, replicated = sharding.batch_sharding(mesh), sharding.replicated_sharding(mesh)
    proxies = jax.tree_util.DictKey("proxies")
    shardings = jax.tree.map_with_path(
        lambda path, _: by_row if proxies in path else replicated, shapes
    )
    if shapes.memory is not None:
        # Rows and classes, the first axes of a memory, are split over devices.
        of_memory = jax.tree.map(lambda x: by_row if x.ndim else replicated, shapes.memory)
        shardings = shardings._replace(memory=of_memory)
    return jax.tree.map(
        lambda x, of_array: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=of_array),
        shapes,
        shardings,
    )


def with_features(
    experiment: Experiment,
    variables: dict[str, PyTree],
    workdir: str | os.PathLike[str],
    interrupt: Callable[[], None],
) -> Experiment:
    """Returns the experiment with cached features, if the config caches them.

    Args:
        experiment: the experiment.
        variables: variables of its network.
        workdir: directory or URL of the run, beside which they are cached by default.
        interrupt: see `features.load`.

    Raises:
        ValueError: see `features.load`.
    """
    config = experiment.config.data
    if config.cache != "features":
        return experiment
    beside = storage.join(os.path.dirname(storage.absolute(workdir)), "features")
    folder = config.features or beside
    loaded = features.load(experiment.network, variables, experiment.sources, folder, interrupt)
    evaluator = experiment.evaluator._replace(features=loaded)
    return experiment._replace(features=loaded, evaluator=evaluator)


def abstract_batch(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes, dtypes and shardings of a batch; loads the device cache, if there is one."""
    rows, size = experiment.config.batch_size, experiment.config.data.image_size
    cache = experiment.cache("train")
    if experiment.config.data.cache == "features":
        shape = (rows, *experiment.network.features_shape.shape)
        shapes = {"features": (shape, features.DTYPE), "label": ((rows,), jnp.int32)}
    elif cache is None:
        shapes = {"image": ((rows, size, size, 3), jnp.uint8), "label": ((rows,), jnp.int32)}
    else:
        shapes = {
            "cache": (cache.images.shape, jnp.uint8),
            "index": ((rows,), jnp.int32),
            "label": ((rows,), jnp.int32),
            "sides": ((rows, 2), jnp.int32),
        }
    row_sharding = sharding.batch_sharding(experiment.mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=row_sharding)
        for name, (shape, dtype) in shapes.items()
    }
