"""The page of a leaderboard of backbones: one self-contained HTML file."""

from pathlib import Path

from dml_jax import retrieval
from dml_jax._utils import extras, files
from dml_jax.inference.leaderboard import FEATURES, WHITENED, Leaderboard
from dml_jax.report import page

with extras.required_by("report"):
    import plotly.graph_objects
    from markupsafe import Markup

_KINDS = {FEATURES: "raw", WHITENED: "PCA-whitened"}


def write(leaderboard: Leaderboard, path: Path, *, device: str) -> None:
    """Writes the page of a leaderboard.

    Args:
        leaderboard: the results.
        path: the HTML file.
        device: name of the devices that the costs hold for.
    """
    text = page.render(
        "leaderboard.html",
        **leaderboard._asdict(),
        kinds=_KINDS,
        scores=retrieval.SCORES,
        best={kind: _best(leaderboard, kind) for kind in _KINDS},
        figure=_figure(leaderboard) if leaderboard.rows else "",
        device=device,
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
