"""The page of a leaderboard of backbones: one self-contained HTML file."""

import time
from importlib import resources
from pathlib import Path

import dml_jax
from dml_jax import retrieval
from dml_jax._utils import extras, files
from dml_jax.inference.leaderboard import FEATURES, WHITENED, Leaderboard

with extras.required_by("report"):
    import jinja2
    import plotly.graph_objects
    import plotly.offline
    from markupsafe import Markup

_KINDS = {FEATURES: "raw", WHITENED: "PCA-whitened"}


def write(leaderboard: Leaderboard, path: Path, *, device: str) -> None:
    """Writes the page of a leaderboard.

    Args:
        leaderboard: the results.
        path: the HTML file.
        device: name of the devices that the costs hold for.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dml_jax.report", "assets"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    style = resources.files("dml_jax.report") / "assets" / "style.css"
    text = environment.get_template("leaderboard.html").render(
        **leaderboard._asdict(),
        kinds=_KINDS,
        scores=retrieval.SCORES,
        best={kind: _best(leaderboard, kind) for kind in _KINDS},
        figure=_figure(leaderboard) if leaderboard.rows else "",
        device=device,
        style=Markup(style.read_text(encoding="utf-8")),
        plotly=Markup(plotly.offline.get_plotlyjs()),
        version=dml_jax.__version__,
        date=time.strftime("%Y-%m-%d"),
    )
    files.write_text(path, text)


def _best(leaderboard: Leaderboard, kind: str) -> dict[str, float]:
    return {
        metric: max((row[kind][metric] for row in leaderboard.rows), default=0.0)
        for metric in retrieval.SCORES.values()
    }


def _figure(leaderboard: Leaderboard) -> Markup:
    """Returns MAP@R over the speed of each backbone, by kind of features."""
    figure = plotly.graph_objects.Figure()
    for kind, name in _KINDS.items():
        figure.add_scatter(
            x=[row["images_per_second"] for row in leaderboard.rows],
            y=[100 * row[kind][retrieval.SCORES["MAP@R"]] for row in leaderboard.rows],
            text=[f"{row['backbone']}, {row['pretrained']}" for row in leaderboard.rows],
            mode="markers",
            name=name,
        )
    figure.update_layout(
        xaxis={"title": "images/s", "type": "log"}, yaxis_title="MAP@R, %", hovermode="closest"
    )
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False))
