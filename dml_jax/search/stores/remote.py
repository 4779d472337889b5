"""A gallery in a vector database."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from dml_jax._utils.errors import UserError
from dml_jax.retrieval import exact
from dml_jax.search import gallery
from dml_jax.search.stores.base import Store


class RemoteGallery:
    """Images whose embeddings a vector database keeps and searches; see `gallery.Gallery`."""

    def __init__(self, url: str, store: Store) -> None:
        """Reads the facts of a collection.

        Raises:
            ValueError: there is no such collection, or it is not complete.
        """
        facts = store.facts()
        if facts is None:
            raise UserError(
                f"{url} holds no complete gallery; delete what is there, if anything, and write it "
                "with `dml-jax index --to`"
            )
        self._store, self._facts = store, facts
        self._dim = store.vectors([0]).shape[1]

    @property
    def facts(self) -> str:
        """Number of images and name of the database, in one line."""
        return f"{self._facts['images']:,} images, {self._store.kind}"

    @property
    def threshold(self) -> float | None:
        """The similarity below which a result is unknown; None if there is none."""
        return self._facts["threshold"]

    def nearest(self, embedding: Float32[np.ndarray, "1 d"], k: int) -> list[gallery.Neighbour]:
        """Returns at most k nearest neighbours of a raw embedding [1, d], the nearest first.

        Raises:
            ValueError: the embedding has another dimension than the gallery, or is not finite.
        """
        gallery.check_dimension(embedding, self._dim)
        return self._store.search(exact.unit_rows(embedding)[0], k)

    def vectors_of(self, rows: Sequence[int]) -> Float32[np.ndarray, "n d"]:
        """Returns the unit embeddings of images."""
        return self._store.vectors(rows)

    def file(self, row: int) -> Path | None:
        """Returns the file of an image; None if there is none inside the folder."""
        name = self._store.name(row)
        return None if name is None else gallery.file_below(self._facts["folder"], name)

    def check_network(self, first: Float32[np.ndarray, "1 d"]) -> None:
        """Raises ValueError unless a network's embedding of the first image is the one here."""
        gallery.check_network(str(self._store.name(0)), first, self._store.vectors([0])[0])

    def close(self) -> None:
        """Ends the connection."""
        self._store.close()
