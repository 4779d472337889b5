import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import dml_jax
from dml_jax._utils import files, sharding
from dml_jax.data import centre_view
from dml_jax.evaluation import embedding_files
from dml_jax.inference import export
from dml_jax.training import builder, checkpoint, resume, run_directory
from dml_jax.training.config import parse
from dml_jax.training.state import network_variables
from tests.helpers import tiny

SCORES = {"recall@1": 0.75, "r_precision": 0.5, "map@r": 0.25}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained run with an average of the network, whose images have been moved since."""
    root = tmp_path_factory.mktemp("export")
    images = tiny.write_images(root / "images")
    config = tiny.config(images, "ps_memvir", optimizer__average_decay=0.9)
    built = builder.build(parse(config), sharding.make_mesh(jax.devices()[:1]))
    state = built.init()
    state = state._replace(average=jax.tree.map(lambda x: x + 0.25, state.average))
    resume.claim(root / "run", parse(config))
    with checkpoint.Checkpoints(root / "run", keep_last=2) as checkpoints:
        checkpoints.save(4, state, SCORES)
    vectors = built.evaluator.embed(network_variables(state), "test")["test"]
    source = built.sources["test"]
    embedding_files.save_embeddings(
        root / "run" / run_directory.EMBEDDINGS,
        vectors,
        source.labels,
        source.names,
        source.class_names,
    )
    images.rename(root / "elsewhere")
    return root / "run"


@pytest.fixture(scope="module")
def exported(run):
    export.write(run, run.parent / "exported", "best_map")
    return run.parent / "exported"


@pytest.fixture(scope="module")
def saved(run):
    return embedding_files.load_embeddings(run / run_directory.EMBEDDINGS)


@pytest.fixture(scope="module")
def paths(run, saved):
    return [run.parent / "elsewhere" / name for name in saved.names]


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("kind", ["run", "exported"])
def test_run_and_export_reproduce_the_saved_embeddings(kind, request, saved, paths):
    model = dml_jax.load(request.getfixturevalue(kind))
    vectors = model.embed(paths)
    np.testing.assert_allclose(
        np.linalg.norm(vectors, axis=1), np.linalg.norm(saved.embeddings, axis=1), rtol=1e-5
    )
    np.testing.assert_allclose(unit(vectors), unit(saved.embeddings), rtol=0, atol=1e-6)


# The packages that JAX needs, also to read exported functions.
JAX = ("flatbuffers", "jax", "jaxlib", "ml_dtypes", "numpy", "opt_einsum", "scipy")


def python_with_jax_only(folder):
    """Returns a command that runs a program with no package but JAX, and its first line."""
    for name in JAX:
        package = Path(importlib.util.find_spec(name).origin).parent
        for part in (package, package.with_name(f"{name}.libs")):
            if part.exists():
                (folder / part.name).symlink_to(part)
    return [sys.executable, "-I", "-S", "-c"], f"import sys; sys.path.append({str(folder)!r})\n"


def test_snippet_of_the_card_works_with_jax_only(run, exported, saved, paths, tmp_path):
    _, _, rest = (exported / export.CARD).read_text().partition("```python\n")
    snippet, _, _ = rest.partition("```")
    zeros = f"images = np.zeros((2, {tiny.SIZE}, {tiny.SIZE}, 3), np.uint8)"
    assert zeros in snippet
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    np.save(run.parent / "images.npy", pixels)
    python, program = python_with_jax_only(tmp_path)
    program += snippet.replace(zeros, 'images = np.load("../images.npy")')
    program += """
