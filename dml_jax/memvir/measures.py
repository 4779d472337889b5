"""What the virtual classes of a step are like, as metrics of a run."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dml_jax import losses
from dml_jax._utils import numerics
from dml_jax.losses.base import Scalar
from dml_jax.memvir.memory import Memory, check_ablation, slots_in_use


class Drift(NamedTuple):
    """How far the virtual classes of a step are from its own classes; NaN if there are none."""

    cosine: Scalar
    """Mean cosine of the proxy of a class with its virtual proxies."""
    separation: Scalar
    """Fraction of the rows that are nearer to their proxy than to its virtual proxies."""


def drift(loss: losses.ProxyLoss, memory: Memory, *, growth: str = "gradual") -> Drift:
    """Returns how far the virtual classes of the latest step were from its own classes.

    Args:
        loss: the loss.
        memory: the memory after the step.
        growth: that of the step; see `loss_and_update`.
    """
    check_ablation(growth=growth)
    _, blocks, _ = memory.ring.labels.shape
    step = jnp.maximum(memory.steps - 1, 0)
    stored = jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, step % blocks, axis=1, keepdims=False),
        memory.ring,
    )
    in_use = slots_in_use(memory, step, growth)
    rows, proxies, labels = memory.pending
    now, then = numerics.normalize(proxies), numerics.normalize(stored.proxies)
    cosines = jnp.sum(now[:, None] * then, axis=-1)
    classes = _actual_classes(memory)
    is_own = jax.nn.one_hot(labels, len(proxies), dtype=bool)

    def own_logits(of_classes: Float[Array, "classes pdim"]) -> Float[Array, " batch"]:
        logits = loss.logits(rows, of_classes.reshape(-1, rows.shape[1]))
        # A gather would need the logits of all devices, among which the classes are split.
        return jnp.sum(logits, axis=1, where=is_own)

    nearest = jnp.max(
        jax.vmap(own_logits, in_axes=1)(stored.proxies),
        axis=0,
        initial=-jnp.inf,
        where=in_use[:, None],
    )
    return Drift(
        cosine=jnp.mean(cosines, where=in_use[None] & classes[:, None]),
        separation=jnp.mean(own_logits(proxies) > nearest, where=in_use.any()),
    )


def classes_in_use(
    memory: Memory, *, virtual: str = "both", growth: str = "gradual"
) -> Int[Array, ""]:
    """Returns the number of classes in the loss of the latest step: its own and the virtual ones.

    The synthetic classes of Proxy Synthesis are not counted.

    Args:
        memory: the memory after the step.
        virtual: that of the step; see `loss_and_update`.
        growth: that of the step.
    """
    check_ablation(virtual=virtual, growth=growth)
    in_use = slots_in_use(memory, jnp.maximum(memory.steps - 1, 0), growth)
    sets = 1 if virtual == "embeddings" else 1 + jnp.sum(in_use)
    return jnp.sum(_actual_classes(memory)) * sets


def _actual_classes(memory: Memory) -> Bool[Array, " classes"]:
    """Returns which classes do not pad the memory; those that do are zero."""
    return jnp.any(memory.pending.proxies != 0, axis=1)
