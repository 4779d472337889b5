"""Ablations of Proxy Synthesis against a list of the rows and classes that each should leave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dml_jax import losses, memvir, proxy_synthesis
from dml_jax._utils import sharding
from dml_jax.proxy_synthesis import ProxySynthesisConfig
from dml_jax.report import training_map
from dml_jax.training import builder, step
from dml_jax.training.config import parse
from tests.helpers import tiny
from tests.helpers.oracles import LOSSES, prepared

BATCH, CLASSES, DIM = 4, 4, 3
LABELS = np.asarray([2, 0, 1, 2])
PARTNER = np.asarray(
    [[1, 3, 0, 2], [3, 2, 1, 0]]
)  # In the second draw, samples 0 and 3 are a pair.
WEIGHTS = np.asarray([[0.3, 0.8, 0.5, 0.1], [0.6, 0.2, 0.9, 0.4]], np.float32)
COUNT = 7
RATIO = COUNT / BATCH
ABLATIONS = {
    "per_sample": {},
    "proxies": {"mix": "proxies"},
    "embeddings": {"mix": "embeddings"},
    "stop_gradient": {"stop_gradient": True},
    "same_class": {"same_class": True},
    "all": {"mix": "embeddings", "stop_gradient": True, "same_class": True},
}
HYPERPARAMETERS = {"soft_triple": {"centers_per_class": 2}}


def make_loss(name):
    return losses.create(name, **HYPERPARAMETERS.get(name, {}))


def make_vectors(loss, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (BATCH, DIM), loss.proxy_shape(CLASSES, DIM)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def listed(name, embeddings, proxies, *, mix="both", stop_gradient=False, same_class=False):
    """Returns the rows, their labels and the proxies of a batch, one mixture after another."""
    e, p = prepared(name, embeddings, proxies)
    rows, labels = list(e), list(LABELS)
    columns = list(p.reshape(CLASSES, -1))
    for i in range(COUNT):
        draw, a = divmod(i, BATCH)
        b, lam = int(PARTNER[draw, a]), float(WEIGHTS[draw, a])
        if LABELS[a] == LABELS[b] and not same_class:
            continue
        targets = p.reshape(CLASSES, -1, p.shape[1])[LABELS[[a, b]]]
        row, column = prepared(
            name,
            lam * e[a] + (1 - lam) * e[b],
            lam * targets[0] + (1 - lam) * targets[1],
        )
        if stop_gradient:
            row, column = jax.lax.stop_gradient((row, column))
        if mix != "embeddings":
            columns.append(column.reshape(-1))
        if mix == "both":
            labels.append(len(columns) - 1)
        if mix == "embeddings":
            labels.append(LABELS[a] if lam >= 0.5 else LABELS[b])
        if mix != "proxies":
            rows.append(row)
    return jnp.stack(rows), jnp.asarray(labels), jnp.stack(columns)


def plain(name, rows, labels, columns):
    """Returns the loss of rows and of classes, all of which count."""
    loss = make_loss(name)
    masks = jnp.ones(len(rows), bool), jnp.ones(len(columns), bool)
    columns = columns.reshape(len(columns) * loss.proxies_per_class, -1)
    return LOSSES[name](rows, columns, labels, *masks, **HYPERPARAMETERS.get(name, {}))


def synthesized(loss, embeddings, proxies, *, shards=1, **ablation):
    return proxy_synthesis.synthesize(
        embeddings,
        proxies,
        jnp.asarray(LABELS),
        lam=jnp.asarray(WEIGHTS),
        partner=jnp.asarray(PARTNER),
        ratio=RATIO,
        loss=loss,
        shards=shards,
        **ablation,
    )


def assert_close(ours, expected):
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(x - y) <= 1e-5 * max(1, np.linalg.norm(y))


def compiled(function, **options):
    """Returns value and gradients of a function, compiled quickly rather than well."""
    fast = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(jax.value_and_grad(function, **options), compiler_options=fast)


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("name", ["softmax", "soft_triple"])
def test_what_is_not_masked_are_the_listed_rows_and_classes(name, ablation):
    loss, settings = make_loss(name), ABLATIONS[ablation]
    problem = synthesized(loss, *make_vectors(loss), **settings)
    rows, labels, columns = listed(name, *make_vectors(loss), **settings)
    of_rows, of_classes = np.asarray(problem.row_mask), np.asarray(problem.class_mask)
    positions = np.cumsum(of_classes) - 1
    assert positions[np.asarray(problem.labels)[of_rows]].tolist() == labels.tolist()
    assert of_classes[np.asarray(problem.labels)[of_rows]].all()
    found = np.asarray(problem.proxies).reshape(len(of_classes), -1)[of_classes]
    np.testing.assert_allclose(np.asarray(problem.embeddings)[of_rows], rows, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found, columns, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "ablation"),
    [
        ("norm_softmax", "stop_gradient"),
        ("norm_softmax", "proxies"),
        ("proxy_anchor", "proxies"),
        ("proxy_anchor", "embeddings"),
    ],
)
def test_loss_and_gradients_are_those_of_the_listed_rows_and_classes(name, ablation):
    loss, settings = make_loss(name), ABLATIONS[ablation]
    vectors = make_vectors(loss)
    ours = compiled(lambda x: loss(**synthesized(loss, *x, **settings)._asdict()))
    expected = compiled(lambda x: plain(name, *listed(name, *x, **settings)))
    assert_close(ours(vectors), expected(vectors))


@pytest.mark.parametrize(
    ("name", "ablation", "shards"),
    [
        ("norm_softmax", "embeddings", 2),
        ("proxy_anchor", "proxies", 1),
    ],
)
def test_ablations_join_the_virtual_classes_of_memvir(name, ablation, shards):
    loss, settings = make_loss(name), ABLATIONS[ablation]

    def ours(vectors, memory):
        problem = synthesized(loss, *vectors, shards=shards, **settings)._asdict()
        return memvir.loss_and_update(loss, memory, **problem, shards=shards)

    def expected(vectors, stored):
        rows, labels, columns = listed(name, *vectors, **settings)
        for k, (e, _) in enumerate(stored):
            labels = jnp.concatenate([labels, len(columns) + k * CLASSES + LABELS])
            rows = jnp.concatenate([rows, e])
        columns = jnp.concatenate([columns, *[p.reshape(CLASSES, -1) for _, p in stored]])
        return plain(name, rows, labels, columns)

    memory = memvir.init(
        num_steps=2, step_gap=0, batch_size=BATCH, num_classes=CLASSES, dim=DIM, loss=loss
    )
    take = compiled(ours, has_aux=True)
    stored = []
    for seed in range(3):
        vectors = make_vectors(loss, seed)
        (value, memory), gradients = take(vectors, memory)
        if seed == 2:
            assert_close((value, gradients), compiled(expected)(vectors, stored))
        stored.insert(0, prepared(name, *vectors))


def test_the_settings_are_the_arguments_of_both_functions():
    settings = ProxySynthesisConfig(
        ratio=2.0, lam=0.25, same_class=True, mix="proxies", stop_gradient=True
    )
    loss = losses.NormSoftmax()
    vectors = make_vectors(loss)
    draw = proxy_synthesis.draw(jax.random.key(0), jnp.asarray(LABELS), **settings.of_draw())
    mixed = proxy_synthesis.synthesize(
        *vectors, jnp.asarray(LABELS), lam=draw[0], partner=draw[1], **settings.of_synthesis()
    )
    assert draw[0].tolist() == [0.25, 0.25]
    assert mixed.row_mask.tolist() == [True] * BATCH + [False] * 2 * BATCH
    assert mixed.class_mask.all()
    assert {*settings.of_draw(), *settings.of_synthesis()} == set(vars(settings))


@pytest.mark.parametrize("mix", ["proxies", "embeddings"])
def test_the_step_and_the_map_of_a_run_use_its_settings(mix, tmp_path):
    settings = {"proxy_synthesis__ratio": 1.0, "proxy_synthesis__mix": mix}
    made = tiny.config(tiny.write_images(tmp_path), **settings)
    built = builder.build(parse(made), sharding.make_mesh(jax.devices()[:1]))
    loss = built.config.loss
    vectors = make_vectors(loss)
    present = jnp.ones(CLASSES, bool)
    problem = step._mixed(
        built.step_config, loss, jax.random.key(0), *vectors, jnp.asarray(LABELS), present
    )
    assert problem["row_mask"][BATCH:].all() == (mix != "proxies")
    assert problem["class_mask"][CLASSES:].all() == (mix != "embeddings")
    points = training_map._synthetic(built, *vectors, LABELS)
    shown = {
        kind: sum(len(x.label) for x in points if x.kind == kind) for kind in training_map.KINDS
    }
    assert (shown["synthetic embedding"] > 0) == (mix != "proxies")
    assert (shown["synthetic proxy"] > 0) == (mix != "embeddings")


def test_weights_of_samples_follow_the_beta_distribution_independently():
    labels = jnp.arange(3000) % 7
    lam, partner = proxy_synthesis.draw(
        jax.random.key(1), labels, alpha=0.4, ratio=2.0, per_sample=True, same_class=True
    )
    assert lam.shape == partner.shape == (2, 3000)
    assert scipy.stats.kstest(
        np.asarray(lam).reshape(-1), scipy.stats.beta(0.4, 0.4).cdf
    ).pvalue > (1e-3)
    assert abs(scipy.stats.spearmanr(lam[0, :-1], lam[0, 1:]).statistic) < 0.06


def test_the_default_draw_is_that_of_before_the_ablations():
    labels = jnp.asarray([0, 1, 2, 3, 1, 0])
    lam, partner = proxy_synthesis.draw(jax.random.key(3), labels, alpha=0.4, ratio=1.5)
    assert lam.tolist() == [0.996055543422699, 0.3962149918079376]
    assert partner.tolist() == [[1, 3, 4, 5, 0, 2], [1, 2, 3, 0, 5, 4]]


def test_partners_regardless_of_class_are_uniform_over_the_other_samples():
    labels = jnp.asarray([0, 0, 0, 1, 2])
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.vmap(
        lambda key: proxy_synthesis.draw(key, labels, alpha=1.0, ratio=1.0, same_class=True)[1][0]
    )
    partners = np.asarray(jax.jit(draw)(keys))
    assert (np.sort(partners, axis=1) == np.arange(5)).all()
    for sample in range(5):
        counts = np.bincount(partners[:, sample], minlength=5)
        assert counts[sample] == 0
        assert scipy.stats.chisquare(np.delete(counts, sample)).pvalue > 1e-3


def test_an_unknown_mix_raises():
    loss = losses.NormSoftmax()
    with pytest.raises(ValueError, match="mix is 'rows'; choose one of both, proxies, embeddings"):
        synthesized(loss, *make_vectors(loss), mix="rows")
