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
the same gradients. That is for losses that sum over classes; Proxy-Anchor sums over rows for each
proxy, and the same holds with the two exchanged. What sums is called a unit here, what it sums over
the others.

Every array is laid out `[unit, block, slot, ...]`, so that all are split over devices alike. Steps
M+1 apart share a block of the ring: what a step reads is one slice of it. A step's own entry waits
in `pending` until the next step begins: a program that read the ring and wrote it afterwards would
have to copy it.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from dml_jax import losses
from dml_jax._utils import numerics, sharding
from dml_jax.settings import choice, integer, setting


@dataclasses.dataclass(frozen=True)
class MemVirConfig:
    """The settings of MemVir."""

    num_steps: int = setting(
        0,
        integer(0),
        help="Earlier steps whose classes take part as virtual classes, the paper's N; 0 is no "
        "MemVir.",
    )
    step_gap: int = setting(
        0, integer(0), help="Steps between two remembered steps, the paper's M."
    )
    warmup_epochs: int = setting(0, integer(0), help="Epochs at the start without virtual classes.")
    dtype: str = setting(
        "float32", choice(("float32", "bfloat16")), help="What remembered vectors are stored in."
    )


class Entry(NamedTuple):
    """What is remembered of a step, or of many behind the first axis; nothing has a gradient."""

    embeddings: Float[Array, "batch *steps dim"]
    proxies: Float[Array, "classes *steps pdim"]
    """Those of a class, if it has several, one after the other."""
    labels: Int[Array, "batch *steps"]


class Known(NamedTuple):
    """What remembered units, rows or classes, need never compute again."""

    own: Float[Array, "units blocks slots"]
    """What each has with its own class, as `ProxyLoss.within` gives it."""
    sums: Float[Array, "units blocks slots slots"]
    """`[unit, block, a, b]`: log-sum-exp of slot a's unit over slot b's others."""
    pending_own: Float[Array, " units"]
    """Of the latest step."""
    pending_over: Float[Array, "units slots"]
    """Log-sum-exp of the latest step's units over each slot's others."""
    pending_of: Float[Array, "units slots"]
    """Log-sum-exp of each slot's units over the latest step's others."""


class Memory(NamedTuple):
    """The ring buffer, one block for each residue of the step modulo M+1, N slots a block."""

    steps: Int[Array, ""]
    """How many were remembered since the warm-up; zero makes the memory an empty one."""
    ring: Entry
    """Of `[M+1, N]` steps."""
    pending: Entry
    """The latest step, which the next one puts into the ring."""
    known: dict[str, Known]
    """By the losses' units, `rows` or `classes`."""


