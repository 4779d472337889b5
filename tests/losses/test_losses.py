import dataclasses
import math
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dml_jax import losses, memvir, proxy_synthesis
from tests.helpers.oracles import LOSSES, prepared

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "peer_losses.npz")
BATCH, CLASSES, DIM = 6, 5, 8
HYPERPARAMETERS = {"soft_triple": {"centers_per_class": 3}}
PEERS = {
    "norm_softmax_scale20": ("norm_softmax", {"scale": 20.0}),
    "proxy_nca_scale8": ("proxy_nca", {"scale": 8.0}),
    "proxy_anchor_margin0.1_alpha32": ("proxy_anchor", {"margin": 0.1, "alpha": 32.0}),
    "cosface_margin0.35_scale64": ("cosface", {"margin": 0.35, "scale": 64.0}),
    "arcface_margin28.6deg_scale64": ("arcface", {"margin": math.radians(28.6), "scale": 64.0}),
    "sphereface_margin4_scale1": ("sphereface", {"margin": 4.0, "scale": 1.0}),
    "soft_triple_k3_la20_gamma0.1_margin0.01": (
        "soft_triple",
        {"centers_per_class": 3, "la": 20.0, "gamma": 0.1, "margin": 0.01},
    ),
}


@pytest.mark.parametrize("peer", PEERS)
def test_losses_and_gradients_match_pytorch_metric_learning(peer):
    name, hyperparameters = PEERS[peer]
    kind = "centers" if name == "soft_triple" else "proxies"
    value, gradients = jax.value_and_grad(losses.create(name, **hyperparameters), argnums=(0, 1))(
        jnp.asarray(GOLDEN["embeddings"]), jnp.asarray(GOLDEN[kind]), jnp.asarray(GOLDEN["labels"])
    )
    np.testing.assert_allclose(value, GOLDEN[f"{peer}_loss"], rtol=1e-5)
    for gradient, argument in zip(gradients, ("embeddings", kind), strict=True):
        expected = GOLDEN[f"{peer}_grad_{argument}"]
        assert np.linalg.norm(gradient - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("bias", [False, True])
def test_softmax_matches_pytorchs_linear_layer_and_cross_entropy(bias):
    """PyTorch 2.13, with the vectors of the other golden losses."""
    golden = np.load(Path(__file__).parents[1] / "golden" / "softmax.npz")
    key, proxies = "softmax_bias" if bias else "softmax", GOLDEN["proxies"]
    if bias:
        proxies = np.concatenate([proxies, golden["bias"][:, None]], axis=1)
    value, gradients = jax.value_and_grad(losses.create("softmax", bias=bias), argnums=(0, 1))(
        jnp.asarray(GOLDEN["embeddings"]), jnp.asarray(proxies), jnp.asarray(GOLDEN["labels"])
    )
    np.testing.assert_allclose(value, golden[f"{key}_loss"], rtol=1e-5)
    for gradient, argument in zip(gradients, ("embeddings", "proxies"), strict=True):
        expected = golden[f"{key}_grad_{argument}"]
        assert np.linalg.norm(gradient - expected) < 1e-5 * np.linalg.norm(expected)


def create(name, **hyperparameters):
    return losses.create(name, **HYPERPARAMETERS.get(name, {}), **hyperparameters)


@pytest.fixture
def problem(name):
    rng = np.random.default_rng(0)
    embeddings = jnp.asarray(rng.normal(size=(BATCH, DIM)), jnp.float32)
    shape = create(name).proxy_shape(CLASSES, DIM)
    proxies = jnp.asarray(rng.normal(size=shape), jnp.float32)
    return embeddings, proxies, jnp.asarray(rng.integers(CLASSES, size=BATCH))


@pytest.mark.parametrize("name", losses.names())
class TestEveryLoss:
    def test_equals_its_definition(self, name, problem):
        masks = jnp.ones(BATCH, bool), jnp.ones(CLASSES, bool)
        embeddings, proxies, labels = problem
        vectors = prepared(name, embeddings, proxies)
        expected = LOSSES[name](*vectors, labels, *masks, **HYPERPARAMETERS.get(name, {}))
        chex.assert_trees_all_close(create(name)(*problem), expected, rtol=1e-5)

    def test_is_invariant_to_the_length_of_normalised_vectors(self, name, problem):
        embeddings, proxies, labels = problem
        loss = create(name)
        factors = {
            "softmax": (1.0, 1.0),  # Normalises neither,
            "virtual_softmax": (1.0, 1.0),
            "sphereface": (1.0, 1e-3),  # and this one only the proxies.
        }.get(name, (1e3, 1e-3))
        scaled = loss(factors[0] * embeddings, factors[1] * proxies, labels)
        chex.assert_trees_all_close(scaled, loss(*problem), rtol=1e-5)

    def test_excludes_masked_rows_and_classes(self, name, problem):
        embeddings, proxies, labels = problem
        loss = create(name)
        rng = np.random.default_rng(1)
        extra = jnp.asarray(rng.normal(size=(2, DIM)), jnp.float32)
        extra_proxies = jnp.asarray(rng.normal(size=loss.proxy_shape(2, DIM)), jnp.float32)
        value = loss(
            jnp.concatenate([embeddings, extra]),
            jnp.concatenate([proxies, extra_proxies]),
            jnp.concatenate([labels, CLASSES + jnp.arange(2)]),
            row_mask=jnp.arange(BATCH + 2) < BATCH,
            class_mask=jnp.arange(CLASSES + 2) < CLASSES,
        )
        chex.assert_trees_all_close(value, loss(*problem), rtol=1e-6)

    def test_accepts_bfloat16_and_returns_float32(self, name, problem):
        embeddings, proxies, labels = problem
        assert create(name)(embeddings.astype(jnp.bfloat16), proxies, labels).dtype == jnp.float32

    def test_propagates_nan(self, name, problem):
        embeddings, proxies, labels = problem
        assert np.isnan(create(name)(embeddings.at[2, 3].set(np.nan), proxies, labels))

    def test_gradient_matches_finite_differences(self, name, problem):
        embeddings, proxies, labels = problem
        smooth = {"la": 2.0, "alpha": 2.0, "scale": 2.0}
        loss = create(name)
        fields = {field.name for field in dataclasses.fields(loss)}
        loss = dataclasses.replace(loss, **{k: v for k, v in smooth.items() if k in fields})
        chex.assert_numerical_grads(
            lambda e, p: loss(jnp.asarray(e), jnp.asarray(p), labels),
            (embeddings, proxies),
            order=1,
            atol=2e-2,
        )


@pytest.mark.parametrize(("name", "margin"), [("norm_softmax", 0.0), ("cosface", 0.3)])
def test_label_smoothing_equals_the_cross_entropy_of_optax(name, margin, problem):
    embeddings, proxies, labels = problem
    hyperparameters = {"margin": margin} if margin else {}
    loss = losses.create(name, scale=7.0, label_smoothing=0.2, **hyperparameters)
    classes = jnp.arange(CLASSES) < CLASSES - 1
    labels = labels % (CLASSES - 1)
    vectors = prepared(name, embeddings, proxies[:-1])
    targets = jax.nn.one_hot(labels, CLASSES - 1)
    expected = optax.losses.softmax_cross_entropy(
        7 * (vectors[0] @ vectors[1].T - margin * targets), optax.smooth_labels(targets, 0.2)
    )
    value = loss(embeddings, proxies, labels, class_mask=classes)
    chex.assert_trees_all_close(value, expected.mean(), rtol=1e-5)


def degenerate(name, embeddings, proxies, labels):
    """Yields embeddings and proxies that could break the numerics."""
    targets = proxies.reshape(CLASSES, -1, DIM)[labels, 0]
    zeros = jnp.zeros(BATCH, int)
    embeddings, proxies = (x / jnp.max(jnp.abs(x)) for x in (embeddings, proxies))
    yield "zero", 0 * embeddings, proxies
    yield "zero proxies", embeddings, 0 * proxies
    yield "all zero", 0 * embeddings, 0 * proxies
    yield "identical", embeddings[zeros], proxies
    yield "all identical", embeddings[zeros], jnp.ones_like(proxies) * embeddings[:1]
    yield "each its proxy", targets, proxies
    yield "each opposite to its proxy", -targets, proxies
    yield "opposite", embeddings * jnp.where(zeros.at[::2].set(1), 1.0, -1.0)[:, None], proxies
    yield "tiny", 1e-38 * embeddings, 1e-38 * proxies
    yield "large", 1e30 * embeddings, proxies
    if name not in ("softmax", "virtual_softmax"):  # Their logits of huge proxies overflow float32,
        yield "huge proxies", embeddings, 1e38 * proxies
    if name not in ("softmax", "virtual_softmax", "sphereface"):  # as do theirs of huge embeddings.
        yield "huge", 1e38 * embeddings, proxies
        yield "all huge", 1e38 * embeddings, 1e38 * proxies


@pytest.mark.parametrize(
    ("with_ps", "with_memvir"),
    [
        pytest.param(False, False, id="alone"),
        pytest.param(True, False, id="ps", marks=pytest.mark.slow),
        pytest.param(False, True, id="memvir", marks=pytest.mark.slow),
        pytest.param(True, True, id="ps_memvir"),
    ],
)
@pytest.mark.parametrize("name", losses.names())
def test_degenerate_vectors_leave_loss_and_gradients_finite(name, with_ps, with_memvir, problem):
    loss = create(name)
    labels = problem[2]
    lam, partner = proxy_synthesis.draw(jax.random.key(0), labels, alpha=0.4, ratio=1.0)
    empty = memvir.init(
        num_steps=2, step_gap=0, batch_size=BATCH, num_classes=CLASSES, dim=DIM, loss=loss
    )

    def objective(vectors, memory):
        step = {"embeddings": vectors[0], "proxies": vectors[1], "labels": labels}
        if with_ps:
            step = proxy_synthesis.synthesize(
                **step, lam=lam, partner=partner, ratio=1.0, loss=loss
            )._asdict()
        if with_memvir:
            return memvir.loss_and_update(loss, memory, **step)
        return loss(**step), memory

    options = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    }
    compiled = jax.jit(jax.value_and_grad(objective, has_aux=True), compiler_options=options)
    for kind, *vectors in degenerate(name, *problem):
        memory = empty
        for _ in range(4 if with_memvir else 1):  # Until the memory is full of these vectors.
            (value, memory), gradients = compiled(vectors, memory)
            assert all(np.isfinite(x).all() for x in (value, *gradients)), kind


