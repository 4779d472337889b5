"""Exports a run's embedding function, which then needs JAX alone, with a model card.

dml-jax export runs/memvir --out=exports/memvir --checkpoint=best_map
"""

from pathlib import Path

from absl import flags

from dml_jax.cli import command_line
from dml_jax.inference import export
from dml_jax.training import checkpoint

_CHECKPOINT = flags.DEFINE_enum(
    "checkpoint", "last", ["last", *checkpoint.BEST], "The checkpoint of the run."
)
_OUT = flags.DEFINE_string("out", None, "The folder to write.", required=True)


def main(run: str) -> None:
    """Runs the program."""
    out = Path(_OUT.value)
    with command_line.user_errors():
        export.write(Path(run), out, _CHECKPOINT.value)
    for path in sorted(out.iterdir()):
        print(f"{path.stat().st_size / 1e6:8.2f} MB  {path}")
    print(f"{out / export.CARD} says how to load it")


def start() -> None:
    """Parses the command line and runs the program."""
    command_line.run(main, "run")
