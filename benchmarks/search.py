"""Times an index of synthetic embeddings: building, writing, reading and searching.

python -m benchmarks.search --images=1000000 --dim=512
python -m benchmarks.search --images=100000 --kind=hnsw

Like real embeddings, the synthetic ones have a low intrinsic dimension. They are random in 32
dimensions, where the 100 images of a class have a cosine similarity of 0.5, rotated at random into
the full space, with a tenth of isotropic noise. Queries are further images of the same classes.
"""

import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from dml_jax.cli import command_line
from dml_jax.evaluation import embedding_files
from dml_jax.retrieval import exact
from dml_jax.search import index

_IMAGES = flags.DEFINE_integer("images", 1_000_000, "Number of gallery images.", lower_bound=1000)
_DIM = flags.DEFINE_integer("dim", 512, "Dimension of the embeddings.", lower_bound=1)
_KIND = flags.DEFINE_enum(
    "kind", None, index.KINDS, "Kind of index; by default the one chosen for this number of images."
)

_CLASS, _LATENT, _QUERIES = 100, 32, 500


def main() -> None:
    """Runs the program."""
    images, queries = _synthetic(_IMAGES.value, _DIM.value)
    table = Table("", "", title=f"{_IMAGES.value:,} images of {_DIM.value} dimensions")
    began, computed = time.perf_counter(), time.process_time()
    gallery, measured = index.build(images, kind=_KIND.value)
    table.add_row("build and measure recall, s", f"{time.perf_counter() - began:.0f}")
    table.add_row("CPU time of these, s", f"{time.process_time() - computed:.0f}")
    table.add_row("kind, effort", f"{gallery.kind}, {measured[-1].effort or 'all'}")
    table.add_row("peak memory, GB", f"{_peak():.1f}")
    true = _exact(table, images.embeddings, queries)
    del images
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "index")
        began = time.perf_counter()
        index.save(gallery, out)
        table.add_row("write, s", f"{time.perf_counter() - began:.1f}")
        sizes = {file.name: file.stat().st_size / 1e6 for file in out.iterdir()}
        table.add_row("files, MB", ", ".join(f"{k} {v:.0f}" for k, v in sizes.items()))
        del gallery
        began = time.perf_counter()
        gallery = index.load(out)
        table.add_row("read, s", f"{time.perf_counter() - began:.1f}")
    seconds, hits = [], 0
    for query, expected in zip(queries, true, strict=True):
        began = time.perf_counter()
        found = gallery.nearest(query[None], len(expected))
        seconds.append(time.perf_counter() - began)
        hits += len({neighbour.row for neighbour in found} & set(expected.tolist()))
    median, slow = 1e3 * np.percentile(seconds, [50, 95])
    table.add_row("query, ms: median, 95th percentile", f"{median:.1f}, {slow:.1f}")
    recalls = f"{100 * gallery.recall:.1f}, {100 * hits / true.size:.1f}"
    table.add_row("recall@10, %: measured while building, of new queries", recalls)
    Console().print(table)


def _synthetic(count: int, dim: int) -> tuple[embedding_files.Embeddings, np.ndarray]:
    """Returns the embeddings of a gallery and of queries."""
    rng = np.random.default_rng(0)
    centres = exact.unit_rows(rng.standard_normal((-(-count // _CLASS), _LATENT), np.float32))
    rotation = rng.standard_normal((_LATENT, dim), np.float32) / dim**0.5
    labels = np.arange(count) // _CLASS

    def draw(classes: np.ndarray) -> np.ndarray:
        latent = rng.standard_normal((len(classes), _LATENT), np.float32) / _LATENT**0.5
        noise = rng.standard_normal((len(classes), dim), np.float32) / dim**0.5
        return exact.unit_rows((latent + centres[classes]) @ rotation + 0.1 * noise)

    vectors = np.empty((count, dim), np.float32)
    for start in range(0, count, 10_000):
        vectors[start : start + 10_000] = draw(labels[start : start + 10_000])
    names = tuple(f"{label:05d}/{row:07d}.jpg" for row, label in enumerate(labels.tolist()))
    classes = tuple(f"{label:05d}" for label in range(len(centres)))
    queries = draw(rng.integers(len(centres), size=_QUERIES))
    return embedding_files.Embeddings(vectors, labels, names, classes), queries


def _exact(table: Table, vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Returns the exact neighbours of the queries; adds the time of a single query to the table."""
    searcher = exact.Searcher(vectors)
    few = queries[:20]
    began = time.perf_counter()
    for query in few:
        searcher.nearest(query[None], index.RECALL_AT)
    table.add_row("exact query, ms", f"{1e3 * (time.perf_counter() - began) / len(few):.1f}")
    return searcher.nearest(queries, index.RECALL_AT)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    command_line.run(main)
