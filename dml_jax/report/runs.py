"""Finished runs as they lie in their folders, and which of them differ in nothing but the seed."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dml_jax._utils import files
from dml_jax.evaluation import embedding_files
from dml_jax.evaluation.embedding_files import Embeddings
from dml_jax.training import config as configs
from dml_jax.training import run_directory


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What a finished run has left behind.

    Attributes:
        folder: its workdir.
        config: its configuration.
        metrics: a line an epoch.
        timings: a line an epoch.
        scores: the line of the last epoch; scores are fractions.
        queries: embeddings of the test images.
        gallery: embeddings of what they are looked for in, if not among themselves.
    """

    folder: Path
    config: ConfigDict
    metrics: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    scores: dict[str, Any]
    queries: Embeddings
    gallery: Embeddings | None


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in the seed alone, by seed.

    Attributes:
        name: what tells the group from the others of a report.
        runs: at least one; the first stands for all where a single one is shown.
    """

    name: str
    runs: list[Run]

    @property
    def first(self) -> Run:
        """The run of the lowest seed."""
        return self.runs[0]


def read(folder: Path) -> Run:
    """Reads a finished run.

    Raises:
        FileNotFoundError: there is no run, or it has not ended.
        ValueError: a file of it is damaged.
    """
    config = run_directory.read_config(folder)
    configs.parse(config)
    result = run_directory.read_result(folder)
    if result is None:
        raise FileNotFoundError(
            f"{folder} holds an unfinished run: there is no {run_directory.RESULT}; start its "
            "training command again, and make the report then"
        )
    gallery = folder / run_directory.GALLERY
    return Run(
        folder=folder,
        config=config,
        metrics=files.read_json_lines(folder / run_directory.METRICS),
        timings=files.read_json_lines(folder / run_directory.TIMINGS),
        scores=result["last"],
        queries=embedding_files.load_embeddings(folder / run_directory.EMBEDDINGS),
        gallery=embedding_files.load_embeddings(gallery) if gallery.exists() else None,
    )


def group(runs: Sequence[Run]) -> list[Group]:
    """Puts runs together that differ in the seed alone, in the order in which they come.

    Raises:
        ValueError: runs were tested on different images, so that nothing can be compared, or a run
            is there twice.
    """
    _check_same_images(runs)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings = run.config.to_dict() | {"seed": None}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    members = [sorted(runs, key=lambda run: run.config.seed) for runs in groups.values()]
    return [Group(name, runs) for name, runs in zip(_names(members), members, strict=True)]


def _check_same_images(runs: Sequence[Run]) -> None:
    folders = [run.folder.resolve() for run in runs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ValueError(f"{folder} is named twice; name each run once")
    first = runs[0]
    for run in runs[1:]:
        here, there = (
            [part and (part.names, part.class_names) for part in (x.queries, x.gallery)]
            for x in (run, first)
        )
        if here != there:
            raise ValueError(
                f"{run.folder} and {first.folder} were tested on different images; make a report "
                "of each"
            )


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Folders, as far as they differ; of a group with several seeds the folder above them."""
    common = [
        os.path.commonpath([run.folder.resolve() for run in runs]) if len(runs) > 1 else None
        for runs in groups
    ]
    folders = [
        str(runs[0].folder.resolve()) if path is None or common.count(path) > 1 else path
        for runs, path in zip(groups, common, strict=True)
    ]
    if len(folders) == 1:
        return [os.path.basename(folders[0])]
    root = os.path.commonpath(folders)
    # A folder above the others would be called ".".
    root = os.path.dirname(root) if root in folders else root
    return [os.path.relpath(folder, root) for folder in folders]
