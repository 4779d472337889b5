"""The splits of a run: loaded, inspected, checked, with validation classes held out."""

import dataclasses
import json
from collections.abc import Mapping, Sequence

import numpy as np

from dml_jax import data
from dml_jax._utils import processes
from dml_jax._utils.errors import UserError
from dml_jax.data.config import DataConfig
from dml_jax.data.sources.source import UNSPLIT

_LISTED = 10  # Classes in a message.


def load_splits(
    config: DataConfig, recall_at: Sequence[int], inspection: data.InspectionReport | None = None
) -> tuple[dict[str, data.Source], data.InspectionReport]:
    """Loads the images that a configuration names, without those that it leaves out.

    Args:
        config: settings of the images.
        recall_at: the values of k in Recall@k; a split must have enough images for the largest.
        inspection: the report from the start of the run; by default all images are inspected now.

    Returns:
        The images by split, and the inspection report.

    Raises:
        ValueError: an image cannot be read, or a split has too few images or classes.
        FileNotFoundError: the images are not where the configuration says.
    """
    sources = load_sources(config)
    report = inspection or _inspect_once(sources)
    sources = data.accept(sources, report, config.unreadable)
    if inspection is None and processes.is_first_process():
        data.report(report)
    if config.validation_classes:
        # The same classes for every seed of the run, so that runs can be compared.
        sources["train"], sources["validation"] = data.split_classes(
            sources["train"], config.validation_classes, seed=0, fold=config.validation_fold
        )
    if config.cache == "host":
        sources = {k: dataclasses.replace(source, cache={}) for k, source in sources.items()}
    for split in sources.keys() - {"train", "gallery"}:
        _check_gallery_size(sources, split, max(recall_at))
    for split, source in sources.items():
        if len(source.class_names) < 2:
            raise UserError(
                f"the images of {split!r} are all of one class, {source.class_names[0]}; a split "
                "needs at least two classes"
            )
    return sources, report


def load_sources(config: DataConfig) -> dict[str, data.Source]:
    """Returns the images that a configuration names by split, without inspecting them.

    Raises:
        ValueError: they are not split and the configuration does not split them, or the reverse.
        FileNotFoundError: the images are not where the configuration says.
    """
    sources = data.create(config.name, root=config.root or None)
    if config.split_classes and sources.keys() != {UNSPLIT}:
        raise UserError(
            f"config.data.split_classes is {config.split_classes}, but the images are split "
            "already; set it to 0"
        )
    if sources.keys() != {UNSPLIT}:
        return sources
    if not config.split_classes:
        raise UserError(
            f"the images at {config.root} are not split into training and test classes (train/ and "
            "test/, or a column `split`, with different classes in both); "
            "config.data.split_classes=0.5 tests on half of them"
        )
    # The same classes for every seed of the run, so that runs can be compared.
    train, test = data.split_classes(sources[UNSPLIT], config.split_classes, seed=0)
    if processes.is_first_process():
        print(
            f"{len(train.class_names)} classes are trained on, and {len(test.class_names)} tested: "
            f"{', '.join(test.class_names[:_LISTED])}"
            + (", ..." if len(test.class_names) > _LISTED else "")
        )
    return {"train": train, "test": test}


def gallery_of(sources: Mapping[str, data.Source], split: str) -> data.Source | None:
    """Returns the gallery of a split's queries; None if they are searched among themselves."""
    return sources.get("gallery") if split == "test" else None


def _inspect_once(sources: Mapping[str, data.Source]) -> data.InspectionReport:
    """Inspects the images in the first process and returns its report in all of them.

    All processes must leave out the same images.
    """
    message = b""
    if processes.is_first_process():
        message = json.dumps(data.inspect(sources)._asdict()).encode()
    return data.InspectionReport.from_json(json.loads(processes.bytes_from_first_process(message)))


def _check_gallery_size(sources: Mapping[str, data.Source], split: str, max_rank: int) -> None:
    """Raises ValueError unless the queries of a split have `max_rank` neighbours, one relevant."""
    queries = sources[split]
    gallery = gallery_of(sources, split)
    searched = queries if gallery is None else gallery
    is_self = gallery is None  # A query is not its own neighbour.
    relevant = np.bincount(searched.labels)[queries.labels] - is_self
    if max_rank > len(searched) - is_self or relevant.max() < 1:
        raise UserError(
            f"the gallery of {split!r} has too few images, {len(searched)}: "
            f"config.evaluation.recall_at needs {max_rank} neighbours, and at least one query "
            "another image of its class"
        )
