from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dml_jax import losses, memvir, proxy_synthesis
from dml_jax._utils import sharding
from tests.helpers.oracles import DenseMemVir, normalized

GOLDEN = Path(__file__).parent / "golden"
HYPERPARAMETERS = {"soft_triple": {"centers_per_class": 3}}
KINDS = ("norm_softmax", "soft_triple", "proxy_anchor")  # One loss of each structure.


def make_step(loss, ratio=0.0):
    """Returns a compiled step: loss, new memory and gradients. Compiling it twice fails the test.

    With weights and partners as further arguments the step applies Proxy Synthesis. With None as
    the memory it applies the loss alone.
    """
    chex.clear_trace_counter()  # It counts per line of code, not per function object.

    def objective(embeddings, proxies, memory, labels, *mixing):
        problem = {"embeddings": embeddings, "proxies": proxies, "labels": labels}
        if mixing:
            lam, partner = mixing
            problem = proxy_synthesis.synthesize(
                **problem, lam=lam, partner=partner, ratio=ratio, loss=loss
            )._asdict()
        if memory is None:
            return loss(**problem), None
        return memvir.loss_and_update(loss, memory, **problem)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(memory, embeddings, proxies, labels, *mixing):
        return jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(
            embeddings, proxies, memory, labels, *mixing
        )

    return step


def close(ours, expected):
    """Whether the distance is within 1e-5 of the expected norm, or of 1 if that is larger."""
    distance = np.linalg.norm(np.asarray(ours) - np.asarray(expected))
    return distance <= 1e-5 * max(1, np.linalg.norm(expected))


@pytest.mark.parametrize("name", ["norm_softmax", "proxy_nca"])
def test_trajectory_matches_the_official_implementation(name):
    golden = np.load(GOLDEN / f"memvir_{name}.npz")
    steps, batch, dim = golden["embeddings"].shape
    memory = memvir.init(
        num_steps=int(golden["num_steps"]),
        step_gap=int(golden["step_gap"]),
        batch_size=batch,
        num_classes=len(golden["proxies_init"]),
        dim=dim,
    )
    loss = losses.create(name, scale=float(golden["scale"]))
    step = make_step(loss)
    plain = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    warmup = int(golden["warmup_epochs"] * golden["steps_per_epoch"])
    proxies = jnp.asarray(golden["proxies_init"])
    for t in range(steps):
        batch = jnp.asarray(golden["embeddings"][t]), proxies, jnp.asarray(golden["labels"][t])
        if t < warmup:
            value, gradients = plain(*batch)
        else:
            (value, memory), gradients = step(memory, *batch)
        assert close(value, golden["losses"][t]), t
        assert close(gradients[0], golden["grad_embeddings"][t]), t
        assert close(gradients[1], golden["grad_proxies"][t]), t
        proxies = proxies - float(golden["proxy_lr"]) * gradients[1]
    assert close(proxies, golden["proxies_final"])


def run_against_dense(name, *, num_steps, step_gap, batch, classes, dim, steps, **options):
    """Compares every step of a run with `DenseMemVir`; `options`: seed, synthetic, dtype."""
    rng = np.random.default_rng(options.get("seed", 0))
    synthetic, dtype = options.get("synthetic", 0), options.get("dtype", jnp.float32)
    hyperparameters = HYPERPARAMETERS.get(name, {})
    loss = losses.create(name, **hyperparameters)
    sizes = {"num_steps": num_steps, "step_gap": step_gap, "dtype": dtype}
    dense = DenseMemVir(
        name, batch=batch, classes=classes, synthetic=synthetic, **sizes, **hyperparameters
    )
    memory = None
    if num_steps:
        memory = memvir.init(batch_size=batch, num_classes=classes, dim=dim, loss=loss, **sizes)
    ratio = synthetic / batch
    step = make_step(loss, ratio)
    draw = jax.jit(proxy_synthesis.draw, static_argnames=("alpha", "ratio"))
    proxies = jnp.asarray(rng.normal(size=(classes * loss.proxies_per_class, dim)), jnp.float32)
    for t in range(steps):
        labels = jnp.asarray(rng.integers(classes, size=batch))
        problem = jnp.asarray(rng.normal(size=(batch, dim)), jnp.float32), proxies, labels
        mixing = draw(jax.random.key(t), labels, alpha=0.4, ratio=ratio) if synthetic else ()
        (value, memory), gradients = step(memory, *problem, *mixing)
        expected, expected_gradients = dense(*problem, *mixing)
        assert close(value, expected), t
        assert close(gradients[0], expected_gradients[0]), t
        assert close(gradients[1], expected_gradients[1]), t
        if dtype != jnp.float32:  # Rounding may differ by the last bit: copy ours.
            dense.steps[-1] = jax.tree.map(lambda x: x.astype(jnp.float32), memory.pending[:2]) + (
                memory.pending.labels,
            )
        proxies = proxies - 0.5 * gradients[1]


