"""MemVir: embeddings and proxies of earlier steps as virtual classes.

Source: Ko, Gu and Kim, Learning with memory-based virtual classes for deep metric learning,
ICCV 2021 (arXiv 2103.16940).

The virtual classes of step t are the classes of steps t-(M+1), t-2(M+1), ..., t-N(M+1), as far as
these exist. The loss is the mean over the rows of all N+1 steps, each against the proxies of all
N+1 steps. The direct implementation computes (N+1)B x (N+1)C logits, but most of them were
computed before: of two stored steps, the newer one was once the current step while the older one
was in memory, and neither has changed since. So the memory has a log-sum-exp cache: for each stored
row, the log-sum-exp of its logits against the proxies of each stored step. A step then computes
only the current rows against all proxies and the stored rows against the current proxies,
(2N+1)BC logits, for the same value and the same gradients.

This holds for losses that sum over classes. Proxy-Anchor sums over rows for each class, so there
rows and classes exchange their roles. This module covers both with the terms of `losses.ProxyLoss`:
each anchor (a row or a class) has a log-sum-exp over candidates (classes or rows).

Every array has the layout `[anchor, block, slot, ...]`, so that all are sharded alike. Steps that
are M+1 apart share a block of the ring buffer, so a step reads one contiguous slice. A step stores
its entry in `pending`, and the next step writes it into the ring before reading: a program that
reads the ring and then writes it has to copy it.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from dml_jax import losses
from dml_jax._utils import numerics, sharding
from dml_jax._utils.errors import UserError
from dml_jax.losses.base import (
    AnchorTerms,
    ClassMask,
    Embeddings,
    Labels,
    Proxies,
    RawProxies,
    RowMask,
    Scalar,
)
from dml_jax.settings import choice, integer, setting

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
    """Log-sum-exp caches by the kind of anchor, `rows` or `classes`."""


class Drift(NamedTuple):
    """How far the virtual classes of a step are from its own classes; NaN if there are none."""

    cosine: Scalar
    """Mean cosine of the proxy of a class with its virtual proxies."""
    separation: Scalar
    """Fraction of the rows that are nearer to their proxy than to its virtual proxies."""


def init(
    *,
    num_steps: int,
    step_gap: int,
    batch_size: int,
    num_classes: int,
    dim: int,
    dtype: DTypeLike = jnp.float32,
    loss: losses.ProxyLoss | None = None,
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

    Raises:
        ValueError: a size is too small.
    """
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
        anchors = {_anchor_kind(loss): anchors[_anchor_kind(loss)]}
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


