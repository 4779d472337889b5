"""The public data sets that can be prepared: their layouts, counts and addresses."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from dml_jax.data.prepare import layouts
from dml_jax.data.prepare.archives import Address
from dml_jax.data.prepare.layouts import Contents

Counts = Mapping[str, tuple[int, int]]
"""Expected numbers of classes and images, by split."""


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set that can be prepared.

    Attributes:
        layout: the function that lists the images of a directory.
        counts: numbers of classes and images of the published data set; empty if unknown.
        origin: how to get the data set, for error messages.
        addresses: its archives, if they can be downloaded without registration.
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
        "Kaggle and the Hugging Face Hub have copies named 'Stanford Cars'",
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
    "grocery": DataSet(
        layouts.grocery,
        {"train": (40, 2493), "test": (41, 2928)},
        "its author publishes it on GitHub, marcusklasson/GroceryStoreDataset (--download)",
        (
            Address(
                "https://github.com/marcusklasson/GroceryStoreDataset/archive/"
                "fc80ba90f803d79d0383df52c5a4ac5de99ff6fc.zip",
                "GroceryStoreDataset.zip",
                None,
            ),
        ),
    ),
    "folder": DataSet(layouts.folder, {}, "any images, in train/CLASS/* and test/CLASS/*"),
}
"""The data sets by name."""
