"""The training step: embeddings, mixtures, memory, loss, gradients and update."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Num, PRNGKeyArray, PyTree

from dml_jax import losses, memvir, mixup, proxy_synthesis, xbm
from dml_jax._utils import sharding
from dml_jax.mixup import Mixture, MixupConfig
from dml_jax.models import Embedder
from dml_jax.training.state import (
    EpochMetrics,
    Memory,
    Skipped,
    TrainState,
    merge,
    split,
    updated_average,
)

# Folded into the key of a step, for the views of its images, stochastic depth and mixup.
_VIEWS, _DEPTH, _MIXUP = 2**32 - 1, 2**32 - 2, 2**32 - 3


def images_of_batch(batch: Mapping[str, Array], key: PRNGKeyArray) -> Array:
    """Returns the images of a batch, which the input pipeline has already augmented."""
    del key
    return batch["image"]


def features_of_batch(batch: Mapping[str, Array], key: PRNGKeyArray, *, dtype: DTypeLike) -> Array:
    """Returns the cached results of the frozen part of the network for the images of a batch."""
    del key
    return batch["features"].astype(dtype)


class StepConfig(NamedTuple):
    """The constants of a training step: modules, hyper-parameters and lengths."""

    embedder: Embedder
    loss: losses.Loss
    optimizer: optax.GradientTransformationExtraArgs
    seed: int
    steps_per_epoch: int
    mixing: proxy_synthesis.ProxySynthesisConfig
    """Proxy Synthesis."""
    remembering: memvir.MemVirConfig
    """MemVir; without effect if the state has no memory of it."""
    memory_warmup_steps: int
    """Steps before the memory is used; without effect if the state has no memory."""
    num_classes: int
    """Number of training classes. Further proxies are padding; see `state.create`."""
    shards: int
    """Number of devices that the classes are split over."""
    frozen_steps: int
    """First steps, in which the backbone and its batch statistics do not change."""
    micro_batches: int
    """Number of equal parts in which a batch is embedded, one after another; see `embed`."""
    mixup: MixupConfig = MixupConfig()
    """Mixup of images or features."""
    memory_weight: float = 1.0
    """XBM: weight of the loss of pairs with the memory."""
    average_decay: float = 0.0
    """Decay of the moving average of the network's variables; without effect if there is none."""
    fixed: frozenset[tuple[str, ...]] = frozenset()
    """Paths of the embedder's parameters that never change; see `state.split`."""
    images: Callable[[Mapping[str, Array], PRNGKeyArray], Array] = images_of_batch
    """Function of a batch and a key that returns the images, `[batch, height, width, 3]`."""
    cached_features: bool = False
    """Whether `images` returns the results of the frozen part of the network instead."""


def embed(
    config: StepConfig,
    params: PyTree,
    batch_stats: PyTree,
    images: Num[Array, "batch *image"],
    key: PRNGKeyArray,
    mixture: Mixture | None = None,
) -> tuple[Float[Array, "batch dim"], PyTree]:
    """Embeds a batch in training mode, one micro-batch after another.

    Activations take the memory of one micro-batch; the backward pass rematerialises them. Batch
    normalisation that is not frozen normalises each micro-batch by its own statistics, and updates
    the running statistics once per micro-batch.

    Args:
        config: embedder and number of micro-batches.
        params: parameters of the embedder.
        batch_stats: batch statistics before the batch.
        images: images, or cached features; sharded by row. Each micro-batch takes equally many
            rows from every device.
        key: random key of the batch, for stochastic depth.
        mixture: how the images or their features are mixed, within each micro-batch; None for none.

    Returns:
        The embeddings, and the batch statistics after the batch.
    """

    def frozen(images: Array) -> Any:
        if config.cached_features:
            return images
        variables = {"params": params, "batch_stats": batch_stats}
        return config.embedder.apply(variables, images, method="frozen")

    def trained(
        params: PyTree, batch_stats: PyTree, x: Array, key: PRNGKeyArray
    ) -> tuple[Array, PyTree]:
        embeddings, updates = config.embedder.apply(
            {"params": params, "batch_stats": batch_stats},
            x,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
            mix=None if mixture is None else mixture.at,
            method="trained",
        )
        return embeddings, updates.get("batch_stats", {})

    count = config.micro_batches
    if count == 1:
        return trained(params, batch_stats, frozen(images), key)
    # A micro-batch is every count-th row: the same rows on any number of devices, without transfer.
    parts = images.reshape(-1, count, *images.shape[1:])
    # Unrolled: in an XLA loop, gradients of convolutions are many times slower on the CPU.
    embeddings = []
    for part in range(count):
        # The frozen part is not differentiated, so nothing of it is rematerialised.
        x = frozen(parts[:, part])
        of_part = jax.random.fold_in(key, part)
        made, batch_stats = jax.checkpoint(trained)(params, batch_stats, x, of_part)
        # Keeps micro-batches in sequence, in the backward pass too.
        params, batch_stats, made = jax.lax.optimization_barrier((params, batch_stats, made))
        embeddings.append(made)
    return jnp.stack(embeddings, axis=1).reshape(len(images), -1), batch_stats


