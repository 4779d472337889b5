"""Splits from rows: a label for each image and, if there are any, the columns of `OPTIONAL`.

Tables and tar shards are read into rows. The names are those of Open Metric Learning.
"""

import dataclasses
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64
from PIL import Image

from dml_jax._utils.errors import UserError
from dml_jax.data.images import decode
from dml_jax.data.sources.source import UNSPLIT, Source, Sources, Subset

BOX = ("x_1", "y_1", "x_2", "y_2")
"""Left, top, right and bottom of a box in pixels, to which an image is cropped."""

ALIASES = {"x1": "x_1", "y1": "y_1", "x2": "x_2", "y2": "y_2"}
"""Other names of columns."""

OPTIONAL = ("split", "is_query", "is_gallery", *BOX)
"""Columns that rows may have besides their label."""

_TRAIN, _TEST = ("train", "training"), ("test", "validation", "valid", "val")
_LISTED = 5  # Classes in a message.


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a data set, without encoded images.

    Attributes:
        labels: the class of each image; None or blank where it is missing.
        records: the images, as those of a `Source`.
        names: name of each image.
        columns: values of columns of `OPTIONAL` by name, None where they are missing.
        where: returns the file and the place of a row, for messages.
    """

    labels: Sequence[Any]
    records: Sequence[bytes | str]
    names: Sequence[str]
    columns: Mapping[str, Sequence[Any]]
    where: Callable[[int], str]

    def sources(self, path: Path) -> Sources:
        """Returns the splits: train, test and, if queries are searched in others, gallery.

        There is one, `UNSPLIT`, if no row has a split, or if training and test images have classes
        in common, as in a classification split: retrieval is tested on classes not trained on.

        Args:
            path: where the rows are from, for messages.

        Raises:
            ValueError: a row is wrong, or a split has none.
        """
        if not len(self.labels):
            raise UserError(f"{path} has no rows")
        labels = self._checked_labels()
        self._check_names()
        boxes = _boxes([self._column(name) for name in BOX], self.where)
        splits = self._column("split")
        if all(split is None for split in splits):
            return {UNSPLIT: self._source(labels, np.arange(len(labels)), boxes)}
        is_train = np.array([_is_train(x, self.where(row)) for row, x in enumerate(splits)], bool)
        if not is_train.any() or is_train.all():
            missing = "test" if is_train.all() else "train"
            raise UserError(f"{path} has no rows of the split {missing!r}; see its column `split`")
        chosen = {"train": np.flatnonzero(is_train), **self._queries_and_gallery(is_train, path)}
        shared = sorted(set(labels[is_train]) & set(labels[~is_train]))
        if shared and "gallery" in chosen:
            raise UserError(
                f"{path}: {len(shared)} classes are both in training and in testing: "
                f"{', '.join(shared[:_LISTED])}{', ...' if len(shared) > _LISTED else ''}; queries "
                "and gallery need classes of their own"
            )
        if shared:
            return {UNSPLIT: self._source(labels, np.arange(len(labels)), boxes)}
        classes = {split: labels[is_train if split == "train" else ~is_train] for split in chosen}
        return {
            split: self._source(labels, numbers, boxes, classes[split])
            for split, numbers in chosen.items()
        }

    def _column(self, name: str) -> Sequence[Any]:
        return self.columns.get(name, [None] * len(self.labels))

    def _checked_labels(self) -> np.ndarray:
        for row, label in enumerate(self.labels):
            if label is None or not str(label).strip():
                raise UserError(f"{self.where(row)}: there is no label")
        return np.array([str(label) for label in self.labels])

    def _check_names(self) -> None:
        first: dict[str, int] = {}
        for row, name in enumerate(self.names):
            if first.setdefault(name, row) != row:
                raise UserError(
                    f"{self.where(row)}: {name} is listed twice, first in {self.where(first[name])}"
                )

    def _queries_and_gallery(
        self, is_train: Bool[np.ndarray, " n"], path: Path
    ) -> dict[str, Int64[np.ndarray, " m"]]:
        """Returns the rows of the test images, or of the queries and of the gallery, by split."""
        held_out = np.flatnonzero(~is_train)
        queries, gallery = (
            self._truth(name, is_train)[held_out] for name in ("is_query", "is_gallery")
        )
        if (queries & gallery).all():
            return {"test": held_out}
        odd = held_out[queries == gallery]
        if len(odd):
            raise UserError(
                f"{self.where(int(odd[0]))}: is_query and is_gallery are equal; in the test split "
                "both must be true in all rows, or one of them in each"
            )
        for name, chosen in (("is_query", queries), ("is_gallery", gallery)):
            if not chosen.any():
                raise UserError(f"{path} has no test rows in which {name} is true")
        return {"test": held_out[queries], "gallery": held_out[gallery]}

    def _truth(self, name: str, is_train: Bool[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Returns a column of truth, true if it is missing; training images do not count."""
        known = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
        truth = np.ones(len(is_train), bool)
        for row, value in enumerate(self.columns.get(name, ())):
            if is_train[row]:
                continue
            text = str(value).lower()
            if text not in known:
                raise UserError(f"{self.where(row)}: {name} is {value!r}; it must be true or false")
            truth[row] = known[text]
        return truth

    def _source(
        self,
        labels: np.ndarray,
        rows: Int64[np.ndarray, " m"],
        boxes: Int64[np.ndarray, "n 4"] | None,
        of_split: np.ndarray | None = None,
    ) -> Source:
        """Returns the chosen rows; its classes are those of `of_split`, by default of all rows."""
        classes, numbers = np.unique(labels if of_split is None else of_split), labels[rows]
        names = tuple(self.names[row] for row in rows)
        records: Sequence[bytes | str] = Subset(self.records, rows)
        if boxes is not None:
            records = _Cropped(records, boxes[rows], names)
        return Source(
            records=records,
            labels=np.searchsorted(classes, numbers).astype(np.int32),
            class_names=tuple(map(str, classes)),
            names=names,
        )