def init(
    *,
    num_steps: int,
    step_gap: int,
    batch_size: int,
    num_classes: int,
    dim: int,
    dtype: DTypeLike = jnp.float32,
    loss: losses.ProxyLoss | None = None,
    shards: int = 1,
) -> Memory:
    """An empty memory.

    Args:
        num_steps: N, how many earlier steps take part in a loss.
        step_gap: M, how many steps lie between two that take part.
        batch_size: B, rows that are remembered of a step.
        num_classes: C, classes that are remembered of a step.
        dim: D, size of an embedding.
        dtype: of the remembered embeddings and proxies.
        loss: whose memory it is. By default it fits any loss that has `[num_classes, dim]` proxies,
            and is larger by what losses of the other kind would keep.
        shards: over how many devices it will be split, each with its share of a step's rows and
            classes. Classes are padded where they cannot be shared out evenly.

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
        ("shards", shards, 1),
    ):
        if value < least:
            raise ValueError(f"memvir needs {name} of at least {least}, got {value}")
    num_classes = -(-num_classes // shards) * shards
    per_class, pdim = (1, dim) if loss is None else loss.proxy_shape(1, dim)
    units = {"rows": batch_size, "classes": num_classes}
    if loss is not None:
        units = {_units(loss): units[_units(loss)]}
    blocks = step_gap + 1

    def entry(*steps: int) -> Entry:
        return Entry(
            embeddings=jnp.zeros((batch_size, *steps, pdim), dtype),
            proxies=jnp.zeros((num_classes, *steps, per_class * pdim), dtype),
            labels=jnp.zeros((batch_size, *steps), jnp.int32),
        )

    def known(count: int) -> Known:
        return Known(
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
        known={name: known(count) for name, count in units.items()},
    )


def loss_and_update(
    loss: losses.ProxyLoss,
    memory: Memory,
    embeddings: Float[Array, "rows dim"],
    proxies: Float[Array, "proxies pdim"],
    labels: Int[Array, " rows"],
    *,
    row_mask: Bool[Array, " rows"] | None = None,
    class_mask: Bool[Array, " classes"] | None = None,
) -> tuple[Float[Array, ""], Memory]:
    """The loss of a step with the virtual classes in memory, and the memory with that step in it.

    The first B rows are remembered, B as the memory has it, and all classes but as many of the last
    as there are rows beyond B: those are synthetic classes of one row each. They take part in this
    step only; what is in memory meets them too.

    Args:
        loss: the loss.
        memory: of the steps before this one.
        embeddings: `[rows, dim]`, raw.
        proxies: raw, as they are before this step's update, `[classes, dim]` or as the loss has it.
        labels: `[rows]`, in `0..classes - 1`.
        row_mask: rows that count; None counts all. The first B must.
        class_mask: classes that exist; None takes all. The first C must.

    Returns:
        A float32 scalar, differentiable in embeddings and proxies, and the new memory.

    Raises:
        ValueError: the memory was made for other sizes.
    """
    memory = _store_pending(memory)
    rows, columns = loss.prepare(embeddings, proxies)
    row_mask, class_mask = loss.masks(rows, columns, row_mask, class_mask)
    actual, synthetic = _parts(loss, memory, _Part(rows, columns, row_mask, class_mask))
    past = _recall(loss, memory, actual.class_mask)
    within = loss.within(rows, columns, labels, row_mask, class_mask)
    value = _loss(loss, past, within, actual, synthetic) + loss.penalty(columns, class_mask)

    entry = Entry(
        embeddings=actual.rows.astype(memory.ring.embeddings.dtype),
        proxies=actual.columns.reshape(len(actual.class_mask), -1).astype(
            memory.ring.proxies.dtype
        ),
        labels=labels[: len(actual.rows)].astype(jnp.int32),
    )
    # What is kept is computed from the vectors as they are stored, which may be rounded. Where they
    # are not, the compiler finds that it has these numbers already.
    actual = actual._replace(
        rows=entry.embeddings.astype(jnp.float32),
        columns=entry.proxies.reshape(actual.columns.shape).astype(jnp.float32),
    )
    own_sums, own = loss.within(
        actual.rows, actual.columns, entry.labels, actual.row_mask, actual.class_mask
    )
    over, of = _across(loss, past, actual)
    _, blocks, slots = memory.ring.labels.shape
    known = memory.known[_units(loss)]._replace(
        pending_own=own,
        # In the slot where this entry will go its units meet their own others.
        pending_over=over.at[:, memory.steps // blocks % slots].set(own_sums),
        pending_of=of,
    )
    update = memory._replace(
        steps=memory.steps + 1, pending=entry, known=memory.known | {_units(loss): known}
    )
    return value, jax.lax.stop_gradient(update)


def choose(taken: Bool[Array, ""], update: Memory, before: Memory) -> Memory:
    """The memory with a step in it, or as it was before, if the step is not taken.

    Only what is small is chosen. The ring and what is known of its units differ by the entry that
    was pending before, which the next step puts there in any case.

    Args:
        taken: whether the step is.
        update: the memory with the step, as `loss_and_update` gives it.
        before: the memory that this was given.

    Returns:
        A memory from which the next step reads the same as from the one that is chosen.
    """

    def chosen(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree.map(lambda x, y: jnp.where(taken, x, y), new, old)

    def latest(known: Known) -> tuple[Array, ...]:
        return known.pending_own, known.pending_over, known.pending_of

    known = {}
    for name, new in update.known.items():
        own, over, of = chosen(latest(new), latest(before.known[name]))
        known[name] = new._replace(pending_own=own, pending_over=over, pending_of=of)
    return update._replace(
        steps=chosen(update.steps, before.steps),
        pending=chosen(update.pending, before.pending),
        known=known,
    )


class _Part(NamedTuple):
    """Prepared vectors of the step under way, and which of them count."""

    rows: Float[Array, "rows dim"]
    columns: Float[Array, "proxies dim"]
    row_mask: Bool[Array, " rows"]
    class_mask: Bool[Array, " classes"]


class _Past(NamedTuple):
    """What a step sees of the memory: the slots of one block."""

    entries: Entry
    own: Float[Array, "units slots"]
    sums: Float[Array, "units slots slots"]
    in_use: Bool[Array, " slots"]
    class_mask: Bool[Array, " classes"]


def _parts(loss: losses.ProxyLoss, memory: Memory, step: _Part) -> tuple[_Part, _Part]:
    """What is remembered of a step, its classes padded as the memory's are, and the rest of it."""
    per_class = loss.proxies_per_class
    (batch, dim), (held, held_dim) = memory.pending.embeddings.shape, memory.pending.proxies.shape
    classes = len(step.class_mask) - (len(step.rows) - batch)
    if (
        len(step.rows) < batch
        or not 0 < classes <= held
        or step.rows.shape[1] != dim
        or held_dim != dim * per_class
    ):
        raise ValueError(
            f"a memory of {batch} rows of {dim} and {held} classes of {held_dim} numbers cannot "
            f"take a step of rows {step.rows.shape} and proxies {step.columns.shape}, {per_class} "
            "for each class; make it by memvir.init(loss=..., ...)"
        )
    proxies = classes * per_class
    actual = _Part(
        step.rows[:batch],
        jnp.pad(step.columns[:proxies], ((0, (held - classes) * per_class), (0, 0))),
        jnp.ones(batch, bool),
        jnp.arange(held) < classes,
    )
    synthetic = _Part(
        step.rows[batch:],
        step.columns[proxies:],
        step.row_mask[batch:],
        step.class_mask[classes:],
    )
    return actual, synthetic


