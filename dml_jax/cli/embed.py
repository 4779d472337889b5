"""Embeds a folder of images with the network of a run; needs no images of the run itself.

dml-jax embed --workdir=runs/memvir --images=DIR --out=embeddings.npz
"""

from pathlib import Path

from absl import flags

from dml_jax import data
from dml_jax._utils import sharding
from dml_jax.cli import command_line
from dml_jax.evaluation import embedding_files
from dml_jax.evaluation.embedding import embed_images
from dml_jax.inference import trained
from dml_jax.training import checkpoint, run_directory

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run.", required=True)
_CHECKPOINT = flags.DEFINE_enum(
    "checkpoint", "last", ["last", *checkpoint.BEST], "The checkpoint of the run."
)
_IMAGES = flags.DEFINE_string(
    "images", None, "Folder of images, or of one folder of images per class.", required=True
)
_OUT = flags.DEFINE_string("out", None, "The .npz file to write.", required=True)


def main() -> None:
    """Runs the program."""
    with command_line.user_errors():
        if not Path(_OUT.value).absolute().parent.is_dir():
            raise FileNotFoundError(f"the folder of --out={_OUT.value} does not exist")
        folder = Path(_WORKDIR.value)
        given = {"images": data.images_below(_IMAGES.value)}
        report = data.inspect(given)
        policy = run_directory.read_config(folder).data.unreadable
        images = data.accept(given, report, policy)["images"]
        data.report(report)
        mesh = sharding.make_mesh()
        network, variables, _ = trained.load(folder, _CHECKPOINT.value, mesh)
        embeddings = embed_images(network, variables, images)
        embedding_files.save_embeddings(
            _OUT.value, embeddings, images.labels, images.names, images.class_names
        )
    print(f"{len(images)} embeddings of {embeddings.shape[1]} dimensions: {_OUT.value}")


def start() -> None:
    """Parses the command line and runs the program."""
    command_line.run(main, embeds=True)
