"""Every image is read and decoded before a run: which cannot be, and which are there twice.

A header alone says little: a file that was cut short has a whole one, and would end a run in the
middle of an epoch. A run does this once, and keeps what was found with its other files.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dml_jax.data import images
from dml_jax.data.sources import Source, Sources, leave_out

POLICIES = ("fail", "skip")
"""What may be done about images that cannot be read: refuse to run, or leave them out."""

_CHUNK = 1024  # Images that are asked for at a time.
_LISTED = 5
_KINDS = {
    "across_splits": "have a copy in another split, which inflates scores",
    "between_classes": "have a copy in another class, so one of the two labels is wrong",
    "within_class": "have a copy in their own class, which inflates scores if it is a test class",
}


class Copies(NamedTuple):
    """Images that share their bytes with another one.

    Attributes:
        images: how many.
        example: where two of them are; empty if there are none.
    """

    images: int
    example: tuple[str, ...]


class InspectionReport(NamedTuple):
    """What was found in all images of a data set; plain values, to be written as JSON.

    Attributes:
        unreadable: by split, the names of images that cannot be read, each with the reason.
        copies: equal images that lie "across_splits", or in one split "between_classes" or
            "within_class".
    """

    unreadable: Mapping[str, Mapping[str, str]]
    copies: Mapping[str, Copies]

    @classmethod
    def from_json(cls, value: Mapping[str, Mapping]) -> "InspectionReport":
        """What `_asdict` gave, after it was written as JSON and read."""
        copies = {k: Copies(count, tuple(pair)) for k, (count, pair) in value["copies"].items()}
        return cls(value["unreadable"], copies)

    def counts(self) -> dict[str, dict[str, int]]:
        """How many images were unreadable, by split, and how many have copies, by kind."""
        return {
            "unreadable": {split: len(names) for split, names in self.unreadable.items()},
            "copies": {kind: copies.images for kind, copies in self.copies.items()},
        }


def inspect(sources: Mapping[str, Source]) -> InspectionReport:
    """Reads and decodes every image, in as many threads as there are cores, and shows progress.

    Args:
        sources: by split.

    Returns:
        What was found. Two images are copies if all their encoded bytes are equal.
    """
    console = Console(stderr=True)
    unreadable: dict[str, dict[str, str]] = {split: {} for split in sources}
    places = defaultdict(list)
    with (
        Progress(
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ) as progress,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        task = progress.add_task("check every image", total=sum(map(len, sources.values())))
        for split, source in sources.items():
            for index, (digest, problem) in enumerate(_looks(pool, source)):
                if problem:
                    unreadable[split][source.names[index]] = problem
                else:
                    places[digest].append((split, index))
                progress.advance(task)
    shared = [group for group in places.values() if len(group) > 1]
    return InspectionReport(unreadable, {kind: _copies(sources, shared, kind) for kind in _KINDS})


def _looks(pool: ThreadPoolExecutor, source: Source) -> Iterator[tuple[bytes, str]]:
    """Each image's digest, and what is wrong with it."""

    def look(index: int) -> tuple[bytes, str]:
        try:
            data = source[index]
            images.decode(data, source.where(index))
        except (OSError, ValueError) as error:
            return b"", str(error)
        return hashlib.sha256(data).digest(), ""

    for start in range(0, len(source), _CHUNK):
        yield from pool.map(look, range(start, min(start + _CHUNK, len(source))))


def _copies(
    sources: Mapping[str, Source], shared: list[list[tuple[str, int]]], kind: str
) -> Copies:
    groups = [group for group in shared if _kind(sources, group) == kind]
    if not groups:
        return Copies(0, ())
    # By split and class, so that the last differs from the first if any does.
    ordered = sorted(groups[0], key=lambda place: (place[0], sources[place[0]].labels[place[1]]))
    example = [sources[split].where(index) for split, index in (ordered[0], ordered[-1])]
    return Copies(sum(map(len, groups)), tuple(example))


def _kind(sources: Mapping[str, Source], group: list[tuple[str, int]]) -> str:
    if len({split for split, _ in group}) > 1:
        return "across_splits"
    classes = {sources[split].labels[index] for split, index in group}
    return "between_classes" if len(classes) > 1 else "within_class"


def accept(sources: Mapping[str, Source], findings: InspectionReport, policy: str) -> Sources:
    """The images to run with.

    Args:
        sources: by split.
        findings: about them.
        policy: one of `POLICIES`.

    Returns:
        The sources, without the images that cannot be read.

    Raises:
        ValueError: there are some and the policy is "fail", or nothing is left of a split.
    """
    reasons = [reason for names in findings.unreadable.values() for reason in names.values()]
    if not reasons:
        return dict(sources)
    if policy == "fail":
        raise ValueError(
            f"{len(reasons)} of {sum(map(len, sources.values()))} images cannot be read:\n"
            f"{_shortened(reasons)}\n"
            "Mend or remove them, or set config.data.unreadable to skip"
        )
    return leave_out(sources, findings.unreadable)


def report(findings: InspectionReport) -> None:
    """Tells on the terminal which images are left out, and which are there twice."""
    console = Console(stderr=True)
    reasons = [reason for names in findings.unreadable.values() for reason in names.values()]
    lines = [f"{len(reasons)} images cannot be read:\n{_shortened(reasons)}"] if reasons else []
    lines += [
        f"{copies.images} images {_KINDS[kind]}, such as {' and '.join(copies.example)}"
        for kind, copies in findings.copies.items()
        if copies.images
    ]
    for line in lines:
        console.print(f"warning: {line}", markup=False, highlight=False, soft_wrap=True)


def _shortened(lines: list[str]) -> str:
    more = [f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    return "\n".join(f"  {line}" for line in lines[:_LISTED] + more)
