"""Settings of the images: data set, batches, crops, augmentation and cache."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dml_jax.data import sources
from dml_jax.data.images import IN_STEP, Augmentation
from dml_jax.data.inspection import POLICIES
from dml_jax.settings import (
    choice,
    group,
    integer,
    number,
    optional,
    registered,
    setting,
    text,
    together,
)


def _same_crops(there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Returns whether a change of the cache keeps the crops: the other caches draw others."""
    return {there.get("cache"), here["cache"]} <= {"none", "host"}


def test_side(settings: Mapping[str, Any] | ConfigDict) -> int:
    """Returns `DataConfig.test_side` of plain settings, which may be older than `test_size`."""
    return settings.get("test_size") or settings["image_size"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Settings of the data set and of its batches."""

    name: str = setting(
        "folder",
        registered(sources.REGISTRY),
        help="Data set: built-in, `folder` for any folder of images, `table` for a CSV or Parquet "
        "file that lists them, `tar` for tar shards, or a source of your own.",
    )
    root: str = setting(
        "",
        text("it must be the path of a directory or a table"),
        help="Folder of the data set, or the file of a table; for `table` and `tar` also "
        "`hf:datasets/OWNER/NAME` on the Hugging Face hub; empty for data sets that come with "
        "their images.",
        resumable=True,
    )
    unreadable: str = setting(
        "fail",
        choice(POLICIES),
        help="Treatment of images that cannot be read: `fail`, or `skip` and count them.",
    )
    split_classes: float = setting(
        0.0,
        number(least=0.0, below=1.0),
        help="Share of the classes that are tested on, chosen at random, of images that are not "
        "split into training and test classes; 0 for images that are.",
    )
    validation_classes: float = setting(
        0.0,
        number(least=0.0, below=1.0),
        help="Share of the training classes held out as the selection split; 0 holds out none, "
        "and the test classes select the best epoch.",
    )
    validation_fold: int = setting(
        0,
        integer(0),
        help="Which of the disjoint shares of the training classes is held out, from 0.",
    )
    n_instance: int = setting(
        1,
        integer(1),
        help="Images of each class in a batch; 1 samples images regardless of class.",
    )
    image_size: int = setting(
        224, integer(1, 2**16), help="Side of the network's input images, pixels."
    )
    test_size: int | None = setting(
        None,
        optional(integer(1, 2**16)),
        help="Side of the centre crop of a test image, pixels; by default `data.image_size`. "
        "Exports and searches have it too.",
    )
    resize: int = setting(
        256,
        integer(1, 2**16),
        help="Shorter side of a test image before the centre crop, pixels.",
    )
    augmentation: Augmentation = group(Augmentation, help="Random augmentation of training images.")
    num_workers: int = setting(
        4,
        integer(0),
        help="Worker processes that decode images; 0 decodes in the training process.",
        resumable=True,
    )
    cache: str = setting(
        "none",
        choice(("none", "host", "device", "features")),
        help="Cache: `none`, `host` (decoded images in memory, with unchanged results), `device` "
        "(resized in device memory, and cropped inside the training step), or `features` (on disk, "
        "the results of the part of the network below `model.train_from`).",
        resumable=_same_crops,
    )
    cache_size: int = setting(
        320,
        integer(1, 2**16),
        help="Shorter side of images in the device cache, pixels; images that are all smaller are "
        "not enlarged.",
        resumable=_same_crops,
    )
    feature_views: int = setting(
        4,
        integer(1, 2**16),
        help="Random views of each training image in the feature cache.",
    )
    features: str = setting(
        "",
        text("it must be the path of a directory"),
        help="Folder of feature caches, which runs share; empty for `features` beside the run.",
        resumable=True,
    )

    @together("validation_fold", "validation_classes")
    def _validation_fold(self) -> str | None:
        share = self.validation_classes
        folds = math.floor(1 / share + 1e-6) if share else 1
        if self.validation_fold < folds:
            return None
        return (
            f"config.data.validation_fold is {self.validation_fold}; with "
            f"config.data.validation_classes={share} it must be below {folds}"
        )

    @property
    def test_side(self) -> int:
        """The side of a test image, pixels."""
        return self.test_size or self.image_size

    @together("resize", "image_size", "test_size")
    def _resize(self) -> str | None:
        if self.resize >= self.test_side:
            return None
        name = "image_size" if self.test_size is None else "test_size"
        return (
            f"config.data.resize is {self.resize}; it must be at least config.data.{name}, "
            f"{self.test_side}"
        )

    @together("cache", "cache_size", "resize")
    def _cache_size(self) -> str | None:
        if self.cache != "device" or self.cache_size >= self.resize:
            return None
        return (
            f"config.data.cache_size is {self.cache_size}; it must be at least config.data.resize, "
            f"{self.resize}"
        )

    @together("cache", "augmentation")
    def _changed_in_the_step(self) -> str | None:
        used = [name for name in IN_STEP if getattr(self.augmentation, name)]
        if self.cache != "features" or not used:
            return None
        return (
            f"config.data.augmentation.{used[0]} is {getattr(self.augmentation, used[0])}, but the "
            "views of config.data.cache='features' have their own colours and are not erased; set "
            "it to 0, or choose another cache"
        )

    @together("name", "root")
    def _root(self) -> str | None:
        if self.name in sources.WITH_IMAGES:
            if not self.root:
                return None
            return f"config.data.root is {self.root!r}, but {self.name} comes with its images"
        if self.root or self.name not in sources.REGISTRY.names():
            return None
        return f"config.data.root is empty; it must say where {self.name} is"
