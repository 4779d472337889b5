"""Finds the images of an index most similar to query images, in the terminal or on a local page.

dml-jax search --index=mine.index --workdir=runs/memvir query.jpg
dml-jax search --index=mine.index --workdir=runs/memvir --serve

The index may be a vector database, at the URL that `dml-jax index --to` wrote to.
"""

import contextlib
import functools
from collections.abc import Sequence

import numpy as np
from absl import flags
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import dml_jax
from dml_jax import data
from dml_jax._utils import files, storage
from dml_jax._utils.errors import UserError
from dml_jax.cli import checkpoint_flag, command_line
from dml_jax.retrieval import reranking
from dml_jax.search import html, index, server, stores
from dml_jax.search.gallery import Gallery, Neighbour, search

_INDEX = flags.DEFINE_string(
    "index", None, "The folder or vector database that `dml-jax index` wrote.", required=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run that embedded the gallery, or of its export, or hf:OWNER/NAME.",
    required=True,
)
_CHECKPOINT = checkpoint_flag.define("The checkpoint of the run")
_NEIGHBOURS = flags.DEFINE_integer(
    "neighbours", 12, "The number of neighbours to show.", lower_bound=1
)
_THRESHOLD = flags.DEFINE_float(
    "threshold",
    None,
    "The similarity below which a result is unknown; default: that of the index or of the export.",
    lower_bound=-1,
    upper_bound=1,
)
_RERANK = flags.DEFINE_enum(
    "rerank", None, reranking.METHODS, "How to re-rank the neighbours; default: not at all."
)
_OUT = flags.DEFINE_string("out", "search.html", "The contact sheet to write.")
_SERVE = flags.DEFINE_bool("serve", False, "Whether to serve a search page instead.")
_HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "Address to serve on; anyone who can reach it can search."
)
_PORT = flags.DEFINE_integer("port", 8000, "Port of the page; 0 takes any free port.")


def main(*queries: str) -> None:
    """Runs the program."""
    with command_line.user_errors():
        if bool(queries) == _SERVE.value:
            raise UserError("give either one or more query images or --serve")
        images = [(name, storage.local(name).read_bytes()) for name in queries]
        gallery = _gallery(_INDEX.value)
        model = dml_jax.load(_WORKDIR.value, checkpoint=_CHECKPOINT.value)

        def embed(image: bytes, name: str) -> np.ndarray:
            return model.embed([data.decode(image, name)])

        thresholds = (_THRESHOLD.value, gallery.threshold, model.threshold)
        threshold = next((x for x in thresholds if x is not None), None)
        first = gallery.file(0)
        if first is not None:
            gallery.check_network(model.embed([first]))
        if _SERVE.value:
            serving = server.make_server(
                gallery,
                embed,
                host=_HOST.value,
                port=_PORT.value,
                neighbours=_NEIGHBOURS.value,
                threshold=threshold,
                rerank=_RERANK.value,
            )
        else:
            find = functools.partial(
                search, gallery, k=_NEIGHBOURS.value, threshold=threshold, rerank=_RERANK.value
            )
            found = [(name, image, find(embed(image, name))) for name, image in images]
            with storage.writing(_OUT.value) as out:
                files.write_text(out, html.sheet(gallery, found))
    if _SERVE.value:
        print(
            f"{gallery.facts}: http://{_HOST.value}:{serving.server_address[1]} (Ctrl-C stops it)"
        )
        with contextlib.suppress(KeyboardInterrupt), serving:
            serving.serve_forever()
        return
    for name, _, neighbours in found:
        Console().print(_table(name, neighbours))
    below = "" if threshold is None else f"; unknown below {threshold:.3f}"
    print(f"{gallery.facts}{below}; contact sheet: {_OUT.value}")


def _gallery(place: str) -> Gallery:
    if stores.is_store(place):
        return stores.load(place)
    return index.load(storage.local(place))


def _table(title: str, neighbours: Sequence[Neighbour]) -> Table:
    table = Table("", "similarity", title=escape(title))
    for name in ("class", "image"):
        table.add_column(name, overflow="fold")  # A truncated name is useless.
    for rank, neighbour in enumerate(neighbours, 1):
        row = (neighbour.class_name, neighbour.name)
        table.add_row(str(rank), f"{neighbour.similarity:.3f}", *map(escape, row))
    return table


def start() -> None:
    """Parses the command line and runs the program."""
    command_line.run(main, many="image")
