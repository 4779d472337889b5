import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import dml_jax
from dml_jax._utils.sharding import make_mesh
from dml_jax.data import centre_view
from dml_jax.evaluation import embedding, embedding_files
from dml_jax.evaluation.embedding import embed
from dml_jax.evaluation.embedding_files import load_embeddings, save_embeddings
from dml_jax.inference import export
from dml_jax.training import builder, run, run_directory
from dml_jax.training.config import parse
from dml_jax.training.state import network_variables
from tests.helpers import tiny
from tests.helpers.fuzz import damaged


def padded_batches(images, size):
    """Yields batches like those of the test pipeline, with index -1 in the padding."""
    for start in range(0, len(images), size):
        index = np.full(size, -1, np.int32)
        index[: len(images) - start] = np.arange(start, min(start + size, len(images)))
        yield {
            "image": np.where(index[:, None, None, None] < 0, 255, images[index]),
            "index": index,
        }


@jax.jit
def project(variables, images):
    return jnp.tanh(images.astype(jnp.float32).reshape(len(images), -1) / 255 @ variables["w"])


def mesh_of(devices):
    return make_mesh(jax.devices()[:devices])


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("count", [1, 8, 21, 32])
def test_embeddings_are_in_order_without_padding(count, devices):
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(count, 4, 4, 3), dtype=np.uint8)
    variables = {"w": rng.standard_normal((48, 5)).astype(np.float32)}
    with jax.transfer_guard("disallow"):
        got = embed(project, variables, padded_batches(images, 8), count, mesh_of(devices))
    assert got.dtype == np.float32
    expected = np.tanh(images.reshape(count, -1) / 255 @ variables["w"])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_images_are_sharded_over_the_devices():
    shards = []

    def spy(variables, images):
        shards.extend((shard.data.shape[0], shard.device) for shard in images.addressable_shards)
        return project(variables, images)

    images = np.zeros((16, 4, 4, 3), np.uint8)
    embed(spy, {"w": np.ones((48, 2), np.float32)}, padded_batches(images, 16), 16, mesh_of(8))
    assert shards == [(2, device) for device in jax.devices()[:8]]


@pytest.mark.parametrize("on_cpu", [False, True])
def test_accelerators_compute_while_the_next_batch_is_decoded(monkeypatch, on_cpu):
    monkeypatch.setattr(embedding, "on_cpu", lambda mesh: on_cpu)
    events = []
    fetch = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: events.append("fetch") or fetch(x))

    def traced(variables, images):
        events.append("dispatch")
        return project(variables, images)

    def decoded():
        for batch in padded_batches(np.zeros((8, 4, 4, 3), np.uint8), 2):
            events.append("decode")
            yield batch

    embed(traced, {"w": np.ones((48, 2), np.float32)}, decoded(), 8, mesh_of(1))
    first, later = ["decode", "dispatch"], ["decode", "dispatch", "fetch"]
    assert events == (later * 4 if on_cpu else [*first, *later * 3, "fetch"])


@pytest.mark.parametrize(
    "count, message", [(4, "holds image 4, but there are 4"), (7, "2 of 7 images are missing")]
)
def test_embed_rejects_wrong_counts(count, message):
    images = np.zeros((5, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match=message):
        embed(
            project,
            {"w": np.ones((48, 2), np.float32)},
            padded_batches(images, 3),
            count,
            mesh_of(1),
        )


EMBEDDINGS = np.arange(6, dtype=np.float32).reshape(3, 2)
LABELS = np.array([1, 0, 1], np.int32)
NAMES = ("a/ü 1.jpg", "b/2.png", "a/\u05d0.pgm")
CLASSES = ("b", "a")


def test_embeddings_file_round_trip(tmp_path):
    path = tmp_path / "embeddings.npz"
    path.write_text("an old file")
    save_embeddings(path, EMBEDDINGS, LABELS, NAMES, CLASSES)
    loaded = load_embeddings(str(path))
    np.testing.assert_array_equal(loaded.embeddings, EMBEDDINGS)
    np.testing.assert_array_equal(loaded.labels, LABELS)
    assert loaded.embeddings.dtype == np.float32
    assert loaded.labels.dtype == np.int32
    assert (loaded.names, loaded.class_names) == (NAMES, CLASSES)
    assert list(tmp_path.iterdir()) == [path]


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "embeddings.npz"
    save_embeddings(path, EMBEDDINGS, LABELS, NAMES, CLASSES)

    def full_disk(file, **arrays):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_embeddings(path, EMBEDDINGS + 1, LABELS, NAMES, CLASSES)
    np.testing.assert_array_equal(load_embeddings(path).embeddings, EMBEDDINGS)
    assert list(tmp_path.iterdir()) == [path]


def test_inconsistent_embeddings_are_not_saved(tmp_path):
    path = tmp_path / "embeddings.npz"
    with pytest.raises(ValueError, match="3 embeddings, 3 labels and 2 names"):
        save_embeddings(path, EMBEDDINGS, LABELS, NAMES[:2], CLASSES)
    with pytest.raises(ValueError, match=r"labels 0\.\.1 for 1 class names"):
        save_embeddings(path, EMBEDDINGS, LABELS, NAMES, CLASSES[:1])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"labels": None, "names": None}, "labels, names missing"),
        ({"embeddings": EMBEDDINGS[0]}, r"embeddings has shape \(2,\)"),
        ({"labels": LABELS / 2}, "labels has shape .* float64"),
        ({"names": np.array(NAMES[:2])}, "2 names"),
        ({"names": np.array(NAMES, dtype=object)}, "not an embeddings file"),
    ],
)
def test_inconsistent_files_are_rejected(tmp_path, changes, message):
    path = tmp_path / "embeddings.npz"
    arrays = {
        "embeddings": EMBEDDINGS,
        "labels": LABELS,
        "names": np.array(NAMES),
        "class_names": np.array(CLASSES),
        **changes,
    }
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(ValueError, match=message):
        load_embeddings(path)