def objective(
    config: StepConfig,
    params: PyTree,
    state: TrainState,
    batch: Mapping[str, Array],
    key: PRNGKeyArray,
) -> tuple[Float[Array, ""], tuple[PyTree, Memory | None]]:
    """Returns the loss of a batch with its regularisers.

    Args:
        config: the constants of the step.
        params: parameters of the embedder, and proxies if the loss has them.
        state: provides batch statistics, memory and step.
        batch: `image` `[batch, height, width, 3]`, or cached features, and `label` `[batch]`.
        key: random key of the step.

    Returns:
        The loss, and the new batch statistics and memory.
    """
    mixture = None
    if config.mixup.alpha:
        mixture = mixup.draw(jax.random.fold_in(key, _MIXUP), config.mixup)
    embeddings, batch_stats = embed(
        config,
        params["embedder"],
        state.batch_stats,
        batch["image"],
        jax.random.fold_in(key, _DEPTH),
        mixture,
    )
    # Each device gets all rows, and computes the terms of its classes or of its part of the memory.
    embeddings, labels = sharding.replicate(embeddings), sharding.replicate(batch["label"])
    warm = state.step >= config.memory_warmup_steps
    if isinstance(config.loss, losses.PairLoss):
        loss, memory = _of_pairs(config, config.loss, state.memory, embeddings, labels, warm)
    else:
        loss, memory = _of_proxies(
            config, state.memory, embeddings, params["proxies"], labels, key, mixture
        )
    if memory is not None:
        # The memory stays empty during the warm-up, so that it does not affect the loss.
        memory = memory._replace(steps=jnp.where(warm, memory.steps, 0))
    return loss, (batch_stats, memory)


def _of_pairs(
    config: StepConfig,
    loss: losses.PairLoss,
    memory: Memory | None,
    embeddings: Array,
    labels: Array,
    warm: Bool[Array, ""],
) -> tuple[Float[Array, ""], Memory | None]:
    """Returns the loss of pairs, and the new memory."""
    if not isinstance(memory, xbm.Memory):
        return loss(embeddings, labels), None
    weight = jnp.where(warm, config.memory_weight, 0.0)
    return xbm.loss_and_update(loss, memory, embeddings, labels, weight=weight)


def _of_proxies(
    config: StepConfig,
    memory: Memory | None,
    embeddings: Array,
    proxies: Array,
    labels: Array,
    key: PRNGKeyArray,
    mixture: Mixture | None,
) -> tuple[Float[Array, ""], Memory | None]:
    """Returns the loss of a batch and its proxies, and the new memory."""
    loss = losses.of_proxies(config.loss)
    classes = len(proxies) // loss.proxies_per_class
    problem: dict[str, Any] = {
        "embeddings": embeddings,
        "proxies": proxies,
        "labels": labels,
        "class_mask": jnp.arange(classes) < config.num_classes,
    }
    if mixture is not None:
        mean = mixture.loss(
            lambda labels: loss(**problem | {"labels": labels}),
            labels,
            micro_batches=config.micro_batches,
        )
        return mean, None
    if config.mixing.ratio:
        problem = _mixed(config, loss, key, **problem)
    if not isinstance(memory, memvir.Memory):
        return loss(**problem), None
    return memvir.loss_and_update(
        loss, memory, **problem, shards=config.shards, **config.remembering.of_update()
    )


def _mixed(
    config: StepConfig,
    loss: losses.ProxyLoss,
    key: PRNGKeyArray,
    embeddings: Array,
    proxies: Array,
    labels: Array,
    class_mask: Array,
) -> dict[str, Array]:
    """Returns the arguments of the loss with synthetic classes."""
    lam, partner = proxy_synthesis.draw(key, labels, **config.mixing.of_draw())
    mixed = proxy_synthesis.synthesize(
        embeddings,
        proxies,
        labels,
        lam=lam,
        partner=partner,
        loss=loss,
        class_mask=class_mask,
        shards=config.shards,
        **config.mixing.of_synthesis(),
    )
    of_rows = {"embeddings": mixed.embeddings, "labels": mixed.labels, "row_mask": mixed.row_mask}
    return mixed._asdict() | jax.tree.map(sharding.replicate, of_rows)


class StepMetrics(NamedTuple):
    """The metrics of one training step."""

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    skipped: Skipped
    """Skipped steps, up to and including this one."""
    gradient_norms: Float[Array, " arrays"]
    """Norm of the gradient of each array that trains, in the order of `jax.tree.leaves`."""
    parameter_norms: Float[Array, " arrays"]
    """Norm of each such array after the step, even if it is skipped, in the same order."""


