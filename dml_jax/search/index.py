"""A gallery on disk: a faiss index of embeddings, and beside it what their images are called.

Up to `FLAT_UP_TO` images every vector is compared, which is exact. Up to `HNSW_UP_TO` a graph of
neighbours is followed; beyond, vectors are stored in a byte a dimension and looked for in the cells
of a k-means that lie nearest. How far these two look is chosen by measurement: as little as finds
`WANTED_RECALL` of the true neighbours.
"""

import json
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
from jaxtyping import Float32, Int64

from dml_jax._utils import files
from dml_jax.evaluation.embedding_files import Embeddings
from dml_jax.retrieval import exact

KINDS = ("flat", "hnsw", "ivf")
FLAT_UP_TO, HNSW_UP_TO = 50_000, 200_000

WANTED_RECALL = 0.95
RECALL_AT = 10

VECTORS = "vectors.faiss"
IMAGES = "images.json"

_SAMPLE = 500  # Queries by which recall is measured.
_POINTS_PER_CELL = 50  # Of k-means; faiss warns below 39, and more gains little.


class Neighbour(NamedTuple):
    """An image that was found."""

    row: int
    name: str
    class_name: str
    similarity: float
    """The cosine."""


class Measured(NamedTuple):
    """How an index does at one effort."""

    effort: int
    """Nodes (hnsw) or cells (ivf) that a search looks into; 0 where it compares everything."""
    recall: float
    """The share of the true `RECALL_AT` nearest that is found."""
    milliseconds: float
    """Of a query on its own."""


class Gallery(NamedTuple):
    """Images that can be searched by their embeddings."""

    vectors: Any
    """The faiss index."""
    kind: str
    recall: float
    names: list[str]
    labels: list[int]
    class_names: list[str]
    folder: str | None
    """Where the images are, which are named relative to it; None if they are in no files."""
    first: list[float]
    """The first image's embedding, to tell another network by."""

    @property
    def facts(self) -> str:
        """How many images there are, and how they are searched, in a line."""
        exactness = "exact" if self.kind == "flat" else f"recall {100 * self.recall:.1f} %"
        return f"{len(self.names):,} images, {self.kind} index ({exactness})"

    def nearest(self, embedding: Float32[np.ndarray, "1 d"], k: int) -> list[Neighbour]:
        """The images that are most like one.

        Args:
            embedding: [1, d], raw.
            k: how many; all, if there are fewer.

        Returns:
            At most k images, the nearest first.

        Raises:
            ValueError: the embedding has not as many dimensions as the index, or is not finite.
        """
        if embedding.shape[1] != self.vectors.d:
            raise ValueError(
                f"the network's embeddings have {embedding.shape[1]} dimensions, the index's "
                f"{self.vectors.d}: it was made with another network"
            )
        k = min(k, len(self.names))
        similarities, rows = self.vectors.search(exact.unit_rows(embedding), k)
        # faiss fills up with -1 where it looked into too few vectors to find as many.
        return [
            Neighbour(row, self.names[row], self.class_names[self.labels[row]], similarity)
            for row, similarity in zip(rows[0].tolist(), similarities[0].tolist(), strict=True)
            if row >= 0
        ]

    def file(self, row: int) -> Path | None:
        """The file of an image; None if there is none inside the folder."""
        name = os.path.normpath(self.names[row])
        if self.folder is None or os.path.isabs(name) or name.split(os.sep)[0] == os.pardir:
            return None
        path = Path(self.folder, name)
        return path if path.is_file() else None

    def check_network(self, first: Float32[np.ndarray, "1 d"]) -> None:
        """Makes sure that a network is the one that the gallery was embedded with.

        Args:
            first: the network's embedding of the first image.

        Raises:
            ValueError: it differs from the one in the index.
        """
        (again,) = exact.unit_rows(first)
        if (
            len(again) != len(self.first)
            or float(again @ np.asarray(self.first, np.float32)) < 0.99
        ):
            raise ValueError(
                f"the network embeds {self.names[0]} otherwise than the index has it: give the run "
                "and the checkpoint whose embeddings were indexed, or embed and index the images "
                "again"
            )


def build(
    images: Embeddings, *, folder: str | None = None, kind: str | None = None
) -> tuple[Gallery, list[Measured]]:
    """Indexes embeddings.

    Args:
        images: their embeddings, raw, with names.
        folder: that the images are named relative to, if they are files.
        kind: one of `KINDS`; by default the one for so many images.

    Returns:
        The gallery, and how it does at each effort that was tried; the last is what it keeps.

    Raises:
        ValueError: there are no embeddings, or some are not finite.
        FileNotFoundError: an image is not in the folder.
    """
    if not images.embeddings.size:
        raise ValueError("there are no embeddings to index")
    _check_files(folder, images.names)
    unit = exact.unit_rows(images.embeddings)
    kind = kind or kind_for(len(unit))
    vectors = _index(unit, kind)
    measured = list(_tune(vectors, unit, kind))
    gallery = Gallery(
        vectors=vectors,
        kind=kind,
        recall=measured[-1].recall,
        names=list(images.names),
        labels=images.labels.tolist(),
        class_names=list(images.class_names),
        folder=folder,
        first=unit[0].tolist(),
    )
    return gallery, measured


