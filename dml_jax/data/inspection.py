"""Inspection of a data set before a run: images that cannot be decoded, and exact duplicates.

Every image is decoded, because its header does not suffice: a truncated file has an intact header
and would end a run in the middle of an epoch. A run inspects its images once and saves the report.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from rich.console import Console

from dml_jax._utils import progress
from dml_jax._utils.errors import UserError
from dml_jax.data import images
from dml_jax.data.sources import Source, Sources, leave_out

POLICIES = ("fail", "skip")
"""Ways to treat images that cannot be read: refuse to run, or leave them out."""

_CHUNK = 1024  # Images submitted to the threads at a time.
_MAX_LISTED = 5
_KINDS = {
    "across_splits": "have a copy in another split, which inflates scores",
    "between_classes": "have a copy in another class, so one of the two labels is wrong",
    "within_class": "have a copy in their own class, which inflates scores if it is a test class",
}


class Copies(NamedTuple):
    """Images whose encoded bytes equal those of another image.

    Attributes:
        images: number of such images.
        example: where two of them are; empty if there are none.
    """

    images: int
    example: tuple[str, ...]


class InspectionReport(NamedTuple):
    """Result of the inspection of a data set; plain values, to be saved as JSON.

    Attributes:
        unreadable: by split, the names of images that cannot be read, each with the reason.
        copies: equal images by kind: "across_splits", or in one split "between_classes" or
            "within_class".
    """

    unreadable: Mapping[str, Mapping[str, str]]
    copies: Mapping[str, Copies]

    @classmethod
    def from_json(cls, value: Mapping[str, Mapping]) -> "InspectionReport":
        """Returns the report whose `_asdict` was saved as JSON."""
        copies = {k: Copies(count, tuple(pair)) for k, (count, pair) in value["copies"].items()}
        return cls(value["unreadable"], copies)

    def counts(self) -> dict[str, dict[str, int]]:
        """Returns the numbers of unreadable images by split, and of images with copies by kind."""
        return {
            "unreadable": {split: len(names) for split, names in self.unreadable.items()},
            "copies": {kind: copies.images for kind, copies in self.copies.items()},
        }


def inspect(sources: Mapping[str, Source]) -> InspectionReport:
    """Reads and decodes every image, in one thread per core, and shows the progress.

    Args:
        sources: images by split.

    Returns:
        The report. Two images are copies if all their encoded bytes are equal.
    """
    unreadable: dict[str, dict[str, str]] = {split: {} for split in sources}
    locations = defaultdict(list)
    with (
        progress.shown("check every image", sum(map(len, sources.values()))) as advance,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        for split, source in sources.items():
            for index, (digest, problem) in enumerate(_check_images(pool, source)):
                if problem:
                    unreadable[split][source.names[index]] = problem
                else:
                    locations[digest].append((split, index))
                advance(1)
    groups = [group for group in locations.values() if len(group) > 1]
    return InspectionReport(unreadable, {kind: _copies(sources, groups, kind) for kind in _KINDS})


def _check_images(pool: ThreadPoolExecutor, source: Source) -> Iterator[tuple[bytes, str]]:
    """Yields the digest of each image, and the reason if it cannot be read."""

    def check(index: int) -> tuple[bytes, str]:
        try:
            encoded = source[index]
            images.decode(encoded, source.where(index))
        except (OSError, ValueError) as error:
            return b"", str(error)
        return hashlib.sha256(encoded).digest(), ""

    for start in range(0, len(source), _CHUNK):
        yield from pool.map(check, range(start, min(start + _CHUNK, len(source))))


def _copies(
    sources: Mapping[str, Source], groups: list[list[tuple[str, int]]], kind: str
) -> Copies:
    """Returns the copies of one kind.

    Args:
        sources: images by split.
        groups: groups of equal images, each image as (split, index).
        kind: one of `_KINDS`.
    """
    groups = [group for group in groups if _kind(sources, group) == kind]
    if not groups:
        return Copies(0, ())
    # Sorted by split and class, so that the first and the last differ in them if any two do.
    ordered = sorted(groups[0], key=lambda image: (image[0], sources[image[0]].labels[image[1]]))
    example = [sources[split].where(index) for split, index in (ordered[0], ordered[-1])]
    return Copies(sum(map(len, groups)), tuple(example))


def _kind(sources: Mapping[str, Source], group: list[tuple[str, int]]) -> str:
    if len({split for split, _ in group}) > 1:
        return "across_splits"
    classes = {sources[split].labels[index] for split, index in group}
    return "between_classes" if len(classes) > 1 else "within_class"


def accept(sources: Mapping[str, Source], inspection: InspectionReport, policy: str) -> Sources:
    """Returns the images to run with: all that can be read.

    Args:
        sources: images by split.
        inspection: the report about them.
        policy: one of `POLICIES`.

    Raises:
        ValueError: an image cannot be read and the policy is "fail", or a split has no image left.
    """
    reasons = _reasons(inspection)
    if not reasons:
        return dict(sources)
    if policy == "fail":
        raise UserError(
            f"{len(reasons)} of {sum(map(len, sources.values()))} images cannot be read:\n"
            f"{_shorten(reasons)}\n"
            "Repair or remove them, or set config.data.unreadable to skip"
        )
    return leave_out(sources, inspection.unreadable)


def report(inspection: InspectionReport) -> None:
    """Prints warnings about images that are left out and about copies to the terminal."""
    console = Console(stderr=True)
    reasons = _reasons(inspection)
    warnings = [f"{len(reasons)} images cannot be read:\n{_shorten(reasons)}"] if reasons else []
    warnings += [
        f"{copies.images} images {_KINDS[kind]}, such as {' and '.join(copies.example)}"
        for kind, copies in inspection.copies.items()
        if copies.images
    ]
    for warning in warnings:
        console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)


def _reasons(inspection: InspectionReport) -> list[str]:
    return [reason for names in inspection.unreadable.values() for reason in names.values()]


def _shorten(lines: list[str]) -> str:
    more = [f"and {len(lines) - _MAX_LISTED} more"] if len(lines) > _MAX_LISTED else []
    return "\n".join(f"  {line}" for line in lines[:_MAX_LISTED] + more)