@pytest.mark.parametrize("name", ["softmax"])
def test_a_bias_is_the_last_column_of_the_proxies(problem):
    embeddings, proxies, labels = problem
    bias = jnp.arange(CLASSES, dtype=jnp.float32)
    loss = losses.create("softmax", bias=True)
    assert loss.proxy_shape(CLASSES, DIM) == (CLASSES, DIM + 1)
    value = loss(embeddings, jnp.concatenate([proxies, bias[:, None]], axis=1), labels)
    logits = embeddings @ proxies.T + bias[None]
    expected = -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(BATCH), labels])
    chex.assert_trees_all_close(value, expected, rtol=1e-6)


def run_ps_and_memvir(loss, *, steps):
    """Yields the inputs, the loss and the gradients of steps with both regularisers."""
    keys = jax.random.split(jax.random.key(0), 2 * steps)
    memory = memvir.init(
        num_steps=2, step_gap=0, batch_size=BATCH, num_classes=CLASSES, dim=DIM, loss=loss
    )
    labels, partner = jnp.asarray([0, 1, 2, 3, 4, 1]), jnp.roll(jnp.arange(BATCH), 1)

    @jax.jit
    def step(embeddings, proxies, memory):
        def value(e, p):
            mixed = proxy_synthesis.synthesize(
                e, p, labels, lam=jnp.asarray(0.3), partner=partner, ratio=0.5, loss=loss
            )
            return memvir.loss_and_update(loss, memory, **mixed._asdict())

        return jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(embeddings, proxies)

    for i in range(steps):
        embeddings = jax.random.normal(keys[2 * i], (BATCH, DIM))
        proxies = jax.random.normal(keys[2 * i + 1], loss.proxy_shape(CLASSES, DIM))
        (loss_value, memory), gradients = step(embeddings, proxies, memory)
        yield (embeddings, proxies, labels, partner), (loss_value, gradients)


