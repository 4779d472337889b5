import collections

import numpy as np
import pytest
from ml_collections import ConfigDict

from dml_jax import retrieval
from dml_jax.evaluation.embedding_files import Embeddings
from dml_jax.report import ranking
from dml_jax.report.runs import Run
from dml_jax.retrieval import exact

CLASSES = 9


def embeddings(seed, count, spread=1.0):
    # Class 8 has a single image, so its query has no match.
    rng = np.random.default_rng(seed)
    labels = np.append(rng.integers(CLASSES - 1, size=count - 1), CLASSES - 1)
    centres = np.random.default_rng(0).normal(size=(CLASSES, 6))
    vectors = 3 * (centres[labels] + spread * rng.normal(size=(count, 6)))
    names = tuple(f"{seed}/{i}" for i in range(count))
    return Embeddings(
        vectors.astype(np.float32), labels, names, tuple(f"class{c}" for c in range(CLASSES))
    )


def make(tmp_path, gallery=False):
    return Run(
        folder=tmp_path,
        place=str(tmp_path),
        config=ConfigDict(),
        metrics=[],
        timings=[],
        scores={},
        queries=embeddings(1, 150),
        gallery=embeddings(2, 70) if gallery else None,
    )


@pytest.fixture(params=[False, True], ids=["alone", "gallery"])
def run(request, tmp_path):
    return make(tmp_path, request.param)


def expected(run):
    gallery = run.gallery and (run.gallery.embeddings, run.gallery.labels)
    return retrieval.evaluate(run.queries.embeddings, run.queries.labels, gallery=gallery)


def test_rank_agrees_with_evaluate(run):
    ranked, scores = ranking.rank(run.queries, run.gallery), expected(run)
    counted = ranked.relevant > 0
    assert 0 < scores["recall@1"] < 1
    np.testing.assert_allclose(ranked.correct[counted, 0].mean(), scores["recall@1"])
    np.testing.assert_allclose(ranked.correct[counted].any(axis=1).mean(), scores["recall@8"])
    np.testing.assert_allclose(ranked.average_precision[counted].mean(), scores["map@r"])
    assert (~counted).sum() == scores["queries_without_match"]
    assert (np.diff(ranked.similarities, axis=1) <= 1e-6).all()


def test_the_weighted_mean_over_classes_is_the_score(run):
    classes, scores = ranking.by_class(run, ranking.rank(run.queries, run.gallery)), expected(run)
    weights = classes.queries / classes.queries.sum()
    np.testing.assert_allclose(weights @ classes.recall, scores["recall@1"])
    np.testing.assert_allclose(weights @ classes.precision, scores["map@r"])


def test_confused_pairs_count_every_wrong_first_neighbour_once(run):
    ranked = ranking.rank(run.queries, run.gallery)
    labels = (run.gallery or run.queries).labels
    counts = collections.Counter()
    for i, near in enumerate(ranked.neighbours[:, 0]):
        if ranked.relevant[i] and labels[near] != run.queries.labels[i]:
            counts[run.queries.labels[i], labels[near]] += 1
    pairs = ranking.confused_pairs(run, ranked, 1000)
    found = {(p["first"], p["second"]): p["first_as_second"] for p in pairs}
    found |= {(p["second"], p["first"]): p["second_as_first"] for p in pairs}
    assert {pair: n for pair, n in found.items() if n} == dict(counts)
    scores = expected(run)
    answered = (ranked.relevant > 0).sum()
    assert sum(found.values()) == round((1 - scores["recall@1"]) * answered)
    totals = [p["first_as_second"] + p["second_as_first"] for p in pairs]
    assert totals == sorted(totals, reverse=True)
    assert ranking.confused_pairs(run, ranked, 2) == pairs[:2]


def test_histograms_count_every_pair_once(run):
    same, other = ranking.similarity_histogram(run)
    queries = exact.unit_rows(run.queries.embeddings)
    gallery = run.gallery or run.queries
    cosines = queries @ exact.unit_rows(gallery.embeddings).T
    pairs = np.ones(cosines.shape, bool)
    if run.gallery is None:
        np.fill_diagonal(pairs, False)
    equal = run.queries.labels[:, None] == gallery.labels
    edges = np.linspace(-1, 1, ranking.BINS + 1)
    for counts, chosen in ((same, equal & pairs), (other, ~equal & pairs)):
        assert counts.sum() == chosen.sum()
        # A cosine on the edge of a bin may fall to either side, once per direction.
        assert abs(counts - np.histogram(cosines[chosen], edges)[0]).sum() <= 4
