"""Losses of pairs and the cross-batch memory, against the official code of XBM."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dml_jax import losses, xbm
from dml_jax._utils import sharding

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "pairs.npz")
STEPS, BATCH, DIM = GOLDEN["embeddings"].shape
SLOTS = 4
HYPERPARAMETERS = {"contrastive": {}, "multi_similarity": {"scale_pos": 2.0, "scale_neg": 40.0}}
of_loss = pytest.mark.parametrize("name", losses.pair_names())
of_official_loss = pytest.mark.parametrize("name", HYPERPARAMETERS)


def batch(step):
    return jnp.asarray(GOLDEN["embeddings"][step]), jnp.asarray(GOLDEN["labels"][step])


def above_margin(step, candidates):
    """Returns what the official contrastive loss adds to ours: the margin of each active pair."""
    rows, labels = batch(step)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    active = 0
    for other in candidates:
        columns, of_columns = batch(other)
        columns = columns / np.linalg.norm(columns, axis=1, keepdims=True)
        different = np.asarray(labels)[:, None] != np.asarray(of_columns)
        active += np.sum((np.asarray(rows @ columns.T) > 0.5) & different)
    return 0.5 * active / BATCH


def check(name, value, expected, step, candidates):
    if name == "contrastive":
        expected = expected - above_margin(step, candidates)
    np.testing.assert_allclose(value, expected, rtol=2e-6)


@of_official_loss
def test_losses_and_gradients_equal_the_official_code(name):
    loss = losses.create(name, **HYPERPARAMETERS[name])
    for step in range(STEPS):
        value, gradient = jax.value_and_grad(loss)(*batch(step))
        check(name, value, GOLDEN[f"{name}_{step}"], step, [step])
    expected = GOLDEN[f"{name}_gradient"]
    assert np.linalg.norm(gradient - expected) < 1e-5 * np.linalg.norm(expected)


@of_official_loss
@pytest.mark.parametrize("devices", [1, 4])
def test_the_memory_equals_the_official_code_on_any_number_of_devices(name, devices):
    """Six steps in a memory of four: the last two overwrite the first two."""
    mesh = sharding.make_mesh(jax.devices()[:devices])
    loss = losses.create(name, **HYPERPARAMETERS[name])
    memory = jax.tree.map(
        lambda x: jax.device_put(
            x, sharding.batch_sharding(mesh) if x.ndim else sharding.replicated_sharding(mesh)
        ),
        xbm.init(num_steps=SLOTS, batch_size=BATCH, dim=DIM),
    )

    @jax.jit
    def step_of(memory, embeddings, labels):
        def of_embeddings(embeddings):
            return xbm.loss_and_update(loss, memory, embeddings, labels)

        return jax.value_and_grad(of_embeddings, has_aux=True)(embeddings)

    for step in range(STEPS):
        (value, memory), gradient = step_of(memory, *batch(step))
        stored = range(max(0, step - SLOTS + 1), step + 1)
        check(name, value, GOLDEN[f"{name}_{step}_xbm"], step, [step, *stored])
        assert memory.embeddings.sharding.num_devices == devices
    expected = GOLDEN[f"{name}_xbm_gradient"]
    assert np.linalg.norm(gradient - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_triplets_are_the_hardest_ones(margin):
    embeddings, labels = (np.asarray(x) for x in batch(0))
    labels = labels.copy()
    labels[0] = 0  # Without a positive.
    rows = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    found = []
    for i in range(1, BATCH):
        distances = np.linalg.norm(rows[i] - rows, axis=1)
        others = np.arange(BATCH) != i
        far = distances[others & (labels == labels[i])].max()
        near = distances[labels != labels[i]].min()
        found.append(np.log1p(np.exp(far - near)) if not margin else far - near + margin)
    expected = np.mean(found if not margin else np.maximum(found, 0))
    value = losses.create("triplet", margin=margin)(jnp.asarray(embeddings), jnp.asarray(labels))
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_a_rejected_step_leaves_no_trace():
    loss = losses.create("contrastive")
    before = xbm.init(num_steps=2, batch_size=BATCH, dim=DIM)
    for step in range(3):
        before = xbm.loss_and_update(loss, before, *batch(step))[1]
    rejected = xbm.loss_and_update(loss, before, batch(3)[0] * jnp.nan, batch(3)[1])[1]
    after = xbm.choose(jnp.asarray(False), rejected, before)
    expected, _ = xbm.loss_and_update(loss, before, *batch(4))
    value, _ = xbm.loss_and_update(loss, after, *batch(4))
    assert value == expected


@of_loss
def test_rows_without_pairs_have_no_loss_and_no_gradient(name):
    loss = losses.create(name)
    # No negatives, then no positives; unit vectors at right angles are below every margin.
    rows = jnp.eye(4, 6)
    for labels in (jnp.zeros(4, int), jnp.arange(4)):
        value, gradient = jax.value_and_grad(loss)(rows, labels)
        assert np.isfinite(gradient).all()
        if name != "contrastive" or labels[1]:
            assert value == 0 and not gradient.any()


@of_loss
def test_nan_propagates_and_float32_is_returned(name):
    loss = losses.create(name)
    embeddings, labels = batch(0)
    assert np.isnan(loss(embeddings.at[2, 3].set(np.nan), labels))
    assert loss(embeddings.astype(jnp.bfloat16), labels).dtype == jnp.float32


def test_bad_sizes_and_losses_are_rejected():
    with pytest.raises(ValueError, match="num_steps of at least 1, got 0"):
        xbm.init(num_steps=0, batch_size=2, dim=3)
    with pytest.raises(ValueError, match="has no proxies"):
        losses.of_proxies(losses.create("contrastive"))
