"""The loss of a step with virtual classes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dml_jax import losses
from dml_jax._utils import numerics, sharding
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
from dml_jax.memvir.memory import (
    Block,
    Entry,
    KnownTerms,
    LogSumExpCache,
    Memory,
    SlotTerms,
    anchor_kind,
    check_ablation,
    read_block,
    read_known,
    write_pending,
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
    virtual: str = "both",
    growth: str = "gradual",
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
        virtual: what of the earlier steps joins the loss. `both` is the method. With `proxies`,
            virtual classes are negatives of the current rows and have no members. With
            `embeddings` there are none: the stored rows are further rows of the current classes.
        growth: when virtual classes join the loss. `gradual` is the method: those of each of the
            N steps as soon as it is old enough. With `at_once` there are none until all N are.

    Returns:
        A float32 scalar, differentiable in embeddings and proxies, and the new memory.

    Raises:
        ValueError: the memory was made for other sizes, or `virtual` or `growth` is unknown.
    """
    check_ablation(virtual=virtual, growth=growth)
    memory = write_pending(memory)
    embeddings, proxies = loss.prepare(embeddings, proxies)
    row_mask, class_mask = loss.fill_masks(embeddings, proxies, row_mask, class_mask)
    batch = _Batch(embeddings, proxies, row_mask, class_mask)
    real, synthetic = _split(loss, memory, batch, shards)
    block = read_block(memory, real.class_mask, growth)
    terms = loss.anchor_terms(embeddings, proxies, labels, row_mask, class_mask)
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
    known = memory.known
    if virtual == "both":
        of_stored = read_known(memory, loss)
        value = _with_virtual_classes(loss, block, of_stored, terms, real, synthetic, shards)
        known = known | {anchor_kind(loss): _updated_cache(loss, memory, block, entry, real)}
    elif virtual == "proxies":
        value = _with_stored_proxies(loss, block, terms, batch, shards)
    else:
        value = _with_stored_embeddings(loss, block, terms, batch, shards)
    value += loss.penalty(proxies, class_mask)
    update = memory._replace(steps=memory.steps + 1, pending=entry, known=known)
    return value, jax.lax.stop_gradient(update)


class _Batch(NamedTuple):
    """Prepared vectors of the current step, or of a part of it, with masks."""

    embeddings: Embeddings
    proxies: Proxies
    row_mask: RowMask
    class_mask: ClassMask


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


