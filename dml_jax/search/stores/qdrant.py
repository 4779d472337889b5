"""Qdrant: a server, or embedded in this process, which is meant for small galleries."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from dml_jax._utils import extras
from dml_jax._utils.errors import UserError
from dml_jax.search.gallery import Neighbour
from dml_jax.search.stores.base import Batch, Facts

with extras.required_by("qdrant"):
    import qdrant_client
    from qdrant_client import models
    from qdrant_client.http.exceptions import ResponseHandlingException


class QdrantStore:
    """A collection of Qdrant. A server searches large collections by an HNSW graph."""

    kind = "Qdrant"

    def __init__(self, server: str, folder: str, collection: str) -> None:
        """Connects to a server (HOST:PORT), or opens a local folder if that is empty."""
        self._collection = collection
        if server:
            url = f"http://{server}{folder}"
            # The check runs in a thread, and only warns.
            self._client = qdrant_client.QdrantClient(url=url, check_compatibility=False)
        else:
            # Only `write` uses SQLite, in one thread; the client's check leaks a connection.
            self._client = qdrant_client.QdrantClient(
                path=folder, force_disable_check_same_thread=True
            )

    def write(self, dim: int, batches: Iterator[Batch], facts: Facts) -> None:
        """Creates the collection; its metadata, which are written last, complete it."""
        with _reachable():
            if self._client.collection_exists(self._collection):
                raise UserError(f"the collection {self._collection} exists already")
            cosine = models.VectorParams(size=dim, distance=models.Distance.COSINE)
            self._client.create_collection(self._collection, vectors_config=cosine)
            for batch in batches:
                payloads = [
                    {"name": name, "class": class_name}
                    for name, class_name in zip(batch.names, batch.class_names, strict=True)
                ]
                points = models.Batch(
                    ids=batch.rows.tolist(), vectors=batch.vectors.tolist(), payloads=payloads
                )
                self._client.upsert(self._collection, points, wait=True)
            self._client.update_collection(self._collection, metadata={"dml_jax": dict(facts)})

    def facts(self) -> Facts | None:
        """Returns what `write` was given; None if it did not end or there is no collection."""
        with _reachable():
            if not self._client.collection_exists(self._collection):
                return None
            metadata = self._client.get_collection(self._collection).config.metadata
        return (metadata or {}).get("dml_jax")

    def search(self, unit: Float32[np.ndarray, " d"], k: int) -> list[Neighbour]:
        """Returns at most k images with the largest cosine similarity to a unit vector."""
        with _reachable():
            found = self._client.query_points(
                self._collection, query=unit.tolist(), limit=k, with_payload=True
            ).points
        payloads = [x.payload or {} for x in found]
        return [
            Neighbour(int(str(x.id)), payload["name"], payload["class"], x.score)
            for x, payload in zip(found, payloads, strict=True)
        ]

    def vectors(self, rows: Sequence[int]) -> Float32[np.ndarray, "n d"]:
        """Returns the unit vectors of images."""
        by_row = {x.id: x.vector for x in self._points(rows, with_vectors=True)}
        return np.array([by_row[row] for row in rows], np.float32)

    def name(self, row: int) -> str | None:
        """Returns the name of an image; None if there is no such image."""
        found = self._points([row], with_payload=True)
        return found[0].payload["name"] if found else None

    def close(self) -> None:
        """Ends the connection."""
        self._client.close()

    def _points(self, rows: Sequence[int], **content: bool) -> list[Any]:
        with _reachable():
            return self._client.retrieve(self._collection, list(rows), **content)


@contextlib.contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except ResponseHandlingException as error:
        raise OSError(f"Qdrant does not answer: {error}") from error
