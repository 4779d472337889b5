"""Programs that need embeddings, but no run."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dml_jax import retrieval
from dml_jax.evaluation import embedding_files

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


def test_evaluate_names_a_flag_that_is_no_number(saved):
    done = run("evaluate.py", f"--embeddings={saved}", "--precision_at=1,two")
    assert done.returncode == 2
    assert "--precision_at=1,two must be integers" in done.stderr