def test_the_bias_is_mixed_and_stored_with_its_proxy():
    """Compares with the definition, which adds the bias separately."""

    def definition(e, p, labels, partner, past):
        def mixed(x):
            return 0.3 * x[:3] + 0.7 * x[partner[:3]]

        rows = jnp.concatenate([e, mixed(e), *[old for old, _, _ in past]])
        columns = jnp.concatenate([p, mixed(p[labels]), *[old for _, old, _ in past]])
        logits = rows @ columns[:, :DIM].T + columns[:, DIM][None]
        virtual = [CLASSES + 3 + k * CLASSES + old for k, (_, _, old) in enumerate(past)]
        targets = jnp.concatenate([labels, CLASSES + jnp.arange(3), *virtual])
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(targets)), targets])

    loss, past = losses.create("softmax", bias=True), []
    for inputs, (value, gradients) in run_ps_and_memvir(loss, steps=4):
        expected, expected_gradients = jax.value_and_grad(definition, argnums=(0, 1))(*inputs, past)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        for ours, theirs in zip(gradients, expected_gradients, strict=True):
            assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)
        past = [inputs[:3], *past[:1]]


def test_tau_includes_synthetic_but_not_virtual_classes():
    def distance(centers):
        unit = centers / jnp.linalg.norm(centers, axis=-1, keepdims=True)
        return jnp.linalg.norm(unit[:, 0] - unit[:, 1], axis=-1)

    plain, regularised = (
        run_ps_and_memvir(losses.create("soft_triple", centers_per_class=2, tau=tau), steps=3)
        for tau in (0.0, 0.2)
    )
    for (inputs, (value, _)), (_, (with_tau, _)) in zip(plain, regularised, strict=True):
        _, proxies, labels, partner = inputs
        unit = proxies / jnp.linalg.norm(proxies, axis=-1, keepdims=True)
        centers = unit.reshape(CLASSES, 2, DIM)
        targets = centers[labels]
        synthetic = 0.3 * targets[:3] + 0.7 * targets[partner[:3]]
        expected = 0.1 * jnp.mean(distance(jnp.concatenate([centers, synthetic])))
        np.testing.assert_allclose(with_tau - value, expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["soft_triple"])
