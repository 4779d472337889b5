"""The memory of MemVir: settings, ring buffer and log-sum-exp cache."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from dml_jax import losses
from dml_jax._utils.errors import UserError
from dml_jax.losses.base import AnchorTerms, ClassMask
from dml_jax.settings import choice, integer, setting

VIRTUAL = ("both", "proxies", "embeddings")
"""What of the earlier steps joins the loss; see `loss_and_update`."""
GROWTH = ("gradual", "at_once")
"""When virtual classes join the loss; see `loss_and_update`."""

SlotTerms = Float[Array, "anchors slots"]
"""A number for each anchor and each slot of a block."""


@dataclasses.dataclass(frozen=True)
class MemVirConfig:
    """The settings of MemVir."""

    num_steps: int = setting(
        0,
        integer(0),
        help="Number of earlier steps whose classes are virtual classes, the paper's N; 0 disables "
        "MemVir.",
    )
    step_gap: int = setting(0, integer(0), help="Steps between two of these steps, the paper's M.")
    warmup_epochs: int = setting(0, integer(0), help="Epochs at the start without virtual classes.")
    dtype: str = setting(
        "float32", choice(("float32", "bfloat16")), help="Dtype of the stored vectors."
    )
    virtual: str = setting(
        "both",
        choice(VIRTUAL),
        help="Ablation: what of the earlier steps joins the loss: `both`; `proxies`, as negatives "
        "without members; or `embeddings`, as samples of the current classes.",
    )
    growth: str = setting(
        "gradual",
        choice(GROWTH),
        help="Ablation: when virtual classes join the loss: `gradual`, those of each of the N "
        "steps as soon as it is old enough; or `at_once`, none until all are.",
    )

    def of_update(self) -> dict[str, Any]:
        """Returns the arguments of `loss_and_update` among the settings."""
        return {"virtual": self.virtual, "growth": self.growth}


class Entry(NamedTuple):
    """Stored vectors of a step, or of many steps along the axes after the first; no gradients."""

    embeddings: Float[Array, "batch *steps dim"]
    proxies: Float[Array, "classes *steps pdim"]
    """All proxies of a class are concatenated."""
    labels: Int[Array, "batch *steps"]


# The names of the fields are keys in checkpoints.
class LogSumExpCache(NamedTuple):
    """Log-sum-exps and positive terms of stored anchors, which later steps reuse."""

    own: Float[Array, "anchors blocks slots"]
    """Positive terms, as `ProxyLoss.anchor_terms` returns them."""
    sums: Float[Array, "anchors blocks slots slots"]
    """`[anchor, block, a, b]`: log-sum-exp of slot a's anchor over slot b's candidates."""
    pending_own: AnchorTerms
    """Positive terms of the latest step."""
    pending_over: SlotTerms
    """Log-sum-exp of the latest step's anchors over each slot's candidates."""
    pending_of: SlotTerms
    """Log-sum-exp of each slot's anchors over the latest step's candidates."""


class Memory(NamedTuple):
    """The ring buffer: one block for each residue of the step modulo M+1, with N slots."""

    steps: Int[Array, ""]
    """Number of steps stored since the warm-up; 0 makes the memory empty."""
    ring: Entry
    """Entries of `[M+1, N]` steps."""
    pending: Entry
    """The latest step, which the next step writes into the ring."""
    known: dict[str, LogSumExpCache]
    """Log-sum-exp caches by the kind of anchor, `rows` or `classes`; none for the ablations."""


class Block(NamedTuple):
    """The block of the memory that a step reads."""

    entries: Entry
    in_use: Bool[Array, " slots"]
    class_mask: ClassMask


class KnownTerms(NamedTuple):
    """The terms of a block's anchors that are known from earlier steps."""

    positives: SlotTerms
    log_sums: Float[Array, "anchors slots slots"]


def init(
    *,
    num_steps: int,
    step_gap: int,
    batch_size: int,
    num_classes: int,
    dim: int,
    dtype: DTypeLike = jnp.float32,
    loss: losses.ProxyLoss | None = None,
    virtual: str = "both",
) -> Memory:
    """Returns an empty memory for N(M+1) steps.

    Args:
        num_steps: N, number of earlier steps in a loss.
        step_gap: M, number of steps between two of them.
        batch_size: B, number of rows stored per step.
        num_classes: C, number of classes stored per step.
        dim: D, size of an embedding.
        dtype: dtype of the stored embeddings and proxies.
        loss: the loss that the memory is for. By default the memory fits any loss with proxies
            `[num_classes, dim]`; it is larger, since it has the caches for both kinds of anchors.
        virtual: that of the steps; see `loss_and_update`.

    Raises:
        ValueError: a size is too small, or `virtual` is unknown.
    """
    check_ablation(virtual=virtual)
    for name, value, minimum in (
        ("num_steps", num_steps, 1),
        ("step_gap", step_gap, 0),
        ("batch_size", batch_size, 1),
        ("num_classes", num_classes, 1),
        ("dim", dim, 1),
    ):
        if value < minimum:
            raise UserError(f"memvir needs {name} of at least {minimum}, got {value}")
    per_class, pdim = (1, dim) if loss is None else loss.proxy_shape(1, dim)
    anchors = {"rows": batch_size, "classes": num_classes}
    if loss is not None:
        anchors = {anchor_kind(loss): anchors[anchor_kind(loss)]}
    if virtual != "both":
        anchors = {}  # No loss of stored rows over stored classes.
    blocks = step_gap + 1

    def entry(*steps: int) -> Entry:
        return Entry(
            embeddings=jnp.zeros((batch_size, *steps, pdim), dtype),
            proxies=jnp.zeros((num_classes, *steps, per_class * pdim), dtype),
            labels=jnp.zeros((batch_size, *steps), jnp.int32),
        )

    def cache(count: int) -> LogSumExpCache:
        return LogSumExpCache(
            own=jnp.zeros((count, blocks, num_steps)),
            sums=jnp.zeros((count, blocks, num_steps, num_steps)),
            pending_own=jnp.zeros(count),
            pending_over=jnp.zeros((count, num_steps)),
            pending_of=jnp.zeros((count, num_steps)),
        )

    return Memory(
        steps=jnp.zeros((), jnp.int32),
        ring=entry(blocks, num_steps),
        pending=entry(),
        known={kind: cache(count) for kind, count in anchors.items()},
    )


