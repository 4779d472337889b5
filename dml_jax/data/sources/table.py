"""Images listed in a table: a CSV or Parquet file, or a folder of Parquet files.

Columns have the names of Open Metric Learning: `label` and either `path`, relative to the folder of
the table, or `image`, which holds encoded images (bytes, or a struct with a field `bytes`, as in
the data sets of the Hugging Face hub). Optional are `split`, `is_query` and `is_gallery`, and a
bounding box in pixels, `x_1`, `y_1`, `x_2`, `y_2` (or `x1` and so on), to which images are cropped.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64
from PIL import Image

from dml_jax._utils import extras, files, locks
from dml_jax._utils.errors import UserError
from dml_jax.data.images import decode
from dml_jax.data.sources.source import UNSPLIT, Source, Sources

_TRAIN, _TEST = ("train", "training"), ("test", "validation", "valid", "val")
_BOX = ("x_1", "y_1", "x_2", "y_2")
_OF_FILE = re.compile(r"(?P<split>[a-z]+)[-_.].*")  # As in train-00000-of-00002.parquet.
_ROWS = 256  # Rows that are read at once when images are copied.


def load(path: Path) -> Sources:
    """Returns the splits of a table: train, test and, if queries are searched in others, gallery.

    A table in which no row has a split has one, `UNSPLIT`.

    Args:
        path: a .csv or .parquet file, or a folder that holds .parquet files, directly or in its
            folder `data`, or .csv files.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: pyarrow is not installed.
        ValueError: a column is missing or a row is wrong; the message has the file and the row.
    """
    rows = _Rows.read(_files(path))
    if rows.is_train is None:
        return {UNSPLIT: rows.source(np.arange(len(rows.labels)), sorted(set(rows.labels)))}
    numbers = {"train": np.flatnonzero(rows.is_train)}
    held_out = np.flatnonzero(~rows.is_train)
    queries, gallery = rows.is_query[held_out], rows.is_gallery[held_out]
    if (queries & gallery).all():
        numbers["test"] = held_out
    else:
        odd = held_out[queries == gallery]
        if len(odd):
            raise UserError(
                f"{rows.where(int(odd[0]))}: is_query and is_gallery are equal; in the test split "
                "both must be true in all rows, or one of them in each"
            )
        numbers |= {"test": held_out[queries], "gallery": held_out[gallery]}
    for split, chosen in numbers.items():
        if not len(chosen):
            raise UserError(f"{path} has no rows of the split {split!r}; see its column `split`")
    train_classes = sorted(set(rows.labels[numbers["train"]]))
    test_classes = sorted(set(rows.labels[held_out]))
    return {
        split: rows.source(chosen, train_classes if split == "train" else test_classes)
        for split, chosen in numbers.items()
    }


def _files(path: Path) -> list[Path]:
    found = [path] if path.is_file() else []
    for pattern in ("*.parquet", "data/*.parquet", "*.csv"):
        found = found or sorted(path.glob(pattern))
    if not found or not {file.suffix for file in found} <= {".csv", ".parquet"}:
        raise FileNotFoundError(f"{path} is no .csv or .parquet file, and no folder with one")
    return found


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows of a table, without encoded images."""

    files: Sequence[Path]
    numbers: Sequence[tuple[int, int]]  # Of the file and of the row in it, by row.
    labels: np.ndarray
    records: Sequence[bytes | str]
    names: tuple[str, ...]
    is_train: Bool[np.ndarray, " n"] | None  # None if no row has a split.
    is_query: Bool[np.ndarray, " n"]
    is_gallery: Bool[np.ndarray, " n"]
    boxes: Int64[np.ndarray, "n 4"] | None

    @classmethod
    def read(cls, listed: Sequence[Path]) -> "_Rows":
        """Reads the columns of tables."""
        tables = [_read(path) for path in listed]
        for path, (columns, _) in zip(listed, tables, strict=True):
            if "label" not in columns or not {"path", "image"} & columns.keys():
                raise UserError(
                    f"{path} has the columns {', '.join(columns)}; it needs `label` and `path`, or "
                    "`label` and `image`"
                )
        numbers = [(f, r) for f, (_, count) in enumerate(tables) for r in range(count)]

        def column(name: str, missing: Any) -> list[Any]:
            values = []
            for columns, count in tables:
                values += columns.get(name, [missing] * count)
            return values

        def where(row: int) -> str:
            return _where(listed, numbers[row])

        labels = [str(value) for value in column("label", None)]
        for row, (value, label) in enumerate(zip(column("label", None), labels, strict=True)):
            if value is None or not label.strip():
                raise UserError(f"{where(row)}: there is no label")
        if "path" in tables[0][0]:
            names = column("path", None)
            for row, name in enumerate(names):
                if not isinstance(name, str) or not name:
                    raise UserError(f"{where(row)}: there is no path")
            folders = [str(listed[f].parent.absolute()) for f, _ in numbers]
            records: Sequence[bytes | str] = [
                os.path.join(folder, name) for folder, name in zip(folders, names, strict=True)
            ]
        else:
            records = _Images(tuple(listed), tuple(numbers))
            names = [f"{listed[f].name}:{r}" for f, r in numbers]
        first: dict[str, int] = {}
        for row, name in enumerate(names):
            if first.setdefault(name, row) != row:
                raise UserError(
                    f"{where(row)}: {name} is listed twice, first in {where(first[name])}"
                )
        splits = [
            _of_file(listed[f]) if split is None else split
            for split, (f, _) in zip(column("split", None), numbers, strict=True)
        ]
        is_split = any(split is not None for split in splits)
        is_train = np.array([is_split and _is_train(x, where(r)) for r, x in enumerate(splits)])
        is_no_test = is_train if is_split else np.ones(len(splits), bool)
        return cls(
            files=listed,
            numbers=numbers,
            labels=np.array(labels),
            records=records,
            names=tuple(names),
            is_train=is_train if is_split else None,
            is_query=_truth(column("is_query", True), is_no_test, "is_query", where),
            is_gallery=_truth(column("is_gallery", True), is_no_test, "is_gallery", where),
            boxes=_boxes(column, where),
        )

    def where(self, row: int) -> str:
        """Returns the file and the number of a row, for messages."""
        return _where(self.files, self.numbers[row])

    def source(self, chosen: Int64[np.ndarray, " m"], classes: Sequence[str]) -> Source:
        """Returns the chosen rows as images of classes."""
        records: Sequence[bytes | str] = _Chosen(self.records, chosen)
        names = tuple(self.names[row] for row in chosen)
        if self.boxes is not None:
            records = _Cropped(records, self.boxes[chosen], names)
        return Source(
            records=records,
            labels=np.searchsorted(classes, self.labels[chosen]).astype(np.int32),
            class_names=tuple(map(str, classes)),
            names=names,
        )


