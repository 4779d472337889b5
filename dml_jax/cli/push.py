"""Publishes a run's network on the Hugging Face hub, as an export with a model card.

dml-jax push --workdir=runs/memvir --checkpoint=best_map --repo=OWNER/NAME --license=cc-by-4.0
dml-jax push --export=exports/memvir --repo=OWNER/NAME --private

`dml_jax.load("hf:OWNER/NAME")` and `dml-jax search --workdir=hf:OWNER/NAME` read it.
"""

import shutil
import tempfile
from pathlib import Path

from absl import flags

from dml_jax._utils import storage
from dml_jax._utils.errors import UserError
from dml_jax.cli import checkpoint_flag, command_line
from dml_jax.inference import export, model_card, publishing
from dml_jax.training import bucket

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder or URL of a run.")
_EXPORT = flags.DEFINE_string("export", None, "Folder or URL of an export, instead of a run.")
_REPO = flags.DEFINE_string("repo", None, "The repository, OWNER/NAME.", required=True)
_CHECKPOINT = checkpoint_flag.define("The checkpoint of the run")
_LICENCE = flags.DEFINE_string(
    "license", None, "The licence of the weights of a run, such as cc-by-4.0; default: unknown."
)
_PRIVATE = flags.DEFINE_bool("private", False, "Whether a new repository is private.")


def main() -> None:
    """Runs the program."""
    with command_line.user_errors():
        workdir, exported = _WORKDIR.value, _EXPORT.value
        if workdir and not exported:
            publishing.check_access(_REPO.value)
            url = _push_run(workdir)
        elif exported and not (workdir or _CHECKPOINT.value or _LICENCE.value):
            folder = storage.local(exported)
            publishing.check_export(folder)
            publishing.check_access(_REPO.value)
            url = publishing.upload(folder, _REPO.value, private=_PRIVATE.value)
        else:
            raise UserError(
                "give either --workdir, optionally with --checkpoint and --license, or --export "
                "alone: an export has one checkpoint, and its README.md states the licence"
            )
    print(f'{url}: dml_jax.load("hf:{_REPO.value}") reads it')


def _push_run(workdir: str) -> str:
    run, folder = bucket.copy(workdir), Path(tempfile.mkdtemp(prefix="dml_jax_"))
    try:
        licence = _LICENCE.value or model_card.UNKNOWN
        export.write(run, folder, _CHECKPOINT.value or "last", licence=licence)
    except BaseException:
        folder.rmdir()
        raise
    try:
        url = publishing.upload(folder, _REPO.value, private=_PRIVATE.value)
    except OSError as error:
        raise OSError(f"{error}\nThe export is kept: --export={folder} pushes it") from error
    shutil.rmtree(folder)
    return url


def start() -> None:
    """Parses the command line and runs the program."""
    command_line.run(main)
