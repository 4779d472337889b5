"""MemVir: the classes of earlier steps, embeddings and proxies alike, as classes of their own.

Source: Ko, Gu and Kim, Learning with memory-based virtual classes for deep metric learning,
ICCV 2021 (arXiv 2103.16940).

At step t the virtual classes are those of steps t-(M+1), t-2(M+1), ..., t-N(M+1), as far back as
there are any. The loss is the mean over the rows of all N+1 steps, each row against the proxies
of all of them. Computed as written that is a matrix of (N+1)B x (N+1)C logits, but most of it was
computed before: of two remembered steps, the newer was once the current one while the older was in
memory, and neither has changed since. So each remembered row keeps the log-sum-exp of its logits
against every remembered step's proxies, and a step computes only the current rows against all
proxies and the remembered rows against the current ones: (2N+1)BC logits, with the same value and
the same gradients.

Steps M+1 apart share a block of the ring, `[block, slot, ...]`, and so everything that a step reads
is one contiguous slice. A step's own entry waits in `pending` until the next step begins: a
program that read the ring and wrote it afterwards would have to copy it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dml_jax import losses


class Entry(NamedTuple):
    """What is remembered of a step, or of many behind leading axes; nothing has a gradient."""

    embeddings: Float[Array, "*steps batch dim"]
    proxies: Float[Array, "*steps classes dim"]
    labels: Int[Array, "*steps batch"]
    targets: Float[Array, "*steps batch"]
    """Each row's logit for its own label, margin included."""


class Memory(NamedTuple):
    """The ring buffer, one block for each residue of the step modulo M+1, N slots a block."""

    steps: Int[Array, ""]
    """How many were remembered since the warm-up; zero makes the memory an empty one."""
    ring: Entry
    """`[M+1, N, ...]`."""
    row_sums: Float[Array, "blocks slots slots batch"]
    """`[block, a, b]`: log-sum-exp of slot a's rows over slot b's proxies."""
    pending: Entry
    """The latest step, which the next one puts into the ring."""
    pending_row_sums: Float[Array, "slots batch"]
    """Log-sum-exp of the pending rows over each slot's proxies."""
    pending_proxy_sums: Float[Array, "slots batch"]
    """Log-sum-exp of each slot's rows over the pending proxies."""


def init(
    *,
    num_steps: int,
    step_gap: int,
    batch_size: int,
    num_classes: int,
    dim: int,
    dtype: DTypeLike = jnp.float32,
) -> Memory:
    """An empty memory.

    Args:
        num_steps: N, how many earlier steps take part in a loss.
        step_gap: M, how many steps lie between two that take part.
        batch_size: B, rows that are remembered of a step.
        num_classes: C, proxies that are remembered of a step.
        dim: D, size of an embedding.
        dtype: of the remembered embeddings and proxies.

    Returns:
        A memory of N(M+1) steps.

    Raises:
        ValueError: a size that is too small.
    """
    for name, value, least in (
        ("num_steps", num_steps, 1),
        ("step_gap", step_gap, 0),
        ("batch_size", batch_size, 1),
        ("num_classes", num_classes, 1),
        ("dim", dim, 1),
    ):
        if value < least:
            raise ValueError(f"memvir needs {name} of at least {least}, got {value}")

    def entry(*steps: int) -> Entry:
        return Entry(
            embeddings=jnp.zeros((*steps, batch_size, dim), dtype),
            proxies=jnp.zeros((*steps, num_classes, dim), dtype),
            labels=jnp.zeros((*steps, batch_size), jnp.int32),
            targets=jnp.zeros((*steps, batch_size)),
        )

    blocks = step_gap + 1
    return Memory(
        steps=jnp.zeros((), jnp.int32),
        ring=entry(blocks, num_steps),
        row_sums=jnp.zeros((blocks, num_steps, num_steps, batch_size)),
        pending=entry(),
        pending_row_sums=jnp.zeros((num_steps, batch_size)),
        pending_proxy_sums=jnp.zeros((num_steps, batch_size)),
    )


