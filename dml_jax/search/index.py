"""A gallery on disk: a faiss index of embeddings, and the names and labels of their images.

Up to `FLAT_UP_TO` images the search compares all vectors and is exact. Up to `HNSW_UP_TO` images it
uses an HNSW graph, beyond that an inverted file (IVF) over k-means cells with one byte per
dimension. The search effort of these two is tuned: the smallest that reaches `TARGET_RECALL`.
"""

import json
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from dml_jax._utils import extras, files, storage
from dml_jax._utils.errors import UserError
from dml_jax.evaluation.embedding_files import Embeddings
from dml_jax.retrieval import exact
from dml_jax.search import gallery
from dml_jax.search.gallery import Neighbour

with extras.required_by("cpu", "cuda", "tpu"):
    import faiss

KINDS = ("flat", "hnsw", "ivf")
FLAT_UP_TO, HNSW_UP_TO = 50_000, 200_000

TARGET_RECALL = 0.95
RECALL_AT = 10

VECTORS = "vectors.faiss"
METADATA = "images.json"

_SAMPLE = 500  # Queries for measuring recall.
_POINTS_PER_CELL = 50  # For k-means; faiss warns below 39, and more improves little.


class Measurement(NamedTuple):
    """Recall and speed of an index at one search effort."""

    effort: int
    """Nodes (hnsw) or cells (ivf) that a search visits; 0 for exhaustive search."""
    recall: float
    """Share of the true `RECALL_AT` nearest neighbours that is found."""
    milliseconds: float
    """Time of a single query."""


class Gallery(NamedTuple):
    """Images indexed by their embeddings."""

    vectors: Any
    """The faiss index."""
    kind: str
    recall: float
    names: list[str]
    labels: list[int]
    class_names: list[str]
    folder: str | None
    """Folder that the image names are relative to; None if the images have no files."""
    first: list[float]
    """Embedding of the first image, for detecting another network."""
    threshold: float | None = None
    """The similarity below which a search result is unknown; None if there is none."""

    @property
    def facts(self) -> str:
        """Number of images and kind of index, in one line."""
        exactness = "exact" if self.kind == "flat" else f"recall {100 * self.recall:.1f} %"
        return f"{len(self.names):,} images, {self.kind} index ({exactness})"

    def nearest(self, embedding: Float32[np.ndarray, "1 d"], k: int) -> list[Neighbour]:
        """Returns the nearest neighbours of an embedding.

        Args:
            embedding: [1, d], raw.
            k: number of neighbours; at most the number of images.

        Returns:
            At most k images, the nearest first.

        Raises:
            ValueError: the embedding has another dimension than the index, or is not finite.
        """
        gallery.check_dimension(embedding, self.vectors.d)
        k = min(k, len(self.names))
        similarities, rows = self.vectors.search(exact.unit_rows(embedding), k)
        # faiss pads with -1 if it visited fewer than k vectors.
        return [
            Neighbour(row, self.names[row], self.class_names[self.labels[row]], similarity)
            for row, similarity in zip(rows[0].tolist(), similarities[0].tolist(), strict=True)
            if row >= 0
        ]

    def vectors_of(self, rows: Sequence[int]) -> Float32[np.ndarray, "n d"]:
        """Returns the unit embeddings of images; those of an IVF index are rounded."""
        if self.kind == "ivf":
            self.vectors.make_direct_map()
        return self.vectors.reconstruct_batch(np.asarray(rows, np.int64))

    def file(self, row: int) -> Path | None:
        """Returns the file of an image; None if there is none inside the folder."""
        exists = 0 <= row < len(self.names)
        return gallery.file_below(self.folder, self.names[row]) if exists else None

    def check_network(self, first: Float32[np.ndarray, "1 d"]) -> None:
        """Raises ValueError unless a network's embedding of the first image is the one here."""
        gallery.check_network(self.names[0], first, np.asarray(self.first, np.float32))


def build(
    images: Embeddings,
    *,
    folder: str | None = None,
    kind: str | None = None,
    threshold: float | None = None,
) -> tuple[Gallery, list[Measurement]]:
    """Builds an index of embeddings.

    Args:
        images: raw embeddings with names and labels.
        folder: the folder that the image names are relative to, if the images are files.
        kind: one of `KINDS`; by default it depends on the number of images.
        threshold: the similarity below which a search result is unknown.

    Returns:
        The gallery, and its recall and speed at each effort that was tried; the last is used.

    Raises:
        ValueError: there are no embeddings, or some are not finite.
        FileNotFoundError: an image is not in the folder.
    """
    if not images.embeddings.size:
        raise UserError("there are no embeddings to index")
    check_files(folder, images.names)
    unit = exact.unit_rows(images.embeddings)
    kind = kind or kind_for(len(unit))
    vectors = _build_index(unit, kind)
    measurements = list(_tune(vectors, unit, kind))
    built = Gallery(
        vectors=vectors,
        kind=kind,
        recall=measurements[-1].recall,
        names=list(images.names),
        labels=images.labels.tolist(),
        class_names=list(images.class_names),
        folder=folder,
        first=unit[0].tolist(),
        threshold=threshold,
    )
    return built, measurements


def kind_for(count: int) -> str:
    """Returns the default kind of index for a number of images."""
    return KINDS[(count > FLAT_UP_TO) + (count > HNSW_UP_TO)]


def check_files(folder: str | None, names: Sequence[str]) -> None:
    """Raises FileNotFoundError unless all images are in the folder, if there is one."""
    if folder is None:
        return
    if storage.is_url(folder):
        missing = sorted(set(names) - storage.names(folder).keys())
    else:
        missing = [name for name in names if not Path(folder, name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(names)} images are not in {folder}, such as {missing[0]}; "
            "pass the folder that they were embedded from"
        )


