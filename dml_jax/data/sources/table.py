"""Images listed in a table: a CSV or Parquet file, or a folder of Parquet files.

Columns have the names of Open Metric Learning: `label` and either `path`, relative to the folder of
the table, or `image`, which holds encoded images (bytes, or a struct with a field `bytes`, as in
the data sets of the Hugging Face hub). Optional are `split`, `is_query` and `is_gallery`, and a
bounding box in pixels, `x_1`, `y_1`, `x_2`, `y_2` (or `x1` and so on), to which images are cropped.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dml_jax._utils import extras
from dml_jax._utils.errors import UserError
from dml_jax.data.sources import parquet
from dml_jax.data.sources.rows import ALIASES, BOX, OPTIONAL, Rows, splits_of_files
from dml_jax.data.sources.source import Sources

_WANTED = ("label", "path", *OPTIONAL, *ALIASES)


def load(path: Path) -> Sources:
    """Returns the splits of a table: train, test and, if queries are searched in others, gallery.

    A table that is not split, or whose training and test images share classes, has one, `UNSPLIT`.

    Args:
        path: a .csv or .parquet file, or a folder that holds .parquet files, at any depth, or .csv
            files.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: pyarrow is not installed.
        ValueError: a column is missing or a row is wrong; the message has the file and the row.
    """
    listed = [path] if path.is_file() else parquet.below(path) or sorted(path.glob("*.csv"))
    if not listed or not {file.suffix for file in listed} <= {".csv", ".parquet"}:
        raise FileNotFoundError(f"{path} is no .csv or .parquet file, and no folder with one")
    return _rows(listed, path).sources(path)


@dataclasses.dataclass(frozen=True)
class _Table:
    """The columns of a file by name, the number of its rows, and its column of images, if any."""

    columns: dict[str, list[Any]]
    count: int
    image: str | None


def _rows(listed: Sequence[Path], path: Path) -> Rows:
    tables = [_read_csv(file) if file.suffix == ".csv" else _read_parquet(file) for file in listed]
    numbers = tuple((f, r) for f, table in enumerate(tables) for r in range(table.count))

    def column(name: str, missing: Any) -> list[Any]:
        values = []
        for table in tables:
            values += table.columns.get(name, [missing] * table.count)
        return values

    def where(row: int) -> str:
        return parquet.where(listed, numbers[row])

    images = tuple(table.image for table in tables if table.image is not None)
    if images and len(images) < len(tables):
        raise UserError(f"{path} has files with images and files with paths; separate them")
    common = os.path.commonpath([file.parent for file in listed])
    relative = [file.relative_to(common) for file in listed]
    if images:
        records: Sequence[bytes | str] = parquet.Images(tuple(listed), images, numbers)
        names = [f"{relative[f].as_posix()}:{r}" for f, r in numbers]
    else:
        names = column("path", None)
        for row, name in enumerate(names):
            if not isinstance(name, str) or not name:
                raise UserError(f"{where(row)}: there is no path")
        folders = [str(file.parent.absolute()) for file in listed]
        records = [
            os.path.join(folders[f], name) for (f, _), name in zip(numbers, names, strict=True)
        ]
    splits = splits_of_files([x if path.is_file() else x.relative_to(path) for x in listed])
    columns = {name: column(name, None) for name in BOX} | {
        name: column(name, True) for name in ("is_query", "is_gallery")
    }
    columns["split"] = [
        splits[f] if split is None else split
        for split, (f, _) in zip(column("split", None), numbers, strict=True)
    ]
    return Rows(column("label", None), records, names, columns, where)


def _read_csv(path: Path) -> _Table:
    with extras.required_by("tables"):
        import pyarrow
        import pyarrow.csv
    try:
        names = pyarrow.csv.open_csv(path).schema.names
        # As text, so that a label such as 007 stays as it is.
        texts = {name: pyarrow.string() for name in names if name in ("label", "path", "split")}
        options = pyarrow.csv.ConvertOptions(
            column_types=texts,
            strings_can_be_null=True,
            include_columns=[name for name in names if name in _WANTED],
        )
        read = pyarrow.csv.read_csv(path, convert_options=options)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise UserError(f"{path} cannot be read: {error}") from error
    columns = {name: read.column(name).to_pylist() for name in read.column_names}
    return _checked(path, columns, read.num_rows, None, names)


def _read_parquet(path: Path) -> _Table:
    read = parquet.read(path, _WANTED)
    return _checked(path, read.values, read.count, read.image, parquet.names_of(path))


def _checked(
    path: Path, columns: dict[str, list[Any]], count: int, image: str | None, names: Sequence[str]
) -> _Table:
    """Returns a table; raises ValueError if a column that it needs is not among `names`."""
    if "label" not in columns or not ("path" in columns or image):
        raise UserError(
            f"{path} has the columns {', '.join(names)}; it needs `label` and `path`, or `label` "
            "and `image`"
        )
    columns = {ALIASES.get(name, name): values for name, values in columns.items()}
    return _Table(columns, count, image)