def _updated_cache(
    loss: losses.ProxyLoss, memory: Memory, block: Block, entry: Entry, real: _Batch
) -> LogSumExpCache:
    """Returns the log-sum-exp cache with the terms of an entry, the real part of the batch."""
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
    return memory.known[anchor_kind(loss)]._replace(
        pending_own=positives,
        # In the slot that the entry will occupy, candidates are those of the step itself.
        pending_over=current_over_stored.at[:, memory.steps // blocks % slots].set(log_sums),
        pending_of=stored_over_current,
    )


def _with_virtual_classes(
    loss: losses.ProxyLoss,
    block: Block,
    known: KnownTerms,
    terms: tuple[AnchorTerms, AnchorTerms],
    real: _Batch,
    synthetic: _Batch,
    shards: int,
) -> Scalar:
    """Returns the mean loss of the current and the stored anchors.

    Args:
        loss: the loss.
        block: the block of the memory for this step.
        known: its known terms.
        terms: `anchor_terms` of the current batch, including the synthetic part.
        real: the real part of the current batch.
        synthetic: the synthetic part.
        shards: number of devices that the classes are split over.
    """
    current_log_sums, positives = terms
    current_over_stored, stored_over_current = _cross_log_sums(loss, block, real)
    stored_parts = [
        stored_over_current[..., None],
        jnp.where(block.in_use[None, None], known.log_sums, -jnp.inf),
    ]
    anchor_mask = real.class_mask if loss.class_anchors else real.row_mask
    stored_mask = block.in_use[None] & anchor_mask[:, None]
    if len(synthetic.embeddings):
        synthetic_over_stored, stored_over_synthetic = _cross_log_sums(loss, block, synthetic)
        current_over_stored = _join(loss, current_over_stored, synthetic_over_stored, shards)
        stored_parts.append(stored_over_synthetic[..., None])
        synthetic_mask = synthetic.class_mask if loss.class_anchors else synthetic.row_mask
        anchor_mask = _join(loss, anchor_mask, synthetic_mask, shards)
    current_parts = [
        current_log_sums[:, None],
        jnp.where(block.in_use[None], current_over_stored, -jnp.inf),
    ]
    log_sums = numerics.log_sum_exp(jnp.concatenate(current_parts, axis=1), axis=1)
    stored_log_sums = numerics.log_sum_exp(jnp.concatenate(stored_parts, axis=2), axis=2)
    return loss.mean(
        _join(loss, log_sums, stored_log_sums.reshape(-1), shards),
        _join(loss, positives, known.positives.reshape(-1), shards),
        _join(loss, anchor_mask, stored_mask.reshape(-1), shards),
    )


def _with_stored_proxies(
    loss: losses.ProxyLoss,
    block: Block,
    terms: tuple[AnchorTerms, AnchorTerms],
    batch: _Batch,
    shards: int,
) -> Scalar:
    """Returns the mean loss of the current batch with stored proxies as classes without members.

    Args:
        loss: the loss.
        block: the block of the memory for this step.
        terms: `anchor_terms` of the current batch.
        batch: the current batch, including the synthetic part.
        shards: number of devices that the classes are split over.
    """
    log_sums, positives = terms
    logits = _logits_to_stored_proxies(loss, block, batch.embeddings)
    exist = block.class_mask[:, None] & block.in_use[None]
    if not loss.class_anchors:
        logits = logits.reshape(len(logits), -1)
        over_stored = numerics.log_sum_exp(logits, axis=1, where=exist.reshape(1, -1))
        log_sums = numerics.log_sum_exp(jnp.stack([log_sums, over_stored]), axis=0)
        return loss.mean(log_sums, positives, batch.row_mask)
    of_stored = numerics.log_sum_exp(logits, axis=0, where=batch.row_mask[:, None, None])
    of_stored = of_stored.reshape(-1)
    return loss.mean(
        _join(loss, log_sums, of_stored, shards),
        _join(loss, positives, jnp.full_like(of_stored, -jnp.inf), shards),
        _join(loss, batch.class_mask, exist.reshape(-1), shards),
    )


def _with_stored_embeddings(
    loss: losses.ProxyLoss,
    block: Block,
    terms: tuple[AnchorTerms, AnchorTerms],
    batch: _Batch,
    shards: int,
) -> Scalar:
    """Returns the mean loss of the current batch with stored rows as further rows of its classes.

    Args:
        loss: the loss.
        block: the block of the memory for this step.
        terms: `anchor_terms` of the current batch.
        batch: the current batch, including the synthetic part.
        shards: number of devices that the classes are split over.
    """
    rows, slots, dim = block.entries.embeddings.shape
    exist = jnp.broadcast_to(block.in_use[None], (rows, slots)).reshape(-1)
    classes = len(block.class_mask)
    labels = sharding.joined_positions(
        block.entries.labels.reshape(-1), classes, len(batch.class_mask) - classes, shards
    )
    stored = block.entries.embeddings.reshape(-1, dim).astype(jnp.float32)
    stored, proxies = _replicate_fewer(stored, batch.proxies)
    of_stored = loss.anchor_terms(stored, proxies, labels, exist, batch.class_mask)
    if loss.class_anchors:
        pairs = zip(terms, of_stored, strict=True)
        log_sums, positives = (numerics.log_sum_exp(jnp.stack(pair), axis=0) for pair in pairs)
        return loss.mean(log_sums, positives, batch.class_mask)
    both = zip((*terms, batch.row_mask), (*of_stored, exist), strict=True)
    return loss.mean(*(_join(loss, current, stored, shards) for current, stored in both))


def _join(loss: losses.ProxyLoss, x: Array, y: Array, shards: int) -> Array:
    """Returns two arrays of anchors as one."""
    if loss.class_anchors:
        return sharding.join(x, y, shards)
    # Rows of different shardings are expensive to concatenate; these arrays are small.
    return jnp.concatenate([sharding.replicate(x), sharding.replicate(y)])


def _cross_log_sums(
    loss: losses.ProxyLoss, block: Block, batch: _Batch
) -> tuple[Float[Array, "batch_anchors slots"], SlotTerms]:
    """Returns log-sum-exps between a batch and each slot of a block.

    Returns:
        The log-sum-exp of the batch's anchors over each slot's candidates, and of each slot's
        anchors over the batch's candidates.
    """
    rows, slots, dim = block.entries.embeddings.shape
    stored_rows = block.entries.embeddings.reshape(-1, dim)
    stored_rows, proxies = _replicate_fewer(stored_rows, batch.proxies)
    to_stored_proxies = _logits_to_stored_proxies(loss, block, batch.embeddings)
    to_stored_rows = loss.logits(stored_rows, proxies)
    to_stored_rows = to_stored_rows.reshape(rows, slots, -1)
    # Masks apply to candidates here; the caller masks the anchors.
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


def _logits_to_stored_proxies(
    loss: losses.ProxyLoss, block: Block, embeddings: Embeddings
) -> Float[Array, "rows classes slots"]:
    _, slots, dim = block.entries.embeddings.shape
    # Rows and classes are split over the same devices, so one factor of the product goes to all.
    embeddings = sharding.replicate(embeddings)
    # One product for all slots: a vmap over slots would copy the transposed proxies.
    logits = loss.logits(embeddings, block.entries.proxies.reshape(-1, dim))
    return logits.reshape(len(embeddings), -1, slots)


def _replicate_fewer(rows: Embeddings, proxies: Proxies) -> tuple[Embeddings, Proxies]:
    """Returns rows and proxies for a product, in which the fewer of them go to all devices."""
    if len(proxies) < len(rows):
        return rows, sharding.replicate(proxies)
    return sharding.replicate(rows), proxies
