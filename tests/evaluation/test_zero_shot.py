import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.decomposition

from dml_jax import data, retrieval
from dml_jax._utils import sharding
from dml_jax.evaluation import zero_shot
from dml_jax.training import builder, run, run_directory
from dml_jax.training.config import parse
from dml_jax.training.state import network_variables
from tests.helpers import tiny


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images"))


def test_whitening_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(12, 12))
    training, test = ((rng.normal(size=(n, 12)) @ mixing).astype(np.float32) for n in (200, 30))

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    reference = sklearn.decomposition.PCA(5, whiten=True, svd_solver="full").fit(unit(training))
    expected = reference.transform(unit(test))
    ours = zero_shot.whiten({"test": test}, training, 5)["test"]
    assert ours.dtype == np.float32
    # Components have an arbitrary sign.
    np.testing.assert_allclose(ours @ ours.T, expected @ expected.T, rtol=1e-3, atol=1e-3)


def test_whitening_leaves_out_components_without_variance():
    rng = np.random.default_rng(0)
    training = (rng.normal(size=(50, 3)) @ rng.normal(size=(3, 8))).astype(np.float32)
    whitened = zero_shot.whiten({"train": training}, training, 8)["train"]
    assert whitened.shape[1] <= 4 and np.isfinite(whitened).all()
    np.testing.assert_allclose(np.cov(whitened, rowvar=False), np.eye(whitened.shape[1]), atol=0.02)


@pytest.mark.parametrize("train_from", ["all", "head"])
def test_pooled_features_are_those_of_the_backbone(images, train_from):
    config = tiny.config(images, model__train_from=train_from)
    built = builder.build(parse(config), sharding.make_mesh())
    variables = network_variables(built.init())
    source = built.sources["test"]
    pixels = np.stack([data.decode(source[i], "") for i in range(len(source))])
    backbone = built.network.embedder.backbone
    of_backbone = {name: tree["backbone"] for name, tree in variables.items()}
    normalised = backbone.input_normalisation.normalise(jnp.asarray(pixels))
    expected = backbone.apply(of_backbone, normalised, train=False).mean((1, 2))
    found = zero_shot.pooled_features(built.evaluator, variables, "test")
    assert found.keys() == {"test"}
    np.testing.assert_allclose(found["test"], expected, rtol=1e-4, atol=1e-5)


def test_a_run_that_is_worse_than_its_backbone_warns(images, tmp_path, caplog):
    first, good = tmp_path / "first", tmp_path / "good"
    result = run.train(tiny.config(images, epochs=1), first)
    assert "zero_shot" not in result and not (first / run_directory.ZERO_SHOT).exists()

    features = {"model__train_from": "head", "data__cache": "features"}
    for folder, settings in ((good, {}), (tmp_path / "cached", features)):
        result = run.train(tiny.config(images, epochs=1, **settings), folder, fork_from=first)
        written = json.loads((folder / run_directory.ZERO_SHOT).read_text())
        assert result["zero_shot"] == written and written["map@r"] <= result["last"]["map@r"]
        assert set(retrieval.SCORES.values()) < written.keys()
    assert "less than" not in caplog.text

    # On a line, all cosines are 1 or -1.
    run.train(tiny.config(images, epochs=1, model__dim=1), tmp_path / "line")
    config = tiny.config(images, epochs=1, model__dim=1)
    result = run.train(config, tmp_path / "bad", fork_from=tmp_path / "line")
    assert result["zero_shot"]["map@r"] > result["last"]["map@r"]
    assert "less than" in caplog.text and "pooled features of the backbone" in caplog.text
