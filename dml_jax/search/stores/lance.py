"""LanceDB, embedded: a folder of Lance files. Without an index that the user adds it is exact."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from dml_jax._utils import extras
from dml_jax._utils.errors import UserError
from dml_jax.search.gallery import Neighbour
from dml_jax.search.stores.base import Batch, Facts

with extras.required_by("lancedb"):
    import lancedb
    import pyarrow as pa

_FACTS = b"dml_jax"


class LanceStore:
    """A table of LanceDB."""

    kind = "LanceDB"

    def __init__(self, folder: str, table: str) -> None:
        """Opens a folder, which is created when a table is written."""
        self._database, self._name = lancedb.connect(folder), table

    def write(self, dim: int, batches: Iterator[Batch], facts: Facts) -> None:
        """Creates the table; it appears complete."""
        if self._table() is not None:
            raise UserError(f"the table {self._name} exists already")
        columns = {
            "row": pa.int64(),
            "name": pa.string(),
            "class": pa.string(),
            "vector": pa.list_(pa.float32(), dim),
        }
        schema = pa.schema(columns, metadata={_FACTS: json.dumps(facts)})

        def arrow() -> Iterator[pa.RecordBatch]:
            for rows, names, class_names, vectors in batches:
                flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim)
                arrays = [pa.array(rows), pa.array(names), pa.array(class_names), flat]
                yield pa.record_batch(arrays, schema=schema)

        self._database.create_table(self._name, pa.RecordBatchReader.from_batches(schema, arrow()))

    def facts(self) -> Facts | None:
        """Returns what `write` was given; None if there is no table of it."""
        table = self._table()
        metadata = {} if table is None else table.schema.metadata or {}
        return json.loads(metadata[_FACTS]) if _FACTS in metadata else None

    def search(self, unit: Float32[np.ndarray, " d"], k: int) -> list[Neighbour]:
        """Returns at most k images with the largest cosine similarity to a unit vector."""
        wanted = ["row", "name", "class", "_distance"]
        query = self._opened().search(unit).distance_type("cosine").limit(k).select(wanted)
        return [
            Neighbour(x["row"], x["name"], x["class"], 1 - x["_distance"])
            for x in query.to_arrow().to_pylist()
        ]

    def vectors(self, rows: Sequence[int]) -> Float32[np.ndarray, "n d"]:
        """Returns the unit vectors of images."""
        by_row = {x["row"]: x["vector"] for x in self._where(rows, ["row", "vector"])}
        return np.array([by_row[row] for row in rows], np.float32)

    def name(self, row: int) -> str | None:
        """Returns the name of an image; None if there is no such image."""
        found = self._where([row], ["name"])
        return found[0]["name"] if found else None

    def close(self) -> None:
        """Does nothing: there is no connection."""

    def _where(self, rows: Sequence[int], columns: list[str]) -> list[dict[str, Any]]:
        chosen = f"row IN ({', '.join(map(str, rows))})"
        query = self._opened().search().where(chosen).select(columns).limit(len(rows))
        return query.to_arrow().to_pylist()

    def _table(self) -> Any:
        """Returns the table; None if it does not exist."""
        try:
            return self._database.open_table(self._name)
        except ValueError:
            return None

    def _opened(self) -> Any:
        return self._database.open_table(self._name)
