"""Self-contained HTML pages with figures of Plotly, in the style of the report."""

import time
from importlib import resources
from typing import Any

import dml_jax
from dml_jax._utils import extras

with extras.required_by("report"):
    import jinja2
    import plotly.offline
    from markupsafe import Markup


def render(template: str, **values: Any) -> str:
    """Returns a page made from a template, which also has `style`, `plotly`, `version` and `date`.

    Args:
        template: file name of the template in the folder `assets`, an extension of `page.html`.
        values: further values of the template.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dml_jax.report", "assets"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    style = resources.files("dml_jax.report") / "assets" / "style.css"
    return environment.get_template(template).render(
        **values,
        style=Markup(style.read_text(encoding="utf-8")),
        plotly=Markup(plotly.offline.get_plotlyjs()),
        version=dml_jax.__version__,
        date=time.strftime("%Y-%m-%d"),
    )
