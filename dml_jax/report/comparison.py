"""Runs of several seeds side by side, with the tests that say what a difference is worth."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import scipy.stats
from ml_collections import ConfigDict

from dml_jax.training import variants


def table(
    title: str,
    scores: Mapping[str, Sequence[float]],
    *,
    baselines: Mapping[str, str],
    published: Mapping[str, str],
) -> str:
    """A metric of every run, its mean and standard deviation, as a Markdown table in percent.

    Welch's t-test compares each variant with its baseline, two-sided: the p-value is how often
    seeds alone would set the two means at least so far apart.

    >>> print(table("R@1, last epoch", {"plain": [0.5, 0.52], "mixed": [0.6, 0.62]},
    ...             baselines={"mixed": "plain"}, published={"plain": "51.5 (paper)"}))
    | R@1, last epoch | 1 | 2 | mean ± std | against | p (Welch) | published |
    |---|---|---|---|---|---|---|
    | plain | 50.0 | 52.0 | 51.00 ± 1.41 |  |  | 51.5 (paper) |
    | mixed | 60.0 | 62.0 | 61.00 ± 1.41 | plain +10.00 | 0.019 |  |

    Args:
        title: the metric, and the epoch that it is of.
        scores: of each variant, one fraction a seed; as many seeds each.
        baselines: which variant each is compared with, of those that are.
        published: what others published of each variant, as text; "" for nothing. Without any the
            table has no such column.

    Returns:
        The lines of the table.
    """
    seeds = range(1, 1 + max(map(len, scores.values())))
    head = [title, *map(str, seeds), "mean ± std", "against", "p (Welch)"]
    if any(published.values()):
        head.append("published")
    rows = [head, ["---"] * len(head)]
    for variant, fractions in scores.items():
        percents = [100 * fraction for fraction in fractions]
        against, p = "", ""
        if variant in baselines:
            baseline = [100 * fraction for fraction in scores[baselines[variant]]]
            gain = statistics.mean(percents) - statistics.mean(baseline)
            against = f"{baselines[variant]} {gain:+.2f}"
            p = p_value(percents, baseline)
        row = [variant, *(f"{x:.1f}" for x in percents), mean_and_std(percents), against, p]
        if any(published.values()):
            row.append(published.get(variant, ""))
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows).replace("| --- ", "|---")


def baseline(variant: str, get_config: Callable[[str], ConfigDict]) -> str:
    """The bare variant that a variant is compared with, itself if it has no regulariser.

    It has the variant's loss and its schedule, and is named as the variant is, with its loss or
    without.

    Args:
        variant: a name, see `config.with_variant`.
        get_config: gives the configuration of a variant.
    """
    method, loss = variants.parse_variant(variant)
    if "baseline" in method:
        return variant
    names_loss = variant.endswith(loss)
    plain = loss if names_loss else "baseline"
    long = f"memvir_baseline_{loss}" if names_loss else "memvir_baseline"
    differ = get_config(long).to_dict() != get_config(plain).to_dict()
    return long if "memvir" in method and differ else plain


def scores(
    results: Mapping[str, Sequence[Mapping[str, Any]]], metric: str, *, best: bool
) -> tuple[str, dict[str, list[float]]]:
    """A metric of every run, and which epoch it is of.

    >>> result = {"last": {"map@r": 0.5}, "best_of": {"map@r": {"map@r": 0.6}}}
    >>> results = {"plain": [result | {"best_chosen_on": "test"}]}
    >>> scores(results, "map@r", best=False)
    ('last epoch', {'plain': [0.5]})
    >>> scores(results, "map@r", best=True)
    ('best epoch on test classes', {'plain': [0.6]})

    Args:
        results: of each variant, the results of its runs.
        metric: its key in them.
        best: whether to take the metric's own best epoch instead of the last one.

    Returns:
        The epoch in words, and the metric's fractions by variant.
    """
    if not best:
        last = {name: [run["last"][metric] for run in runs] for name, runs in results.items()}
        return "last epoch", last
    splits = sorted({run["best_chosen_on"] for runs in results.values() for run in runs})
    return f"best epoch on {' and '.join(splits)} classes", {
        name: [run["best_of"][metric][metric] for run in runs] for name, runs in results.items()
    }


def mean_and_std(percents: Sequence[float]) -> str:
    """Mean and, of several, standard deviation, as text with two decimals."""
    mean = f"{statistics.mean(percents):.2f}"
    return mean if len(percents) < 2 else f"{mean} ± {statistics.stdev(percents):.2f}"


def p_value(percents: Sequence[float], baseline: Sequence[float]) -> str:
    """The p-value of Welch's t-test, two-sided, as text; empty where there are too few seeds."""
    if min(len(percents), len(baseline)) < 2:
        return ""
    return f"{scipy.stats.ttest_ind(percents, baseline, equal_var=False).pvalue:.2g}"
