"""Mixup and manifold mixup, against the same mixtures made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dml_jax import data, mixup
from dml_jax._utils import sharding
from dml_jax.configs import glyphs
from dml_jax.training import builder, config, step
from dml_jax.training.config import parse

BATCH = 16
SMALL = {
    "batch_size": BATCH,
    "data.image_size": 16,
    "model.backbone": "conv4",
    "model.width": 4,
    "model.dim": 6,
}
SOURCE = data.Source(
    records=[""] * 64,
    labels=np.arange(64, dtype=np.int32) % 8,
    class_names=tuple("abcdefgh"),
    names=tuple(map(str, range(64))),
)
LABELS = jnp.arange(BATCH, dtype=jnp.int32) % 7


def build(devices=1, **settings):
    made = glyphs.get_config("mixup_cosface")
    made.update_from_flattened_dict(SMALL | settings)
    return on_devices(made, devices)


def on_devices(made, devices=1):
    """Returns the experiment of a config; no test reads its images."""
    mesh = sharding.make_mesh(jax.devices()[:devices])
    return builder.build(parse(made), mesh, sources={"train": SOURCE, "test": SOURCE})


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).integers(256, size=(BATCH, 16, 16, 3)), jnp.uint8)


def loss_of(built, images, key):
    state, mesh = built.init(), built.mesh
    with jax.set_mesh(mesh):
        batch = sharding.put_batch(mesh, {"image": images, "label": LABELS})
        value = jax.jit(
            lambda state, batch: step.objective(built.step_config, state.params, state, batch, key)
        )(state, batch)[0]
    return float(value)


@pytest.mark.parametrize("depth", [0, 2, 4])
def test_the_loss_is_that_of_mixtures_made_by_hand(images, depth):
    built = build(**{"mixup.depth": 4})
    keys = (jax.random.key(seed) for seed in range(99))
    settings = built.step_config.mixup
    drawn = ((key, mixup.draw(jax.random.fold_in(key, step._MIXUP), settings)) for key in keys)
    key, mixture = next((key, x) for key, x in drawn if x.depth == depth and 0.2 < x.weight < 0.8)
    state, embedder = built.init(), built.network.embedder
    partner = np.roll(np.arange(BATCH), -BATCH // 2)
    variables = {"params": state.params["embedder"], "batch_stats": state.batch_stats}

    def mixed(place, x):
        if place != depth:
            return x
        return mixture.weight * x + (1 - mixture.weight) * x[partner]

    def embed(module, images):
        backbone = module.backbone
        x = backbone.input_normalisation.normalise(images)
        for place, part in enumerate(("block1", "block2", "block3", "block4")):
            x = backbone(mixed(place, x), train=True, parts=(part,))
        return mixed(4, module._pool(x))

    pooled, _ = embedder.apply(variables, images, method=embed, mutable=["batch_stats"])
    head = state.params["embedder"]["head"]
    embeddings = pooled @ head["kernel"] + head["bias"][None]
    loss, weight = built.step_config.loss, float(mixture.weight)
    expected = weight * loss(embeddings, state.params["proxies"], LABELS) + (1 - weight) * loss(
        embeddings, state.params["proxies"], LABELS[partner]
    )
    np.testing.assert_allclose(loss_of(built, images, key), expected, rtol=1e-5)


@pytest.mark.slow
def test_micro_batches_and_devices_mix_the_same_samples(images):
    """Without batch statistics, which are those of a micro-batch."""
    frozen = {"model.freeze_bn": True, "mixup.depth": 1}
    key = jax.random.key(3)
    expected = loss_of(build(**frozen), images, key)
    for devices, parts in ((4, 1), (1, 2), (2, 4)):
        value = loss_of(build(devices, micro_batches=parts, **frozen), images, key)
        np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_weights_and_places_have_their_distributions():
    settings = mixup.MixupConfig(alpha=0.4, depth=2)
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(lambda key: mixup.draw(key, settings))(keys)
    beta = scipy.stats.beta(0.4, 0.4).cdf
    assert scipy.stats.kstest(np.asarray(drawn.weight), beta).pvalue > 0.01
    counts = np.bincount(drawn.depth, minlength=3)
    assert scipy.stats.chisquare(counts).pvalue > 0.01
    by_place = [drawn.weight[drawn.depth == place] for place in range(3)]
    assert scipy.stats.kruskal(*map(np.asarray, by_place)).pvalue > 0.01


def test_a_weight_of_one_mixes_nothing():
    mixture = mixup.Mixture(jnp.asarray(1.0), jnp.asarray(0))
    x = jax.random.normal(jax.random.key(0), (6, 3))
    assert (mixture.at(0, x) == x).all() and (mixture.at(1, x) == x).all()
    assert mixture.loss(lambda labels: labels.sum() * 1.0, LABELS, micro_batches=1) == LABELS.sum()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"proxy_synthesis.ratio": 1.0}, "ratio and config.mixup.alpha are used together"),
        ({"memvir.num_steps": 1}, "num_steps and config.mixup.alpha are used together"),
        ({"micro_batches": BATCH}, "has 1 of config.batch_size 16; choose config.micro_batches"),
        ({"batch_size": 20, "micro_batches": 4}, "has 5 of config.batch_size 20"),
        ({"mixup.depth": 5}, "has 5 places: the inputs of block1, .*, head; choose at most 4"),
        ({"model.train_from": "head", "mixup.depth": 1}, "has 1 places: the inputs of head"),
        ({"xbm.num_steps": 2}, "the loss cosface has no pairs"),
    ],
)
def test_settings_that_cannot_be_mixed_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_losses_of_pairs_refuse_what_needs_proxies():
    made = glyphs.get_config("xbm_contrastive")
    made.update_from_flattened_dict(SMALL | {"memvir.num_steps": 1, "mixup.alpha": 1.0})
    with pytest.raises(ValueError, match=r"memvir.num_steps and config.mixup.alpha must be 0"):
        config.parse(made)
    made.update_from_flattened_dict({"memvir.num_steps": 0, "mixup.alpha": 0.0})
    made.xbm.warmup_epochs = made.epochs
    with pytest.raises(ValueError, match="before the memory is used"):
        config.parse(made)


def test_a_loss_of_pairs_without_pairs_warns(caplog):
    made = glyphs.get_config("contrastive")
    made.update_from_flattened_dict(SMALL | {"data.n_instance": 1})
    on_devices(made)
    assert "pairs of one class only by chance" in caplog.text
