"""Embeds a folder of images with the network of a run, or exports its synthetic classes.

dml-jax embed --workdir=runs/memvir --images=DIR --out=embeddings.npz
dml-jax embed --workdir=runs/memvir --images=DIR --out=embeddings.parquet
dml-jax embed --workdir=hf:OWNER/NAME --images=DIR --out=embeddings.npz
dml-jax embed --workdir=runs/ps --synthetic=synthetic.npz --checkpoint=best_map

Embedding needs no images of the run itself. --synthetic does: it writes the embeddings and proxies
that Proxy Synthesis mixes of the training images, with the two classes and the weight of each.
"""

from pathlib import Path

import numpy as np
from absl import flags
from jaxtyping import Float32

import dml_jax
from dml_jax import data
from dml_jax._utils import sharding, storage
from dml_jax._utils.errors import UserError
from dml_jax.cli import checkpoint_flag, command_line
from dml_jax.evaluation import embedding_files
from dml_jax.evaluation.embedding import embed_images
from dml_jax.inference import mixtures, retriever, trained
from dml_jax.training import run_directory

_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder or URL of a run or of an export, or hf:OWNER/NAME of an export on the hub.",
    required=True,
)
_CHECKPOINT = checkpoint_flag.define("The checkpoint of the run")
_IMAGES = flags.DEFINE_string(
    "images", "", "Folder or URL of images, or of one folder of images per class."
)
_OUT = flags.DEFINE_string("out", "", "The .npz or .parquet file to write.")
_SYNTHETIC = flags.DEFINE_string(
    "synthetic", "", "The .npz file to write with the synthetic classes, instead of --out."
)

_BLOCK = 64  # Decoded images in memory.


def main() -> None:
    """Runs the program."""
    with command_line.user_errors():
        if bool(_IMAGES.value) != bool(_OUT.value) or bool(_OUT.value) == bool(_SYNTHETIC.value):
            raise UserError("give --images and --out, or --synthetic")
        name, file = ("out", _OUT.value) if _OUT.value else ("synthetic", _SYNTHETIC.value)
        if not (storage.is_url(file) or Path(file).absolute().parent.is_dir()):
            raise FileNotFoundError(f"the folder of --{name}={file} does not exist")
        folder = retriever.find(_WORKDIR.value)
        is_export = retriever.is_export(folder)
        if _SYNTHETIC.value:
            _export_synthetic(folder, is_export)
            return
        if is_export and _CHECKPOINT.value:
            raise UserError(f"{_WORKDIR.value} is an export of one checkpoint: omit --checkpoint")
        given = {"images": data.images_below(storage.local(_IMAGES.value))}
        report = data.inspect(given)
        policy = run_directory.read_config(folder).data.unreadable
        images = data.accept(given, report, policy)["images"]
        data.report(report)
        if is_export:
            embeddings = _embed_by_export(folder, images)
        else:
            checkpoint_name = _CHECKPOINT.value or "last"
            network, variables, _ = trained.load(folder, checkpoint_name, sharding.make_mesh())
            embeddings = embed_images(network, variables, images)
        with storage.writing(_OUT.value) as out:
            embedding_files.save_embeddings(
                out, embeddings, images.labels, images.names, images.class_names
            )
    print(f"{len(images)} embeddings of {embeddings.shape[1]} dimensions: {_OUT.value}")


def _export_synthetic(folder: Path, is_export: bool) -> None:
    if is_export:
        raise UserError(f"{_WORKDIR.value} is an export, which has no proxies: give a run")
    if not _SYNTHETIC.value.endswith(".npz"):
        raise UserError(f"--synthetic={_SYNTHETIC.value} must end in .npz")
    made, class_names = mixtures.of_run(folder, _CHECKPOINT.value or "last")
    with storage.writing(_SYNTHETIC.value) as out:
        mixtures.save(out, made, class_names)
    print(f"{len(made.weights)} synthetic classes of {len(class_names)}: {_SYNTHETIC.value}")


def _embed_by_export(folder: Path, images: data.Source) -> Float32[np.ndarray, "n d"]:
    model, count = dml_jax.load(folder), len(images)
    blocks = [range(i, min(i + _BLOCK, count)) for i in range(0, count, _BLOCK)]
    return np.concatenate(
        [model.embed([data.decode(images[i], images.names[i]) for i in one]) for one in blocks]
    )


def start() -> None:
    """Parses the command line and runs the program."""
    command_line.run(main, embeds=True)
