"""Makes one page of finished runs: what they score, what they find, what they confuse.

python scripts/report.py runs/quickstart/* --out=report.html

The page needs no network. Runs that differ in the seed alone are one row of its first table.
"""

import runpy
from pathlib import Path

from absl import flags

from dml_jax.cli import command_line
from dml_jax.report import render, runs

_OUT = flags.DEFINE_string("out", "report.html", "The page to write.")

_CONFIGS = Path(__file__).parents[1] / "configs"


def main(*folders: str) -> None:
    """Runs the program."""
    out = Path(_OUT.value)
    with command_line.user_errors():
        groups = runs.group([runs.read(Path(folder)) for folder in folders])
        recipe = runpy.run_path(str(_CONFIGS / f"{groups[0].first.config.data.name}.py"))
        render.write(groups, recipe, out)
    print(f"Report ({out.stat().st_size / 1e6:.1f} MB): {out.absolute()}")


def start() -> None:
    """Parses the command line and runs the program."""
    command_line.run(main, "RUN", many="RUN")
