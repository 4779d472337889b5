import functools

import jax
import jax.numpy as jnp
import numpy as np

from dml_jax import losses, memvir
from dml_jax.report import training_map

BATCH, CLASSES, DIM, SLOTS, BLOCKS = 4, 3, 5, 3, 2


def test_entries_are_ordered_by_age():
    loss = losses.NormSoftmax()
    memory = memvir.init(
        num_steps=SLOTS,
        step_gap=BLOCKS - 1,
        batch_size=BATCH,
        num_classes=CLASSES,
        dim=DIM,
        loss=loss,
    )
    update = jax.jit(functools.partial(memvir.loss_and_update, loss))
    rng = np.random.default_rng(0)
    seen = []
    for step in range(16):
        entries = training_map._entries(memory)
        assert len(entries.labels) == min(step, SLOTS * BLOCKS)
        for i, (rows, columns, labels) in enumerate(seen[: len(entries.labels)]):
            np.testing.assert_allclose(entries.embeddings[i], rows, rtol=1e-5)
            np.testing.assert_allclose(entries.proxies[i], columns, rtol=1e-5)
            np.testing.assert_array_equal(entries.labels[i], labels)
        rows, columns = loss.prepare(
            jnp.asarray(rng.normal(size=(BATCH, DIM))), jnp.asarray(rng.normal(size=(CLASSES, DIM)))
        )
        labels = rng.integers(CLASSES, size=BATCH)
        seen.insert(0, (rows, columns, labels))
        _, memory = update(memory, rows, columns, jnp.asarray(labels))