def _where(listed: Sequence[Path], number: tuple[int, int]) -> str:
    """Returns a file and a row in it, counted from 1 without the header."""
    return f"{listed[number[0]]}, row {number[1] + 1}"


def _read(path: Path) -> tuple[dict[str, list[Any]], int]:
    """Returns the columns of a table by name, that of images as an empty list, and its length."""
    with extras.required_by("tables"):
        import pyarrow
        import pyarrow.csv
        import pyarrow.parquet
    try:
        if path.suffix == ".csv":
            # As text, so that a label such as 007 stays as it is.
            texts = {
                name: pyarrow.string()
                for name in pyarrow.csv.open_csv(path).schema.names
                if name in ("label", "path", "split")
            }
            options = pyarrow.csv.ConvertOptions(column_types=texts, strings_can_be_null=True)
            table = pyarrow.csv.read_csv(path, convert_options=options)
            names = None
        else:
            schema = pyarrow.parquet.read_schema(path)
            wanted = [name for name in schema.names if name != "image"]
            table = pyarrow.parquet.read_table(path, columns=wanted)
            names = _class_names(schema)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise UserError(f"{path} cannot be read: {error}") from error
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    columns = {re.sub(r"^([xy])([12])$", r"\1_\2", name): x for name, x in columns.items()}
    if path.suffix == ".parquet" and "image" in schema.names:
        columns["image"] = []
    if names is not None and "label" in columns:
        columns["label"] = [x if x is None else names[x] for x in columns["label"]]
    return columns, table.num_rows


