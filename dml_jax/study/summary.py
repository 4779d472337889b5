"""The tables of a study: scores with intervals, tests and effect sizes; all runs as CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dml_jax import retrieval
from dml_jax.study import statistics
from dml_jax.study.finals import Final
from dml_jax.study.statistics import Interval
from dml_jax.study.trials import METRIC

_METRICS = tuple(retrieval.SCORES.values())


class Row(NamedTuple):
    """A variant's scores of one kind, in percent, compared with the bare loss."""

    name: str
    scores: dict[str, Interval]
    """By metric: mean over seeds, with the interval by Student's t."""
    over_classes: Interval | None
    """MAP@R of the concatenated embeddings, with the interval over classes; None if separated."""
    baseline: str
    """The bare loss; empty for itself."""
    gain: float
    """Difference of MAP@R from the baseline, in points."""
    p: float
    """p-value of Welch's t-test of MAP@R."""
    p_holm: float
    """The same, corrected for all comparisons of the table."""
    effect: float
    """Hedges' g."""


def rows(
    finals: Mapping[str, Sequence[Final]], baselines: Mapping[str, str], kind: str
) -> list[Row]:
    """Returns the table of one kind of scores.

    Args:
        finals: the scores of each variant.
        baselines: the bare loss of each variant that has a regulariser.
        kind: "separated" or "concatenated"; see `Final`.
    """

    def values(name: str, metric: str) -> list[float]:
        return [100 * getattr(final, kind)[metric] for final in finals[name]]

    compared = [name for name in finals if name in baselines]
    p_values = {
        name: statistics.welch(values(name, METRIC), values(baselines[name], METRIC))
        for name in compared
    }
    corrected = dict(zip(compared, statistics.holm(list(p_values.values())), strict=True))
    found = []
    for name, of_seeds in finals.items():
        ours, against = values(name, METRIC), baselines.get(name, "")
        theirs = values(against, METRIC) if against else []
        over_classes = None
        if kind == "concatenated":
            precision = np.mean([final.average_precision for final in of_seeds], axis=0)
            interval = statistics.bootstrap_over_classes(precision, of_seeds[0].labels)
            over_classes = Interval(*(100 * x for x in interval))
        found.append(
            Row(
                name=name,
                scores={
                    metric: statistics.t_interval(values(name, metric))
                    for metric in retrieval.SCORES.values()
                },
                over_classes=over_classes,
                baseline=against,
                gain=float(np.mean(ours) - np.mean(theirs)) if against else float("nan"),
                p=p_values.get(name, float("nan")),
                p_holm=corrected.get(name, float("nan")),
                effect=statistics.hedges_g(ours, theirs) if against else float("nan"),
            )
        )
    return found


def markdown(table: Sequence[Row], title: str) -> str:
    """Returns a table in Markdown, with scores in percent.

    Args:
        table: the rows.
        title: header of the first column.
    """
    with_classes = any(row.over_classes for row in table)
    head = [title, *retrieval.SCORES, *(["MAP@R over classes"] if with_classes else [])]
    head += ["against", "p (Welch)", "p (Holm)", "Hedges' g"]
    lines = [head, ["---"] * len(head)]
    for row in table:
        cells = [row.name, *(_interval(x) for x in row.scores.values())]
        if with_classes:
            cells.append(_interval(row.over_classes) if row.over_classes else "")
        if row.baseline:
            cells += [f"{row.baseline} {row.gain:+.2f}", *map(_number, (row.p, row.p_holm))]
            cells.append(f"{row.effect:.1f}")
        else:
            cells += [""] * 4
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("| --- ", "|---")


def _interval(x: Interval) -> str:
    if not np.isfinite(x.low):
        return f"{x.mean:.2f}"
    return f"{x.mean:.2f} [{x.low:.2f}, {x.high:.2f}]"


def _number(x: float) -> str:
    return "" if np.isnan(x) else f"{x:.2g}"


def runs_csv(trials: Mapping[str, Sequence[Any]], finals: Mapping[str, Sequence[Final]]) -> str:
    """Returns all runs as CSV, one per line: those of the search and the final ones.

    Args:
        trials: Optuna's trials of each variant.
        finals: the scores of each variant.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["phase", "variant", "trial or seed", "fold", "state", *_METRICS, "settings"])
    for name, of_variant in trials.items():
        for trial in of_variant:
            settings = " ".join(f"{path}={value:g}" for path, value in sorted(trial.params.items()))
            for number, score in enumerate(trial.user_attrs.get("folds", [float("nan")])):
                cells = ["", "", f"{score:.5f}", settings]
                writer.writerow(["search", name, trial.number, number, trial.state.name, *cells])
    for name, of_seeds in finals.items():
        for final in of_seeds:
            for fold, scores in [*enumerate(final.folds), ("all", final.concatenated)]:
                cells = [f"{scores[metric]:.5f}" for metric in _METRICS]
                writer.writerow(["final", name, final.seed, fold, "COMPLETE", *cells, ""])
    return file.getvalue()