def loss_and_update(
    loss: losses.ProxyLoss,
    memory: Memory,
    embeddings: Embeddings,
    proxies: RawProxies,
    labels: Labels,
    *,
    row_mask: RowMask | None = None,
    class_mask: ClassMask | None = None,
    shards: int = 1,
) -> tuple[Scalar, Memory]:
    """Returns the loss of a step with the virtual classes, and the memory with the step added.

    The first B rows are stored, with B the memory's batch size. Rows beyond B are synthetic ones,
    and as many classes are their synthetic classes: the last ones of each device. These take part
    in this step's loss, also as candidates of the stored rows, but are not stored.

    Args:
        loss: the loss.
        memory: the memory of the steps before this one.
        embeddings: `[rows, dim]`, raw.
        proxies: raw, before this step's update, `[classes, dim]` or the shape that the loss uses.
        labels: `[rows]`, in `0..classes - 1`.
        row_mask: rows to include; None includes all. It must include the first B.
        class_mask: classes to include; None includes all. Except for the synthetic ones, it must be
            the same in all steps.
        shards: number of devices that the classes are split over; see `synthesize`.

    Returns:
        A float32 scalar, differentiable in embeddings and proxies, and the new memory.

    Raises:
        ValueError: the memory was made for other sizes.
    """
    memory = _write_pending(memory)
    embeddings, proxies = loss.prepare(embeddings, proxies)
    row_mask, class_mask = loss.fill_masks(embeddings, proxies, row_mask, class_mask)
    batch = _Batch(embeddings, proxies, row_mask, class_mask)
    real, synthetic = _split(loss, memory, batch, shards)
    block = _read_block(loss, memory, real.class_mask)
    terms = loss.anchor_terms(embeddings, proxies, labels, row_mask, class_mask)
    value = _loss(loss, block, terms, real, synthetic, shards) + loss.penalty(proxies, class_mask)

    entry = Entry(
        embeddings=real.embeddings.astype(memory.ring.embeddings.dtype),
        proxies=real.proxies.reshape(len(real.class_mask), -1).astype(memory.ring.proxies.dtype),
        labels=sharding.unjoined_positions(
            labels[: len(real.embeddings)].astype(jnp.int32),
            len(real.class_mask),
            len(synthetic.class_mask),
            shards,
        ),
    )
    # The cache must agree with the vectors as stored, which may be rounded. If they are not, the
    # compiler removes this as a common subexpression.
    real = real._replace(
        embeddings=entry.embeddings.astype(jnp.float32),
        proxies=entry.proxies.reshape(real.proxies.shape).astype(jnp.float32),
    )
    log_sums, positives = loss.anchor_terms(
        real.embeddings, real.proxies, entry.labels, real.row_mask, real.class_mask
    )
    current_over_stored, stored_over_current = _cross_log_sums(loss, block, real)
    _, blocks, slots = memory.ring.labels.shape
    cache = memory.known[_anchor_kind(loss)]._replace(
        pending_own=positives,
        # In the slot that the entry will occupy, candidates are those of the step itself.
        pending_over=current_over_stored.at[:, memory.steps // blocks % slots].set(log_sums),
        pending_of=stored_over_current,
    )
    update = memory._replace(
        steps=memory.steps + 1, pending=entry, known=memory.known | {_anchor_kind(loss): cache}
    )
    return value, jax.lax.stop_gradient(update)


def drift(loss: losses.ProxyLoss, memory: Memory) -> Drift:
    """Returns how far the virtual classes of the latest step were from its own classes.

    Args:
        loss: the loss.
        memory: the memory after the step.
    """
    _, blocks, slots = memory.ring.labels.shape
    step = jnp.maximum(memory.steps - 1, 0)
    stored = jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, step % blocks, axis=1, keepdims=False),
        memory.ring,
    )
    in_use = jnp.arange(slots) < step // blocks
    rows, proxies, labels = memory.pending
    now, then = numerics.normalize(proxies), numerics.normalize(stored.proxies)
    cosines = jnp.sum(now[:, None] * then, axis=-1)
    # Classes that pad the memory are zero.
    classes = jnp.any(proxies != 0, axis=1)
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


class _Batch(NamedTuple):
    """Prepared vectors of the current step, or of a part of it, with masks."""

    embeddings: Embeddings
    proxies: Proxies
    row_mask: RowMask
    class_mask: ClassMask


class _Block(NamedTuple):
    """The block of the memory that a step reads."""

    entries: Entry
    positives: SlotTerms
    log_sums: Float[Array, "anchors slots slots"]
    in_use: Bool[Array, " slots"]
    class_mask: ClassMask


def _anchor_kind(loss: losses.ProxyLoss) -> str:
    return "classes" if loss.class_anchors else "rows"


def _split(
    loss: losses.ProxyLoss, memory: Memory, batch: _Batch, shards: int
) -> tuple[_Batch, _Batch]:
    """Returns the real part of a batch and the synthetic part."""
    per_class = loss.proxies_per_class
    rows, dim = memory.pending.embeddings.shape
    stored_classes, stored_dim = memory.pending.proxies.shape
    classes = len(batch.class_mask) - (len(batch.embeddings) - rows)
    if (
        len(batch.embeddings) < rows
        or classes != stored_classes
        or batch.embeddings.shape[1] != dim
        or stored_dim != dim * per_class
    ):
        raise ValueError(
            f"a memory for embeddings {(rows, dim)} and proxies {(stored_classes, stored_dim)} "
            f"cannot store embeddings {batch.embeddings.shape} and proxies {batch.proxies.shape}, "
            f"{per_class} for each class; pass memvir.init the sizes and the loss of the step"
        )
    by_class = batch.proxies.reshape(len(batch.class_mask), -1)
    real_proxies, proxies = (
        x.reshape(len(x) * per_class, dim) for x in sharding.unjoin(by_class, classes, shards)
    )
    real_mask, class_mask = sharding.unjoin(batch.class_mask, classes, shards)
    real = _Batch(batch.embeddings[:rows], real_proxies, jnp.ones(rows, bool), real_mask)
    return real, _Batch(batch.embeddings[rows:], proxies, batch.row_mask[rows:], class_mask)


def _write_pending(memory: Memory) -> Memory:
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