def _class_names(schema: Any) -> list[str] | None:
    """Returns the names of numbered classes, which the hub's data sets keep beside the columns."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return list(features["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def _of_file(file: Path) -> str | None:
    """Returns the split with which the name of a file begins; None if it begins with none."""
    found = _OF_FILE.fullmatch(file.name.lower())
    return found["split"] if found and found["split"] in _TRAIN + _TEST else None


def _is_train(split: Any, where: str) -> bool:
    if str(split).lower() not in _TRAIN + _TEST:
        raise UserError(
            f"{where}: the split is {split!r}; in the column `split`, or at the start of the name "
            f"of a Parquet file, it must be one of {', '.join(_TRAIN + _TEST)}"
        )
    return str(split).lower() in _TRAIN


def _truth(
    values: Sequence[Any], is_train: Bool[np.ndarray, " n"], name: str, where: Any
) -> Bool[np.ndarray, " n"]:
    """Returns the values of a column of truth; those of training images do not count."""
    known = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
    truth = np.zeros(len(values), bool)
    for row, value in enumerate(values):
        if is_train[row]:
            continue
        text = str(value).lower()
        if text not in known:
            raise UserError(f"{where(row)}: {name} is {value!r}; it must be true or false")
        truth[row] = known[text]
    return truth


def _boxes(column: Any, where: Any) -> Int64[np.ndarray, "n 4"] | None:
    """Returns left, top, right and bottom of each box, -1 for no box; None if there are none."""
    sides = [column(name, None) for name in _BOX]
    boxes = np.full((len(sides[0]), 4), -1, np.int64)
    for row, box in enumerate(zip(*sides, strict=True)):
        if all(side is None for side in box):
            continue
        if any(side is None for side in box):
            raise UserError(f"{where(row)}: the box {box} lacks a side")
        left, top, right, bottom = (round(float(side)) for side in box)
        if not (0 <= left < right and 0 <= top < bottom):
            raise UserError(f"{where(row)}: the box {box} is empty or outside of the image")
        boxes[row] = left, top, right, bottom
    return boxes if (boxes >= 0).any() else None


@dataclasses.dataclass(frozen=True)
class _Chosen(Sequence[bytes | str]):
    """Some of the records."""

    records: Sequence[bytes | str]
    rows: Int64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> bytes | str:  # type: ignore[override]  # No slices.
        return self.records[int(self.rows[index])]


@dataclasses.dataclass(frozen=True)
class _Cropped(Sequence[bytes | str]):
    """Images cropped to boxes, encoded without loss."""

    records: Sequence[bytes | str]
    boxes: Int64[np.ndarray, "n 4"]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> bytes | str:  # type: ignore[override]  # No slices.
        record, (left, top, right, bottom) = self.records[index], self.boxes[index].tolist()
        if left < 0:
            return record
        data = record if isinstance(record, bytes) else Path(record).read_bytes()
        pixels = decode(data, self.names[index])
        height, width = pixels.shape[:2]
        if right > width or bottom > height:
            raise UserError(
                f"{self.names[index]}: the box ({left}, {top}, {right}, {bottom}) exceeds the "
                f"image of {width}x{height} pixels"
            )
        encoded = io.BytesIO()
        # PPM: encoding takes no time, and the image is decoded again soon.
        Image.fromarray(pixels[top:bottom, left:right]).save(encoded, "PPM")
        return encoded.getvalue()


@dataclasses.dataclass(frozen=True)
class _Images(Sequence[bytes | str]):
    """The images in Parquet files, read from copies that allow random access."""

    files: tuple[Path, ...]
    numbers: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> bytes | str:  # type: ignore[override]  # No slices.
        file, row = self.numbers[index]
        image = _column(self.files[file])[row].as_py()
        if image is None:
            raise UserError(f"{_where(self.files, (file, row))}: there is no image")
        return image


@functools.cache
def _column(path: Path) -> Any:
    """Returns the images of a Parquet file as a column in mapped memory.

    A row of a Parquet file cannot be read without all of its group, which may be gigabytes. So the
    images are copied to an Arrow file in the cache folder once.
    """
    import pyarrow
    import pyarrow.parquet

    state = path.stat()
    identity = f"{path.absolute()} {state.st_size} {state.st_mtime_ns}"
    name = hashlib.sha256(identity.encode()).hexdigest()[:32]
    copy = files.cache_folder() / "parquet" / f"{name}.arrow"
    with locks.exclusive(copy.with_suffix(".lock")):
        if not copy.exists():
            _copy_images(path, copy)
    mapped = pyarrow.ipc.open_file(pyarrow.memory_map(str(copy)))
    return mapped.read_all().column("image")


def _copy_images(path: Path, copy: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([("image", pyarrow.large_binary())])
    with (
        files.atomic_write(copy) as part,
        pyarrow.OSFile(str(part), "wb") as sink,
        pyarrow.ipc.new_file(sink, schema) as writer,
    ):
        parquet = pyarrow.parquet.ParquetFile(path)
        for batch in parquet.iter_batches(_ROWS, columns=["image"]):
            images = batch.column(0)
            if pyarrow.types.is_struct(images.type):
                images = images.field("bytes")
            encoded = images.cast(pyarrow.large_binary())
            writer.write_batch(pyarrow.record_batch([encoded], schema=schema))