def train_step(
    config: StepConfig, state: TrainState, batch: Mapping[str, Array]
) -> tuple[TrainState, StepMetrics]:
    """Training step: forward and backward pass, update and metrics.

    A step with a nonfinite loss, gradient, parameter or batch statistic is skipped: it counts as
    done, for learning rates and frozen epochs too, and changes nothing else.

    Args:
        config: the constants of the step.
        state: before the step.
        batch: `label` `[batch]`, and the inputs of `config.images`.

    Returns:
        The state after the step, and the step metrics.
    """
    # The key depends on seed and step alone, so that a resumed run is the same run.
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    images = config.images(batch, jax.random.fold_in(key, _VIEWS))
    batch = {"image": images, "label": batch["label"]}
    trained, fixed = split(state.params, config.fixed)
    (loss, (batch_stats, memory)), gradients = jax.value_and_grad(
        lambda params: objective(config, merge(params, fixed), state, batch, key), has_aux=True
    )(trained)
    if config.frozen_steps:
        frozen = state.step < config.frozen_steps
        batch_stats = _where(frozen, state.batch_stats, batch_stats)
    updates, opt_state = config.optimizer.update(
        gradients, state.opt_state, trained, step=state.step
    )
    params = optax.apply_updates(trained, updates)
    gradient_norms, parameter_norms = _norms(gradients), _norms(params)
    gradient_norm = jnp.linalg.norm(gradient_norms)
    # A norm is nonfinite if an element is. Optimizer state and memory need no check: they follow
    # from the gradient and the loss's inputs.
    taken = _all_finite((loss, gradient_norm, parameter_norms, batch_stats))
    memory = _chosen(taken, memory, state.memory)
    skipped = Skipped(
        total=state.skipped.total + ~taken,
        in_a_row=jnp.where(taken, 0, state.skipped.in_a_row + 1),
    )
    average = state.average
    if average is not None:
        network = {"params": merge(params, fixed)["embedder"], "batch_stats": batch_stats}
        later = updated_average(average, network, decay=config.average_decay, step=state.step)
        average = _where(taken, later, average)
    epoch_starts = state.step % config.steps_per_epoch == 0
    so_far = _where(epoch_starts, EpochMetrics.empty(), state.metrics)
    now = EpochMetrics.single_from_model_output(loss=loss, gradient_norm=gradient_norm)
    new_state = TrainState(
        step=state.step + 1,
        params=merge(_where(taken, params, trained), fixed),
        batch_stats=_where(taken, batch_stats, state.batch_stats),
        average=average,
        opt_state=_where(taken, opt_state, state.opt_state),
        memory=memory,
        metrics=_where(taken, so_far.merge(now), so_far),
        skipped=skipped,
    )
    return new_state, StepMetrics(loss, gradient_norm, skipped, gradient_norms, parameter_norms)


def _chosen(taken: Bool[Array, ""], update: Memory | None, before: Memory | None) -> Memory | None:
    """Returns the memory after a step, equivalent to that before it if the step is not taken."""
    if isinstance(update, memvir.Memory) and isinstance(before, memvir.Memory):
        return memvir.choose(taken, update, before)
    if isinstance(update, xbm.Memory) and isinstance(before, xbm.Memory):
        return xbm.choose(taken, update, before)
    return None


def _norms(tree: PyTree) -> Float[Array, " arrays"]:
    return jnp.stack([jnp.linalg.norm(x.reshape(-1)) for x in jax.tree.leaves(tree)])


def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()
    # Without the barrier, XLA's CPU compiler recomputes the conjunction for each array that depends
    # on it: 354,000 operations for BN-Inception, and six times the compile time.
    return jax.lax.optimization_barrier(finite)


def _where(condition: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), new, old)


class Step:
    """A compiled `train_step`, which is traced once: by `lower` or by the first call.

    A call donates the state that is passed to it.
    """

    def __init__(self, compiled: jax.stages.Wrapped, mesh: jax.sharding.Mesh) -> None:
        """Wraps a jitted step, which is traced with the mesh set."""
        self._compiled, self._mesh = compiled, mesh

    def __call__(
        self, state: TrainState, batch: Mapping[str, Any]
    ) -> tuple[TrainState, StepMetrics]:
        """Takes the step; see `train_step`."""
        # `sharding.replicate` reads the mesh.
        with jax.set_mesh(self._mesh):
            return self._compiled(state, batch)

    def lower(self, state: TrainState, batch: Mapping[str, Any]) -> jax.stages.Lowered:
        """Returns the step traced for some shapes; later calls with them do not trace again.

        Args:
            state: shapes, dtypes and shardings of the state's arrays.
            batch: shapes, dtypes and shardings of the batch's arrays.
        """
        with jax.set_mesh(self._mesh):
            return self._compiled.lower(state, batch)


def compile_step(config: StepConfig, abstract_state: TrainState, mesh: Mesh) -> Step:
    """Returns the jitted `train_step` of a step config.

    Args:
        config: the constants of the step.
        abstract_state: shape, dtype and sharding of every array of the state.
        mesh: the devices, which share each batch.
    """

    def step(state: TrainState, batch: Mapping[str, Array]) -> tuple[TrainState, StepMetrics]:
        return train_step(config, state, batch)

    state_sharding = sharding.shardings_of(abstract_state)
    compiled = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(state_sharding, sharding.batch_sharding(mesh)),
        out_shardings=(state_sharding, sharding.replicated_sharding(mesh)),
    )
    return Step(compiled, mesh)
