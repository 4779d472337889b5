"""The metrics of `retrieval.evaluate` that flags add, against loops and scikit-learn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dml_jax import retrieval
from dml_jax.retrieval import classes, exact, metrics, verification

sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")


def data(seed=0, sizes=(9, 7, 5, 4, 3, 1), dim=6):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)) * 3, sizes))
    centres = rng.standard_normal((3 * len(sizes), dim))
    return (centres[labels] + rng.standard_normal((len(labels), dim))).astype(np.float32), labels


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def per_query(embeddings, labels, k):
    """Returns (class, precision@k, AP@k) of each query with a match, by loops."""
    similarities = unit(embeddings.astype(np.float64)) @ unit(embeddings.astype(np.float64)).T
    found = []
    for i, row in enumerate(similarities):
        order = [j for j in np.argsort(-row) if j != i]
        correct = [labels[j] == labels[i] for j in order]
        if not any(correct):
            continue
        hits, total = 0, 0.0
        for rank in range(1, k + 1):
            if correct[rank - 1]:
                hits += 1
                total += hits / rank
        found.append((labels[i], hits / k, total / min(k, sum(correct))))
    return found


@pytest.mark.parametrize("k", [1, 3, 8, 20])
def test_precision_and_map_at_k_equal_loops(k):
    embeddings, labels = data()
    found = per_query(embeddings, labels, k)
    result = retrieval.evaluate(embeddings, labels, precision_at=(k,), map_at=(k,))
    assert result[f"precision@{k}"] == pytest.approx(np.mean([x[1] for x in found]), abs=1e-12)
    assert result[f"map@{k}"] == pytest.approx(np.mean([x[2] for x in found]), abs=1e-12)


def test_map_at_k_is_one_if_the_first_min_k_r_neighbours_are_correct():
    matches = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]], bool)
    relevant = np.array([2, 9, 1])
    np.testing.assert_allclose(metrics.average_precision_at(matches, relevant, 4), [1, 1, 0.5])
    np.testing.assert_allclose(metrics.average_precision_at(matches, relevant, 2), [1, 1, 0.5])
    np.testing.assert_allclose(metrics.precision(matches, (1, 4)), [[1, 0.5], [1, 1], [0, 0.25]])


def test_more_metrics_change_no_other():
    embeddings, labels = data()
    plain = retrieval.evaluate(embeddings, labels, nmi=True)
    more = retrieval.evaluate(
        embeddings,
        labels,
        nmi=True,
        precision_at=(3,),
        map_at=(20,),
        ami=True,
        per_class=True,
        confidence=0.9,
        fmr=(0.1,),
    )
    assert plain.items() <= more.items()
    assert list(plain) == [name for name in more if name in plain]


def test_means_over_classes_count_each_class_once():
    embeddings, labels = data()
    found = per_query(embeddings, labels, 3)
    by_class = [np.mean([x[1] for x in found if x[0] == label]) for label in {x[0] for x in found}]
    result = retrieval.evaluate(embeddings, labels, precision_at=(3,), per_class=True)
    assert result["macro_precision@3"] == pytest.approx(np.mean(by_class), abs=1e-12)
    assert result["macro_precision@3"] != pytest.approx(result["precision@3"], abs=1e-4)
    assert "precision@3_low" not in result


def slow_interval(values, labels, confidence, macro):
    """Draws classes one by one and concatenates their queries."""
    rng = np.random.default_rng(1)
    groups = [values[labels == label] for label in np.unique(labels)]
    means = []
    for _ in range(4000):
        drawn = [groups[i] for i in rng.integers(len(groups), size=len(groups))]
        means.append(
            np.mean([np.mean(x) for x in drawn]) if macro else np.mean(np.concatenate(drawn))
        )
    return np.percentile(means, [50 * (1 - confidence), 50 * (1 + confidence)])


@pytest.mark.parametrize("macro", [False, True])
def test_intervals_are_those_of_resampled_classes(macro):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(40), rng.integers(2, 30, size=40))
    values = np.clip(rng.random(40)[labels] + 0.3 * rng.standard_normal(len(labels)), 0, 1)
    found = classes.by_class(values[None], labels)
    ((low, high),) = classes.intervals(found, 0.9, per_class=macro)
    expected = slow_interval(values, labels, 0.9, macro)
    # Both are random; 0.004 is about four standard errors of such a percentile.
    np.testing.assert_allclose([low, high], expected, rtol=0, atol=0.008)
    # Images of one class are alike: an interval from resampled images would be half as wide.
    images = [np.mean(rng.choice(values, len(values))) for _ in range(1000)]
    assert high - low > 1.5 * np.subtract(*np.percentile(images, [95, 5]))


def test_intervals_of_evaluate_are_repeatable_and_hold_the_mean(monkeypatch):
    embeddings, labels = data(sizes=[5] * 30)
    first = retrieval.evaluate(embeddings, labels, confidence=0.95, per_class=True)
    assert first == retrieval.evaluate(embeddings, labels, confidence=0.95, per_class=True)
    for name in ("recall@1", "map@r", "macro_recall@1"):
        assert 0 < first[f"{name}_low"] < first[name] < first[f"{name}_high"] < 1
    monkeypatch.setattr(classes, "_CELLS", 30 * 7)  # Many portions: other draws, same law.
    again = retrieval.evaluate(embeddings, labels, confidence=0.95)
    assert again["map@r_low"] == pytest.approx(first["map@r_low"], abs=0.01)


def test_ami_is_adjusted_for_chance():
    rng = np.random.default_rng(0)
    labels, random = np.repeat(np.arange(100), 3), rng.permutation(np.repeat(np.arange(100), 3))
    assert abs(metrics.adjusted_mutual_information(labels, random)) < 0.05
    assert metrics.normalized_mutual_information(labels, random) > 0.7
    embeddings, classes_of = data(sizes=[8] * 5)
    result = retrieval.evaluate(embeddings, classes_of, ami=True)
    clusters = exact.kmeans(unit(embeddings), 5)
    expected = sklearn_metrics.adjusted_mutual_info_score(classes_of, clusters)
    assert result["ami"] == pytest.approx(expected, abs=1e-9)
    assert 0.1 < expected < 0.99 and "nmi" not in result


def pairs(embeddings, labels, gallery=None):
    """Returns the float32 similarities of all pairs, and whether they are of one class."""
    if gallery is not None:
        similarities = embeddings @ gallery[0].T
        return similarities.ravel(), (labels[:, None] == gallery[1]).ravel()
    upper = np.triu_indices(len(labels), 1)
    return (embeddings @ embeddings.T)[upper], (labels[:, None] == labels)[upper]


@given(seed=st.integers(0, 2**32 - 1), rate=st.sampled_from([0.01, 0.05, 0.29, 0.5, 0.9]))
@pytest.mark.parametrize("split", [False, True])
def test_fnmr_at_fmr_is_that_of_the_roc_curve_of_scikit_learn(seed, rate, split):
    rng = np.random.default_rng(seed)
    # Sums of a few halves are exact, so that there are ties and zeros of both signs.
    embeddings = (rng.integers(-2, 3, size=(40, 4)) / 2).astype(np.float32)
    labels = rng.integers(4, size=40)
    gallery = (embeddings[25:], labels[25:]) if split else None
    queries, of = (embeddings[:25], labels[:25]) if split else (embeddings, labels)
    scores, same = pairs(queries, of, gallery)
    fpr, tpr, _ = sklearn_metrics.roc_curve(same, scores, drop_intermediate=False)
    (point,) = verification.operating_points(queries, of, gallery, [rate])
    assert point.fnmr == pytest.approx(1 - tpr[fpr <= rate].max(), abs=1e-12)
    threshold = np.float32(point.threshold)
    assert np.mean(scores[~same] >= threshold) <= rate
    assert np.mean(scores[~same] >= np.nextafter(threshold, np.float32(-9))) > rate
    assert point.fnmr == np.mean(scores[same] < threshold)


def test_verification_of_many_blocks_counts_each_pair_once(monkeypatch):
    embeddings, labels = data(sizes=[20] * 10)
    rates = (0.001, 0.01, 0.2)
    expected = verification.operating_points(unit(embeddings), labels, None, rates)
    monkeypatch.setattr(verification, "_BLOCK_QUERIES", 17)
    monkeypatch.setattr(verification, "_BLOCK_GALLERY", 23)
    found = verification.operating_points(unit(embeddings), labels, None, rates)
    # A block's matrix product may round differently.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    scores, same = pairs(unit(embeddings), labels)
    for point, rate in zip(found, rates, strict=True):
        assert np.mean(scores[~same] >= point.threshold) == pytest.approx(rate, abs=1e-4)
    result = retrieval.evaluate(embeddings, labels, fmr=(0.01,))
    assert result["fnmr@fmr0.01"] == pytest.approx(expected[1].fnmr, abs=1e-3)
    assert result["threshold@fmr0.01"] == pytest.approx(expected[1].threshold, abs=1e-6)


def test_equal_embeddings_need_a_threshold_above_all():
    (point,) = verification.operating_points(
        np.tile(np.float32([[0.6, 0.8]]), (6, 1)), np.arange(6) // 2, None, [0.5]
    )
    assert 1 <= point.threshold < 1.0001 and point.fnmr == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precision_at": (0,)}, ValueError, r"precision_at=\(0,\) must be in 1\.\.28"),
        ({"map_at": (29,)}, ValueError, r"map_at=\(29,\) must be in 1\.\.28"),
        ({"map_at": (1.5,)}, TypeError, "must be integers"),
        ({"confidence": 1.0}, ValueError, "confidence=.* above 0 and below 1"),
        ({"confidence": 95}, TypeError, "confidence=.* must be floats"),
        ({"fmr": (0.0,)}, ValueError, "fmr=.* above 0 and below 1"),
        ({"fmr": (1e-4,)}, ValueError, "needs at least 10000 pairs of different classes"),
        ({"rerank": "best"}, ValueError, "rerank must be one of aqe, k_reciprocal"),
    ],
)
def test_bad_options(options, error, message):
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)  # As for users.
    try:
        with pytest.raises(error, match=message):
            retrieval.evaluate(*data(), **options)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_no_pair_of_one_class_is_reported():
    with pytest.raises(ValueError, match="no pair of two images of one class"):
        verification.operating_points(np.eye(3, dtype=np.float32), np.arange(3), None, [0.5])