def loss_and_update(
    loss: losses.SoftmaxLoss,
    memory: Memory,
    embeddings: Float[Array, "rows dim"],
    proxies: Float[Array, "proxies dim"],
    labels: Int[Array, " rows"],
    *,
    row_mask: Bool[Array, " rows"] | None = None,
    class_mask: Bool[Array, " classes"] | None = None,
) -> tuple[Float[Array, ""], Memory]:
    """The loss of a step with the virtual classes in memory, and the memory with that step in it.

    The first B rows and C proxies are remembered, B and C as the memory has them. Any that follow
    (synthetic classes) take part in this step only; remembered rows meet their proxies too.

    Args:
        loss: forms the logits.
        memory: of the steps before this one.
        embeddings: `[rows, dim]`, raw.
        proxies: `[proxies, dim]`, raw, as they are before this step's update.
        labels: `[rows]`, in `0..classes - 1`.
        row_mask: rows that count; None counts all. The first B must.
        class_mask: classes that exist; None takes all. The first C must.

    Returns:
        A float32 scalar, differentiable in embeddings and proxies, and the new memory.
    """
    memory = _store_pending(memory)
    blocks, slots, batch = memory.ring.labels.shape
    classes = memory.pending.proxies.shape[0]
    block, slot = memory.steps % blocks, memory.steps // blocks % slots
    in_use = jnp.arange(slots) < memory.steps // blocks
    past: Entry
    past, past_sums = jax.tree.map(
        lambda stored: jax.lax.dynamic_index_in_dim(stored, block, keepdims=False),
        (memory.ring, memory.row_sums),
    )
    rows, columns = loss.prepare(embeddings, proxies)

    # The current rows, against the current proxies and those in memory.
    logits = loss.logits(rows, columns)
    own_sums, targets = losses.row_terms(loss, logits, labels, class_mask)
    sums_over_past = _sums_over_slots(loss, rows, past.proxies)
    reached = jnp.where(in_use[:, None], sums_over_past, -jnp.inf)
    current = jax.nn.logsumexp(jnp.vstack([own_sums, reached]), axis=0) - targets

    # The rows in memory, against the current proxies; the rest of their logits are remembered.
    sums_of_past = _sums_of_slots(loss, past.embeddings, columns[:classes])
    known = jnp.where(in_use[None, :, None], past_sums, -jnp.inf)
    terms = [sums_of_past[:, None], known]
    if len(columns) > classes:
        extra_mask = None if class_mask is None else class_mask[classes:]
        extra = _sums_of_slots(loss, past.embeddings, columns[classes:], extra_mask)
        terms.append(extra[:, None])
    virtual = jax.nn.logsumexp(jnp.concatenate(terms, axis=1), axis=1) - past.targets

    counted = jnp.ones(len(rows), bool) if row_mask is None else row_mask
    total = jnp.sum(current, where=counted) + jnp.sum(virtual, where=in_use[:, None])
    mean = total / (jnp.sum(counted) + batch * jnp.sum(in_use)).astype(jnp.float32)

    entry = Entry(
        embeddings=rows[:batch].astype(memory.ring.embeddings.dtype),
        proxies=columns[:classes].astype(memory.ring.proxies.dtype),
        labels=labels[:batch].astype(jnp.int32),
        targets=targets[:batch],
    )
    if entry.embeddings.dtype == rows.dtype:
        among_own, _ = losses.row_terms(loss, logits[:batch, :classes], labels[:batch])
        sums_over_past = sums_over_past[:, :batch]
    else:
        entry, among_own, sums_over_past, sums_of_past = _sums_of_rounded(loss, entry, past)
    update = jax.lax.stop_gradient(
        memory._replace(
            steps=memory.steps + 1,
            pending=entry,
            # Slot `slot` is where this entry will go: its rows meet their own proxies there.
            pending_row_sums=sums_over_past.at[slot].set(among_own),
            pending_proxy_sums=sums_of_past,
        )
    )
    return mean, update


def _store_pending(memory: Memory) -> Memory:
    """Puts the latest step into the ring; before the first step, zeros that nothing reads."""
    blocks, slots, _ = memory.ring.labels.shape
    latest = memory.steps - 1
    block, slot = latest % blocks, latest // blocks % slots
    ring = jax.tree.map(
        lambda ring, entry: ring.at[block, slot].set(entry), memory.ring, memory.pending
    )
    row_sums = memory.row_sums.at[block, :, slot].set(memory.pending_proxy_sums)
    row_sums = row_sums.at[block, slot].set(memory.pending_row_sums)
    return memory._replace(ring=ring, row_sums=row_sums)


def _sums_over_slots(
    loss: losses.SoftmaxLoss,
    rows: Float[Array, "rows dim"],
    proxies: Float[Array, "slots classes dim"],
) -> Float[Array, "slots rows"]:
    logits = jax.vmap(loss.logits, in_axes=(None, 0))(rows, proxies)
    return jax.nn.logsumexp(logits, axis=-1)


def _sums_of_slots(
    loss: losses.SoftmaxLoss,
    rows: Float[Array, "slots batch dim"],
    proxies: Float[Array, "proxies dim"],
    class_mask: Bool[Array, " classes"] | None = None,
) -> Float[Array, "slots batch"]:
    logits = jax.vmap(loss.logits, in_axes=(0, None))(rows, proxies)
    return jax.nn.logsumexp(logits, axis=-1, where=class_mask)


def _sums_of_rounded(
    loss: losses.SoftmaxLoss, entry: Entry, past: Entry
) -> tuple[Entry, Float[Array, " batch"], Float[Array, "slots batch"], Float[Array, "slots batch"]]:
    """What is kept of an entry that storage rounds: sums of the vectors as they are stored."""
    rows, columns = entry.embeddings.astype(jnp.float32), entry.proxies.astype(jnp.float32)
    among_own, targets = losses.row_terms(loss, loss.logits(rows, columns), entry.labels)
    return (
        entry._replace(targets=targets),
        among_own,
        _sums_over_slots(loss, rows, past.proxies),
        _sums_of_slots(loss, past.embeddings, columns),
    )
