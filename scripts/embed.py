"""Embeds any folder of images with a trained run, whose own images are not needed any more.

python scripts/embed.py --workdir=runs/memvir --images=DIR --out=embeddings.npz
"""

from pathlib import Path

from absl import flags

from dml_jax import command_line, data, sharding
from dml_jax.retrieval import embed
from dml_jax.training import checkpoint, networks, workdir

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run.", required=True)
_CHECKPOINT = flags.DEFINE_enum(
    "checkpoint", "last", ["last", *checkpoint.BEST], "Which of the run's checkpoints."
)
_IMAGES = flags.DEFINE_string(
    "images", None, "Folder of images, or of one folder a class.", required=True
)
_OUT = flags.DEFINE_string("out", None, "The .npz file to write.", required=True)


def main() -> None:
    """Runs the program."""
    with command_line.mendable():
        if not Path(_OUT.value).absolute().parent.is_dir():
            raise FileNotFoundError(f"there is no folder to write {_OUT.value} into")
        folder = Path(_WORKDIR.value)
        given = {"images": data.images_below(_IMAGES.value)}
        findings = data.inspect(given)
        policy = workdir.read_config(folder).data.unreadable
        images = data.accept(given, findings, policy)["images"]
        data.report(findings)
        mesh = sharding.make_mesh()
        network, variables, _ = networks.trained(folder, _CHECKPOINT.value, mesh)
        embeddings = networks.embed_images(network, variables, images)
        embed.save_embeddings(
            _OUT.value, embeddings, images.labels, images.names, images.class_names
        )
    print(f"{len(images)} embeddings of {embeddings.shape[1]} dimensions: {_OUT.value}")


if __name__ == "__main__":
    command_line.run(main, embeds=True)