@pytest.mark.parametrize(
    ("num_steps", "step_gap", "synthetic"),
    [
        (5, 7, 3),
        pytest.param(5, 7, 0, marks=pytest.mark.slow),
        pytest.param(3, 2, 3, marks=pytest.mark.slow),
        pytest.param(4, 0, 0, marks=pytest.mark.slow),
        pytest.param(0, 0, 3, marks=pytest.mark.slow),  # Proxy Synthesis alone.
    ],
)
@pytest.mark.parametrize("name", losses.names())
def test_equals_the_dense_form(name, num_steps, step_gap, synthetic):
    run_against_dense(
        name,
        num_steps=num_steps,
        step_gap=step_gap,
        batch=4,
        classes=3,
        dim=6,
        steps=max(60, 3 * num_steps * (step_gap + 1)),
        synthetic=synthetic,
    )


@pytest.mark.parametrize("name", ["norm_softmax", "proxy_anchor"])
def test_a_memory_made_without_a_loss_gives_the_same_values(name):
    rng = np.random.default_rng(0)
    loss = losses.create(name)
    sizes = {"num_steps": 2, "step_gap": 0, "batch_size": 3, "num_classes": 4, "dim": 5}
    memories = memvir.init(**sizes), memvir.init(**sizes, loss=loss)
    for _ in range(4):
        problem = (
            jnp.asarray(rng.normal(size=(3, 5)), jnp.float32),
            jnp.asarray(rng.normal(size=(4, 5)), jnp.float32),
            jnp.asarray(rng.integers(4, size=3)),
        )
        values, memories = zip(
            *(memvir.loss_and_update(loss, memory, *problem) for memory in memories), strict=True
        )
        assert values[0] == values[1]


# No shrinking: every example compiles twice, so it would take minutes.
@pytest.mark.slow
@settings(max_examples=6, phases=[Phase.explicit, Phase.generate])
@given(
    num_steps=st.integers(1, 4),
    step_gap=st.integers(0, 3),
    batch=st.integers(1, 5),
    classes=st.integers(1, 6),
    dim=st.integers(2, 7),
    synthetic=st.integers(0, 4),
    seed=st.integers(0, 99),
    name=st.sampled_from(losses.names()),
)
def test_equals_the_dense_form_for_any_shape(num_steps, step_gap, **shape):
    run_against_dense(
        num_steps=num_steps,
        step_gap=step_gap,
        steps=2 * num_steps * (step_gap + 1) + 1,
        **shape,
    )


@pytest.mark.parametrize("name", ["norm_softmax", "proxy_anchor"])
def test_the_cache_of_a_bfloat16_memory_matches_the_rounded_vectors(name):
    run_against_dense(
        name,
        num_steps=3,
        step_gap=1,
        batch=4,
        classes=3,
        dim=6,
        steps=14,
        synthetic=2,
        dtype=jnp.bfloat16,
    )


