"""Statistics of a study: intervals, tests against a baseline, and effect sizes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Float64, Int


class Interval(NamedTuple):
    """A mean with its confidence interval."""

    mean: float
    low: float
    high: float


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Returns the mean and its interval by Student's t; of one value, the interval is infinite."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, -np.inf, np.inf)
    half = scipy.stats.sem(values) * scipy.stats.t.ppf((1 + confidence) / 2, len(values) - 1)
    return Interval(mean, mean - half, mean + half)


def bootstrap_over_classes(
    scores: Float64[np.ndarray, " queries"],
    labels: Int[np.ndarray, " queries"],
    confidence: float = 0.95,
    resamples: int = 10_000,
) -> Interval:
    """Returns the mean score of all queries, and its interval if classes are drawn again.

    Images of one class are alike, so that classes, not images, are the units that are drawn. The
    interval is the percentile interval of `resamples` draws, with a fixed seed.

    Args:
        scores: score of each query.
        labels: class of each query.
        confidence: probability of the interval.
        resamples: number of draws.
    """
    _, codes = np.unique(labels, return_inverse=True)
    sums, sizes = np.bincount(codes, weights=scores), np.bincount(codes)
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=resamples)
    means = (drawn @ sums) / (drawn @ sizes)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(sums.sum() / sizes.sum()), float(low), float(high))


def welch(values: Sequence[float], baseline: Sequence[float]) -> float:
    """Returns the two-sided p-value of Welch's t-test; NaN for fewer than two values."""
    if min(len(values), len(baseline)) < 2:
        return float("nan")
    return float(scipy.stats.ttest_ind(values, baseline, equal_var=False).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values corrected for several tests by Holm's step-down procedure.

    Source: Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 1979.
    """
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.maximum.accumulate(np.asarray(p_values, float)[order] * factors)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(adjusted, 1.0)
    return corrected.tolist()


def hedges_g(values: Sequence[float], baseline: Sequence[float]) -> float:
    """Returns the difference of means in pooled standard deviations, corrected for few values.

    Source: Hedges, Distribution theory for Glass's estimator of effect size, 1981. NaN for fewer
    than two values.
    """
    n, m = len(values), len(baseline)
    if min(n, m) < 2:
        return float("nan")
    pooled = ((n - 1) * np.var(values, ddof=1) + (m - 1) * np.var(baseline, ddof=1)) / (n + m - 2)
    correction = 1 - 3 / (4 * (n + m) - 9)
    return float(correction * (np.mean(values) - np.mean(baseline)) / np.sqrt(pooled))
