"""From a configuration to what it names: images, network, loss, optimizer, and what they give."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import clu.parameter_overview
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, PRNGKeyArray, PyTree
from ml_collections import ConfigDict

from dml_jax import config as configs
from dml_jax import data, device_cache, losses, memvir, retrieval, sharding
from dml_jax.training import networks, optimizer, state, step, workdir


class Experiment(NamedTuple):
    """All that a run is made of, besides its state."""

    config: ConfigDict
    sources: Mapping[str, data.Source]
    findings: data.Findings
    """What was found in the images before some were left out."""
    chosen_on: str
    """The split on which epochs are scored while training, and the best is chosen."""
    mesh: jax.sharding.Mesh
    steps_per_epoch: int
    recipe: step.Recipe
    take_step: step.Step
    """The recipe's step, sharded as the state and a batch are."""
    learning_rate: Callable[[int], tuple[float, float]]
    """Of the embedder and of the proxies, at a step."""
    init: Callable[[], state.TrainState]
    """Makes the state before the first step, sharded; reads pretrained weights where there are."""
    state_shape: state.TrainState
    """The shape and type of every array of the state."""
    state_sharding: PyTree
    """The sharding of every array of the state."""
    network: networks.Network
    cache: Callable[[str], device_cache.Cache | None]
    """The images of a split on the devices, put there when first asked for; None if the config
    wants none there."""


