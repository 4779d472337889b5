import jax
import numpy as np
import pytest

from dml_jax import data, retrieval
from dml_jax.evaluation.scoring import Evaluator


@pytest.mark.parametrize("index", [0, 1])
def test_only_the_first_process_searches_with_faiss(monkeypatch, index):
    labels = np.repeat(np.arange(3, dtype=np.int32), 4)
    names = tuple(map(str, range(12)))
    source = data.Source(records=names, labels=labels, class_names=("a", "b", "c"), names=names)
    embeddings = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
    expected = retrieval.evaluate(embeddings, labels, recall_at=(1, 2), nmi=True)
    evaluator = Evaluator(
        network=None,
        sources={"test": source},
        cache=lambda _: None,
        recall_at=(1, 2),
        nmi=True,
    )
    monkeypatch.setattr(jax, "process_index", lambda: index)
    # With one process there is nobody to receive the metrics from.
    assert evaluator.score({"test": embeddings}) == (expected if index == 0 else {})
