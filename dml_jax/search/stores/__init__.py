"""Galleries in a vector database, for more images than the index of one machine holds.

A URL names the database and, last, the collection or table: qdrant://HOST:PORT/COLLECTION,
qdrant:///FOLDER/COLLECTION (embedded, up to some ten thousand images), lancedb:///FOLDER/TABLE, and
postgresql://USER@HOST/DATABASE/TABLE with the extension pgvector.
"""

from collections.abc import Iterator
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from dml_jax._utils.errors import UserError
from dml_jax.evaluation.embedding_files import Embeddings
from dml_jax.retrieval import exact
from dml_jax.search.stores.base import Batch, Facts, Store
from dml_jax.search.stores.remote import RemoteGallery

SCHEMES = ("qdrant", "lancedb", "postgresql")

_ROWS = 1000  # In a batch.


def is_store(url: str) -> bool:
    """Returns whether a path or URL is that of a vector database."""
    return urlsplit(url).scheme in SCHEMES


def connect(url: str) -> Store:
    """Returns the collection of a URL, which need not exist.

    Raises:
        ValueError: the URL names no collection.
        ModuleNotFoundError: the database's client is not installed.
    """
    parts = urlsplit(url)
    place, _, table = parts.path.rpartition("/")
    if parts.scheme not in SCHEMES or not table.isidentifier():
        raise UserError(
            f"{url} must be {'://, '.join(SCHEMES)}:// with a place and, last, the name of a "
            "collection or table of letters, digits and underscores"
        )
    # Each client is imported only for its own databases.
    if parts.scheme == "qdrant":
        from dml_jax.search.stores import qdrant

        return qdrant.QdrantStore(parts.netloc, place, table)
    if parts.scheme == "lancedb":
        from dml_jax.search.stores import lance

        return lance.LanceStore(parts.netloc + place, table)
    from dml_jax.search.stores import postgres

    return postgres.PostgresStore(urlunsplit(parts._replace(path=place)), table)


def write(
    url: str, images: Embeddings, *, folder: str | None = None, threshold: float | None = None
) -> None:
    """Writes embeddings to a new collection of a vector database.

    Args:
        url: the collection; see the module.
        images: raw embeddings with names and labels.
        folder: the folder that the image names are relative to, if the images are files.
        threshold: the similarity below which a search result is unknown.

    Raises:
        ValueError: the collection exists, there are no embeddings, or some are not finite.
        OSError: the database cannot be reached.
    """
    if not images.embeddings.size:
        raise UserError("there are no embeddings to index")
    unit = exact.unit_rows(images.embeddings)

    def batches() -> Iterator[Batch]:
        for start in range(0, len(unit), _ROWS):
            rows = slice(start, start + _ROWS)
            classes = [images.class_names[label] for label in images.labels[rows]]
            yield Batch(
                np.arange(start, start + len(classes)), images.names[rows], classes, unit[rows]
            )

    facts: Facts = {"images": len(unit), "folder": folder, "threshold": threshold}
    store = connect(url)
    try:
        store.write(unit.shape[1], batches(), facts)
    finally:
        store.close()


def load(url: str) -> RemoteGallery:
    """Returns the gallery that `write` wrote.

    Raises:
        ValueError: there is no such collection, or `write` did not complete it.
        OSError: the database cannot be reached.
    """
    store = connect(url)
    try:
        return RemoteGallery(url, store)
    except BaseException:
        store.close()
        raise
