"""Converts published data sets to the format that `dml_jax.data.create` and TFDS read.

The encoded images are stored unchanged; each is decoded once to check it. The splits are those of
the retrieval protocols, with disjoint classes for training and testing. The classification splits
of the data sets are merged first.
"""

import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from dml_jax._utils import files
from dml_jax._utils.errors import UserError
from dml_jax.data import records
from dml_jax.data.prepare import archives, layouts, writer
from dml_jax.data.prepare.catalogue import DATA_SETS, Counts, DataSet
from dml_jax.data.prepare.layouts import Contents, ImageEntry
from dml_jax.data.sources import create

_MAX_LISTED = 200  # Lines of an error message that may have one per class.


def prepare(
    data_set: str,
    *,
    source: Path,
    out: Path,
    download: bool = False,
    allow_different_counts: bool = False,
    published: DataSet | None = None,
) -> records.Manifest:
    """Prepares a data set, unless `out` holds it already.

    `out` is written atomically. The next call removes what an interrupted one leaves beside it.

    Args:
        data_set: a key of `DATA_SETS`.
        source: the directory or the archive with the files; archives are downloaded to it.
        out: the directory to create.
        download: whether to download the archives first.
        allow_different_counts: whether to accept a data set that differs from the published one,
            without the images that are missing or cannot be decoded. Differences are printed.
        published: the expected data set, if it is not the entry of `DATA_SETS`.

    Returns:
        The manifest of `out`.

    Raises:
        ValueError: the data set is unknown or cannot be downloaded, `out` holds something else, or
            files, images, counts or archives are not as expected.
        OSError: a file is missing, or the disk or the network fails.
    """
    if data_set not in DATA_SETS:
        raise UserError(f"unknown data set {data_set!r}; there are {', '.join(DATA_SETS)}")
    published = published or DATA_SETS[data_set]
    if out.exists() and any(out.iterdir()):
        return _check_existing(data_set, out)
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
            root = _unpack(data_set, published, source, unpacked, progress)
            contents = layouts.read(published.layout, root)
            _check_classes(contents)
            problems = differences(contents, published.counts)
            _report(data_set, problems, allow_different_counts, progress)
            contents = contents._replace(
                entries=[entry for entry in contents.entries if entry.file.is_file()]
            )
            unreadable = writer.write(data_set, contents, part, progress)
            _report(data_set, unreadable, allow_different_counts, progress)
            create(data_set, root=part)
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    return records.read_manifest(out)


def differences(contents: Contents, counts: Counts) -> list[str]:
    """Returns missing and unexpected images, one line per split and then per class.

    Args:
        contents: the listed data set.
        counts: expected numbers of classes and images by split; empty if unknown.
    """
    present = [entry for entry in contents.entries if entry.file.is_file()]
    split_lines, class_lines = [], []
    for split in dict.fromkeys([*counts, *(entry.split for entry in contents.entries)]):
        listed = _images_by_class(contents.entries, split)
        found = _images_by_class(present, split)
        classes, images = counts.get(split, (0, 0))
        differs = bool(counts) and (classes, images) != (len(found), found.total())
        if differs:
            split_lines.append(
                f"{split}: expected {images} images of {classes} classes, "
                f"found {found.total()} of {len(found)}"
            )
        if missing := listed - found:
            class_lines += [
                f"{split}, class {name}: {count} of {listed[name]} images are missing"
                for name, count in missing.items()
            ]
        elif differs:
            class_lines += [
                f"{split}, class {name}: {count} images" for name, count in found.items()
            ]
    return split_lines + class_lines


def _images_by_class(entries: Iterable[ImageEntry], split: str) -> Counter[str]:
    return Counter(entry.class_name for entry in entries if entry.split == split)


def _check_existing(data_set: str, out: Path) -> records.Manifest:
    """Returns the manifest of `out` if it holds the data set; raises ValueError otherwise."""
    try:
        manifest = records.read_manifest(out)
    except FileNotFoundError:
        raise UserError(f"{out} is not empty; name a new directory") from None
    if manifest.data_set != data_set:
        raise UserError(f"{out} holds the data set {manifest.data_set!r}; name a new directory")
    create(data_set, root=out)  # Raises if a file is damaged.
    return manifest


def _download(data_set: str, published: DataSet, directory: Path, progress: Progress) -> None:
    if not published.addresses:
        raise UserError(f"{data_set} cannot be downloaded: {published.origin}")
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--download needs a directory to download to; {directory} is a file")
    for address in published.addresses:
        archives.download(address, directory, progress)


def _unpack(
    data_set: str, published: DataSet, source: Path, unpacked: Path, progress: Progress
) -> Path:
    """Unpacks the source if it is an archive or holds archives; returns the directory of files."""
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist. {data_set}: {published.origin}")
    if archives.is_archive(source):
        found = [source]
    elif source.is_dir():
        expected = [source / address.file_name for address in published.addresses]
        found = expected if all(path.is_file() for path in expected) else []
    else:
        raise UserError(
            f"{source} is neither a directory nor named *{', *'.join(archives.SUFFIXES)}"
        )
    for path in found:
        archives.unpack(path, unpacked, progress)
    return unpacked if found else source


def _check_classes(contents: Contents) -> None:
    classes = {
        is_train: {x.class_name for x in contents.entries if (x.split == "train") == is_train}
        for is_train in (True, False)
    }
    if shared := sorted(classes[True] & classes[False]):
        raise UserError(
            f"{len(shared)} classes are both in training and in testing, as in a classification "
            f"split: {_shorten(shared, ', ')}; retrieval is tested on classes not trained on"
        )
    if not all(classes.values()):
        raise UserError("there are no images for training, or none for testing")


def _report(data_set: str, problems: list[str], is_allowed: bool, progress: Progress) -> None:
    """Raises ValueError with the problems, or prints them if they are allowed."""
    if not problems:
        return
    text = _shorten(problems, "\n")
    if not is_allowed:
        raise UserError(
            f"{data_set} differs from the published data set:\n{text}\n"
            "Correct it, or set --allow_different_counts to use the images that can be read"
        )
    progress.console.print(text, markup=False, highlight=False)


def _shorten(lines: list[str], separator: str) -> str:
    more = [f"and {len(lines) - _MAX_LISTED} more"] if len(lines) > _MAX_LISTED else []
    return separator.join(lines[:_MAX_LISTED] + more)
