"""Prepares a public data set or a folder of images for training.

docs/how-to/data-sets.md says where to get the public data sets.

dml-jax prepare cars196 --source=stanford_cars --out=data/cars196
dml-jax prepare cars196 --source=hf:datasets/tanganke/stanford_cars --out=data/cars196
dml-jax prepare cub200 --download --source=downloads --out=data/cub200
dml-jax prepare folder --source=photos --out=data/photos
"""

from pathlib import Path

from absl import flags

from dml_jax._utils import hub, storage
from dml_jax._utils.errors import UserError
from dml_jax.cli import command_line
from dml_jax.data import records
from dml_jax.data.prepare import prepare

_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "Directory, archive or URL with the published files, or hf:datasets/OWNER/NAME.",
    required=True,
)
_OUT = flags.DEFINE_string("out", None, "Directory or URL to create.", required=True)
_DOWNLOAD = flags.DEFINE_bool(
    "download", False, "Whether to download the archives to --source first."
)
_ALLOW = flags.DEFINE_bool(
    "allow_different_counts",
    False,
    "Whether to accept missing or unreadable images and counts other than the published ones.",
)


def main(data_set: str) -> None:
    """Runs the program."""
    with command_line.user_errors(), storage.writing(_OUT.value, last=records.MANIFEST) as out:
        index = prepare(
            data_set,
            source=_local(_SOURCE.value),
            out=out,
            download=_DOWNLOAD.value,
            allow_different_counts=_ALLOW.value,
        )
    for name, split in index.splits.items():
        print(f"{name}: {len(split.labels)} images of {len(set(split.labels))} classes")
    print(f"prepared: {_OUT.value}")


def _local(source: str) -> Path:
    if not hub.is_data_set(source):
        return storage.local(source)
    if _DOWNLOAD.value:
        raise UserError("--download is for --source=DIRECTORY; hf:datasets/... needs none")
    return hub.data_set(source, ".parquet")


def start() -> None:
    """Parses the command line and runs the program."""
    command_line.run(main, "data_set")
