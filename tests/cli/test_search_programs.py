"""Programs that need embeddings, but no run."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from dml_jax import retrieval
from dml_jax.cli import command_line
from dml_jax.evaluation import embedding_files
from dml_jax.search import index, stores

ROOT = Path(__file__).parents[2]


def run(program, *arguments):
    command = [sys.executable, f"scripts/{program}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(8), 6)
    vectors = rng.standard_normal((8, 16))[labels] + rng.standard_normal((48, 16))
    names = [f"{label}/{row}.png" for row, label in enumerate(labels)]
    file = tmp_path_factory.mktemp("embeddings") / "mine.npz"
    embedding_files.save_embeddings(
        file, vectors.astype(np.float32), labels, names, list("abcdefgh")
    )
    return file


def test_evaluate_prints_the_metrics_that_flags_name(saved):
    done = run(
        "evaluate.py",
        f"--embeddings={saved}",
        "--recall_at=1",
        "--precision_at=2,5",
        "--map_at=5",
        "--per_class",
        "--confidence=0.9",
        "--fmr=0.05",
        "--rerank=aqe",
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    reranked = printed.pop("reranked")
    images = embedding_files.load_embeddings(saved)
    options = {
        "recall_at": (1,),
        "precision_at": (2, 5),
        "map_at": (5,),
        "per_class": True,
        "confidence": 0.9,
    }
    arrays = images.embeddings, images.labels
    assert printed == retrieval.evaluate(*arrays, fmr=(0.05,), **options)
    assert reranked.pop("method") == "aqe"
    assert reranked.pop("seconds") > 0 and reranked.pop("seconds_without") > 0
    assert reranked == retrieval.evaluate(*arrays, rerank="aqe", **options)
    assert reranked["map@r"] != printed["map@r"]


def test_items_of_a_list_that_are_no_numbers_are_reported():
    given = flags.FlagValues()
    levels = flags.DEFINE_list("precision_at", [], "", flag_values=given)
    given(["program", "--precision_at=1,2"])
    assert command_line.numbers(levels, int) == [1, 2]
    given(["program", "--precision_at=1,two"])
    with pytest.raises(ValueError, match="--precision_at=1,two must be integers"):
        command_line.numbers(levels, int)
    with pytest.raises(ValueError, match="--precision_at=1,two must be numbers"):
        command_line.numbers(levels, float)


def test_index_stores_the_threshold_of_a_false_match_rate(saved, tmp_path):
    done = run("index.py", f"--embeddings={saved}", f"--out={tmp_path / 'index'}", "--fmr=0.05")
    assert done.returncode == 0, done.stderr
    images = embedding_files.load_embeddings(saved)
    expected = retrieval.evaluate(images.embeddings, images.labels, fmr=(0.05,))
    threshold = index.load(tmp_path / "index").threshold
    assert threshold == expected["threshold@fmr0.05"]
    fnmr = expected["fnmr@fmr0.05"]
    assert f"unknown below {threshold:.4f}: FMR 0.05, FNMR {fnmr:.4f}" in done.stdout


def test_index_writes_to_a_vector_database(saved, tmp_path):
    pytest.importorskip("lancedb", reason="the extra lancedb is not installed")
    url = f"lancedb://{tmp_path}/images"
    done = run("index.py", f"--embeddings={saved}", f"--to={url}", "--threshold=0.5")
    assert done.returncode == 0, done.stderr
    assert f"48 images: {url}" in done.stdout
    gallery = stores.load(url)
    assert gallery.threshold == 0.5
    images = embedding_files.load_embeddings(saved)
    exact, _ = index.build(images)
    query = images.embeddings[5:6]
    assert [x.row for x in gallery.nearest(query, 6)] == [x.row for x in exact.nearest(query, 6)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out=a", "--to=lancedb:///a/b"], "give either --out"),
        (["--out=a", "--fmr=0.1", "--threshold=0.5"], "give either --threshold or --fmr"),
    ],
)
def test_index_rejects_flags_that_exclude_each_other(saved, arguments, message):
    done = run("index.py", f"--embeddings={saved}", *arguments)
    assert done.returncode == 2 and message in done.stderr
