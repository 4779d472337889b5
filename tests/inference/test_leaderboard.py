import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import constants

from dml_jax import data, retrieval
from dml_jax._utils import sharding
from dml_jax.inference import leaderboard
from dml_jax.inference.leaderboard import Entry
from dml_jax.models import BACKBONES, pretrained, zoo
from dml_jax.report import leaderboard as page
from dml_jax.training import builder
from dml_jax.training.config import parse
from dml_jax.training.state import network_variables
from tests.helpers import tiny

GOOD, BAD = Entry("conv1", "none"), Entry("conv1", "<b>.safetensors")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images"))


def config(images, **settings):
    return tiny.config(images, model__width=None, **{"model__dim": 3} | settings)


def test_scores_and_costs_are_those_of_the_backbone_and_are_kept(images, tmp_path, monkeypatch):
    given, chosen = config(images), frozenset[str]()
    found = leaderboard.score(given, [BAD, GOOD], chosen, tmp_path / "results")
    (row,) = found.rows
    assert list(found.failed) == [str(BAD)] and "there are no weights" in found.failed[str(BAD)]
    assert found.images == {
        "train": {"images": 36, "classes": 6},
        "test": {"images": 24, "classes": 4},
    }

    built = builder.build(parse(given), sharding.make_mesh())
    variables, source = network_variables(built.init()), built.sources["test"]
    pixels = jnp.asarray(np.stack([data.decode(source[i], "") for i in range(len(source))]))
    backbone = built.network.embedder.backbone
    of_backbone = {name: tree["backbone"] for name, tree in variables.items()}
    normalised = backbone.input_normalisation.normalise(pixels)
    features = backbone.apply(of_backbone, normalised, train=False).mean((1, 2))
    expected = retrieval.evaluate(np.asarray(features), source.labels)
    for metric in retrieval.SCORES.values():
        assert row["features"][metric] == pytest.approx(expected[metric], abs=1e-6)
        assert 0 <= row["whitened"][metric] <= 1
    # A convolution of 3x3 pixels from 3 to 4 channels, and a normalisation.
    assert (row["parameters"], row["dim"], row["whitened_dim"]) == (3 * 3 * 3 * 4 + 2 * 4, 4, 3)
    assert row["images_per_second"] > 0
    # At least the images of a batch of 8, and the features.
    assert 8 * 16 * 16 * 3 + 8 * 4 * 4 < row["memory"] < 1e6

    calls = []
    monkeypatch.setattr(leaderboard, "score_one", lambda *_: calls.append(1) or row)
    again = leaderboard.score(given, [GOOD], chosen, tmp_path / "results")
    assert again.rows == found.rows and not calls
    leaderboard.score(given, [BAD, GOOD], chosen, tmp_path / "results")
    assert calls == [1]  # Of the one that failed.
    for changed in (config(images, evaluation__recall_at=(1, 2)), config(images, model__dim=2)):
        calls.clear()
        leaderboard.score(changed, [GOOD], chosen, tmp_path / "results")
        assert calls == [1]

    page.write(found, tmp_path / "index.html", device="cpu")
    text = (tmp_path / "index.html").read_text()
    _, _, body = text.partition("</head>")
    assert f"{100 * row['features']['map@r']:.1f}" in body
    assert "&lt;b&gt;.safetensors" in body and "<b>" not in body
    outside = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert "<main>" in outside and not re.search(r"(src|href)=.?http|@import|url\(", outside)


def test_the_best_backbone_comes_first(images, tmp_path, monkeypatch):
    def scored(raw, whitened):
        return {"features": {"map@r": raw}, "whitened": {"map@r": whitened}}

    results = iter([scored(0.5, 0.1), scored(0.2, 0.6), scored(0.3, 0.4)])
    monkeypatch.setattr(leaderboard, "score_one", lambda *_: next(results))
    entries = [Entry("conv1", "none"), Entry("conv4", "none"), Entry("resnet6", "none")]
    given = tiny.config(images, model__width=None)
    rows = leaderboard.score(given, entries, frozenset(), tmp_path).rows
    assert [row["backbone"] for row in rows] == ["conv4", "conv1", "resnet6"]


def test_size_and_normalisation_are_those_of_the_weights_unless_they_are_chosen(images):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = Path(constants.HF_HUB_CACHE) / "models--somebody--published"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    half = [0.5, 0.5, 0.5]
    stated = {"mean": half, "std": half, "input_size": [3, 224, 224], "crop_pct": 0.9}
    file = repository / "snapshots" / commit / "config.json"
    file.write_text(json.dumps({"pretrained_cfg": stated}))
    entry, given = Entry("vit_tiny_patch16", "hf:somebody/published"), config(images)

    own = leaderboard.settings_of(entry, given, frozenset())
    assert (own.data.image_size, own.data.resize) == (224, 248)  # As timm: floor(224 / 0.9).
    assert (own.model.normalisation, own.model.pooling) == ("inception", "token")
    chosen = frozenset({"data.resize", "model.normalisation", "model.pooling"})
    own = leaderboard.settings_of(entry, given, chosen)
    assert (own.data.image_size, own.data.resize) == (16, 16)
    assert (own.model.normalisation, own.model.pooling) == (None, "gap")
    own = leaderboard.settings_of(Entry("resnet18", "hf:somebody/other"), given, frozenset())
    assert (own.data.image_size, own.model.normalisation) == (16, None)
    assert given.model.backbone == "conv1"


def test_the_default_weights_are_of_known_backbones():
    for name, location in zoo.WEIGHTS:
        assert name in BACKBONES.names() and pretrained.is_location(location)
    assert len(set(zoo.WEIGHTS)) == len(zoo.WEIGHTS)
