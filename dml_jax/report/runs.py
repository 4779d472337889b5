"""Reads finished runs and groups those that differ in the seed alone."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dml_jax._utils import files, storage
from dml_jax._utils.errors import UserError
from dml_jax.evaluation import embedding_files
from dml_jax.evaluation.embedding_files import Embeddings
from dml_jax.published import Reference
from dml_jax.training import bucket, run_directory
from dml_jax.training import config as configs
from dml_jax.training.origin import Origin


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """The files of a finished run.

    Attributes:
        folder: the workdir, or a copy of it.
        place: the workdir as it was given, a path or a URL.
        config: the configuration.
        metrics: one dict per epoch, from `metrics.jsonl`.
        timings: one dict per epoch, from `timings.jsonl`.
        scores: the scores of the last epoch, as fractions.
        queries: embeddings of the test images.
        gallery: embeddings of the gallery, or None if the test images are their own gallery.
        origin: config file and variant, or None if the run was not started from a config file.
        zero_shot: the scores of the backbone before training, or None if its weights were random.
    """

    folder: Path
    place: str
    config: ConfigDict
    metrics: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    scores: dict[str, Any]
    queries: Embeddings
    gallery: Embeddings | None
    origin: Origin | None = None
    zero_shot: dict[str, Any] | None = None

    @property
    def published(self) -> tuple[Reference, ...]:
        """The published scores of the run's variant."""
        return self.origin.published if self.origin else ()


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in the seed alone.

    Attributes:
        name: a name that is unique in a report.
        runs: at least one run, ordered by seed.
    """

    name: str
    runs: list[Run]

    @property
    def first(self) -> Run:
        """The run with the lowest seed, which represents the group."""
        return self.runs[0]


def read(path: str | Path) -> Run:
    """Reads a finished run.

    Args:
        path: path or URL of its workdir.

    Raises:
        FileNotFoundError: the folder holds no run, or the run has not finished.
        ValueError: a file of the run is damaged.
    """
    folder = bucket.copy(str(path))
    config = run_directory.read_config(folder)
    configs.parse(config)
    result = run_directory.read_result(folder)
    if result is None:
        raise FileNotFoundError(
            f"the run in {path} has not finished: it has no {run_directory.RESULT}; resume it by "
            "its training command, then make the report"
        )
    gallery = folder / run_directory.GALLERY
    return Run(
        folder=folder,
        place=str(path),
        config=config,
        metrics=files.read_json_lines(folder / run_directory.METRICS),
        timings=files.read_json_lines(folder / run_directory.TIMINGS),
        scores=result["last"],
        queries=embedding_files.load_embeddings(folder / run_directory.EMBEDDINGS),
        gallery=embedding_files.load_embeddings(gallery) if gallery.exists() else None,
        origin=run_directory.read_origin(folder),
        zero_shot=result.get("zero_shot"),
    )


def group(runs: Sequence[Run]) -> list[Group]:
    """Groups runs that differ in the seed alone, in order of first appearance.

    Raises:
        ValueError: the runs were tested on different images, or a run is given twice.
    """
    _check_same_images(runs)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings = run.config.to_dict() | {"seed": None}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    members = [sorted(runs, key=lambda run: run.config.seed) for runs in groups.values()]
    return [Group(name, runs) for name, runs in zip(_names(members), members, strict=True)]


def _check_same_images(runs: Sequence[Run]) -> None:
    paths = [_path(run) for run in runs]
    for run, path in zip(runs, paths, strict=True):
        if paths.count(path) > 1:
            raise UserError(f"{run.place} is given twice; give each run once")
    first = runs[0]
    for run in runs[1:]:
        images, first_images = (
            [part and (part.names, part.class_names) for part in (x.queries, x.gallery)]
            for x in (run, first)
        )
        if images != first_images:
            raise UserError(
                f"{run.place} and {first.place} were tested on different images; make a separate "
                "report of each"
            )


def _path(run: Run) -> str:
    """Returns the place of a run as an absolute path, which for a URL is none of the system."""
    if storage.is_url(run.place):
        return os.path.normpath(os.path.join(os.sep, run.place.replace("://", os.sep)))
    return os.path.realpath(run.place)


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Returns the distinguishing part of each group's path.

    The path of a group with several seeds is their common parent folder.
    """
    common = [
        os.path.commonpath([_path(run) for run in runs]) if len(runs) > 1 else None
        for runs in groups
    ]
    folders = [
        _path(runs[0]) if path is None or common.count(path) > 1 else path
        for runs, path in zip(groups, common, strict=True)
    ]
    if len(folders) == 1:
        return [os.path.basename(folders[0])]
    root = os.path.commonpath(folders)
    # If one folder contains the others, its relative path would be ".".
    root = os.path.dirname(root) if root in folders else root
    return [os.path.relpath(folder, root) for folder in folders]