def test_labels_are_smoothed_over_the_classes_of_their_own_step():
    rows, classes, smoothing, scale = 4, 3, 0.3, 5.0
    rng = np.random.default_rng(0)
    loss = losses.create("norm_softmax", scale=scale, label_smoothing=smoothing)
    sizes = {"num_classes": classes, "dim": 6, "batch_size": rows}
    memory = memvir.init(num_steps=1, step_gap=0, loss=loss, **sizes)
    embeddings, proxies = rng.normal(size=(2, rows, 6)), rng.normal(size=(2, classes, 6))
    labels = rng.integers(classes, size=(2, rows))
    for t in range(2):
        step = (jnp.asarray(x[t], jnp.float32) for x in (embeddings, proxies))
        value, memory = memvir.loss_and_update(loss, memory, *step, jnp.asarray(labels[t]))
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (embeddings, proxies)]
    logits = scale * np.einsum("srd,tcd->srtc", *unit)
    targets = np.zeros_like(logits)
    for t in range(2):
        targets[t, :, t] = smoothing / classes
        targets[t, np.arange(rows), t, labels[t]] += 1 - smoothing
    log_sums = np.log(np.exp(logits).sum((2, 3)))
    expected = np.mean(log_sums - (targets * logits).sum((2, 3)))
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_drift_of_virtual_classes():
    axes = jnp.eye(3)
    memory = memvir.init(num_steps=2, step_gap=0, batch_size=3, num_classes=2, dim=3)
    loss = losses.create("norm_softmax")
    labels = jnp.asarray([0, 0, 1])

    def step(memory, embeddings, proxies):
        _, memory = memvir.loss_and_update(loss, memory, embeddings, proxies, labels)
        return memory, [float(x) for x in memvir.drift(loss, memory)]

    memory, drift = step(memory, axes, axes[:2])
    assert np.isnan(drift).all()  # There are no virtual classes yet.
    # The first class has moved by 90 degrees and the second not at all. Of the rows of the first
    # class, one is nearer to its proxy and one to the virtual one; the third row has a tie.
    memory, drift = step(memory, axes[jnp.asarray([2, 0, 1])], axes[jnp.asarray([2, 1])])
    np.testing.assert_allclose(drift, [1 / 2, 1 / 3], atol=1e-6)
    # Virtual classes of two steps: the first class at cosines 1 and 0, the second at 1 and 1.
    _, drift = step(memory, axes[jnp.asarray([2, 2, 1])], axes[jnp.asarray([2, 1])])
    np.testing.assert_allclose(drift, [3 / 4, 0], atol=1e-6)


@pytest.mark.parametrize("name", ["norm_softmax", "proxy_anchor"])
def test_masked_rows_and_classes_have_no_effect(name):
    rng = np.random.default_rng(0)
    loss = losses.create(name)
    memory = memvir.init(num_steps=2, step_gap=0, batch_size=3, num_classes=4, dim=5)
    other = memory
    for _ in range(4):
        embeddings = jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)
        proxies = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
        extra = jnp.asarray(rng.normal(size=(2, 5)), jnp.float32)
        labels = jnp.asarray(rng.integers(4, size=3))
        expected, memory = memvir.loss_and_update(loss, memory, embeddings, proxies, labels)
        value, other = memvir.loss_and_update(
            loss,
            other,
            jnp.concatenate([embeddings, extra]),
            jnp.concatenate([proxies, extra]),
            jnp.concatenate([labels, 4 + jnp.arange(2)]),
            row_mask=jnp.arange(5) < 3,
            class_mask=jnp.arange(6) < 4,
        )
        chex.assert_trees_all_close(value, expected, rtol=1e-5)
        chex.assert_trees_all_close(other, memory, rtol=1e-5, atol=1e-5)


