"""Exports a run's embedding function, which then needs JAX alone, with a model card.

dml-jax export runs/memvir --out=exports/memvir --checkpoint=best_map
"""

from absl import flags

from dml_jax._utils import storage
from dml_jax.cli import checkpoint_flag, command_line
from dml_jax.inference import export, model_card
from dml_jax.training import bucket, run_directory

_CHECKPOINT = checkpoint_flag.define("The checkpoint of the run")
_THRESHOLD = flags.DEFINE_float(
    "threshold", None, "The similarity below which a search result is unknown; default: none."
)
_FMR = flags.DEFINE_float(
    "fmr", None, "False match rate among the test images for the threshold; last checkpoint only."
)
_LICENCE = flags.DEFINE_string(
    "license", model_card.UNKNOWN, "The licence of the weights, such as cc-by-4.0."
)
_OUT = flags.DEFINE_string("out", None, "The folder or URL to write.", required=True)


def main(run: str) -> None:
    """Runs the program."""
    with (
        command_line.user_errors(),
        storage.writing(_OUT.value, last=run_directory.CONFIG) as out,
    ):
        folder, checkpoint_name = bucket.copy(run), _CHECKPOINT.value or "last"
        threshold = export.threshold(folder, checkpoint_name, _THRESHOLD.value, _FMR.value)
        export.write(folder, out, checkpoint_name, threshold, licence=_LICENCE.value)
        sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    for name, size in sizes.items():
        print(f"{size / 1e6:8.2f} MB  {storage.join(_OUT.value, name)}")
    print(f"{storage.join(_OUT.value, export.CARD)} says how to load it")


def start() -> None:
    """Parses the command line and runs the program."""
    command_line.run(main, "run")
