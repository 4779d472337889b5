"""Finds images like a given one in an index, in the terminal or on a local page.

python scripts/search.py --index=mine.index --workdir=runs/memvir query.jpg
python scripts/search.py --index=mine.index --workdir=runs/memvir --serve
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import dml_jax
from dml_jax import data
from dml_jax._utils import files
from dml_jax.cli import command_line
from dml_jax.search import html, index, server
from dml_jax.training import checkpoint

_INDEX = flags.DEFINE_string("index", None, "What index.py wrote.", required=True)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run that the gallery was embedded with, or of its export.",
    required=True,
)
_CHECKPOINT = flags.DEFINE_enum(
    "checkpoint", None, ["last", *checkpoint.BEST], "Which of the run's checkpoints; the last."
)
_NEIGHBOURS = flags.DEFINE_integer("neighbours", 12, "How many to show.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "search.html", "The contact sheet to write.")
_SERVE = flags.DEFINE_bool("serve", False, "Whether to serve a page to drop images on instead.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Where to serve; whoever reaches it may search.")
_PORT = flags.DEFINE_integer("port", 8000, "The page's port; 0 for any free one.")


def main(*queries: str) -> None:
    """Runs the program."""
    with command_line.user_errors():
        if bool(queries) == _SERVE.value:
            raise ValueError("give one or more images to look for, or --serve without any")
        images = [(name, Path(name).read_bytes()) for name in queries]
        gallery = index.load(Path(_INDEX.value))
        model = dml_jax.load(_WORKDIR.value, checkpoint=_CHECKPOINT.value)

        def embed(image: bytes, name: str) -> np.ndarray:
            return model.embed([data.decode(image, name)])

        first = gallery.file(0)
        if first is not None:
            gallery.check_network(model.embed([first]))
        if _SERVE.value:
            serving = server.make_server(
                gallery, embed, host=_HOST.value, port=_PORT.value, neighbours=_NEIGHBOURS.value
            )
        else:
            found = [
                (name, image, gallery.nearest(embed(image, name), _NEIGHBOURS.value))
                for name, image in images
            ]
            files.write_text(Path(_OUT.value), html.sheet(gallery, found))
    if _SERVE.value:
        print(f"{gallery.facts}: http://{_HOST.value}:{serving.server_address[1]} (Ctrl-C ends it)")
        with contextlib.suppress(KeyboardInterrupt), serving:
            serving.serve_forever()
        return
    for name, _, neighbours in found:
        Console().print(_table(name, neighbours))
    print(f"{gallery.facts}; contact sheet: {_OUT.value}")


def _table(title: str, neighbours: Sequence[index.Neighbour]) -> Table:
    table = Table("", "similarity", title=escape(title))
    for name in ("class", "image"):
        table.add_column(name, overflow="fold")  # A name that is cut names nothing.
    for rank, neighbour in enumerate(neighbours, 1):
        row = (neighbour.class_name, neighbour.name)
        table.add_row(str(rank), f"{neighbour.similarity:.3f}", *map(escape, row))
    return table


def start() -> None:
    """Parses the command line and runs the program."""
    command_line.run(main, many="image")
