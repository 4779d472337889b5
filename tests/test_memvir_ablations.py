"""Ablations of MemVir against the bare loss of the rows and classes that each should have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dml_jax import losses, memvir, proxy_synthesis
from dml_jax._utils import files, sharding
from dml_jax.inference import trained
from dml_jax.memvir import MemVirConfig
from dml_jax.report import training_map
from dml_jax.training import builder, loop, resume, run_directory
from dml_jax.training.config import parse
from tests.helpers import tiny
from tests.helpers.oracles import LOSSES, prepared

BATCH, CLASSES, DIM, SETS, GAP = 4, 4, 5, 2, 1
RATIO = 0.5
HYPERPARAMETERS = {"soft_triple": {"centers_per_class": 2}}
FAST = {  # One case of each structure; the others are marked slow.
    ("norm_softmax", "proxies", True, 2),
    ("arcface", "embeddings", True, 2),
    ("proxy_anchor", "proxies", True, 2),
    ("proxy_anchor", "embeddings", True, 2),
}
CASES = [
    pytest.param(*case, marks=[pytest.mark.slow] * (case not in FAST))
    for name in ("norm_softmax", "proxy_nca", "arcface", "soft_triple", "proxy_anchor")
    for virtual in ("proxies", "embeddings")
    for mixes in (False, True)
    # On one device nothing is split, so one loss of each kind of anchor is enough there.
    for devices in ((1, 2) if name in ("norm_softmax", "proxy_anchor") and not mixes else (2,))
    for case in [(name, virtual, mixes, devices)]
]


def make_loss(name):
    return losses.create(name, **HYPERPARAMETERS.get(name, {}))


def make_memory(loss, **settings):
    return memvir.init(
        num_steps=SETS,
        step_gap=GAP,
        batch_size=BATCH,
        num_classes=CLASSES,
        dim=DIM,
        loss=loss,
        **settings,
    )


def make_problem(loss, step):
    """Returns the vectors of a step, its labels, a mixing weight and partners."""
    rng = np.random.default_rng(step)
    shapes = (BATCH, DIM), loss.proxy_shape(CLASSES, DIM)
    vectors = tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    labels, partner = rng.integers(CLASSES, size=BATCH), rng.permutation(BATCH)
    return vectors, jnp.asarray(labels), (jnp.asarray(rng.uniform(), jnp.float32), partner)


def mixed(loss, vectors, labels, mixing, mixes, shards=1):
    if not mixes:
        problem = dict(zip(("embeddings", "proxies"), vectors, strict=True))
        return problem | {
            "labels": labels,
            "row_mask": jnp.ones(BATCH, bool),
            "class_mask": jnp.ones(CLASSES, bool),
        }
    lam, partner = mixing
    return proxy_synthesis.synthesize(
        *vectors, labels, lam=lam, partner=partner, ratio=RATIO, loss=loss, shards=shards
    )._asdict()


def naive(name, virtual, problem, stored, exist):
    """Returns the bare loss of a batch, extended by stored rows or by stored proxies."""
    rows, columns = prepared(name, problem["embeddings"], problem["proxies"])
    labels, row_mask, class_mask = (problem[x] for x in ("labels", "row_mask", "class_mask"))
    if virtual == "proxies":
        columns = jnp.concatenate([columns, *[old.proxies for old in stored]])
        class_mask = jnp.concatenate([class_mask, jnp.repeat(exist, CLASSES)])
    else:
        rows = jnp.concatenate([rows, *[old.embeddings for old in stored]])
        labels = jnp.concatenate([labels, *[old.labels for old in stored]])
        row_mask = jnp.concatenate([row_mask, jnp.repeat(exist, BATCH)])
    of_loss = HYPERPARAMETERS.get(name, {})
    return LOSSES[name](rows, columns, labels, row_mask, class_mask, **of_loss)


def run_against_naive(name, virtual, mixes, devices, dtype=jnp.float32):
    """Compares values and gradients of enough steps to overwrite the ring."""
    loss, mesh = make_loss(name), sharding.make_mesh(jax.devices()[:devices])

    def ours(vectors, memory, labels, mixing):
        problem = mixed(loss, vectors, labels, mixing, mixes, devices)
        return memvir.loss_and_update(loss, memory, **problem, shards=devices, virtual=virtual)

    def expected(vectors, labels, mixing, stored, exist):
        return naive(name, virtual, mixed(loss, vectors, labels, mixing, mixes), stored, exist)

    memory = make_memory(loss, virtual=virtual, dtype=dtype)
    split, whole = sharding.batch_sharding(mesh), sharding.replicated_sharding(mesh)
    kept = jax.tree.map(lambda x: split if x.ndim else whole, memory)
    memory = jax.device_put(memory, kept)
    take = jax.jit(
        jax.value_and_grad(ours, has_aux=True), out_shardings=((whole, kept), (whole, split))
    )
    expect = jax.jit(jax.value_and_grad(expected))
    entries = []
    for step in range((SETS + 2) * (GAP + 1)):
        (embeddings, proxies), labels, mixing = make_problem(loss, step)
        vectors = jax.device_put(embeddings, whole), jax.device_put(proxies, split)
        with jax.set_mesh(mesh):
            (value, memory), gradients = take(vectors, memory, labels, mixing)
        now = jax.device_get(memory.pending)
        entries.append(now)
        ages = [k * (GAP + 1) for k in range(1, SETS + 1)]
        # Steps that do not exist are replaced by this one and masked.
        stored = [entries[step - age] if age <= step else now for age in ages]
        stored = [as_rows(old, loss) for old in stored]
        exist = jnp.asarray(ages) <= step
        reference = expect((embeddings, proxies), labels, mixing, stored, exist)
        for x, y in zip(
            jax.tree.leaves((value, gradients)), jax.tree.leaves(reference), strict=True
        ):
            assert np.linalg.norm(x - y) <= 1e-5 * max(1, np.linalg.norm(y)), step
        assert_stored(now, name, (embeddings, proxies), labels, dtype)


def as_rows(entry, loss):
    """Returns an entry in float32, with each proxy of a class in a row."""
    rows, columns = (x.astype(np.float32) for x in (entry.embeddings, entry.proxies))
    return memvir.Entry(rows, columns.reshape(loss.proxy_shape(CLASSES, DIM)), entry.labels)


def assert_stored(entry, name, vectors, labels, dtype):
    tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
    rows, columns = prepared(name, *vectors)
    np.testing.assert_allclose(entry.embeddings.astype(np.float32), rows, atol=tolerance)
    stored = entry.proxies.astype(np.float32).reshape(columns.shape)
    np.testing.assert_allclose(stored, columns, atol=tolerance)
    assert entry.labels.tolist() == labels.tolist()


@pytest.mark.parametrize(("name", "virtual", "mixes", "devices"), CASES)
def test_an_ablation_is_the_bare_loss_of_an_extended_batch(name, virtual, mixes, devices):
    run_against_naive(name, virtual, mixes, devices)


@pytest.mark.slow
@pytest.mark.parametrize("virtual", ["proxies", "embeddings"])
def test_ablations_use_the_rounded_vectors_of_a_bfloat16_memory(virtual):
    run_against_naive("arcface", virtual, mixes=True, devices=1, dtype=jnp.bfloat16)


@pytest.mark.parametrize("name", ["norm_softmax", "proxy_anchor"])
@pytest.mark.parametrize("virtual", ["proxies", "embeddings"])
def test_an_ablation_computes_two_products_and_keeps_no_cache(name, virtual):
    """One product forward and one backward, since stored vectors have no gradients."""
    loss, (batch, classes, dim, sets) = losses.create(name), (32, 24, 64, 9)
    sizes = {"num_steps": sets, "step_gap": 0, "batch_size": batch, "num_classes": classes}
    memory = memvir.init(**sizes, dim=dim, loss=loss, virtual=virtual)
    assert memory.known == {}

    def step(vectors, memory):
        labels = jnp.arange(batch) % classes
        return memvir.loss_and_update(loss, memory, *vectors, labels, virtual=virtual)

    vectors = jnp.ones((batch, dim)), jnp.ones((classes, dim))
    taken = jax.jit(jax.value_and_grad(step, has_aux=True)).lower(vectors, memory).compile()
    product = 2 * (sets + 1) * batch * classes * dim
    assert 2 * product < taken.cost_analysis()["flops"] < 2.5 * product


@pytest.mark.parametrize("virtual", memvir.VIRTUAL)
def test_classes_that_grow_at_once_join_when_all_exist(virtual):
    loss = make_loss("norm_softmax")
    bare = jax.jit(loss)
    update = jax.jit(
        functools.partial(memvir.loss_and_update, loss), static_argnames=("virtual", "growth")
    )
    gradual = at_once = make_memory(loss, virtual=virtual)
    for step in range(SETS * (GAP + 1) + 3):
        vectors, labels, _ = make_problem(loss, step)
        expected, gradual = update(gradual, *vectors, labels, virtual=virtual)
        value, at_once = update(at_once, *vectors, labels, virtual=virtual, growth="at_once")
        alone = bare(*vectors, labels)
        np.testing.assert_allclose(value, alone if step < SETS * (GAP + 1) else expected, rtol=1e-5)
        # The gradual one has virtual classes earlier.
        assert np.isclose(expected, alone, rtol=1e-3) == (step <= GAP)


def test_classes_in_use_and_drift_follow_the_settings():
    loss = make_loss("norm_softmax")
    memory = make_memory(loss)
    update = jax.jit(functools.partial(memvir.loss_and_update, loss))
    measure = jax.jit(
        lambda memory: (
            [
                memvir.classes_in_use(memory, virtual=virtual, growth=growth)
                for virtual in memvir.VIRTUAL
                for growth in memvir.GROWTH
            ]
            + [memvir.drift(loss, memory, growth=growth).cosine for growth in memvir.GROWTH]
        )
    )
    actual = 3  # The fourth class is padding, as on many devices.
    for step in range(SETS * (GAP + 1) + 3):
        (embeddings, proxies), labels, _ = make_problem(loss, step)
        proxies = proxies * (jnp.arange(CLASSES) < actual)[:, None]
        mask = jnp.arange(CLASSES) < actual
        _, memory = update(memory, embeddings, proxies, labels % actual, class_mask=mask)
        *counts, gradual, at_once = measure(memory)
        sets = [k for k in range(1, SETS + 1) if k * (GAP + 1) <= step]
        grown = actual * (1 + len(sets))
        grown_at_once = grown if len(sets) == SETS else actual
        assert [int(x) for x in counts] == [grown, grown_at_once] * 2 + [actual] * 2
        assert np.isnan(gradual) == (not sets)
        assert np.isnan(at_once) == (len(sets) < SETS)


@pytest.mark.slow
def test_a_run_follows_its_ablations(tmp_path, monkeypatch):
    given, update = [], memvir.loss_and_update

    def recorded(*arguments, virtual, growth, **others):
        given.append((virtual, growth))
        return update(*arguments, virtual=virtual, growth=growth, **others)

    monkeypatch.setattr(memvir, "loss_and_update", recorded)
    ablation = {"memvir__virtual": "proxies", "memvir__growth": "at_once"}
    config = tiny.config(tiny.write_images(tmp_path / "images"), "ps_memvir", **ablation)
    folder = tmp_path / "run"
    resume.claim(folder, parse(config))
    loop.train(builder.build(parse(config), sharding.make_mesh(jax.devices()[:2])), folder)
    assert given == [("proxies", "at_once")]
    lines = files.read_json_lines(folder / run_directory.METRICS)
    # The first epoch is the warm-up, and the memory is full after the second one.
    assert [line["memvir_classes"] for line in lines] == [6, 6, 18]
    assert ["memvir_cosine" in line for line in lines] == [False, False, True]
    built = trained.build(folder)
    state = trained.read_training_state(built, folder, "last", with_memory=True)
    shown = training_map.compute(built, state)
    kinds = {training_map.KINDS[kind] for kind in shown.kind}
    assert "remembered proxy" in kinds and "remembered embedding" not in kinds


def test_unknown_ablations_raise():
    loss = make_loss("norm_softmax")
    memory, (vectors, labels, _) = make_memory(loss), make_problem(loss, 0)
    with pytest.raises(ValueError, match="virtual is 'rows'; choose one of both, proxies, embed"):
        memvir.loss_and_update(loss, memory, *vectors, labels, virtual="rows")
    with pytest.raises(ValueError, match="growth is 'slow'; choose one of gradual, at_once"):
        memvir.loss_and_update(loss, memory, *vectors, labels, growth="slow")
    with pytest.raises(ValueError, match="virtual is 'rows'"):
        make_memory(loss, virtual="rows")
    with pytest.raises(ValueError, match="virtual is 'rows'"):
        memvir.classes_in_use(memory, virtual="rows")
    with pytest.raises(ValueError, match="growth is 'slow'"):
        memvir.drift(loss, memory, growth="slow")


@pytest.mark.parametrize(
    ("of_memory", "of_step"), [("proxies", "norm_softmax"), ("both", "proxy_anchor")]
)
def test_a_memory_without_the_cache_of_a_step_raises(of_memory, of_step):
    memory = make_memory(make_loss("norm_softmax"), virtual=of_memory)
    loss = make_loss(of_step)
    vectors, labels, _ = make_problem(loss, 0)
    with pytest.raises(ValueError, match="no log-sum-exps of .*; pass memvir.init the loss"):
        memvir.loss_and_update(loss, memory, *vectors, labels)


def test_the_settings_are_the_arguments_of_a_step():
    settings = MemVirConfig(virtual="proxies", growth="at_once")
    assert settings.of_update() == {"virtual": "proxies", "growth": "at_once"}
