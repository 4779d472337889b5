"""Exports on the Hugging Face hub: a stand-in on this machine, and the hub's cache on disk."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.repocard import ModelCard

import dml_jax
from dml_jax._utils import files, sharding
from dml_jax.evaluation import embedding_files
from dml_jax.inference import export, publishing
from dml_jax.training import builder, checkpoint, resume, run_directory
from dml_jax.training.config import parse
from tests.helpers import hub_server, tiny

ROOT = Path(__file__).parents[2]
SCORES = {"recall@1": 0.75, "r_precision": 0.5, "map@r": 0.25}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained run of a network that programs know, with scores."""
    root = tmp_path_factory.mktemp("publishing")
    images = tiny.write_images(root / "images")
    config = tiny.config(images, model__backbone="conv4")
    built = builder.build(parse(config), sharding.make_mesh(jax.devices()[:1]))
    resume.claim(root / "run", parse(config))
    with checkpoint.Checkpoints(root / "run", keep_last=2) as checkpoints:
        checkpoints.save(4, built.init(), SCORES)
    line = {"step": 4} | SCORES
    counts = {"train": 36, "test": 24}
    result = {"last": line, "best_of": {}, "images": counts, "classes": counts}
    files.write_json(root / "run" / run_directory.RESULT, result)
    return root / "run"


@pytest.fixture(scope="module")
def exported(run):
    export.write(run, run.parent / "exported", "last", licence="cc-by-4.0")
    return run.parent / "exported"


def start(hub, folder, *command, **environment):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | hub.environment(folder) | environment,
        capture_output=True,
        text=True,
    )


COMPARE = """
import sys, numpy as np, dml_jax
pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), np.uint8)
there, here = (dml_jax.load(path).embed(pixels) for path in sys.argv[1:])
assert there.any() and np.array_equal(there, here)
"""


@pytest.mark.slow
def test_a_pushed_run_comes_back_bit_for_bit(run, exported, tmp_path):
    with hub_server.served() as hub:
        push = ("scripts/push.py", f"--workdir={run}", "--repo=somebody/tiny", "--private")
        done = start(hub, tmp_path, *push, "--license=cc-by-4.0")
        assert done.returncode == 0, done.stderr
        assert 'dml_jax.load("hf:somebody/tiny")' in done.stdout
        assert hub.private == {"somebody/tiny": True}
        pushed = hub.repositories["somebody/tiny"][-1]
        assert pushed == {file.name: file.read_bytes() for file in exported.iterdir()}

        location = f"hf:somebody/tiny@{hub_server.oid(pushed)}"
        done = start(hub, tmp_path, "-c", COMPARE, location, exported)
        assert done.returncode == 0, done.stderr
        # Once downloaded, the hub is not needed.
        calls = len(hub.calls)
        out, images = tmp_path / "out.npz", run.parent / "images" / "test"
        embed = ("scripts/embed.py", f"--workdir={location}", f"--images={images}", f"--out={out}")
        done = start(hub, tmp_path, *embed, HF_HUB_OFFLINE="1")
        assert done.returncode == 0, done.stderr
        assert len(hub.calls) == calls
    found = embedding_files.load_embeddings(out)
    expected = dml_jax.load(run).embed([images / name for name in found.names])
    np.testing.assert_allclose(found.embeddings, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_an_export_whose_upload_fails_is_kept(run, tmp_path):
    with hub_server.served() as hub:
        hub.full = True
        push = ("scripts/push.py", f"--workdir={run}", "--repo=somebody/tiny")
        done = start(hub, tmp_path, *push, TMPDIR=str(tmp_path))
        assert done.returncode == 2 and "somebody/tiny cannot be written" in done.stderr
        (kept,) = tmp_path.glob("dml_jax_*")
        assert f"--export={kept} pushes it" in done.stderr
        publishing.check_export(kept)
        assert hub.repositories["somebody/tiny"] == [{}]

        done = start(hub, tmp_path, *push, HF_TOKEN="hf_wrong", TMPDIR=str(tmp_path / "no"))
        assert done.returncode == 2 and "the hub refuses the token" in done.stderr


def test_metadata_of_the_card_are_those_of_the_hub(exported):
    card = ModelCard.load(exported / export.CARD)
    assert (card.data.license, card.data.library_name) == ("cc-by-4.0", "jax")
    assert "under `cc-by-4.0`" in card.text
    found = {result.metric_type: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in found.items()} == SCORES
    assert (found["map@r"].dataset_name, found["map@r"].dataset_split) == ("folder", "test")
    assert not hub_server.metadata_errors((exported / export.CARD).read_text())


def test_an_export_is_read_from_the_cache_of_the_hub(exported):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = Path(constants.HF_HUB_CACHE) / "models--somebody--cached.net"
    snapshot = repository / "snapshots" / commit
    shutil.copytree(exported, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    expected = dml_jax.load(exported).embed(pixels)
    for location in ("hf:somebody/cached.net", f"hf:somebody/cached.net@{commit}"):
        np.testing.assert_array_equal(dml_jax.load(location).embed(pixels), expected)
    with pytest.raises(ValueError, match="hf:somebody/cached.net is an export"):
        dml_jax.load("hf:somebody/cached.net", checkpoint="last")
    with pytest.raises(
        FileNotFoundError, match="hf:somebody/other cannot be reached .*hf download"
    ):
        dml_jax.load("hf:somebody/other")
    with pytest.raises(ValueError, match="hf:somebody is not hf:OWNER/NAME"):
        dml_jax.load("hf:somebody")
    (snapshot / "weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="not an export .* no weights.safetensors"):
        dml_jax.load("hf:somebody/cached.net")


@pytest.mark.parametrize(
    ("repository", "message"),
    [("tiny", "lacks its owner"), ("a/b/c", "no name"), ("a/-b", "no name"), ("a/b", "no token")],
)
def test_a_bad_name_or_no_token_is_reported(repository, message, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match=message):
        publishing.check_access(repository)


def test_a_hub_that_cannot_be_reached_is_reported(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    with pytest.raises(OSError, match="hub cannot be reached"):  # The tests are offline.
        publishing.check_access("somebody/tiny")
