"""The splits of a run: loaded, inspected, held out, checked."""

import dataclasses
import json
from collections.abc import Mapping, Sequence

import numpy as np

from dml_jax import data
from dml_jax._utils import processes
from dml_jax.data.config import DataConfig


def load_splits(
    config: DataConfig, recall_at: Sequence[int], findings: data.InspectionReport | None = None
) -> tuple[dict[str, data.Source], data.InspectionReport]:
    """Finds the images that a configuration names, without those that it leaves out.

    Args:
        config: the settings of the images.
        recall_at: each k of Recall@k, for which a split must have enough images.
        findings: what the run found in its images when it began; by default they are looked at
            now, every one of them.

    Returns:
        The images by split, and what was found in them.

    Raises:
        ValueError: an image is bad, or a split has too few.
        FileNotFoundError: the images are not where the config says.
    """
    sources = data.create(config.name, root=config.root or None)
    found = findings or _inspected(sources)
    sources = data.accept(sources, found, config.unreadable)
    if findings is None and processes.is_first_process():
        data.report(found)
    if config.validation_classes:
        # Of all seeds the same classes, so that their runs can be compared.
        sources["train"], sources["validation"] = data.split_classes(
            sources["train"], config.validation_classes, seed=0
        )
    if config.cache == "host":
        sources = {k: dataclasses.replace(source, kept={}) for k, source in sources.items()}
    for split in sources.keys() - {"train", "gallery"}:
        _check_enough(sources, split, max(recall_at))
    for split, source in sources.items():
        if len(source.class_names) < 2:
            raise ValueError(
                f"the images of {split!r} are all of one class, {source.class_names[0]}: there is "
                "nothing to tell apart; there must be at least two classes"
            )
    return sources, found


def _inspected(sources: Mapping[str, data.Source]) -> data.InspectionReport:
    """What the first process finds in the images, in every process: all must leave out the same."""
    message = b""
    if processes.is_first_process():
        message = json.dumps(data.inspect(sources)._asdict()).encode()
    return data.InspectionReport.from_json(json.loads(processes.bytes_from_first_process(message)))


def _check_enough(sources: Mapping[str, data.Source], split: str, furthest: int) -> None:
    queries = sources[split]
    found_in, alone = gallery_of(sources, split), gallery_of(sources, split) is None
    searched = queries if found_in is None else found_in
    relevant = np.bincount(searched.labels)[queries.labels] - alone
    if furthest > len(searched) - alone or relevant.max() < 1:
        raise ValueError(
            f"the {len(searched)} images that {split} images are looked for in are too few: "
            f"config.evaluation.recall_at asks for {furthest} neighbours, and some image needs "
            "another of its class"
        )


def gallery_of(sources: Mapping[str, data.Source], split: str) -> data.Source | None:
    """Returns the gallery of a split's queries; None if they are searched among themselves."""
    return sources.get("gallery") if split == "test" else None