def _recall(loss: losses.ProxyLoss, memory: Memory, class_mask: Bool[Array, " classes"]) -> _Past:
    _, blocks, slots = memory.ring.labels.shape
    known = memory.known[_units(loss)]
    entries, own, sums = jax.tree.map(
        lambda stored: jax.lax.dynamic_index_in_dim(
            stored, memory.steps % blocks, axis=1, keepdims=False
        ),
        (memory.ring, known.own, known.sums),
    )
    return _Past(entries, own, sums, jnp.arange(slots) < memory.steps // blocks, class_mask)


def _loss(
    loss: losses.ProxyLoss,
    past: _Past,
    within: tuple[Float[Array, " units"], Float[Array, " units"]],
    actual: _Part,
    synthetic: _Part,
) -> Float[Array, ""]:
    """The loss of a step's units and of those in memory.

    Only the units of this step over all others, and those in memory over this step's others, are
    computed: the rest is known.
    """
    own_sums, own = within
    over, of = _across(loss, past, actual)
    of_terms = [of[..., None], jnp.where(past.in_use[None, None], past.sums, -jnp.inf)]
    counts = actual.class_mask if loss.per_class else actual.row_mask
    past_counts = past.in_use[None] & counts[:, None]
    # Padded classes are in memory alone.
    over = over[: len(own) - len(synthetic.rows)]
    counts = counts[: len(over)]
    if len(synthetic.rows):
        more, of_more = _across(loss, past, synthetic)
        over = jnp.concatenate([over, more])
        of_terms.append(of_more[..., None])
        counts = jnp.append(counts, synthetic.class_mask if loss.per_class else synthetic.row_mask)
    over_terms = jnp.concatenate(
        [own_sums[:, None], jnp.where(past.in_use[None], over, -jnp.inf)], axis=1
    )
    sums = numerics.log_sum_exp(over_terms, axis=1)
    past_sums = numerics.log_sum_exp(jnp.concatenate(of_terms, axis=2), axis=2)
    # Arrays split in different ways are not appended without much ado; these are a few numbers.
    pairs = (sums, past_sums), (own, past.own), (counts, past_counts)
    return loss.mean(
        *(jnp.append(sharding.replicate(new), sharding.replicate(old)) for new, old in pairs)
    )


def shardings(memory: Memory, mesh: jax.sharding.Mesh) -> PyTree:
    """How a memory is split over devices: by a step's rows, and by its classes.

    Args:
        memory: made for as many shards as the mesh has devices; shapes will do.
        mesh: the devices.

    Returns:
        A sharding for each of the memory's arrays.
    """
    return jax.tree.map(
        lambda x: sharding.batch_sharding(mesh) if x.ndim else sharding.replicated_sharding(mesh),
        memory,
    )


def _units(loss: losses.ProxyLoss) -> str:
    return "classes" if loss.per_class else "rows"


def _store_pending(memory: Memory) -> Memory:
    """Puts the latest step into the ring; before the first step, zeros that nothing reads."""
    _, blocks, slots = memory.ring.labels.shape
    latest = memory.steps - 1
    block, slot = latest % blocks, latest // blocks % slots

    def stored(known: Known) -> Known:
        sums = known.sums.at[:, block, :, slot].set(known.pending_of)
        return known._replace(
            own=known.own.at[:, block, slot].set(known.pending_own),
            sums=sums.at[:, block, slot].set(known.pending_over),
        )

    return memory._replace(
        ring=jax.tree.map(
            lambda ring, entry: ring.at[:, block, slot].set(entry), memory.ring, memory.pending
        ),
        known={name: stored(known) for name, known in memory.known.items()},
    )


def _across(
    loss: losses.ProxyLoss, past: _Past, part: _Part
) -> tuple[Float[Array, "new_units slots"], Float[Array, "units slots"]]:
    """Log-sum-exps of a step's units over each slot's others, and of each slot's over theirs."""
    batch, slots, dim = past.entries.embeddings.shape
    # On many devices each has its share of the memory, and the step's few vectors come to it.
    rows, columns = sharding.replicate(part.rows), sharding.replicate(part.columns)
    # All slots at once: mapped over them, a matrix product would copy the proxies transposed.
    old_columns = loss.logits(rows, past.entries.proxies.reshape(-1, dim))
    old_columns = old_columns.reshape(len(rows), -1, slots)
    old_rows = loss.logits(past.entries.embeddings.reshape(-1, dim), columns)
    old_rows = old_rows.reshape(batch, slots, -1)
    # Units that do not exist are summed too, and left out of the mean; others are left out here.
    if loss.per_class:
        over = numerics.log_sum_exp(old_rows, axis=0).T
        return over, numerics.log_sum_exp(old_columns, axis=0, where=part.row_mask[:, None, None])
    over = numerics.log_sum_exp(old_columns, axis=1, where=past.class_mask[None, :, None])
    return over, numerics.log_sum_exp(old_rows, axis=2, where=part.class_mask[None, None])
