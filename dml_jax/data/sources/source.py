"""Random access to the encoded images of a split, and the operations that choose among them."""

import dataclasses
import itertools
import os
import stat
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int32, Int64

from dml_jax._utils.errors import UserError
from dml_jax.data.images import LazyImage


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """The encoded images of one split with their labels, cheap to pickle.

    Attributes:
        records: the bytes of each image, or the path of its file, which is read on access.
        labels: the class of each image, 0 .. C - 1.
        class_names: names of the C classes.
        names: unique name of each image, for messages.
        cache: the images that were accessed, if they are to stay decoded in memory; else None.
    """

    records: Sequence[bytes | str]
    labels: Int32[np.ndarray, " n"]
    class_names: tuple[str, ...]
    names: tuple[str, ...]
    cache: dict[int, LazyImage] | None = None

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.records)

    def __getitem__(self, index: int) -> bytes:
        """Returns the encoded image at `index`.

        Raises:
            OSError: its file cannot be read or is not a regular file; the message has its path.
            ValueError: the prepared data set that holds it is damaged.
        """
        record = self.records[index]
        if isinstance(record, bytes):
            return record
        if not stat.S_ISREG(os.stat(record).st_mode):  # Reading a pipe or a device may not end.
            raise OSError(f"{record} is not a regular file")
        with open(record, "rb") as file:
            return file.read()

    def image(self, index: int) -> LazyImage:
        """Returns the image at `index`, to be decoded on demand, or from the cache.

        Raises:
            OSError: its file cannot be read; the message has its path.
            ValueError: it cannot be decoded; the message has its path, or its name.
        """
        if self.cache is None:
            return LazyImage(self[index], self.where(index))
        if index not in self.cache:
            self.cache[index] = LazyImage(self[index], self.where(index))
        return self.cache[index]

    def size(self, index: int) -> int:
        """Returns the size of the encoded image at `index` in bytes.

        Raises:
            OSError: its file cannot be read.
        """
        record = self.records[index]
        return len(record) if isinstance(record, bytes) else os.stat(record).st_size

    def where(self, index: int) -> str:
        """Returns the path of an image, or its name if it has no file of its own."""
        record = self.records[index]
        return record if isinstance(record, str) else self.names[index]


Sources = dict[str, Source]
"""Splits by name."""

UNSPLIT = "all"
"""Name of the only split of images that are not divided into training and test classes."""


def from_classes(classes: Mapping[str, Sequence[tuple[str, bytes | str]]]) -> Source:
    """Returns a source of (name, record) pairs by class; classes are numbered in their order."""
    pairs = [pair for members in classes.values() for pair in members]
    labels = np.repeat(np.arange(len(classes)), [len(members) for members in classes.values()])
    return Source(
        records=tuple(record for _, record in pairs),
        labels=labels.astype(np.int32),
        class_names=tuple(classes),
        names=tuple(name for name, _ in pairs),
    )


def split_classes(
    source: Source, fraction: float, seed: int, *, fold: int = 0
) -> tuple[Source, Source]:
    """Holds out some classes with all their images, for example for validation.

    Args:
        source: images of at least two classes.
        fraction: share of the classes to hold out, above 0 and below 1; at least one class is held
            out and at least one remains.
        seed: seed of the random choice of classes, non-negative.
        fold: number of the share to hold out. The shares of one seed are disjoint.

    Returns:
        The remaining and the held-out images, each in the order of the source and with labels
        numbered from 0.

    Raises:
        ValueError: there is only one class, `fraction` or `seed` is out of range, or there are too
            few classes for the fold.
    """
    count = len(source.class_names)
    if count < 2:
        raise UserError(f"{count} class cannot be split; there must be at least two")
    if not 0 < fraction < 1:
        raise UserError(f"fraction is {fraction}; it must be above 0 and below 1")
    first, end = round(fold * fraction * count), round((fold + 1) * fraction * count)
    if fold == 0:
        end = min(max(end, 1), count - 1)
    if not first < end <= count or (fold and fraction * count < 1):
        raise UserError(
            f"{count} classes are too few for a fold {fold} of {fraction:g} of them; hold out more"
        )
    held_out = np.zeros(count, bool)
    order = np.random.default_rng(seed).permutation(count)
    held_out[order[first:end]] = True
    return _select_classes(source, ~held_out), _select_classes(source, held_out)


def merge(sources: Sequence[Source]) -> Source:
    """Returns the images of several sources, ordered by name and without classes.

    The result does not depend on how a set of images is distributed over the sources.

    Args:
        sources: images whose names differ.
    """
    order = sorted((name, s, i) for s, x in enumerate(sources) for i, name in enumerate(x.names))
    return Source(
        records=_Merged(sources, [(s, i) for _, s, i in order]),
        labels=np.zeros(len(order), np.int32),
        class_names=("",),
        names=tuple(name for name, _, _ in order),
    )


def leave_out(sources: Mapping[str, Source], names: Mapping[str, Collection[str]]) -> Sources:
    """Removes images from splits, and classes that have no image left.

    Args:
        sources: images by split. All splits but "train" share one numbering of classes, and still
            do so in the result.
        names: names of the images to remove, by split.

    Returns:
        The splits by name, in the same order.

    Raises:
        ValueError: a split has no image left.
    """
    kept = {
        split: np.flatnonzero([name not in names.get(split, ()) for name in source.names])
        for split, source in sources.items()
    }
    for split, indices in kept.items():
        if not len(indices):
            raise UserError(f"none of the {len(sources[split])} images of {split!r} can be read")

    def remaining_classes(split: str) -> Bool[np.ndarray, " c"]:
        same_numbering = [other for other in sources if (other == "train") == (split == "train")]
        labels = np.concatenate([sources[other].labels[kept[other]] for other in same_numbering])
        return np.bincount(labels, minlength=len(sources[split].class_names)) > 0

    return {
        split: _select(source, kept[split], remaining_classes(split))
        for split, source in sources.items()
    }


def _select_classes(source: Source, selected: Bool[np.ndarray, " c"]) -> Source:
    """Returns the images of the selected classes."""
    return _select(source, np.flatnonzero(selected[source.labels]), selected)


def _select(
    source: Source, indices: Int64[np.ndarray, " n"], classes: Bool[np.ndarray, " c"]
) -> Source:
    """Returns the images at `indices`, all of them of `classes`, which are numbered from 0."""
    return Source(
        records=Subset(source.records, indices),
        labels=(np.cumsum(classes) - 1).astype(np.int32)[source.labels[indices]],
        class_names=tuple(itertools.compress(source.class_names, classes)),
        names=tuple(source.names[index] for index in indices),
    )


class Subset(Sequence[bytes | str]):
    """A subset of a sequence of records, read on access."""

    def __init__(self, records: Sequence[bytes | str], indices: Int64[np.ndarray, " n"]):
        """Chooses the records at `indices`, in their order."""
        self._records, self._indices = records, indices

    def __len__(self) -> int:
        """Returns the number of chosen records."""
        return len(self._indices)

    def __getitem__(self, index: int) -> bytes | str:  # type: ignore[override]  # No slices.
        """Returns a chosen record."""
        return self._records[int(self._indices[index])]


class _Merged(Sequence[bytes | str]):
    """Records of several sources, read on access."""

    def __init__(self, sources: Sequence[Source], places: Sequence[tuple[int, int]]):
        self._records, self._places = [source.records for source in sources], places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> bytes | str:  # type: ignore[override]  # No slices.
        source, position = self._places[index]
        return self._records[source][position]
