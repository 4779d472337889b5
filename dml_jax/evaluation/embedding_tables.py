"""Embeddings as Parquet files, for other programs and for reading back."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from dml_jax._utils import extras
from dml_jax._utils.errors import UserError

SUFFIX = ".parquet"

_CLASS_NAMES = b"dml_jax.class_names"


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a table with the columns name, class, label and embedding.

    Args:
        path: the file.
        arrays: `embeddings` [n, d] float32, `labels` [n], `names` [n] and `class_names`.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
    """
    with extras.required_by("tables"):
        import pyarrow as pa
        import pyarrow.parquet as pq

    embeddings, class_names = arrays["embeddings"], arrays["class_names"].tolist()
    labels = pa.array(arrays["labels"])
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), embeddings.shape[1])
    columns = {
        "name": pa.array(arrays["names"].tolist(), pa.string()),
        "class": pa.array([class_names[label] for label in arrays["labels"]], pa.string()),
        "label": labels,
        "embedding": vectors,
    }
    # The names of classes without images, and the order of all.
    table = pa.table(columns).replace_schema_metadata({_CLASS_NAMES: json.dumps(class_names)})
    pq.write_table(table, path)


def read(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays that `write` was given.

    Raises:
        ValueError: it is no such file.
        ModuleNotFoundError: pyarrow is not installed.
    """
    with extras.required_by("tables"):
        import pyarrow as pa
        import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, partitioning=None).combine_chunks()
        class_names = json.loads((table.schema.metadata or {})[_CLASS_NAMES])
        vectors: Any = table["embedding"].combine_chunks()
        return {
            "embeddings": vectors.flatten().to_numpy().reshape(len(table), vectors.type.list_size),
            "labels": table["label"].to_numpy(),
            "names": np.asarray(table["name"].to_pylist(), dtype=str),
            "class_names": np.asarray(class_names, dtype=str),
        }
    except (pa.ArrowException, KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a Parquet file of embeddings as dml_jax writes it: {error!r}"
        ) from error
