"""The synthetic classes of a run, against a naive mixture of each pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dml_jax import losses, proxy_synthesis
from dml_jax._utils import files, sharding
from dml_jax.data.sampling import Order
from dml_jax.inference import mixtures, trained
from dml_jax.proxy_synthesis import ProxySynthesisConfig
from dml_jax.training import run_directory
from dml_jax.training.run import train
from tests.helpers import tiny


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def naive(key, embeddings, proxies, labels, config):
    """Returns embedding, proxies, classes and weight of each synthetic class, one after another."""
    lam, partner = map(np.asarray, proxy_synthesis.draw(key, jnp.asarray(labels), **config))
    e, p = unit(embeddings), unit(proxies.reshape(-1, embeddings.shape[1])).reshape(proxies.shape)
    made = []
    for i in range(int(config["ratio"] * len(labels))):
        draw, first = divmod(i, len(labels))
        second, weight = partner[draw, first], lam[draw]
        a, b = labels[first], labels[second]
        proxy = unit(weight * p[a] + (1 - weight) * p[b]).ravel()
        made.append((unit(weight * e[first] + (1 - weight) * e[second]), proxy, (a, b), weight))
    return [np.array(x) for x in zip(*made, strict=True)]


@pytest.mark.parametrize("loss", [losses.NormSoftmax(), losses.SoftTriple(centers_per_class=2)])
def test_mixtures_of_a_batch_equal_those_of_each_pair(loss):
    rng = np.random.default_rng(0)
    labels = np.array([0, 0, 1, 2, 2, 3])
    embeddings, proxies = rng.normal(size=(6, 5)), rng.normal(size=(4, loss.proxies_per_class, 5))
    config = ProxySynthesisConfig(ratio=1.5, alpha=0.4)
    key = jax.random.key(3)
    made = mixtures.of_batch(
        key,
        jnp.asarray(embeddings),
        jnp.asarray(proxies.reshape(-1, 5)),
        jnp.asarray(labels),
        loss=loss,
        mixing=config,
    )
    expected = naive(key, embeddings, proxies, labels, config.of_draw())
    assert len(made.weights) == 9 and made.row_mask.all() and made.class_mask.all()
    for ours, theirs in zip(made, expected, strict=False):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_a_run_exports_the_pairs_of_its_next_epoch(monkeypatch, tmp_path):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: make_mesh(jax.devices()[:1]))
    images = tiny.write_images(tmp_path / "images")
    config = tiny.config(images, "ps", epochs=1, seed=7, evaluation__recall_at=(1,))
    folder = tmp_path / "run"
    steps = train(config, folder)["last"]["step"]
    made, class_names = mixtures.of_run(folder, "last")
    mixtures.save(tmp_path / "synthetic.npz", made, class_names)

    built = trained.build(folder)
    state = trained.read_training_state(built, folder, "last")
    source = built.sources["train"]
    embeddings = built.evaluator._replace(sources={"test": source}).embed(state.variables, "test")
    order, draws = Order(source.labels, 8, 1, 7), config.proxy_synthesis.to_dict()
    draws = {name: draws[name] for name in ("ratio", "alpha")}
    parts = []
    for step in range(steps, 2 * steps):
        rows = order(step)
        key = jax.random.fold_in(jax.random.key(7), step)
        of_step = embeddings["test"][rows], state.proxies[:, None], source.labels[rows], draws
        parts.append(naive(key, *of_step))
    expected = [np.concatenate(x) for x in zip(*parts, strict=True)]
    names = ("embeddings", "proxies", "classes", "weights")
    with np.load(tmp_path / "synthetic.npz", allow_pickle=False) as saved:
        assert set(saved) == {*names, "row_mask", "class_mask", "class_names"}
        assert len(saved["weights"]) == 8 * steps and len(set(saved["weights"])) == steps
        for name, theirs in zip(names, expected, strict=True):
            np.testing.assert_allclose(saved[name], theirs, atol=1e-5)
        assert saved["class_names"].tolist() == [f"class{c}" for c in range(tiny.TRAIN_CLASSES)]

    with pytest.raises(FileNotFoundError, match="holds no run"):
        mixtures.of_run(tmp_path, "last")
    without = run_directory.read_config(folder)
    without.proxy_synthesis.ratio = 0.0
    files.write_json(folder / run_directory.CONFIG, without.to_dict())
    with pytest.raises(ValueError, match=r"has no synthetic classes: .*ratio is 0"):
        mixtures.of_run(folder, "last")
