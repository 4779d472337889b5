import json

import chex
import jax
import numpy as np
import pytest

from dml_jax import data
from dml_jax._utils import sharding
from dml_jax.evaluation import embedding_files, features
from dml_jax.evaluation.embedding import embed_images
from dml_jax.inference import trained
from dml_jax.training import builder, run
from dml_jax.training.batches import device_batches
from dml_jax.training.config import parse
from dml_jax.training.state import network_variables
from tests.helpers import tiny

HEAD = {"model__train_from": "head", "data__cache": "features"}
UNCHANGED = {"data__augmentation__crop_scale": (1.0, 1.0), "data__augmentation__flip": False}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images"))


def build(images, devices=1, **settings):
    config = parse(tiny.config(images, **HEAD | settings))
    mesh = sharding.make_mesh(jax.devices()[:devices])
    # An empty report saves the time of an inspection.
    return builder.build(config, mesh, data.InspectionReport({}, {}))


def load(built, folder, *, variables=None, **arguments):
    variables = variables or network_variables(built.init())
    return features.load(built.network, variables, built.sources, folder, **arguments)


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("network", [tiny.NETWORK, tiny.RESNET])
def test_a_run_with_cached_features_is_one_without_up_to_rounding(images, tmp_path, network):
    train_from = "head" if network is tiny.NETWORK else "layer2"
    settings = {"data__feature_views": 1, "model__train_from": train_from, **UNCHANGED}
    settings |= {name.replace(".", "__"): value for name, value in network.items()}
    for cache in ("none", "features"):
        config = tiny.config(images, "ps_memvir", data__cache=cache, **settings)
        run.train(config, tmp_path / cache)
    plain, cached = metrics_of(tmp_path / "none"), metrics_of(tmp_path / "features")
    for name in ("loss", "gradient_norm", "learning_rate", "map@r"):
        np.testing.assert_allclose(
            [line[name] for line in cached], [line[name] for line in plain], rtol=5e-3
        )
    assert not (tmp_path / "none" / "features").exists()

    # Everything after training applies the whole network to images.
    exported = embedding_files.load_embeddings(tmp_path / "features" / "embeddings.npz")
    mesh = sharding.make_mesh(jax.devices()[:1])
    found, variables, _ = trained.load(tmp_path / "features", "last", mesh)
    test = data.create("folder", root=str(images))["test"]
    ours = embed_images(found, variables, test)
    np.testing.assert_allclose(exported.embeddings, ours, rtol=5e-3, atol=5e-3)


def test_features_are_those_of_the_frozen_part(images, tmp_path):
    built = build(images, data__feature_views=2, data__validation_classes=0.3)
    variables = network_variables(built.init())
    loaded = load(built, tmp_path, variables=variables)
    assert {split: x.views for split, x in loaded.items()} == {
        "train": 2,
        "validation": 1,
        "test": 1,
    }
    for split in ("validation", "test"):
        source = built.sources[split]
        pixels = np.stack(
            [
                data.centre_view(data.decode(source[i], ""), size=tiny.SIZE, resize_to=tiny.SIZE)
                for i in range(len(source))
            ]
        )
        expected = built.network.freeze(variables, pixels)
        found = loaded[split].take(np.arange(len(source)))
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-3)
    train = loaded["train"]
    first, second = (train.take(np.arange(len(train.rows)), view) for view in (0, 1))
    assert first.shape == second.shape and (first != second).any(axis=1).all()
    np.testing.assert_array_equal(
        built.network.embed(variables, pixels),
        built.network.embed_features(variables, expected),
    )


def test_caches_are_shared_by_runs_that_differ_in_other_things(images, tmp_path):
    load(build(images), tmp_path)
    caches = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("complete.json")}
    assert len(caches) == 2
    weights = network_variables(build(images).init())
    for settings in (
        {"seed": 3, "data__validation_classes": 0.3},
        {"seed": 4, "data__validation_classes": 0.5, "model__dim": 8, "batch_size": 4},
    ):
        built = build(images, **settings)
        variables = network_variables(built.init())
        variables["params"] = {**variables["params"], "backbone": weights["params"]["backbone"]}
        load(built, tmp_path, variables=variables)
    # The centre crops of the training images are new.
    now = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("complete.json")}
    assert now.items() > caches.items() and len(now) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 1},  # The weights are random.
        {"data__feature_views": 5},
        {"data__augmentation__flip": False},
        {"data__image_size": 14},
        {"model__pooling": "gmp"},
        {"model__channels": "bgr"},
    ],
)
def test_other_settings_make_other_caches(images, tmp_path, settings):
    load(build(images), tmp_path)
    before = set(tmp_path.iterdir())
    load(build(images, **settings), tmp_path)
    assert set(tmp_path.iterdir()) > before


