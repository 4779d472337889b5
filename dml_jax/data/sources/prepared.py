"""Data sets written by `dml_jax.data.prepare`."""

from pathlib import Path

import numpy as np
from jaxtyping import Int64

from dml_jax._utils.errors import UserError
from dml_jax.data.records import MANIFEST, EncodedImages, read_manifest
from dml_jax.data.sources.source import Source, Sources

PUBLIC = ("cars196", "cub200", "sop", "inshop", "omniglot", "grocery")
"""Public data sets that `scripts/prepare_data.py` prepares from the published files."""


def is_prepared(root: Path) -> bool:
    """Returns whether a directory holds a prepared data set."""
    return (root / MANIFEST).is_file()


def load(name: str, root: str | Path) -> Sources:
    """Returns the splits of a prepared data set.

    Args:
        name: name of the data set.
        root: the directory that holds it.

    Raises:
        FileNotFoundError: no data set was prepared in the directory.
        ValueError: it holds another data set, or is damaged.
    """
    root = Path(root)
    manifest = read_manifest(root)
    if manifest.data_set != name:
        raise UserError(f"{root} holds the data set {manifest.data_set!r}, not {name!r}")

    def source(split_name: str, classes: Int64[np.ndarray, " c"]) -> Source:
        split = manifest.splits[split_name]
        images = EncodedImages(root, split.files)
        if not len(images) == len(split.labels) == len(split.names):
            raise UserError(
                f"{root} is damaged: {len(images)} images but {len(split.labels)} labels in split "
                f"{split_name!r}; remove it and prepare the data set again"
            )
        return Source(
            records=images,
            labels=np.searchsorted(classes, split.labels).astype(np.int32),
            class_names=tuple(manifest.class_names[label] for label in classes),
            names=split.names,
        )

    # Queries and gallery share one numbering of classes.
    train = np.unique(manifest.splits["train"].labels)
    test = np.unique(
        np.concatenate([x.labels for split, x in manifest.splits.items() if split != "train"])
    )
    return {split: source(split, train if split == "train" else test) for split in manifest.splits}
