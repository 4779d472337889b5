"""XBM: a cross-batch memory of the embeddings of earlier steps, for losses of pairs.

Source: Wang et al., Cross-batch memory for embedding learning, CVPR 2020 (arXiv 1912.06798).

The loss of a step is that of the pairs in its batch, plus that of the pairs of the batch with all
embeddings in the memory, those of the step itself among them. The memory is a ring buffer of the
latest steps, split by row over the devices.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dml_jax import losses
from dml_jax._utils import numerics
from dml_jax._utils.errors import UserError
from dml_jax.losses.base import Embeddings, Labels, Scalar
from dml_jax.settings import integer, number, setting


@dataclasses.dataclass(frozen=True)
class XbmConfig:
    """The settings of the cross-batch memory."""

    num_steps: int = setting(
        0,
        integer(0),
        help="Number of steps whose embeddings are in the memory, the current one included; 0 "
        "disables XBM.",
    )
    weight: float = setting(
        1.0, number(least=0.0), help="Weight of the loss of pairs with the memory."
    )
    warmup_epochs: int = setting(1, integer(0), help="Epochs at the start without the memory.")


class Memory(NamedTuple):
    """The ring buffer. Rows are the first axis, so that it is split like a batch."""

    steps: Int[Array, ""]
    """Number of steps stored since the warm-up."""
    embeddings: Float[Array, "batch steps dim"]
    """Unit vectors."""
    labels: Int[Array, "batch steps"]


def init(*, num_steps: int, batch_size: int, dim: int) -> Memory:
    """Returns an empty memory.

    Args:
        num_steps: steps that it holds, at least 1.
        batch_size: rows of a step.
        dim: size of an embedding.

    Raises:
        ValueError: a size is too small.
    """
    for name, value in (("num_steps", num_steps), ("batch_size", batch_size), ("dim", dim)):
        if value < 1:
            raise UserError(f"xbm needs {name} of at least 1, got {value}")
    return Memory(
        steps=jnp.zeros((), jnp.int32),
        embeddings=jnp.zeros((batch_size, num_steps, dim)),
        labels=jnp.zeros((batch_size, num_steps), jnp.int32),
    )


def loss_and_update(
    loss: losses.PairLoss,
    memory: Memory,
    embeddings: Embeddings,
    labels: Labels,
    *,
    weight: Scalar | float = 1.0,
) -> tuple[Scalar, Memory]:
    """Returns the loss of a step with the memory, and the memory with the step added.

    Args:
        loss: the loss.
        memory: the memory of the steps before this one.
        embeddings: `[batch, dim]`, raw.
        labels: `[batch]`.
        weight: weight of the pairs with the memory.

    Returns:
        A float32 scalar, differentiable in the embeddings, and the new memory.
    """
    rows, slots, dim = memory.embeddings.shape
    slot = memory.steps % slots
    unit = jax.lax.stop_gradient(numerics.normalize(embeddings))
    update = Memory(
        steps=memory.steps + 1,
        embeddings=memory.embeddings.at[:, slot].set(unit),
        labels=memory.labels.at[:, slot].set(labels.astype(jnp.int32)),
    )
    in_use = jnp.arange(slots) < update.steps
    with_memory = loss(
        embeddings,
        labels,
        candidates=update.embeddings.reshape(-1, dim),
        candidate_labels=update.labels.reshape(-1),
        candidate_mask=jnp.tile(in_use, rows),
    )
    return loss(embeddings, labels) + weight * with_memory, update


def choose(accepted: Bool[Array, ""], update: Memory, before: Memory) -> Memory:
    """Returns `update` if the step is accepted, else a memory equivalent to `before`.

    The slot that a rejected step has overwritten is the one that the next step overwrites.

    Args:
        accepted: whether the step is accepted.
        update: the memory that `loss_and_update` returned.
        before: the memory that `loss_and_update` was given.
    """
    return update._replace(steps=jnp.where(accepted, update.steps, before.steps))