def _read_block(loss: losses.ProxyLoss, memory: Memory, class_mask: ClassMask) -> _Block:
    _, blocks, slots = memory.ring.labels.shape
    cache = memory.known[_anchor_kind(loss)]
    entries, positives, log_sums = jax.tree.map(
        lambda stored: jax.lax.dynamic_index_in_dim(
            stored, memory.steps % blocks, axis=1, keepdims=False
        ),
        (memory.ring, cache.own, cache.sums),
    )
    in_use = jnp.arange(slots) < memory.steps // blocks
    return _Block(entries, positives, log_sums, in_use, class_mask)


def _loss(
    loss: losses.ProxyLoss,
    block: _Block,
    terms: tuple[AnchorTerms, AnchorTerms],
    real: _Batch,
    synthetic: _Batch,
    shards: int,
) -> Scalar:
    """Returns the mean loss of the current and the stored anchors.

    Args:
        loss: the loss.
        block: the block of the memory for this step.
        terms: `anchor_terms` of the current batch, including the synthetic part.
        real: the real part of the current batch.
        synthetic: the synthetic part.
        shards: number of devices that the classes are split over.
    """

    def joined(x: Array, y: Array) -> Array:
        if loss.class_anchors:
            return sharding.join(x, y, shards)
        # Rows of different shardings are expensive to concatenate; these arrays are small.
        return jnp.concatenate([sharding.replicate(x), sharding.replicate(y)])

    current_log_sums, positives = terms
    current_over_stored, stored_over_current = _cross_log_sums(loss, block, real)
    stored_parts = [
        stored_over_current[..., None],
        jnp.where(block.in_use[None, None], block.log_sums, -jnp.inf),
    ]
    anchor_mask = real.class_mask if loss.class_anchors else real.row_mask
    stored_mask = block.in_use[None] & anchor_mask[:, None]
    if len(synthetic.embeddings):
        synthetic_over_stored, stored_over_synthetic = _cross_log_sums(loss, block, synthetic)
        current_over_stored = joined(current_over_stored, synthetic_over_stored)
        stored_parts.append(stored_over_synthetic[..., None])
        anchor_mask = joined(
            anchor_mask, synthetic.class_mask if loss.class_anchors else synthetic.row_mask
        )
    current_parts = [
        current_log_sums[:, None],
        jnp.where(block.in_use[None], current_over_stored, -jnp.inf),
    ]
    log_sums = numerics.log_sum_exp(jnp.concatenate(current_parts, axis=1), axis=1)
    stored_log_sums = numerics.log_sum_exp(jnp.concatenate(stored_parts, axis=2), axis=2)
    return loss.mean(
        joined(log_sums, stored_log_sums.reshape(-1)),
        joined(positives, block.positives.reshape(-1)),
        joined(anchor_mask, stored_mask.reshape(-1)),
    )


def _cross_log_sums(
    loss: losses.ProxyLoss, block: _Block, batch: _Batch
) -> tuple[Float[Array, "batch_anchors slots"], SlotTerms]:
    """Returns log-sum-exps between a batch and each slot of a block.

    Returns:
        The log-sum-exp of the batch's anchors over each slot's candidates, and of each slot's
        anchors over the batch's candidates.
    """
    rows, slots, dim = block.entries.embeddings.shape
    # Rows and classes are split over the same devices, so one factor of each product goes to all.
    embeddings, proxies = sharding.replicate(batch.embeddings), batch.proxies
    stored_rows = block.entries.embeddings.reshape(-1, dim)
    if len(proxies) < len(stored_rows):
        proxies = sharding.replicate(proxies)
    else:
        stored_rows = sharding.replicate(stored_rows)
    # One product for all slots: a vmap over slots would copy the transposed proxies.
    to_stored_proxies = loss.logits(embeddings, block.entries.proxies.reshape(-1, dim))
    to_stored_proxies = to_stored_proxies.reshape(len(embeddings), -1, slots)
    to_stored_rows = loss.logits(stored_rows, proxies)
    to_stored_rows = to_stored_rows.reshape(rows, slots, -1)
    # Masks apply to candidates here; `_loss` masks the anchors.
    if loss.class_anchors:
        batch_over_stored = numerics.log_sum_exp(to_stored_rows, axis=0).T
        stored_over_batch = numerics.log_sum_exp(
            to_stored_proxies, axis=0, where=batch.row_mask[:, None, None]
        )
    else:
        batch_over_stored = numerics.log_sum_exp(
            to_stored_proxies, axis=1, where=block.class_mask[None, :, None]
        )
        stored_over_batch = numerics.log_sum_exp(
            to_stored_rows, axis=2, where=batch.class_mask[None, None]
        )
    return batch_over_stored, stored_over_batch
