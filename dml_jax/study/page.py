"""The page of a study: one self-contained HTML file."""

import time
from collections.abc import Mapping, Sequence
from importlib import resources

import dml_jax
from dml_jax import retrieval
from dml_jax._utils import extras
from dml_jax.study.summary import Row
from dml_jax.study.trials import METRIC

with extras.required_by("study"):
    import jinja2
    import optuna
    import plotly.graph_objects
    import plotly.offline
    from markupsafe import Markup


def render(
    searches: Mapping[str, optuna.Study],
    tables: Mapping[str, Sequence[Row]],
    trials: int,
    folds: int,
    seeds: int,
) -> str:
    """Returns the page of a study.

    Args:
        searches: the search of each variant.
        tables: the rows of the tables by kind of scores; see `summary.rows`.
        trials: number of trials of each variant.
        folds: number of folds.
        seeds: number of seeds of the final runs.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dml_jax.study", "assets"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    style = resources.files("dml_jax.report") / "assets" / "style.css"
    return environment.get_template("study.html").render(
        tables=tables,
        score_names=list(retrieval.SCORES),
        intervals=_figure(_intervals(tables)),
        searches={name: _search(study) for name, study in searches.items()},
        trials=trials,
        folds=folds,
        seeds=seeds,
        style=Markup(style.read_text(encoding="utf-8")),
        plotly=Markup(plotly.offline.get_plotlyjs()),
        version=dml_jax.__version__,
        date=time.strftime("%Y-%m-%d"),
    )


def _search(study: optuna.Study) -> dict[str, object]:
    figures = [optuna.visualization.plot_slice(study)]
    if len(study.best_trial.params) > 1:
        figures.append(optuna.visualization.plot_parallel_coordinate(study))
    for figure in figures:
        figure.update_layout(title=None)
    return {
        "score": f"{100 * study.best_value:.2f}",
        "settings": {path: f"{x:.4g}" for path, x in sorted(study.best_trial.params.items())},
        "pruned": len(study.get_trials(states=(optuna.trial.TrialState.PRUNED,))),
        "figures": [_figure(figure) for figure in figures],
    }


def _intervals(tables: Mapping[str, Sequence[Row]]) -> plotly.graph_objects.Figure:
    """Returns the mean MAP@R of each variant with its 95 % interval, by kind of scores."""
    figure = plotly.graph_objects.Figure()
    for kind, rows in tables.items():
        means = [row.scores[METRIC] for row in rows]
        figure.add_scatter(
            x=[x.mean for x in means],
            y=[row.name for row in rows],
            error_x={"array": [x.high - x.mean for x in means]},
            mode="markers",
            name=kind,
        )
    figure.update_layout(xaxis_title="MAP@R, %", yaxis_autorange="reversed")
    return figure


def _figure(figure: plotly.graph_objects.Figure) -> Markup:
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False))