def test_stores_unit_vectors_and_proxies_before_the_update():
    rng = np.random.default_rng(0)
    memory = memvir.init(num_steps=1, step_gap=0, batch_size=3, num_classes=2, dim=4)
    embeddings = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    proxies = jnp.asarray(rng.normal(size=(2, 4)), jnp.float32)
    labels = jnp.asarray([1, 0, 1])
    _, memory = memvir.loss_and_update(
        losses.create("norm_softmax"), memory, embeddings, proxies, labels
    )
    assert int(memory.steps) == 1
    chex.assert_trees_all_close(memory.pending.embeddings, normalized(embeddings), atol=1e-6)
    chex.assert_trees_all_close(memory.pending.proxies, normalized(proxies), atol=1e-6)
    assert memory.pending.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in KINDS)) for name in losses.names()],
)
def test_padded_classes_and_the_order_of_devices_have_no_effect(name):
    loss = losses.create(name, **HYPERPARAMETERS.get(name, {}))
    per_class, (_, pdim) = loss.proxies_per_class, loss.proxy_shape(1, 5)

    def run(shards):
        rng = np.random.default_rng(0)
        classes = sharding.padded(3, shards)
        memory = memvir.init(
            num_steps=2, step_gap=0, batch_size=4, num_classes=classes, dim=5, loss=loss
        )

        @jax.jit
        def step(embeddings, proxies, memory, labels, lam, partner):
            problem = proxy_synthesis.synthesize(
                embeddings,
                jnp.pad(proxies, ((0, (classes - 3) * per_class), (0, 0))),
                labels,
                lam=lam,
                partner=partner,
                ratio=0.75,
                loss=loss,
                class_mask=jnp.arange(classes) < 3,
                shards=shards,
            )
            return memvir.loss_and_update(loss, memory, **problem._asdict(), shards=shards)

        for _ in range(5):
            (value, memory), gradients = jax.value_and_grad(step, argnums=(0, 1), has_aux=True)(
                jnp.asarray(rng.normal(size=(4, 5)), jnp.float32),
                jnp.asarray(rng.normal(size=(3 * per_class, pdim)), jnp.float32),
                memory,
                jnp.asarray([0, 1, 2, rng.integers(3)]),
                jnp.asarray(rng.uniform(size=1), jnp.float32),
                jnp.asarray(rng.permutation(4)[None]),
            )
            yield value, gradients
        assert not memory.pending.proxies[3:].any()

    expected = list(run(1))
    for shards in (2, 4):
        for ours, theirs in zip(list(run(shards)), expected, strict=True):
            chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_memory_of_another_size_raises():
    memory = memvir.init(num_steps=1, step_gap=0, batch_size=2, num_classes=3, dim=4)
    with pytest.raises(
        ValueError, match=r"embeddings \(2, 4\) and proxies \(3, 4\) cannot .* proxies \(6, 4\)"
    ):
        memvir.loss_and_update(
            losses.create("norm_softmax"),
            memory,
            jnp.ones((2, 4)),
            jnp.ones((6, 4)),
            jnp.asarray([0, 1]),
        )


def test_an_invalid_size_raises():
    with pytest.raises(ValueError, match="num_steps of at least 1, got 0"):
        memvir.init(num_steps=0, step_gap=0, batch_size=1, num_classes=1, dim=1)


def test_a_step_does_not_copy_the_ring():
    memory = memvir.init(num_steps=20, step_gap=9, batch_size=32, num_classes=24, dim=64)
    loss = losses.create("norm_softmax")

    def step(memory, embeddings, proxies, labels):
        (value, update), gradients = jax.value_and_grad(
            lambda e, p: memvir.loss_and_update(loss, memory, e, p, labels),
            argnums=(0, 1),
            has_aux=True,
        )(embeddings, proxies)
        return value, memvir.choose(jnp.isfinite(value), update, memory), gradients

    compiled = (
        jax.jit(step, donate_argnums=0)
        .lower(memory, jnp.zeros((32, 64)), jnp.zeros((24, 64)), jnp.zeros(32, int))
        .compile()
    )
    ring_bytes = sum(x.nbytes for x in jax.tree.leaves(memory))
    analysis = compiled.memory_analysis()
    assert analysis.alias_size_in_bytes >= ring_bytes
    assert analysis.temp_size_in_bytes < ring_bytes / 4
