"""Builds a search index of embeddings for `dml-jax search`.

dml-jax embed --workdir=runs/memvir --images=DIR --out=mine.npz
dml-jax index --embeddings=mine.npz --images=DIR --out=mine.index --fmr=1e-3
dml-jax index --embeddings=mine.npz --images=DIR --to=lancedb:///data/galleries/mine

--to writes to a vector database: qdrant://HOST:PORT/COLLECTION, qdrant:///FOLDER/COLLECTION,
lancedb:///FOLDER/TABLE or postgresql://USER@HOST/DATABASE/TABLE.
"""

from absl import flags
from rich.console import Console
from rich.table import Table

from dml_jax._utils import storage
from dml_jax._utils.errors import UserError
from dml_jax.cli import command_line
from dml_jax.evaluation import embedding_files, thresholds
from dml_jax.search import index, stores

_EMBEDDINGS = flags.DEFINE_string(
    "embeddings", None, "Embeddings, as `dml-jax embed` writes them.", required=True
)
_IMAGES = flags.DEFINE_string(
    "images", None, "The folder that was embedded; without it, results are shown by name only."
)
_OUT = flags.DEFINE_string("out", None, "The folder or URL to write the index to.")
_TO = flags.DEFINE_string("to", None, "The vector database to write to, instead of --out.")
_THRESHOLD = flags.DEFINE_float(
    "threshold", None, "The similarity below which a search result is unknown; default: none."
)
_FMR = flags.DEFINE_float(
    "fmr", None, "False match rate among the images, which must be labelled, for the threshold."
)
_KIND = flags.DEFINE_enum(
    "kind", None, index.KINDS, "The kind of index; default: by the number of images."
)


def main() -> None:
    """Runs the program."""
    with command_line.user_errors():
        url, out = _TO.value, _OUT.value
        if (url is None) == (out is None) or (url is not None and _KIND.value):
            raise UserError("give either --out, optionally with --kind, or --to")
        if _THRESHOLD.value is not None and _FMR.value is not None:
            raise UserError("give either --threshold or --fmr, not both")
        folder = storage.absolute(_IMAGES.value) if _IMAGES.value else None
        if url is not None:
            _write_to_store(url, folder)
        if out is not None:
            _write_index(out, folder)


def _write_to_store(url: str, folder: str | None) -> None:
    images = embedding_files.load_embeddings(_EMBEDDINGS.value)
    index.check_files(folder, images.names)
    threshold = _threshold(images)
    stores.write(url, images, folder=folder, threshold=threshold)
    print(f"{len(images.names)} images: {url}")


def _threshold(images: embedding_files.Embeddings) -> float | None:
    if _FMR.value is None:
        return None if _THRESHOLD.value is None else thresholds.checked(_THRESHOLD.value).threshold
    threshold, fmr, fnmr = thresholds.at_fmr(_FMR.value, images)
    print(f"unknown below {threshold:.4f}: FMR {fmr:g}, FNMR {fnmr:.4f} among these images")
    return threshold


def _write_index(place: str, folder: str | None) -> None:
    with storage.writing(place, last=index.METADATA) as out:
        index.check_new(out)
        images = embedding_files.load_embeddings(_EMBEDDINGS.value)
        threshold = _threshold(images)
        gallery, measured = index.build(
            images, folder=folder, kind=_KIND.value, threshold=threshold
        )
        index.save(gallery, out)
        size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    table = Table("effort", f"recall@{index.RECALL_AT} of exact search, %", "ms a query")
    for effort, recall, milliseconds in measured:
        table.add_row(str(effort or "all"), f"{100 * recall:.1f}", f"{milliseconds:.2f}")
    Console().print(table)
    print(f"{len(gallery.names)} images, {gallery.kind} index, {size:.1f} MB: {place}")


def start() -> None:
    """Parses the command line and runs the program."""
    command_line.run(main)
