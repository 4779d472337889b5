"""One training step, compiled: embed, synthesise, remember, differentiate, update."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Num, PRNGKeyArray, PyTree

from dml_jax import losses, memvir, proxy_synthesis
from dml_jax._utils import sharding
from dml_jax.models import Embedder
from dml_jax.training.state import EpochMetrics, Skipped, TrainState

_VIEWS = 2**32 - 1  # Sets the random numbers of views apart from all others of a step.


def images_of_batch(batch: Mapping[str, Array], key: PRNGKeyArray) -> Array:
    """The images that a batch brings with it; nothing is random about them any more."""
    del key
    return batch["image"]


class StepConfig(NamedTuple):
    """What a step does, as opposed to what it does it to."""

    embedder: Embedder
    loss: losses.ProxyLoss
    optimizer: optax.GradientTransformationExtraArgs
    seed: int
    steps_per_epoch: int
    mixing_alpha: float
    """Proxy Synthesis: weights come from Beta(alpha, alpha)."""
    mixing_ratio: float
    """Proxy Synthesis: synthetic classes per sample; 0 for none."""
    memory_warmup_steps: int
    """MemVir: steps before the memory is used; of no effect where the state has no memory."""
    frozen_steps: int
    """Steps at the beginning in which the backbone stays as it is, its batch statistics too."""
    micro_batches: int
    """Equal parts in which a batch is embedded, one after another; see `embed`."""
    images: Callable[[Mapping[str, Array], PRNGKeyArray], Array] = images_of_batch
    """From a batch and a key to the images to train on, `[batch, height, width, 3]`."""


def embed(
    config: StepConfig, params: PyTree, batch_stats: PyTree, images: Num[Array, "batch h w 3"]
) -> tuple[Float[Array, "batch dim"], PyTree]:
    """Embeds a batch as training does, with the memory that activations of one part need.

    The way back computes each part once more. Batch normalisation, where it is not frozen, goes by
    the part's own statistics, and moves the running ones at each part.

    Args:
        config: how, and in how many parts.
        params: the embedder's.
        batch_stats: before the batch.
        images: split by row, of which every part takes as many from every device.

    Returns:
        The embeddings, and the batch statistics after the batch.
    """

    def embed_part(params: PyTree, batch_stats: PyTree, images: Array) -> tuple[Array, PyTree]:
        embeddings, updates = config.embedder.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        return embeddings, updates.get("batch_stats", {})

    count = config.micro_batches
    if count == 1:
        return embed_part(params, batch_stats, images)
    # A part is every count-th row: the same rows on any number of devices, and none has to move.
    parts = images.reshape(-1, count, *images.shape[1:])
    # No loop of XLA's, in which convolutions' gradients are many times as slow on the CPU.
    embeddings = []
    for part in range(count):
        made, batch_stats = jax.checkpoint(embed_part)(params, batch_stats, parts[:, part])
        # No part begins before the one before it has ended, nor on the way back.
        params, batch_stats, made = jax.lax.optimization_barrier((params, batch_stats, made))
        embeddings.append(made)
    return jnp.stack(embeddings, axis=1).reshape(len(images), -1), batch_stats


def objective(
    config: StepConfig,
    params: PyTree,
    state: TrainState,
    batch: Mapping[str, Array],
    key: PRNGKeyArray,
) -> tuple[Float[Array, ""], tuple[PyTree, memvir.Memory | None]]:
    """The loss of a batch, with everything that regularises it.

    Args:
        config: what to do.
        params: the embedder's and the proxies, to differentiate by.
        state: for batch statistics, memory and step.
        batch: `image` `[batch, height, width, 3]` and `label` `[batch]`.
        key: this step's.

    Returns:
        The loss, and behind it the new batch statistics and the new memory.
    """
    embeddings, batch_stats = embed(config, params["embedder"], state.batch_stats, batch["image"])
    problem = {"embeddings": embeddings, "proxies": params["proxies"], "labels": batch["label"]}
    if config.mixing_ratio:
        lam, partner = proxy_synthesis.draw(
            key, batch["label"], alpha=config.mixing_alpha, ratio=config.mixing_ratio
        )
        problem = proxy_synthesis.synthesize(
            **problem, lam=lam, partner=partner, ratio=config.mixing_ratio, loss=config.loss
        )._asdict()
    if state.memory is None:
        return config.loss(**problem), (batch_stats, None)
    loss, memory = memvir.loss_and_update(config.loss, state.memory, **problem)
    # What the warm-up remembers is forgotten at once: an empty memory changes no loss.
    warm = state.step >= config.memory_warmup_steps
    memory = memory._replace(steps=jnp.where(warm, memory.steps, 0))
    return loss, (batch_stats, memory)


class StepMetrics(NamedTuple):
    """What a step shows of itself."""

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    skipped: Skipped
    """Up to this step, it included."""
    gradient_norms: Float[Array, " arrays"]
    """Of each array of the parameters, in the order of `jax.tree.leaves`."""
    parameter_norms: Float[Array, " arrays"]
    """As they were before the step, likewise."""


def train_step(
    config: StepConfig, state: TrainState, batch: Mapping[str, Array]
) -> tuple[TrainState, StepMetrics]:
    """Takes one step, or skips it if it would bring in a number that is not finite.

    A step that is skipped counts as done, for learning rates and thaw too, and changes nothing
    else.

    Args:
        config: what to do.
        state: before the step.
        batch: `label` `[batch]`, and whatever the config makes images of.

    Returns:
        The state after the step, and what is to be seen of it.
    """
    # A key that depends on the step alone makes a resumed run the same run.
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    images = config.images(batch, jax.random.fold_in(key, _VIEWS))
    batch = {"image": images, "label": batch["label"]}
    (loss, (batch_stats, memory)), gradients = jax.value_and_grad(
        lambda params: objective(config, params, state, batch, key), has_aux=True
    )(state.params)
    if config.frozen_steps:
        frozen = state.step < config.frozen_steps
        batch_stats = _where(frozen, state.batch_stats, batch_stats)
    updates, opt_state = config.optimizer.update(
        gradients, state.opt_state, state.params, step=state.step
    )
    params = optax.apply_updates(state.params, updates)
    gradient_norms, parameter_norms = _norms(gradients), _norms(state.params)
    gradient_norm = jnp.linalg.norm(gradient_norms)
    # The optimizer's state sums squares of the gradient, and the memory's vectors are the loss's.
    taken = _all_finite((loss, gradient_norm, params, batch_stats))
    if memory is not None and state.memory is not None:
        memory = memvir.choose(taken, memory, state.memory)
    skipped = Skipped(
        total=state.skipped.total + ~taken,
        in_a_row=jnp.where(taken, 0, state.skipped.in_a_row + 1),
    )
    epoch_starts = state.step % config.steps_per_epoch == 0
    so_far = _where(epoch_starts, EpochMetrics.empty(), state.metrics)
    now = EpochMetrics.single_from_model_output(loss=loss, gradient_norm=gradient_norm)
    new_state = TrainState(
        step=state.step + 1,
        params=_where(taken, params, state.params),
        batch_stats=_where(taken, batch_stats, state.batch_stats),
        opt_state=_where(taken, opt_state, state.opt_state),
        memory=memory,
        metrics=_where(taken, so_far.merge(now), so_far),
        skipped=skipped,
    )
    return new_state, StepMetrics(loss, gradient_norm, skipped, gradient_norms, parameter_norms)


def _norms(tree: PyTree) -> Float[Array, " arrays"]:
    return jnp.stack([jnp.linalg.norm(x.reshape(-1)) for x in jax.tree.leaves(tree)])


def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()
    # XLA's CPU compiler would compute the conjunction of all arrays anew for each array that is
    # chosen by it: of BN-Inception, 354,000 operations, and six times as long to compile.
    return jax.lax.optimization_barrier(finite)


def _where(condition: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), new, old)


class Step:
    """A config's `train_step`, compiled once: for its memory, or when it is first taken.

    The state that is given to it is used up.
    """

    def __init__(self, compiled: jax.stages.Wrapped, mesh: jax.sharding.Mesh) -> None:
        """Wraps a jitted step, which looks for the mesh when it is traced."""
        self._compiled, self._mesh = compiled, mesh

    def __call__(
        self, state: TrainState, batch: Mapping[str, Any]
    ) -> tuple[TrainState, StepMetrics]:
        """Takes the step; see `train_step`."""
        # For `sharding.replicate`.
        with jax.set_mesh(self._mesh):
            return self._compiled(state, batch)

    def compile(self, state: TrainState, batch: Mapping[str, Any]) -> jax.stages.Compiled:
        """The step, compiled for shapes. Steps of these shapes are not compiled again.

        Args:
            state: the shapes, types and shardings of the state's arrays.
            batch: those of the batch's.
        """
        with jax.set_mesh(self._mesh):
            return self._compiled.lower(state, batch).compile()


def compile_step(config: StepConfig, state_sharding: Any, batch_sharding: Any) -> Step:
    """`train_step` of a config, to be compiled.

    Args:
        config: what to do.
        state_sharding: where the state lives, before and after.
        batch_sharding: how a batch is split.
    """

    def step(state: TrainState, batch: Mapping[str, Array]) -> tuple[TrainState, StepMetrics]:
        return train_step(config, state, batch)

    compiled = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(state_sharding, batch_sharding),
        out_shardings=(state_sharding, sharding.replicated_sharding(batch_sharding.mesh)),
    )
    return Step(compiled, batch_sharding.mesh)
