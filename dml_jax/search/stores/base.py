"""The interface of a vector database."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64

from dml_jax.search.gallery import Neighbour


class Batch(NamedTuple):
    """Some images of a gallery."""

    rows: Int64[np.ndarray, " n"]
    """Their indices in the gallery."""
    names: Sequence[str]
    class_names: Sequence[str]
    vectors: Float32[np.ndarray, "n d"]
    """Unit vectors."""


class Facts(TypedDict):
    """What a collection keeps about itself, as JSON."""

    images: int
    folder: str | None
    threshold: float | None


@runtime_checkable
class Store(Protocol):
    """A collection of a vector database. It keeps the name, the class and the vector of each image.

    An OSError tells that the database cannot be reached.
    """

    kind: str
    """Name of the database, for messages."""

    def write(self, dim: int, batches: Iterator[Batch], facts: Facts) -> None:
        """Creates the collection; raises UserError if it exists."""

    def facts(self) -> Facts | None:
        """Returns what `write` was given; None if it did not end or there is no collection."""

    def search(self, unit: Float32[np.ndarray, " d"], k: int) -> list[Neighbour]:
        """Returns at most k images with the largest cosine similarity to a unit vector."""

    def vectors(self, rows: Sequence[int]) -> Float32[np.ndarray, "n d"]:
        """Returns the unit vectors of images."""

    def name(self, row: int) -> str | None:
        """Returns the name of an image; None if there is no such image."""

    def close(self) -> None:
        """Ends the connection."""
