"""Writes an HTML report of finished runs: scores, retrieved images and confused classes.

dml-jax report runs/quickstart/* --out=report.html

The page needs no network. Runs that differ only in the seed share a row of its first table.
"""

from pathlib import Path

from absl import flags

from dml_jax.cli import command_line
from dml_jax.report import render, runs

_OUT = flags.DEFINE_string("out", "report.html", "The page to write.")


def main(*folders: str) -> None:
    """Runs the program."""
    out = Path(_OUT.value)
    with command_line.user_errors():
        groups = runs.group([runs.read(Path(folder)) for folder in folders])
        render.write(groups, out)
    print(f"Report ({out.stat().st_size / 1e6:.1f} MB): {out.absolute()}")


def start() -> None:
    """Parses the command line and runs the program."""
    command_line.run(main, "RUN", many="RUN")
