"""Reads copies of public data sets on the Hugging Face hub: Parquet files with encoded images."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dml_jax._utils.errors import UserError
from dml_jax.data.sources import parquet
from dml_jax.data.sources.rows import split_of_file


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """The encoded image in a row of a Parquet file."""

    path: Path
    column: str
    row: int

    def is_file(self) -> bool:
        """Returns whether the row has an image."""
        return parquet.column(self.path, self.column)[self.row].is_valid

    def read_bytes(self) -> bytes:
        """Returns the encoded image."""
        return parquet.column(self.path, self.column)[self.row].as_py()


class Row(NamedTuple):
    """A row of a copy.

    Attributes:
        split: that of its file; None if its name has none.
        name: its file and number.
        values: the values of the wanted columns.
        file: its image.
    """

    split: str | None
    name: str
    values: tuple[Any, ...]
    file: StoredImage


def read(source: Path, *wanted: str) -> tuple[list[Row], list[str]]:
    """Lists the rows of all Parquet files below a directory.

    Args:
        source: the directory.
        wanted: names of columns that all files have.

    Returns:
        The rows, and the names of the classes if the first column has numbered ones.

    Raises:
        ValueError: a file is damaged, has no images, lacks a column or numbers classes otherwise.
    """
    listed: list[Row] = []
    orders: list[list[str]] = []
    for path in parquet.below(source):
        columns = parquet.read(path, wanted)
        if columns.image is None or columns.values.keys() != set(wanted):
            raise UserError(
                f"{path} has the columns {', '.join(parquet.names_of(path))}; it needs "
                f"{' and '.join((*wanted, 'image'))}"
            )
        orders.append(columns.class_names.get(wanted[0], []))
        relative = path.relative_to(source)
        values = zip(*(columns.values[name] for name in wanted), strict=True)
        for row, found in enumerate(values):
            if None in found:
                raise UserError(f"{parquet.where([path], (0, row))}: a value is missing")
            file = StoredImage(path, columns.image, row)
            listed.append(Row(split_of_file(relative), f"{relative.as_posix()}:{row}", found, file))
    if any(order != orders[0] for order in orders):
        raise UserError(f"the Parquet files in {source} number their classes differently")
    return listed, orders[0]


def first_column(source: Path, *names: str) -> str:
    """Returns the first of some names that the Parquet files below a directory have as a column.

    Raises:
        ValueError: they have none of them.
    """
    path = parquet.below(source)[0]
    found = parquet.names_of(path)
    for name in names:
        if name in found:
            return name
    raise UserError(
        f"{path} has the columns {', '.join(found)}; it needs one of {', '.join(names)}"
    )


def in_order(classes: set[Any]) -> tuple[str, ...]:
    """Returns the names of classes in the order of their numbers, or of their names."""
    texts = set(map(str, classes))
    key: Callable[[str], Any] = int if all(text.isdecimal() for text in texts) else str
    return tuple(sorted(texts, key=key))