def test_another_image_makes_another_cache(images, tmp_path):
    copy = tiny.write_images(tmp_path / "images")
    caches = tmp_path / "caches"
    load(build(images), caches)
    before = set(caches.iterdir())
    load(build(copy), caches)
    assert set(caches.iterdir()) == before  # The same names and contents elsewhere.
    first, second = sorted((copy / "train" / "class0").iterdir())[:2]
    size = first.stat().st_size
    first.write_bytes(second.read_bytes()[:size].ljust(size, b"\0"))
    load(build(copy), caches)
    assert len(set(caches.iterdir()) - before) == 1


def test_an_interrupted_computation_is_resumed(images, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_SAVE_EVERY", 2)
    built = build(images)
    whole = load(built, tmp_path / "whole")
    embedded = []

    def counted(variables, images):
        embedded.append(len(images))
        return freeze(variables, images)

    freeze = built.network.freeze
    counting = built._replace(network=built.network._replace(freeze=counted))

    def interrupt():
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt

    interrupted = []
    with pytest.raises(KeyboardInterrupt):
        load(counting, tmp_path / "parts", interrupt=interrupt)
    # Six classes of six images in four views, in batches of eight.
    assert 2 <= len(embedded) <= 3
    embedded.clear()
    resumed = load(counting, tmp_path / "parts", interrupt=interrupt)
    assert len(embedded) == 6 * 6 * 4 / 8 - 2 + 3
    chex.assert_trees_all_equal(resumed, whole)
    embedded.clear()
    load(counting, tmp_path / "parts")
    assert not embedded


def test_a_computation_interrupted_after_its_last_batch_is_resumed(images, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_SAVE_EVERY", 6 * 6 * 4 // 8)
    built = build(images)

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(built, tmp_path, interrupt=interrupt)
    (cache,) = tmp_path.iterdir()
    assert (cache / "progress.json").exists() and not (cache / "complete.json").exists()
    load(built, tmp_path)
    assert (cache / "complete.json").exists() and not (cache / "progress.json").exists()


def test_a_full_disk_is_an_error_that_names_the_file(images, tmp_path):
    built = build(images)
    with tiny.full_disk(1000), pytest.raises(OSError, match=r"features\.npy"):
        load(built, tmp_path)
    load(built, tmp_path)


def test_a_damaged_cache_is_an_error(images, tmp_path):
    built = build(images)
    load(built, tmp_path)
    file = sorted(tmp_path.rglob("features.npy"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"the feature cache {file.parent} is damaged; delete it"):
        load(built, tmp_path)


def test_features_beyond_float16_are_an_error(images, tmp_path):
    built = build(images)
    variables = jax.tree.map(lambda x: 1e4 * x, network_variables(built.init()))
    with pytest.raises(ValueError, match="not finite in float16"):
        load(built, tmp_path, variables=variables)


def test_features_do_not_depend_on_the_number_of_devices(images, tmp_path):
    alone = load(build(images), tmp_path / "1")
    together = load(build(images, devices=8), tmp_path / "8")
    chex.assert_trees_all_close(together, alone, rtol=2e-3)
    for split, found in alone.items():
        np.testing.assert_array_equal(found.rows, together[split].rows)


def test_views_are_drawn_uniformly_and_depend_on_seed_and_step_alone(images, tmp_path):
    built = build(images, data__feature_views=3)
    variables = network_variables(built.init())
    built = builder.with_features(built, variables, tmp_path / "run", lambda: None)
    whole = [(step, jax.device_get(x)) for step, x in device_batches(built, 0, 60)]
    resumed = [(step, jax.device_get(x)) for step, x in device_batches(built, 41, 60)]
    chex.assert_trees_all_equal(whole[41:], resumed)

    stored = built.features["train"].values
    views = [
        int(np.flatnonzero((stored == row).all(-1).any(-1))[0])
        for _, batch in whole
        for row in batch["features"]
    ]
    counts = np.bincount(views, minlength=3)
    assert len(counts) == 3
    # Five standard deviations of a binomial distribution.
    expected, deviation = len(views) / 3, (len(views) * 2 / 9) ** 0.5
    assert (abs(counts - expected) < 5 * deviation).all()


def test_nothing_to_freeze_is_an_error(images):
    with pytest.raises(ValueError, match=r"cache is 'features', but config.model.train_from is"):
        parse(tiny.config(images, data__cache="features"))
