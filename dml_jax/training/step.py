"""One training step, compiled: embed, synthesise, remember, differentiate, update."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from dml_jax import losses, memvir, proxy_synthesis
from dml_jax.models import Embedder
from dml_jax.training.state import EpochMetrics, TrainState


class Recipe(NamedTuple):
    """What a step does, as opposed to what it does it to."""

    embedder: Embedder
    loss: losses.ProxyLoss
    optimizer: optax.GradientTransformation
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


def objective(
    recipe: Recipe,
    params: PyTree,
    state: TrainState,
    batch: Mapping[str, Array],
    key: PRNGKeyArray,
) -> tuple[Float[Array, ""], tuple[PyTree, memvir.Memory | None]]:
    """The loss of a batch, with everything that regularises it.

    Args:
        recipe: what to do.
        params: the embedder's and the proxies, to differentiate by.
        state: for batch statistics, memory and step.
        batch: `image` `[batch, height, width, 3]` and `label` `[batch]`.
        key: this step's.

    Returns:
        The loss, and behind it the new batch statistics and the new memory.
    """
    embeddings, updates = recipe.embedder.apply(
        {"params": params["embedder"], "batch_stats": state.batch_stats},
        batch["image"],
        train=True,
        mutable=["batch_stats"],
    )
    problem = {"embeddings": embeddings, "proxies": params["proxies"], "labels": batch["label"]}
    if recipe.mixing_ratio:
        lam, partner = proxy_synthesis.draw(
            key, batch["label"], alpha=recipe.mixing_alpha, ratio=recipe.mixing_ratio
        )
        problem = proxy_synthesis.synthesize(
            **problem, lam=lam, partner=partner, ratio=recipe.mixing_ratio, loss=recipe.loss
        )._asdict()
    if state.memory is None:
        return recipe.loss(**problem), (updates["batch_stats"], None)
    loss, memory = memvir.loss_and_update(recipe.loss, state.memory, **problem)
    # What the warm-up remembers is forgotten at once: an empty memory changes no loss.
    warm = state.step >= recipe.memory_warmup_steps
    memory = memory._replace(steps=jnp.where(warm, memory.steps, 0))
    return loss, (updates["batch_stats"], memory)


def train_step(
    recipe: Recipe, state: TrainState, batch: Mapping[str, Array]
) -> tuple[TrainState, tuple[Float[Array, ""], Float[Array, ""]]]:
    """Takes one step.

    Args:
        recipe: what to do.
        state: before the step.
        batch: `image` `[batch, height, width, 3]` and `label` `[batch]`.

    Returns:
        The state after the step, and the step's loss and gradient norm.
    """
    # A key that depends on the step alone makes a resumed run the same run.
    key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
    (loss, (batch_stats, memory)), gradients = jax.value_and_grad(
        lambda params: objective(recipe, params, state, batch, key), has_aux=True
    )(state.params)
    if recipe.frozen_steps:
        frozen = state.step < recipe.frozen_steps
        batch_stats = jax.tree.map(
            lambda old, new: jnp.where(frozen, old, new), state.batch_stats, batch_stats
        )
    updates, opt_state = recipe.optimizer.update(gradients, state.opt_state, state.params)
    epoch_starts = state.step % recipe.steps_per_epoch == 0
    so_far = jax.tree.map(
        lambda empty, value: jnp.where(epoch_starts, empty, value),
        EpochMetrics.empty(),
        state.metrics,
    )
    gradient_norm = optax.tree.norm(gradients)
    now = EpochMetrics.single_from_model_output(loss=loss, gradient_norm=gradient_norm)
    new_state = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        memory=memory,
        metrics=so_far.merge(now),
    )
    return new_state, (loss, gradient_norm)


def compile_step(
    recipe: Recipe, state_sharding: Any, batch_sharding: Any
) -> Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, tuple[Array, Array]]]:
    """`train_step` of a recipe, compiled; the state that is given to it is used up.

    Args:
        recipe: what to do.
        state_sharding: where the state lives, before and after.
        batch_sharding: how a batch is split.
    """

    def step(
        state: TrainState, batch: Mapping[str, Array]
    ) -> tuple[TrainState, tuple[Array, Array]]:
        return train_step(recipe, state, batch)

    compiled = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(state_sharding, batch_sharding),
        out_shardings=(state_sharding, None),
    )

    def on_mesh(
        state: TrainState, batch: Mapping[str, Any]
    ) -> tuple[TrainState, tuple[Array, Array]]:
        # For `sharding.gathered`, which looks for the mesh when the step is traced.
        with jax.set_mesh(batch_sharding.mesh):
            return compiled(state, batch)

    return on_mesh
