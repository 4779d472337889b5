"""What is searched: a gallery of images with embeddings, wherever it is kept."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from dml_jax._utils import storage
from dml_jax._utils.errors import UserError
from dml_jax.retrieval import exact, reranking

UNKNOWN = "unknown"
"""Class of a search result below the threshold."""


class Neighbour(NamedTuple):
    """A search result."""

    row: int
    """Index of the image in the gallery."""
    name: str
    class_name: str
    similarity: float
    """Cosine similarity to the query."""


@runtime_checkable
class Gallery(Protocol):
    """Images that can be searched by their embeddings."""

    @property
    def facts(self) -> str:
        """Number of images and kind of index, in one line."""

    @property
    def threshold(self) -> float | None:
        """The similarity below which a result is unknown; None if there is none."""

    def nearest(self, embedding: Float32[np.ndarray, "1 d"], k: int) -> list[Neighbour]:
        """Returns at most k nearest neighbours of a raw embedding [1, d], the nearest first."""

    def vectors_of(self, rows: Sequence[int]) -> Float32[np.ndarray, "n d"]:
        """Returns the unit embeddings of images."""

    def file(self, row: int) -> Path | None:
        """Returns the file of an image; None if there is none."""

    def check_network(self, first: Float32[np.ndarray, "1 d"]) -> None:
        """Raises ValueError if a network's embedding of the first image is not the one here."""


def search(
    gallery: Gallery,
    embedding: Float32[np.ndarray, "1 d"],
    k: int,
    *,
    threshold: float | None = None,
    rerank: str | None = None,
) -> list[Neighbour]:
    """Returns the nearest neighbours of an embedding.

    Args:
        gallery: the gallery.
        embedding: [1, d], raw.
        k: number of neighbours.
        threshold: the similarity below which the class of a neighbour is `UNKNOWN`.
        rerank: a method of `reranking.METHODS`; by default the order is that of the similarity.

    Returns:
        At most k images. Similarities are those to the query, with re-ranking too.

    Raises:
        ValueError: the embedding has another dimension than the gallery, or is not finite.
    """
    found = _ranked(gallery, embedding, k, rerank)
    if threshold is None:
        return found
    return [x if x.similarity >= threshold else x._replace(class_name=UNKNOWN) for x in found]


def _ranked(
    gallery: Gallery, embedding: Float32[np.ndarray, "1 d"], k: int, rerank: str | None
) -> list[Neighbour]:
    if rerank is None:
        return gallery.nearest(embedding, k)
    query = exact.unit_rows(embedding)
    if rerank == "k_reciprocal":
        near = gallery.nearest(embedding, max(k, reranking.SHORTLIST))
        shortlist = near[: reranking.SHORTLIST]
        vectors = gallery.vectors_of([x.row for x in shortlist])
        (order,) = reranking.k_reciprocal(query, vectors[None])
        return [*(shortlist[i] for i in order), *near[len(shortlist) :]][:k]
    near = gallery.nearest(embedding, reranking.EXPANSION)
    vectors = gallery.vectors_of([x.row for x in near])
    found = gallery.nearest(reranking.expand(query, vectors[None]), k)
    similarities = gallery.vectors_of([x.row for x in found]) @ query[0]
    return [x._replace(similarity=float(s)) for x, s in zip(found, similarities, strict=True)]


def check_dimension(embedding: Float32[np.ndarray, "1 d"], dim: int) -> None:
    """Raises ValueError unless an embedding has the dimension of a gallery."""
    if embedding.shape[1] != dim:
        raise UserError(
            f"the network's embeddings have {embedding.shape[1]} dimensions, the index's {dim}: it "
            "was built with another network"
        )


def check_network(
    name: str, first: Float32[np.ndarray, "1 d"], kept: Float32[np.ndarray, " other"]
) -> None:
    """Checks that a network is the one that a gallery was embedded with.

    Args:
        name: name of an image of the gallery.
        first: the network's raw embedding of this image.
        kept: the unit embedding in the gallery.

    Raises:
        ValueError: it differs from the one in the gallery.
    """
    (unit,) = exact.unit_rows(first)
    if len(unit) != len(kept) or float(unit @ kept) < 0.99:
        raise UserError(
            f"the network's embedding of {name} differs from the one in the index: "
            "use the run and the checkpoint whose embeddings were indexed, or embed and index "
            "the images again"
        )


def file_below(folder: str | None, name: str) -> Path | None:
    """Returns the file of an image; None if there is none inside the folder."""
    name = os.path.normpath(name)
    if folder is None or os.path.isabs(name) or name.split(os.sep)[0] == os.pardir:
        return None
    try:
        file = storage.local(storage.join(folder, name))
    except FileNotFoundError:
        return None
    return file if file.is_file() else None
