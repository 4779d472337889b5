import numpy as np
import pytest

from dml_jax import retrieval
from dml_jax.evaluation import thresholds
from dml_jax.evaluation.embedding_files import Embeddings


def images(seed, count=60):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 6
    vectors = rng.standard_normal((6, 8))[labels] * 2 + rng.standard_normal((count, 8))
    return Embeddings(vectors.astype(np.float32), labels, ("x",) * count, tuple("abcdef"))


@pytest.mark.parametrize("split", [False, True])
def test_threshold_of_a_false_match_rate_is_that_of_evaluate(split):
    queries, gallery = images(0), images(1) if split else None
    found = thresholds.at_fmr(0.05, queries, gallery)
    arrays = None if gallery is None else (gallery.embeddings, gallery.labels)
    scores = retrieval.evaluate(
        queries.embeddings, queries.labels, gallery=arrays, fmr=(0.05,), recall_at=()
    )
    assert found == (scores["threshold@fmr0.05"], 0.05, scores["fnmr@fmr0.05"])


def test_values_out_of_range_are_rejected():
    assert thresholds.checked(-1.0) == (-1, None, None)
    with pytest.raises(ValueError, match="the threshold 1.5 must be a cosine"):
        thresholds.checked(1.5)
    with pytest.raises(ValueError, match="false match rate 1.0 must be above 0 and below 1"):
        thresholds.at_fmr(1.0, images(0))
