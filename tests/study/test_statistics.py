import numpy as np
import pytest
import scipy.stats

from dml_jax.study import statistics


def test_the_interval_is_that_of_scipy():
    values = [70.1, 71.4, 69.8, 70.9, 71.0]
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    ours = statistics.t_interval(values)
    np.testing.assert_allclose(ours, [np.mean(values), *expected])
    assert statistics.t_interval([3.0]) == (3.0, -np.inf, np.inf)


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covers = [
        x.low < 1 < x.high for x in map(statistics.t_interval, rng.normal(1, 2, (2000, 4)).tolist())
    ]
    # Five standard errors of a proportion.
    assert abs(np.mean(covers) - 0.95) < 5 * (0.95 * 0.05 / 2000) ** 0.5


def test_holm_rejects_step_by_step():
    # 0.01 x 4, 0.02 x 3, 0.03 x 2, and never less than a smaller p-value.
    ours = statistics.holm([0.03, 0.01, 0.04, 0.02])
    np.testing.assert_allclose(ours, [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(statistics.holm([0.9, 0.8]), [1.0, 1.0])
    assert statistics.holm([]) == []


def test_holm_keeps_the_rate_of_false_positives():
    rng = np.random.default_rng(0)
    wrong = [min(statistics.holm(p)) < 0.05 for p in rng.uniform(size=(4000, 6)).tolist()]
    assert np.mean(wrong) < 0.05 + 5 * (0.05 * 0.95 / 4000) ** 0.5


def test_effect_size_and_test():
    ours, theirs = [2.0, 3.0, 4.0, 3.0], [1.0, 2.0, 1.5, 1.5]
    pooled = ((np.var(ours, ddof=1) + np.var(theirs, ddof=1)) / 2) ** 0.5
    expected = (3.0 - 1.5) / pooled * (1 - 3 / (4 * 8 - 9))
    assert statistics.hedges_g(ours, theirs) == pytest.approx(expected)
    assert statistics.welch(ours, theirs) == pytest.approx(
        scipy.stats.ttest_ind(ours, theirs, equal_var=False).pvalue
    )
    assert np.isnan(statistics.hedges_g([1.0], theirs)) and np.isnan(
        statistics.welch([1.0], theirs)
    )


def test_classes_are_the_units_of_the_bootstrap():
    rng = np.random.default_rng(0)
    of_class = rng.normal(0.5, 0.1, 40)
    labels = np.repeat(np.arange(40), 25)
    scores = of_class[labels]
    found = statistics.bootstrap_over_classes(scores, labels)
    assert found.mean == pytest.approx(scores.mean())
    # Queries of a class are equal, so the standard error is that of 40 numbers, not of 1000.
    error = of_class.std() / 40**0.5
    assert (found.high - found.low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)
    assert found.low < found.mean < found.high