def _build_index(unit: Float32[np.ndarray, "n d"], kind: str) -> Any:
    """Returns a faiss index of unit vectors."""
    count, dim = unit.shape
    # A power of two near 2 * sqrt(count), with enough vectors per cell.
    cells = 2 ** max(0, round(np.log2(2 * np.sqrt(count))))
    cells = max(1, min(cells, count // _POINTS_PER_CELL))
    description = {"flat": "Flat", "hnsw": "HNSW32", "ivf": f"IVF{cells},SQ8"}[kind]
    vectors: Any = faiss.index_factory(dim, description, faiss.METRIC_INNER_PRODUCT)
    if kind == "ivf":
        vectors.cp.max_points_per_centroid = _POINTS_PER_CELL
        vectors.cp.min_points_per_centroid = 1
        vectors.train(unit)
    vectors.add(unit)
    return vectors


def _tune(vectors: Any, unit: Float32[np.ndarray, "n d"], kind: str) -> Iterator[Measurement]:
    """Doubles the search effort until it reaches the target recall or the maximum effort."""
    queries = np.random.default_rng(0).permutation(len(unit))[:_SAMPLE]
    k = min(RECALL_AT, len(unit) - 1)
    if kind == "flat" or not k:
        yield Measurement(0, 1.0, _milliseconds(vectors, unit[queries], k + 1))
        return
    true, _ = faiss.knn(unit[queries], unit, k + 1, metric=faiss.METRIC_INNER_PRODUCT)
    effort, max_effort = (16, 1024) if kind == "hnsw" else (1, vectors.nlist)
    while True:
        _set_effort(vectors, kind, effort)
        _, ids = vectors.search(unit[queries], k + 1)
        recall = _recall(unit, queries, ids, true)
        yield Measurement(effort, recall, _milliseconds(vectors, unit[queries], k + 1))
        if recall >= TARGET_RECALL or effort >= max_effort:
            return
        effort = min(2 * effort, max_effort)


def _set_effort(vectors: Any, kind: str, effort: int) -> None:
    if kind == "hnsw":
        vectors.hnsw.efSearch = effort
    else:
        vectors.nprobe = effort


def _recall(
    unit: Float32[np.ndarray, "n d"],
    queries: Int64[np.ndarray, " q"],
    ids: Int64[np.ndarray, "q k_plus_1"],
    true: Float32[np.ndarray, "q k_plus_1"],
) -> float:
    """Returns the recall of a search, without the query itself as its own nearest neighbour.

    A neighbour counts as found if its similarity reaches that of the k-th true neighbour, so that
    ties between copies of an image do not matter.

    Args:
        unit: the unit vectors of the gallery.
        queries: rows of the queries.
        ids: rows that the search found.
        true: similarities of the true neighbours, in descending order.
    """
    found = exact.without_own(ids, queries)
    similarities = np.einsum("qkd,qd->qk", unit[found], unit[queries])
    return float(((found >= 0) & (similarities >= true[:, -1:] - 1e-6)).mean())


def _milliseconds(vectors: Any, queries: Float32[np.ndarray, "q d"], k: int) -> float:
    """Returns the mean time of a query, over at most 50 queries in sequence."""
    sample = queries[:50]
    start = time.perf_counter()
    for query in sample:
        vectors.search(query[None], k)
    return 1e3 * (time.perf_counter() - start) / len(sample)


def save(built: Gallery, folder: Path) -> None:
    """Writes a gallery to a new folder atomically.

    Raises:
        FileExistsError: the folder, or a file of that name, exists.
    """
    check_new(folder)
    with files.atomic_write(folder) as part:
        part.mkdir(parents=True)
        faiss.write_index(built.vectors, str(part / VECTORS))
        metadata = {name: value for name, value in built._asdict().items() if name != "vectors"}
        metadata["checksum"] = _checksum(part / VECTORS)
        (part / METADATA).write_text(json.dumps(metadata), encoding="utf-8")


def check_new(folder: Path) -> None:
    """Checks that an index can be written to a folder.

    Raises:
        FileExistsError: the folder, or a file of that name, exists.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; remove it, or choose another --out")


def load(folder: Path) -> Gallery:
    """Reads a gallery that `save` wrote; nothing in it is executed.

    Raises:
        FileNotFoundError: the folder holds no index.
        ValueError: it is damaged.
    """
    for path in (folder / METADATA, folder / VECTORS):
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no index: there is no {path}; scripts/index.py makes one"
            )
    try:
        metadata = json.loads((folder / METADATA).read_text(encoding="utf-8"))
        if _checksum(folder / VECTORS) != metadata.pop("checksum"):
            raise UserError(f"the checksum of {VECTORS} differs")
        loaded = Gallery(vectors=faiss.read_index(str(folder / VECTORS)), **metadata)
        counts = {loaded.vectors.ntotal, len(loaded.names), len(loaded.labels)}
        if len(counts) > 1 or max(loaded.labels) >= len(loaded.class_names):
            raise UserError(f"{METADATA} and {VECTORS} do not belong together")
        if not isinstance(loaded.threshold, float | None):
            raise UserError(f"the threshold in {METADATA} is no number")
    # Raised by faiss, or if the JSON is not as `save` writes it.
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"the index {folder} is damaged ({error}); build it again with scripts/index.py"
        ) from error
    return loaded


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            checksum = zlib.crc32(block, checksum)
    return checksum
