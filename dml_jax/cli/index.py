"""Builds a search index of embeddings for `dml-jax search`.

dml-jax embed --workdir=runs/memvir --images=DIR --out=mine.npz
dml-jax index --embeddings=mine.npz --images=DIR --out=mine.index
"""

from absl import flags
from rich.console import Console
from rich.table import Table

from dml_jax._utils import storage
from dml_jax.cli import command_line
from dml_jax.evaluation import embedding_files
from dml_jax.search import index

_EMBEDDINGS = flags.DEFINE_string(
    "embeddings", None, "Embeddings, as `dml-jax embed` writes them.", required=True
)
_IMAGES = flags.DEFINE_string(
    "images", None, "The folder that was embedded; without it, results are shown by name only."
)
_OUT = flags.DEFINE_string("out", None, "The folder or URL to write the index to.", required=True)
_KIND = flags.DEFINE_enum(
    "kind", None, index.KINDS, "The kind of index; default: by the number of images."
)


def main() -> None:
    """Runs the program."""
    with command_line.user_errors(), storage.writing(_OUT.value, last=index.METADATA) as out:
        index.check_new(out)
        images = embedding_files.load_embeddings(_EMBEDDINGS.value)
        folder = storage.absolute(_IMAGES.value) if _IMAGES.value else None
        gallery, measured = index.build(images, folder=folder, kind=_KIND.value)
        index.save(gallery, out)
        size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    table = Table("effort", f"recall@{index.RECALL_AT} of exact search, %", "ms a query")
    for effort, recall, milliseconds in measured:
        table.add_row(str(effort or "all"), f"{100 * recall:.1f}", f"{milliseconds:.2f}")
    Console().print(table)
    print(f"{len(gallery.names)} images, {gallery.kind} index, {size:.1f} MB: {_OUT.value}")


def start() -> None:
    """Parses the command line and runs the program."""
    command_line.run(main)
