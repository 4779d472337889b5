"""Writes an HTML report of finished runs: scores, retrieved images and confused classes.

dml-jax report runs/quickstart/* --out=report.html

The page needs no network. Runs that differ only in the seed share a row of its first table.
"""

from absl import flags

from dml_jax._utils import storage
from dml_jax.cli import checkpoint_flag, command_line
from dml_jax.report import render, runs

_CHECKPOINT = checkpoint_flag.define(
    "The checkpoint of the map of training classes and of the decision boundaries"
)
_OUT = flags.DEFINE_string("out", "report.html", "The page to write, a path or URL.")


def main(*folders: str) -> None:
    """Runs the program."""
    with command_line.user_errors(), storage.writing(_OUT.value) as out:
        groups = runs.group([runs.read(folder) for folder in folders])
        render.write(groups, out, checkpoint=_CHECKPOINT.value or "last")
        size = out.stat().st_size
    print(f"Report ({size / 1e6:.1f} MB): {storage.absolute(_OUT.value)}")


def start() -> None:
    """Parses the command line and runs the program."""
    command_line.run(main, "RUN", many="RUN")
