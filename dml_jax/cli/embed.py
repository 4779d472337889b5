"""Embeds a folder of images with the network of a run; needs no images of the run itself.

dml-jax embed --workdir=runs/memvir --images=DIR --out=embeddings.npz
dml-jax embed --workdir=runs/memvir --images=DIR --out=embeddings.parquet
"""

from pathlib import Path

from absl import flags

from dml_jax import data
from dml_jax._utils import sharding, storage
from dml_jax.cli import command_line
from dml_jax.evaluation import embedding_files
from dml_jax.evaluation.embedding import embed_images
from dml_jax.inference import trained
from dml_jax.training import bucket, checkpoint, run_directory

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder or URL of a run.", required=True)
_CHECKPOINT = flags.DEFINE_enum(
    "checkpoint", "last", ["last", *checkpoint.BEST], "The checkpoint of the run."
)
_IMAGES = flags.DEFINE_string(
    "images", None, "Folder or URL of images, or of one folder of images per class.", required=True
)
_OUT = flags.DEFINE_string("out", None, "The .npz or .parquet file to write.", required=True)


def main() -> None:
    """Runs the program."""
    with command_line.user_errors():
        if not (storage.is_url(_OUT.value) or Path(_OUT.value).absolute().parent.is_dir()):
            raise FileNotFoundError(f"the folder of --out={_OUT.value} does not exist")
        folder = bucket.copy(_WORKDIR.value)
        given = {"images": data.images_below(storage.local(_IMAGES.value))}
        report = data.inspect(given)
        policy = run_directory.read_config(folder).data.unreadable
        images = data.accept(given, report, policy)["images"]
        data.report(report)
        mesh = sharding.make_mesh()
        network, variables, _ = trained.load(folder, _CHECKPOINT.value, mesh)
        embeddings = embed_images(network, variables, images)
        with storage.writing(_OUT.value) as out:
            embedding_files.save_embeddings(
                out, embeddings, images.labels, images.names, images.class_names
            )
    print(f"{len(images)} embeddings of {embeddings.shape[1]} dimensions: {_OUT.value}")


def start() -> None:
    """Parses the command line and runs the program."""
    command_line.run(main, embeds=True)