def test_missing_and_damaged_files_are_rejected(tmp_path):
    with pytest.raises(FileNotFoundError, match="no embeddings file .*missing.npz"):
        load_embeddings(tmp_path / "missing.npz")
    path = tmp_path / "embeddings.npz"
    save_embeddings(path, EMBEDDINGS, LABELS, NAMES, CLASSES)
    content = path.read_bytes()
    for damaged_content in (b"", b"some text", content[: len(content) // 2]):
        path.write_bytes(damaged_content)
        with pytest.raises(ValueError, match="not an embeddings file"):
            load_embeddings(path)
    with path.open("wb") as file:
        np.save(file, EMBEDDINGS)
    with pytest.raises(ValueError, match="not an embeddings file"):
        load_embeddings(path)


def test_decompression_bomb_is_rejected(tmp_path, monkeypatch):
    path = tmp_path / "embeddings.npz"
    np.savez_compressed(path, embeddings=np.zeros((4096, 64), np.float32))
    monkeypatch.setattr(embedding_files, "_ALWAYS_ALLOWED", 1 << 16)
    with pytest.raises(
        ValueError, match=f"{path} is not .*its .* bytes unpack to 1\\d+, which is impl"
    ):
        load_embeddings(path)
    header = np.lib.format.magic(1, 0) + b"v\x00{'descr': '<f4', 'fortran_order': False, 'shape': "
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("embeddings.npy", header + b"(1000000000000, 512), }" + b" " * 46 + b"\n")
    with pytest.raises(ValueError, match=f"{path} is not an embeddings file"):
        load_embeddings(path)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was executed",)


def test_pickle_is_rejected_and_not_executed(tmp_path):
    path = tmp_path / "embeddings.npz"
    np.savez(path, embeddings=np.array([Bomb()], dtype=object))
    with pytest.raises(ValueError, match=f"{path} is not an embeddings file .*without pickles"):
        load_embeddings(path)


def test_arbitrary_files_raise_only_documented_errors(tmp_path):
    path = tmp_path / "embeddings.npz"
    save_embeddings(path, EMBEDDINGS, LABELS, NAMES, CLASSES)

    @settings(max_examples=600)
    @given(damaged(path.read_bytes()))
    def try_all(content):
        path.write_bytes(content)
        try:
            assert len(load_embeddings(path).names) == 3
        except ValueError as error:
            assert str(path) in str(error)

    try_all()


@pytest.mark.parametrize("cache", ["none", "device"])
def test_test_images_may_be_larger_than_training_images(cache, tmp_path):
    images = tiny.write_images(tmp_path)
    config = tiny.config(images, data__test_size=24, data__resize=30, data__cache=cache)
    built = builder.build(parse(config), mesh_of(2))
    variables, source = network_variables(built.init()), built.sources["test"]
    vectors = built.evaluator.embed(variables, "test")["test"]
    crops = [
        centre_view(source.image(i).pixels(), size=24, resize_to=30) for i in range(len(source))
    ]
    expected = np.asarray(built.network.embed(variables, jnp.asarray(crops)))
    # The device cache crops before it enlarges.
    tolerance = 1e-5 if cache == "none" else 0.05
    error = np.linalg.norm(vectors - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() < tolerance
    if cache == "none":
        assert builder.abstract_batch(built)["image"].shape[1:] == (tiny.SIZE, tiny.SIZE, 3)


def test_a_size_of_test_images_that_the_network_cannot_embed_is_refused_at_the_start(tmp_path):
    images = tiny.write_images(tmp_path)
    settings = {"model__backbone": "vit_tiny_patch16", "model__width": None}
    config = tiny.config(images, data__test_size=24, data__resize=30, **settings)
    with pytest.raises(ValueError, match="do not cover images of 24x24; choose multiples of 16"):
        builder.make_network(parse(config), mesh_of(1))


@pytest.mark.slow
def test_cached_features_and_exports_have_the_size_of_test_images(tmp_path):
    images = tiny.write_images(tmp_path / "images")
    sizes = {"data__test_size": 32, "data__resize": 32, "epochs": 1}
    network = {"model__backbone": "conv4", "model__train_from": "block3", "data__cache": "features"}
    config = tiny.config(images, **sizes, **network)
    folder = tmp_path / "run"
    run.train(config, folder)
    made = builder.make_network(parse(config), mesh_of(1))
    assert (made.features_shape.shape[0], made.test_features_shape.shape[0]) == (4, 8)
    export.write(folder, tmp_path / "exported", "last")
    saved = load_embeddings(folder / run_directory.EMBEDDINGS)
    paths = [images / name for name in saved.names]
    ours, exported = (dml_jax.load(x).embed(paths) for x in (folder, tmp_path / "exported"))
    np.testing.assert_allclose(exported, ours, rtol=1e-4, atol=1e-5)
    # Cached features are rounded to float16.
    np.testing.assert_allclose(ours, saved.embeddings, rtol=2e-2, atol=2e-3)
