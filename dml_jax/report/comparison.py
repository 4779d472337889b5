"""Comparison of variants over several seeds, with significance tests."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import scipy.stats
from ml_collections import ConfigDict

from dml_jax.published import Reference, describe
from dml_jax.training import variants


def table(
    title: str,
    scores: Mapping[str, Sequence[float | None]],
    *,
    baselines: Mapping[str, str],
    published: Mapping[str, str],
) -> str:
    """Returns a Markdown table of one metric: each run, mean and standard deviation, in percent.

    Each variant is compared with its baseline by Welch's t-test, two-sided. The p-value is the
    probability of a difference at least as large if both variants had equal means.

    >>> print(table("R@1, last epoch", {"plain": [0.5, 0.52], "mixed": [0.6, 0.62]},
    ...             baselines={"mixed": "plain"}, published={"plain": "51.5 (paper)"}))
    | R@1, last epoch | 1 | 2 | mean ± std | against | p (Welch) | published |
    |---|---|---|---|---|---|---|
    | plain | 50.0 | 52.0 | 51.00 ± 1.41 |  |  | 51.5 (paper) |
    | mixed | 60.0 | 62.0 | 61.00 ± 1.41 | plain +10.00 | 0.019 |  |

    Args:
        title: the metric and the epoch it was measured at.
        scores: for each variant, one fraction per seed; None for a run that has not finished, which
            the table shows as a dash. Some variants may have fewer seeds than others.
        baselines: the baseline of each variant that has one. Without any, the table has no columns
            for the comparison.
        published: published scores of each variant as text; "" if there are none. If all are
            empty, the table has no such column.

    Returns:
        The table, with lines separated by newlines.
    """
    seeds = max(map(len, scores.values()))
    head = [title, *map(str, range(1, 1 + seeds)), "mean ± std"]
    head += ["against", "p (Welch)"] if baselines else []
    if any(published.values()):
        head.append("published")
    rows = [head, ["---"] * len(head)]
    for variant, fractions in scores.items():
        percents = _percents(fractions)
        baseline = _percents(scores[baselines[variant]]) if variant in baselines else []
        runs = ["–" if x is None else f"{100 * x:.1f}" for x in fractions]
        runs += [""] * (seeds - len(runs))
        mean, against, p = mean_and_std(percents) if percents else "", "", ""
        if percents and baseline:
            gain = statistics.mean(percents) - statistics.mean(baseline)
            against = f"{baselines[variant]} {gain:+.2f}"
            p = p_value(percents, baseline)
        row = [variant, *runs, mean, *([against, p] if baselines else [])]
        if any(published.values()):
            row.append(published.get(variant, ""))
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows).replace("| --- ", "|---")


def _percents(fractions: Sequence[float | None]) -> list[float]:
    return [100 * fraction for fraction in fractions if fraction is not None]


def tables(
    results: Mapping[str, Sequence[Mapping[str, Any] | None]],
    *,
    baselines: Mapping[str, str],
    references: Mapping[str, Sequence[Reference]],
    metrics: Mapping[str, str],
    best: bool,
) -> Iterator[str]:
    """Yields the table of each metric, beside the published scores; see `table`.

    Args:
        results: the result of each run of each variant; None for one that has not finished.
        baselines: the baseline of each variant that has one.
        references: the published scores of each variant.
        metrics: the keys of the metrics by their titles.
        best: see `scores`.
    """
    for title, metric in metrics.items():
        epoch, found = scores(results, metric, best=best)
        published = {name: describe(of_variant, metric) for name, of_variant in references.items()}
        yield table(f"{title}, {epoch}", found, baselines=baselines, published=published)


def baseline(variant: str, get_config: Callable[[str], ConfigDict]) -> str:
    """Returns the variant without regularisers that a variant is compared with.

    The baseline has the same loss and the same schedule. Its name includes the loss if the name of
    the variant does. A variant without a regulariser is its own baseline.

    Args:
        variant: a name, see `variants.with_variant`.
        get_config: returns the configuration of a variant.
    """
    method, loss = variants.parse_variant(variant)
    if "baseline" in method:
        return variant
    names_loss = variant.endswith(loss)
    plain = loss if names_loss else "baseline"
    if "memvir" not in method:
        return plain
    long = f"memvir_baseline_{loss}" if names_loss else "memvir_baseline"
    differ = get_config(long).to_dict() != get_config(plain).to_dict()
    return long if differ else plain


def scores(
    results: Mapping[str, Sequence[Mapping[str, Any] | None]], metric: str, *, best: bool
) -> tuple[str, dict[str, list[float | None]]]:
    """Returns one metric of every run, and a description of the epoch it was measured at.

    >>> result = {"last": {"map@r": 0.5}, "best_of": {"map@r": {"map@r": 0.6}}}
    >>> results = {"plain": [result | {"best_chosen_on": "test"}]}
    >>> scores(results, "map@r", best=False)
    ('last epoch', {'plain': [0.5]})
    >>> scores(results, "map@r", best=True)
    ('best epoch on test classes', {'plain': [0.6]})

    Args:
        results: the result of each run of each variant; None for one that has not finished.
        metric: the key of the metric.
        best: whether to use the epoch with the best value of this metric instead of the last one.

    Returns:
        The epoch as text, and the scores of each variant as fractions; None as in `results`.
    """
    finished = [run for runs in results.values() for run in runs if run is not None]
    splits = sorted({run["best_chosen_on"] for run in finished})
    on_classes = f" on {' and '.join(splits)} classes" if splits else ""
    return f"best epoch{on_classes}" if best else "last epoch", {
        name: [None if run is None else score(run, metric, best=best) for run in runs]
        for name, runs in results.items()
    }


def score(result: Mapping[str, Any], metric: str, *, best: bool) -> float:
    """Returns one metric of a run as a fraction, at its best epoch or the last one."""
    return (result["best_of"][metric] if best else result["last"])[metric]


def mean_and_std(percents: Sequence[float]) -> str:
    """Returns the mean, and for several values the standard deviation, with two decimals."""
    mean = f"{statistics.mean(percents):.2f}"
    return mean if len(percents) < 2 else f"{mean} ± {statistics.stdev(percents):.2f}"


def p_value(percents: Sequence[float], baseline: Sequence[float]) -> str:
    """Returns the two-sided p-value of Welch's t-test as text; "" for fewer than two seeds."""
    if min(len(percents), len(baseline)) < 2:
        return ""
    return f"{scipy.stats.ttest_ind(percents, baseline, equal_var=False).pvalue:.2g}"