def kind_for(count: int) -> str:
    """The kind of index for so many images."""
    return KINDS[(count > FLAT_UP_TO) + (count > HNSW_UP_TO)]


def _check_files(folder: str | None, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not Path(folder, name).is_file()] if folder else []
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(names)} images are not in {folder}, such as {missing[0]}; "
            "give the folder that they were embedded from"
        )


def _index(unit: Float32[np.ndarray, "n d"], kind: str) -> Any:
    """A faiss index of unit vectors."""
    count, dim = unit.shape
    # A power of two near twice the root, but enough vectors for each cell.
    cells = 2 ** max(0, round(np.log2(2 * np.sqrt(count))))
    cells = max(1, min(cells, count // _POINTS_PER_CELL))
    recipe = {"flat": "Flat", "hnsw": "HNSW32", "ivf": f"IVF{cells},SQ8"}[kind]
    vectors: Any = faiss.index_factory(dim, recipe, faiss.METRIC_INNER_PRODUCT)
    if kind == "ivf":
        vectors.cp.max_points_per_centroid = _POINTS_PER_CELL
        vectors.cp.min_points_per_centroid = 1
        vectors.train(unit)
    vectors.add(unit)
    return vectors


def _tune(vectors: Any, unit: Float32[np.ndarray, "n d"], kind: str) -> Iterator[Measured]:
    """Doubles the effort until the recall is as wanted, or nothing more is to be had."""
    own = np.random.default_rng(0).permutation(len(unit))[:_SAMPLE]
    k = min(RECALL_AT, len(unit) - 1)
    if kind == "flat" or not k:
        yield Measured(0, 1.0, _milliseconds(vectors, unit[own], k + 1))
        return
    true, _ = faiss.knn(unit[own], unit, k + 1, metric=faiss.METRIC_INNER_PRODUCT)
    effort, most = (16, 1024) if kind == "hnsw" else (1, vectors.nlist)
    while True:
        _set_effort(vectors, kind, effort)
        _, ids = vectors.search(unit[own], k + 1)
        recall = _recall(unit, own, ids, true)
        yield Measured(effort, recall, _milliseconds(vectors, unit[own], k + 1))
        if recall >= WANTED_RECALL or effort >= most:
            return
        effort = min(2 * effort, most)


def _set_effort(vectors: Any, kind: str, effort: int) -> None:
    if kind == "hnsw":
        vectors.hnsw.efSearch = effort
    else:
        vectors.nprobe = effort


def _recall(
    unit: Float32[np.ndarray, "n d"],
    own: Int64[np.ndarray, " q"],
    ids: Int64[np.ndarray, "q wider"],
    true: Float32[np.ndarray, "q wider"],
) -> float:
    """The share of what was found that is as near as the true neighbours.

    By similarity, because of copies of an image any are right. The query itself, which is its own
    nearest, does not count.
    """
    found = exact.without_own(ids, own)
    similarities = np.einsum("qkd,qd->qk", unit[found], unit[own])
    return float(((found >= 0) & (similarities >= true[:, -1:] - 1e-6)).mean())


def _milliseconds(vectors: Any, queries: Float32[np.ndarray, "q d"], k: int) -> float:
    """The time of a query, of a few that come one by one."""
    few = queries[:50]
    began = time.perf_counter()
    for query in few:
        vectors.search(query[None], k)
    return 1e3 * (time.perf_counter() - began) / len(few)


def save(gallery: Gallery, folder: Path) -> None:
    """Writes a gallery into a new folder, atomically.

    Raises:
        FileExistsError: there is something of that name.
    """
    check_new(folder)
    with files.atomic_write(folder) as part:
        part.mkdir(parents=True)
        faiss.write_index(gallery.vectors, str(part / VECTORS))
        about = {name: value for name, value in gallery._asdict().items() if name != "vectors"}
        about["checksum"] = _checksum(part / VECTORS)
        (part / IMAGES).write_text(json.dumps(about), encoding="utf-8")


def check_new(folder: Path) -> None:
    """Makes sure that an index can be written to a folder.

    Raises:
        FileExistsError: there is something of that name.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; remove it, or choose another --out")


def load(folder: Path) -> Gallery:
    """Reads what `save` wrote; nothing in it is executed.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: it is damaged.
    """
    for path in (folder / IMAGES, folder / VECTORS):
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no index: there is no {path}; scripts/index.py makes one"
            )
    try:
        about = json.loads((folder / IMAGES).read_text(encoding="utf-8"))
        if _checksum(folder / VECTORS) != about.pop("checksum"):
            raise ValueError(f"{VECTORS} is not as it was written")
        gallery = Gallery(vectors=faiss.read_index(str(folder / VECTORS)), **about)
        counts = {gallery.vectors.ntotal, len(gallery.names), len(gallery.labels)}
        if len(counts) > 1 or max(gallery.labels) >= len(gallery.class_names):
            raise ValueError(f"{IMAGES} and {VECTORS} do not belong together")
    # Whatever JSON may hold instead of what was written.
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"the index {folder} is damaged ({error}); make it again with scripts/index.py"
        ) from error
    return gallery


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            checksum = zlib.crc32(block, checksum)
    return checksum
