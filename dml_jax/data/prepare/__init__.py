"""Makes data sets that `dml_jax.data.create` and TensorFlow Datasets read out of published files.

The images are stored as they are, encoded, each decoded once to see that it can be. Classes are
split as the retrieval protocols split them: none is in training and in testing. The data sets'
own classification splits are joined.
"""

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from dml_jax._utils import files
from dml_jax.data import records
from dml_jax.data.prepare import archives, layouts, writer
from dml_jax.data.prepare.archives import Address
from dml_jax.data.prepare.layouts import Contents, Picture
from dml_jax.data.sources import create

Counts = Mapping[str, tuple[int, int]]
"""By split, how many classes and images there must be."""

_LISTED = 200  # Lines of an error that may be one a class.


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set that can be prepared.

    Attributes:
        layout: lists what a directory holds.
        counts: what the published data set holds.
        origin: where people get it.
        addresses: its archives, where they can be downloaded without further ado.
    """

    layout: Callable[[Path], Contents]
    counts: Counts
    origin: str
    addresses: tuple[Address, ...] = ()


DATA_SETS = {
    "cars196": DataSet(
        layouts.cars196,
        {"train": (98, 8054), "test": (98, 8131)},
        "its published addresses (ai.stanford.edu) are gone and there is no other official one; "
        "copies are on Kaggle and on the Hugging Face Hub as 'Stanford Cars'",
    ),
    "cub200": DataSet(
        layouts.cub200,
        {"train": (100, 5864), "test": (100, 5924)},
        "CaltechDATA publishes CUB_200_2011.tgz (--download)",
        (
            Address(
                "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1",
                "CUB_200_2011.tgz",
                "0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
            ),
        ),
    ),
    "sop": DataSet(
        layouts.sop,
        {"train": (11318, 59551), "test": (11316, 60502)},
        "Stanford publishes Stanford_Online_Products.zip (--download)",
        (
            Address(
                "ftp://cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip",
                "Stanford_Online_Products.zip",
                "b04fa78210e69fab050ce73939550e1cd0f96890bdd98ec9fee732c3b756ef48",
            ),
        ),
    ),
    "inshop": DataSet(
        layouts.inshop,
        {"train": (3997, 25882), "test": (3985, 14218), "gallery": (3985, 12612)},
        "the authors of DeepFashion (MMLab, CUHK) give it to those who accept their terms, as "
        "'In-shop Clothes Retrieval Benchmark'; it has no public address",
    ),
    "omniglot": DataSet(
        layouts.omniglot,
        {"train": (136, 2720), "test": (106, 2120)},
        "its author publishes two archives of small sets on GitHub (--download)",
        tuple(
            Address(
                f"https://github.com/brendenlake/omniglot/raw/master/python/{name}", name, sha256
            )
            for name, sha256 in (
                (
                    "images_background_small1.zip",
                    "f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4",
                ),
                (
                    "images_background_small2.zip",
                    "3ccaa407515a8778e5d0861875af38b17e418f301ad5bb3b5a6b65d901a41c7f",
                ),
            )
        ),
    ),
    "folder": DataSet(layouts.folder, {}, "any images, in train/CLASS/* and test/CLASS/*"),
}
"""The data sets by name."""


def prepare(
    data_set: str,
    *,
    source: Path,
    out: Path,
    download: bool = False,
    allow_different_counts: bool = False,
    published: DataSet | None = None,
) -> records.Index:
    """Prepares a data set, unless `out` holds it already.

    Writes `out` atomically. What an interrupted call leaves beside `out` the next call removes.

    Args:
        data_set: one of `DATA_SETS`.
        source: the directory or the archive with the files; archives are downloaded to it.
        out: the directory to make.
        download: whether to download the archives first.
        allow_different_counts: whether to go on, and to leave images out that are missing or
            cannot be decoded, when the data set is not the published one. What differs is printed.
        published: what is known of the data set, if it is not what `DATA_SETS` has.

    Returns:
        What `out` holds.

    Raises:
        ValueError: unknown data set; `out` holds something else; nothing can be downloaded; or
            files, images, counts or archives are not as they should be.
        OSError: a file is missing, or the disk or the network fails.
    """
    if data_set not in DATA_SETS:
        raise ValueError(f"unknown data set {data_set!r}; there are {', '.join(DATA_SETS)}")
    published = published or DATA_SETS[data_set]
    if out.exists() and any(out.iterdir()):
        return _existing(data_set, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    unpacked = out.with_name(f".{out.name}.unpacked")
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        with (
            files.atomic_write(out) as part,
            Progress(console=Console(stderr=True)) as progress,
        ):
            if download:
                _download(data_set, published, source, progress)
            root = _opened(data_set, published, source, unpacked, progress)
            contents = layouts.read(published.layout, root)
            _check_classes(contents)
            wrong = differences(contents, published.counts)
            _report(data_set, wrong, allow_different_counts, progress)
            contents = contents._replace(
                pictures=[picture for picture in contents.pictures if picture.file.is_file()]
            )
            unreadable = writer.write(data_set, contents, part, progress)
            _report(data_set, unreadable, allow_different_counts, progress)
            create(data_set, root=part)
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    return records.read_index(out)


def differences(contents: Contents, counts: Counts) -> list[str]:
    """What is missing or too much in a data set, a line each: splits first, then classes.

    Args:
        contents: what there is.
        counts: how many classes and images there should be; empty if nobody knows.
    """
    present = [picture for picture in contents.pictures if picture.file.is_file()]
    of_splits, of_classes = [], []
    for split in dict.fromkeys([*counts, *(picture.split for picture in contents.pictures)]):
        listed = _images_by_class(contents.pictures, split)
        found = _images_by_class(present, split)
        classes, images = counts.get(split, (0, 0))
        differs = bool(counts) and (classes, images) != (len(found), found.total())
        if differs:
            of_splits.append(
                f"{split}: expected {images} images of {classes} classes, "
                f"found {found.total()} of {len(found)}"
            )
        if missing := listed - found:
            of_classes += [
                f"{split}, class {name}: {count} of {listed[name]} images are missing"
                for name, count in missing.items()
            ]
        elif differs:
            of_classes += [
                f"{split}, class {name}: {count} images" for name, count in found.items()
            ]
    return of_splits + of_classes


def _images_by_class(pictures: Iterable[Picture], split: str) -> Counter[str]:
    return Counter(picture.class_name for picture in pictures if picture.split == split)


def _existing(data_set: str, out: Path) -> records.Index:
    try:
        index = records.read_index(out)
    except FileNotFoundError:
        raise ValueError(f"{out} is not empty; name a new directory") from None
    if index.data_set != data_set:
        raise ValueError(f"{out} holds the data set {index.data_set!r}; name a new directory")
    create(data_set, root=out)  # Looks into its files.
    return index


def _download(data_set: str, published: DataSet, directory: Path, progress: Progress) -> None:
    if not published.addresses:
        raise ValueError(f"{data_set} cannot be downloaded: {published.origin}")
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"--download needs a directory to download to; {directory} is a file")
    for address in published.addresses:
        archives.download(address, directory, progress)


def _opened(
    data_set: str, published: DataSet, source: Path, unpacked: Path, progress: Progress
) -> Path:
    """The source itself, or where the archives that it is or holds are unpacked to."""
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist. {data_set}: {published.origin}")
    if archives.is_archive(source):
        found = [source]
    elif source.is_dir():
        expected = [source / address.file_name for address in published.addresses]
        found = expected if all(path.is_file() for path in expected) else []
    else:
        raise ValueError(
            f"{source} is neither a directory nor named *{', *'.join(archives.SUFFIXES)}"
        )
    for path in found:
        archives.unpack(path, unpacked, progress)
    return unpacked if found else source


def _check_classes(contents: Contents) -> None:
    classes = {
        is_train: {p.class_name for p in contents.pictures if (p.split == "train") == is_train}
        for is_train in (True, False)
    }
    if shared := sorted(classes[True] & classes[False]):
        raise ValueError(
            f"{len(shared)} classes are both in training and in testing, as in a classification "
            f"split: {_shortened(shared, ', ')}; retrieval is tested on classes never seen"
        )
    if not all(classes.values()):
        raise ValueError("there are no images for training, or none for testing")


def _report(data_set: str, problems: list[str], is_allowed: bool, progress: Progress) -> None:
    """Raises what is wrong, or prints it if that is allowed."""
    if not problems:
        return
    text = _shortened(problems, "\n")
    if not is_allowed:
        raise ValueError(
            f"{data_set} is not as it should be:\n{text}\n"
            "Mend it, or give --allow_different_counts to go on with what can be read"
        )
    progress.console.print(text, markup=False, highlight=False)


def _shortened(lines: list[str], separator: str) -> str:
    more = [f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    return separator.join(lines[:_LISTED] + more)