def build(
    config: ConfigDict, mesh: jax.sharding.Mesh, findings: data.Findings | None = None
) -> Experiment:
    """Makes everything that a configuration names, and refuses what cannot work.

    Args:
        config: a whole config.
        mesh: the devices to run on.
        findings: what the run found in its images when it began; by default they are looked at
            now, every one of them.

    Returns:
        The experiment; nothing is computed yet, and nothing written.

    Raises:
        ValueError: a setting, or an image, is wrong.
        FileNotFoundError: the images are not where the config says.
    """
    configs.validate(config)
    parts = config.micro_batches
    if config.batch_size // parts % mesh.size:
        in_parts = f" in {parts} parts (config.micro_batches)" if parts > 1 else ""
        raise ValueError(
            f"config.batch_size is {config.batch_size}, which the {mesh.size} devices cannot share "
            f"evenly{in_parts}; choose a multiple of {parts * mesh.size}"
        )
    sources, findings = make_sources(config, findings)
    train = sources["train"]
    steps_per_epoch = data.steps_per_epoch(
        train.labels, batch_size=config.batch_size, n_instance=config.data.n_instance
    )
    _check_lengths(config, steps_per_epoch)
    network = networks.make(config, mesh)
    transformation, learning_rate = optimizer.create(
        **config.optimizer,
        freeze_bn_affine=config.model.freeze_bn_affine,
        steps_per_epoch=steps_per_epoch,
    )
    loss = losses.create(**config.loss)
    num_classes = len(train.class_names)
    recipe = step.Recipe(
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

    everywhere = sharding.replicated(mesh)
    state_shape = jax.eval_shape(initial_state)
    state_sharding = jax.tree.map(lambda _: everywhere, state_shape)
    if state_shape.memory is not None:
        state_sharding = state_sharding._replace(memory=memvir.shardings(state_shape.memory, mesh))
    init = jax.jit(initial_state, out_shardings=state_sharding)
    return Experiment(
        config=config,
        sources=sources,
        findings=findings,
        chosen_on="validation" if "validation" in sources else "test",
        mesh=mesh,
        steps_per_epoch=steps_per_epoch,
        recipe=recipe,
        take_step=step.compile_step(recipe, state_sharding, sharding.by_row(mesh)),
        learning_rate=learning_rate,
        init=lambda: init(networks.load_pretrained(config)),
        state_shape=state_shape,
        state_sharding=state_sharding,
        network=network,
        cache=cache,
    )


def _images(
    config: ConfigDict, mesh: jax.sharding.Mesh
) -> Callable[[Mapping[str, Array], PRNGKeyArray], Array]:
    """How a step comes by its images."""
    if config.data.cache != "device":
        return step.sent
    augmentation = data.Augmentation(**config.data.augmentation)
    size = config.data.image_size
    return partial(device_cache.train_views, mesh=mesh, size=size, augmentation=augmentation)


def _check_lengths(config: ConfigDict, steps_per_epoch: int) -> None:
    if config.skip_nonfinite >= steps_per_epoch:
        raise ValueError(
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
        raise ValueError(
            f"{longest} epochs of {steps_per_epoch} steps are too many: steps are counted in 32 "
            "bits; see config.epochs and config.optimizer.frozen_epochs, .decay_epochs and "
            ".decay_every"
        )


def make_sources(
    config: ConfigDict, findings: data.Findings | None = None
) -> tuple[dict[str, data.Source], data.Findings]:
    """Finds the images that a configuration names, without those that it leaves out.

    Args:
        config: a whole config.
        findings: what the run found in its images when it began; by default they are looked at
            now, every one of them.

    Returns:
        The images by split, and what was found in them.

    Raises:
        ValueError: an image is bad, or a split has too few.
        FileNotFoundError: the images are not where the config says.
    """
    sources = data.create(config.data.name, root=config.data.root or None)
    found = findings or _inspected(sources)
    sources = data.accept(sources, found, config.data.unreadable)
    if findings is None and sharding.is_first_process():
        data.report(found)
    if config.data.validation_classes:
        # Of all seeds the same classes, so that their runs can be compared.
        sources["train"], sources["validation"] = data.split_classes(
            sources["train"], config.data.validation_classes, seed=0
        )
    if config.data.cache == "host":
        sources = {k: dataclasses.replace(source, kept={}) for k, source in sources.items()}
    for split in sources.keys() - {"train", "gallery"}:
        _check_enough(sources, split, max(config.evaluation.recall_at))
    for split, source in sources.items():
        if len(source.class_names) < 2:
            raise ValueError(
                f"the images of {split!r} are all of one class, {source.class_names[0]}: there is "
                "nothing to tell apart; there must be at least two classes"
            )
    return sources, found


def _inspected(sources: Mapping[str, data.Source]) -> data.Findings:
    """What the first process finds in the images, in every process: all must leave out the same."""
    message = b""
    if sharding.is_first_process():
        message = json.dumps(data.inspect(sources)._asdict()).encode()
    return data.Findings.from_json(json.loads(sharding.bytes_from_first_process(message)))


def _check_enough(sources: Mapping[str, data.Source], split: str, furthest: int) -> None:
    queries = sources[split]
    found_in, alone = _gallery(sources, split), _gallery(sources, split) is None
    searched = queries if found_in is None else found_in
    relevant = np.bincount(searched.labels)[queries.labels] - alone
    if furthest > len(searched) - alone or relevant.max() < 1:
        raise ValueError(
            f"the {len(searched)} images that {split} images are looked for in are too few: "
            f"config.evaluation.recall_at asks for {furthest} neighbours, and some image needs "
            "another of its class"
        )


def _gallery(sources: Mapping[str, data.Source], split: str) -> data.Source | None:
    """Where the images of a split are looked for, if not among themselves."""
    return sources.get("gallery") if split == "test" else None


def _memory(
    config: ConfigDict, loss: losses.ProxyLoss, num_classes: int, shards: int
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
    place = sharding.by_row(experiment.mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        for name, (shape, dtype) in shapes.items()
    }


def parameter_overview(experiment: Experiment) -> str:
    """A table of all parameters with their shapes and sizes."""
    return clu.parameter_overview.get_parameter_overview(
        experiment.state_shape.params, include_stats=False
    )


def load_fork(experiment: Experiment, folder: Path) -> dict[str, PyTree]:
    """The network's variables in the last checkpoint of another run.

    Args:
        experiment: that is to start with them.
        folder: the other run's.

    Raises:
        FileNotFoundError: there is no such run, or no checkpoint in it.
        ValueError: it trains another network.
    """
    there, here = workdir.read_config(folder).model, experiment.config.model
    for name in ("backbone", "width", "stem", "channels", "dim"):
        if there.get(name) != here[name]:
            raise ValueError(
                f"config.model.{name} is {here[name]!r}, but {folder}, from which to fork, has "
                f"{there.get(name)!r}"
            )
    return networks.load(experiment.network, folder, "last")


def embed_split(
    experiment: Experiment, variables: dict[str, PyTree], split: str
) -> dict[str, Float32[np.ndarray, "images dim"]]:
    """Embeds the images of a split, and those that they are looked for in, if they are others.

    Args:
        experiment: gives network and images.
        variables: the network's.
        split: `test` or `validation`.

    Returns:
        Raw embeddings by split: `split` and perhaps `gallery`.
    """
    names = [split] if _gallery(experiment.sources, split) is None else [split, "gallery"]
    return {
        name: networks.embed_images(
            experiment.network, variables, experiment.sources[name], experiment.cache(name)
        )
        for name in names
    }


def score(
    experiment: Experiment, embeddings: Mapping[str, Float32[np.ndarray, "images dim"]]
) -> dict[str, float]:
    """Scores embeddings by retrieval, as the config says.

    Args:
        experiment: whose images.
        embeddings: as `embed_split` gives them.

    Returns:
        Metrics by name; see `dml_jax.retrieval.evaluate`. Of several processes all get what the
        first has computed.
    """
    (split,) = embeddings.keys() - {"gallery"}
    gallery = None
    if "gallery" in embeddings:
        gallery = embeddings["gallery"], experiment.sources["gallery"].labels
    return sharding.from_first_process(
        retrieval.evaluate(
            embeddings[split],
            experiment.sources[split].labels,
            recall_at=tuple(experiment.config.evaluation.recall_at),
            gallery=gallery,
            nmi=experiment.config.evaluation.nmi,
        )
    )
