"""The page of a sweep: heat maps of two settings, or curves of one."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dml_jax import retrieval
from dml_jax._utils import extras, files
from dml_jax.report import comparison, page
from dml_jax.report.sweep import Sweep, check_classes, note, text
from dml_jax.training import cells

with extras.required_by("report"):
    import plotly.graph_objects
    from markupsafe import Markup


def write(sweep: Sweep, results: Sequence[Mapping[str, Any] | None], path: Path) -> None:
    """Writes the page of a sweep, of the runs that have finished.

    Args:
        sweep: the sweep.
        results: the result of each of its cells; None for a run that has not finished.
        path: the HTML file.

    Raises:
        ValueError: a finished run was scored on other classes than those of the sweep.
    """
    check_classes(sweep, results)
    scores = {title: _percents(sweep, results, key) for title, key in retrieval.SCORES.items()}
    draw = _heat_map if len(sweep.axes) == 2 else _curve
    files.write_text(
        path,
        page.render(
            "sweep.html",
            sweep=sweep,
            seeds=list(dict.fromkeys(cell.config.seed for cell in sweep.cells)),
            done=sum(result is not None for result in results),
            note=note(sweep),
            figures={title: draw(sweep, title, found) for title, found in scores.items()},
            rows=[
                {
                    "name": name,
                    "cells": [_mean_and_std(found[name]) for found in scores.values()],
                    "runs": len(scores["MAP@R"][name]),
                }
                for name in dict.fromkeys(cell.name for cell in sweep.cells)
            ],
            score_names=list(scores),
            missing=cells.missing(sweep.cells, results),
        ),
    )


def _percents(
    sweep: Sweep, results: Sequence[Mapping[str, Any] | None], metric: str
) -> dict[str, list[float]]:
    """Returns the scores of the finished runs of each point of the grid, in order of the grid."""
    return {
        name: [100 * comparison.score(x, metric, best=False) for x in found if x is not None]
        for name, found in cells.by_name(sweep.cells, results).items()
    }


def _mean_and_std(percents: Sequence[float]) -> str:
    return comparison.mean_and_std(percents) if percents else "–"


def _heat_map(sweep: Sweep, title: str, scores: Mapping[str, Sequence[float]]) -> Markup:
    (down, rows), (across, columns) = sweep.axes.items()
    found = list(scores.values())
    lines = [found[i : i + len(columns)] for i in range(0, len(found), len(columns))]
    figure = plotly.graph_objects.Figure()
    figure.add_heatmap(
        x=[text(value) for value in columns],
        y=[text(value) for value in rows],
        z=[[statistics.mean(x) if x else None for x in line] for line in lines],
        text=[[_mean_and_std(x) for x in line] for line in lines],
        texttemplate="%{text}",
        hovertemplate=f"{across}=%{{x}}<br>{down}=%{{y}}<br>{title} %{{text}} %<extra></extra>",
        colorscale="Blues",
        colorbar={"title": f"{title}, %"},
        xgap=2,
        ygap=2,
    )
    figure.update_layout(
        # Numbers as categories: equal cells, also if the values are not evenly spaced.
        xaxis={"title": across, "type": "category"},
        yaxis={"title": down, "type": "category"},
        plot_bgcolor="#dddddd",  # Unlike the lowest score, so that missing cells can be seen.
    )
    return _html(figure)


def _curve(sweep: Sweep, title: str, scores: Mapping[str, Sequence[float]]) -> Markup:
    """Returns mean and deviation over the values of the setting, and the single runs."""
    ((path, values),) = sweep.axes.items()
    x = [text(v) if v is None or isinstance(v, bool) else v for v in values]
    done = [(at, found) for at, found in zip(x, scores.values(), strict=True) if found]
    figure = plotly.graph_objects.Figure()
    figure.add_scatter(
        x=[at for at, _ in done],
        y=[statistics.mean(found) for _, found in done],
        error_y={"array": [statistics.stdev(y) if len(y) > 1 else 0.0 for _, y in done]},
        name="mean ± std",
        mode="lines+markers",
    )
    figure.add_scatter(
        x=[at for at, found in done for _ in found],
        y=[one for _, found in done for one in found],
        name="single runs",
        mode="markers",
        marker={"color": "gray", "symbol": "x-thin", "line": {"width": 1.5, "color": "gray"}},
    )
    figure.update_layout(xaxis_title=path, yaxis_title=f"{title}, %")
    return _html(figure)


def _html(figure: plotly.graph_objects.Figure) -> Markup:
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False))