def test_tau_regularises_the_distances_of_centres(problem):
    embeddings, centers, labels = problem
    centers = centers.reshape(CLASSES, 3, DIM)
    unit = centers / jnp.linalg.norm(centers, axis=-1, keepdims=True)
    pairs = [(0, 1), (0, 2), (1, 2)]
    # Equation 9 as in the authors' code: the sum over unordered pairs of sqrt(2 - 2 cos), divided
    # by classes * K * (K - 1), the number of ordered pairs.
    distances = [jnp.sqrt(2 - 2 * (unit[:, i] * unit[:, j]).sum(-1)) for i, j in pairs]
    expected = 0.2 * jnp.sum(jnp.asarray(distances)) / (CLASSES * 3 * 2)
    difference = create("soft_triple", tau=0.2)(*problem) - create("soft_triple")(*problem)
    chex.assert_trees_all_close(difference, expected, rtol=1e-4)
    merged = jnp.broadcast_to(centers[:, :1], centers.shape).reshape(-1, DIM)
    gradient = jax.grad(create("soft_triple", tau=0.2), argnums=1)(embeddings, merged, labels)
    chex.assert_tree_all_finite(gradient)


@pytest.mark.parametrize("name", ["arcface", "sphereface"])
def test_the_loss_is_monotone_in_the_angle(name):
    angles = jnp.linspace(0, math.pi, 200)
    proxies = jnp.asarray([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    embeddings = jnp.stack([jnp.cos(angles), jnp.sin(angles), jnp.zeros(200)], axis=1)
    loss = losses.create(name)
    values = jnp.stack([loss(row[None], proxies, jnp.zeros(1, int)) for row in embeddings])
    assert (jnp.diff(values) > -1e-5).all()
    assert values[-1] > values[0] + 1


@pytest.mark.parametrize(("official", "factor"), [("norm_softmax", 1), ("proxy_nca", 2)])
def test_sphereface_without_margin_matches_the_official_losses_of_raw_embeddings(official, factor):
    """The official MemVir losses with --train_with_l2norm=False."""
    embeddings, proxies, labels = (
        jnp.asarray(GOLDEN[x]) for x in ("embeddings", "proxies", "labels")
    )

    def expected(embeddings, proxies):
        unit = proxies / jnp.linalg.norm(proxies, axis=1, keepdims=True)
        if official == "norm_softmax":
            logits = 3.0 * embeddings @ unit.T
        else:
            logits = -3.0 * ((embeddings[:, None] - unit[None]) ** 2).sum(-1)
        return -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels].mean()

    loss = losses.create("sphereface", margin=1.0, scale=3.0 * factor)
    ours = jax.value_and_grad(lambda x, p: loss(x, p, labels), (0, 1))(embeddings, proxies)
    theirs = jax.value_and_grad(expected, (0, 1))(embeddings, proxies)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_unknown_loss_raises_and_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown loss 'norm'.*norm_softmax"):
        losses.create("norm")


def test_an_unknown_hyperparameter_raises_and_lists_the_known_ones():
    message = "'proxy_nca' has no hyper-parameter margin; it has label_smoothing, scale"
    with pytest.raises(ValueError, match=message):
        losses.create("proxy_nca", margin=0.1)