def choose(accepted: Bool[Array, ""], update: Memory, before: Memory) -> Memory:
    """Returns `update` if the step is accepted, else a memory equivalent to `before`.

    Selects the small arrays only. The ring and the caches of the two differ by the entry that was
    pending before the step, which the next step writes there in any case.

    Args:
        accepted: whether the step is accepted.
        update: the memory that `loss_and_update` returned.
        before: the memory that `loss_and_update` was given.
    """

    def select(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree.map(lambda x, y: jnp.where(accepted, x, y), new, old)

    def pending(cache: LogSumExpCache) -> tuple[Array, ...]:
        return cache.pending_own, cache.pending_over, cache.pending_of

    caches = {}
    for kind, new in update.known.items():
        own, over, of = select(pending(new), pending(before.known[kind]))
        caches[kind] = new._replace(pending_own=own, pending_over=over, pending_of=of)
    return update._replace(
        steps=select(update.steps, before.steps),
        pending=select(update.pending, before.pending),
        known=caches,
    )


def check_ablation(*, virtual: str = "both", growth: str = "gradual") -> None:
    """Raises a ValueError if the name of an ablation is unknown."""
    for name, value, choices in (("virtual", virtual, VIRTUAL), ("growth", growth, GROWTH)):
        if value not in choices:
            raise UserError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def anchor_kind(loss: losses.ProxyLoss) -> str:
    """Returns the key of a loss's log-sum-exp cache in `Memory.known`."""
    return "classes" if loss.class_anchors else "rows"


def write_pending(memory: Memory) -> Memory:
    """Writes the latest step into the ring; before the first step, zeros that are never read."""
    _, blocks, slots = memory.ring.labels.shape
    latest = memory.steps - 1
    block, slot = latest % blocks, latest // blocks % slots

    def write(cache: LogSumExpCache) -> LogSumExpCache:
        sums = cache.sums.at[:, block, :, slot].set(cache.pending_of)
        return cache._replace(
            own=cache.own.at[:, block, slot].set(cache.pending_own),
            sums=sums.at[:, block, slot].set(cache.pending_over),
        )

    return memory._replace(
        ring=jax.tree.map(
            lambda ring, entry: ring.at[:, block, slot].set(entry), memory.ring, memory.pending
        ),
        known={kind: write(cache) for kind, cache in memory.known.items()},
    )


def slots_in_use(memory: Memory, step: Int[Array, ""], growth: str) -> Bool[Array, " slots"]:
    """Returns which slots of its block a step uses.

    Args:
        memory: the memory.
        step: number of steps stored before the step.
        growth: see `loss_and_update`.
    """
    _, blocks, slots = memory.ring.labels.shape
    exist = jnp.arange(slots) < step // blocks
    return exist if growth == "gradual" else exist & exist.all()


def read_block(memory: Memory, class_mask: ClassMask, growth: str) -> Block:
    """Returns the block of the next step, whose classes `class_mask` includes."""
    entries = _of_next_step(memory, memory.ring)
    return Block(entries, slots_in_use(memory, memory.steps, growth), class_mask)


def read_known(memory: Memory, loss: losses.ProxyLoss) -> KnownTerms:
    """Returns the known terms of the anchors in the block of the next step."""
    kind = anchor_kind(loss)
    if kind not in memory.known:
        raise UserError(
            f"the memory has no log-sum-exps of {kind}, which this loss needs with virtual='both'; "
            "pass memvir.init the loss and the `virtual` of the step"
        )
    cache = memory.known[kind]
    return KnownTerms(*_of_next_step(memory, (cache.own, cache.sums)))


def _of_next_step(memory: Memory, stored: PyTree) -> PyTree:
    _, blocks, _ = memory.ring.labels.shape
    return jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, memory.steps % blocks, axis=1, keepdims=False),
        stored,
    )