np.save("../unit.npy", unit)
import importlib.util
absent = {"dml_jax", "flax", "safetensors"}
assert not absent & sys.modules.keys() and not any(map(importlib.util.find_spec, absent))
"""
    done = subprocess.run([*python, program], cwd=exported, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    vectors = np.load(run.parent / "unit.npy")
    np.testing.assert_allclose(vectors, unit(saved.embeddings), rtol=0, atol=1e-6)


def test_card_has_scores_and_no_local_paths(run, exported, tmp_path):
    names = {path.name for path in exported.iterdir()}
    assert names == {"README.md", "config.json", "embed.jax_export", "weights.safetensors"}
    card = (exported / export.CARD).read_text()
    assert "was not complete" in card and "This checkpoint was not evaluated." in card
    assert json.loads((exported / "config.json").read_text())["data"]["root"] == "images"
    assert str(run.parent) not in card
    for file in exported.iterdir():
        for path in (Path(__file__).parents[2], Path(jax.__file__).parent):
            assert str(path).encode() not in file.read_bytes(), file

    result = {
        "last": {"step": 4} | SCORES,
        "best_of": {"map@r": {"step": 2} | SCORES},
        "images": {"train": 36, "test": 24},
        "classes": {"train": 6, "test": 4},
    }
    files.write_json(run / run_directory.RESULT, result)
    export.write(run, tmp_path, "last")
    card = (tmp_path / export.CARD).read_text()
    assert "| MAP@R | 25.0 |" in card and "| test | 24 | 4 |" in card
    assert "Proxy Synthesis" in card and "MemVir" in card


def test_export_does_not_overwrite(run, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="not an empty folder"):
        export.write(run, tmp_path, "last")
    with pytest.raises(FileNotFoundError, match="holds no run"):
        export.write(tmp_path, tmp_path / "out", "last")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_paths_pillow_images_and_pixels_are_equivalent(exported):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 40, 30, 3), np.uint8)
    model = dml_jax.load(exported)
    expected = model.embed([centre_view(x, size=16, resize_to=16) for x in pixels])
    path = exported.parent / "third.png"
    Image.fromarray(pixels[2]).save(path)
    mixed = model.embed([pixels[0], Image.fromarray(pixels[1]), path])
    np.testing.assert_array_equal(mixed, expected)
    np.testing.assert_array_equal(model.embed(pixels), expected)


def test_embeddings_do_not_depend_on_the_batch_size(exported):
    pixels = np.random.default_rng(1).integers(0, 256, (69, 16, 16, 3), np.uint8)
    model = dml_jax.load(exported)
    single = np.concatenate([model.embed(pixels[i : i + 1]) for i in (0, 63, 64, 68)])
    together = model.embed(pixels)
    assert together.shape == (69, 16)
    np.testing.assert_allclose(unit(together[[0, 63, 64, 68]]), unit(single), atol=1e-6)


def test_search_returns_the_nearest_embeddings(run, exported, saved, paths):
    model = dml_jax.load(exported)
    found = model.search(paths[:3], run / run_directory.EMBEDDINGS, k=5)
    cosines = unit(saved.embeddings[:3]) @ unit(saved.embeddings).T
    # Not the indices, whose order is arbitrary if two embeddings are almost equal.
    nearest = -np.sort(-cosines, axis=1)[:, :5]
    np.testing.assert_allclose(found.similarities, nearest, atol=1e-6)
    found_cosines = np.take_along_axis(cosines, found.indices, axis=1)
    np.testing.assert_allclose(found_cosines, nearest, atol=1e-6)
    assert found.names == tuple(tuple(saved.names[i] for i in row) for row in found.indices)
    unnamed = model.search(paths[:3], saved.embeddings, k=5)
    np.testing.assert_array_equal(unnamed.indices, found.indices)
    assert unnamed.names[2][0] == str(found.indices[2, 0])


def test_invalid_images_and_galleries_are_rejected(run, exported, tmp_path):
    model = dml_jax.load(exported)
    with pytest.raises(TypeError, match="must be a list"):
        model.embed("photo.jpg")
    with pytest.raises(FileNotFoundError, match="image 1: there is no file photo.jpg"):
        model.embed([np.zeros((4, 4, 3), np.uint8), "photo.jpg"])
    with pytest.raises(ValueError, match="image 0 is float32 of shape"):
        model.embed([np.zeros((4, 4, 3), np.float32)])
    with pytest.raises(ValueError, match="no images"):
        model.embed([])
    with pytest.raises(ValueError, match="3 dimensions, those of this network 16"):
        model.search(np.zeros((1, 4, 4, 3), np.uint8), np.ones((2, 3), np.float32))
    with pytest.raises(ValueError, match="holds one checkpoint"):
        dml_jax.load(exported, checkpoint="last")
    with pytest.raises(FileNotFoundError, match="holds no run"):
        dml_jax.load(tmp_path)


def test_importing_the_package_imports_no_jax():
    program = "import sys, dml_jax; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
    assert dml_jax.losses.create("proxy_nca").scale == 12.0
    with pytest.raises(AttributeError, match="no attribute 'losess'"):
        dml_jax.losess  # noqa: B018


def test_threshold_of_an_export(tmp_path):
    assert export.threshold(tmp_path, "best_map", None, None) is None
    assert export.threshold(tmp_path, "best_map", 0.5, None).threshold == 0.5
    with pytest.raises(ValueError, match="not both"):
        export.threshold(tmp_path, "last", 0.5, 0.01)
    with pytest.raises(ValueError, match="test embeddings of its last checkpoint only"):
        export.threshold(tmp_path, "best_map", None, 0.01)
    with pytest.raises(FileNotFoundError, match="no embeddings file"):
        export.threshold(tmp_path, "last", None, 0.01)