def splits_of_files(listed: Sequence[Path]) -> list[str | None]:
    """Returns the split of each file, see `split_of_file`; None for all if there is only one.

    Many data sets that are not split are in files named like training images.
    """
    splits = [split_of_file(file) for file in listed]
    are_split = len({split in _TRAIN for split in splits if split is not None}) > 1
    return splits if are_split else [None] * len(splits)


def split_of_file(file: Path) -> str | None:
    """Returns the split that a file belongs to by its name or its folder; None if by neither.

    Args:
        file: its path relative to the data set, such as train-00000-of-00002.parquet or
            test/0000.parquet.
    """
    known = (*_TRAIN, *_TEST)
    beginning = file.name.lower().replace("-", ".").replace("_", ".").partition(".")[0]
    return next((part for part in (beginning, *map(str.lower, file.parts)) if part in known), None)


def is_split_name(name: str) -> bool:
    """Returns whether a name is that of a split."""
    return name.lower() in (*_TRAIN, *_TEST)


def _is_train(split: Any, where: str) -> bool:
    if not is_split_name(str(split)):
        raise UserError(
            f"{where}: the split is {split!r}; in the column `split`, or as the folder or the "
            f"start of the name of a file, it must be one of {', '.join(_TRAIN + _TEST)}"
        )
    return str(split).lower() in _TRAIN


def _boxes(
    sides: Sequence[Sequence[Any]], where: Callable[[int], str]
) -> Int64[np.ndarray, "n 4"] | None:
    """Returns left, top, right and bottom of each box, -1 for no box; None if there are none."""
    boxes = np.full((len(sides[0]), 4), -1, np.int64)
    for row, box in enumerate(zip(*sides, strict=True)):
        if all(map(_is_missing, box)):
            continue
        if any(map(_is_missing, box)):
            raise UserError(f"{where(row)}: the box {box} lacks a side")
        try:
            left, top, right, bottom = (round(float(side)) for side in box)
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{where(row)}: the box {box} is not one of numbers") from None
        if not (0 <= left < right and 0 <= top < bottom):
            raise UserError(f"{where(row)}: the box {box} is empty or outside of the image")
        boxes[row] = left, top, right, bottom
    return boxes if (boxes >= 0).any() else None


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


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
