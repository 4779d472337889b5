"""Images in directories, one directory per class."""

import os
from pathlib import Path

from dml_jax._utils.errors import UserError
from dml_jax.data.sources.source import UNSPLIT, Source, Sources, from_classes

IMAGE_EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".webp")
"""Extensions of image files, in lower case."""

_NOT_IMAGES = ("thumbs.db", "desktop.ini")  # Written by file managers, like hidden files.


def load(root: Path) -> Sources:
    """Returns the splits of a folder with train/CLASS/* and test/CLASS/*.

    A folder with CLASS/* alone has one split, `UNSPLIT`.

    Raises:
        FileNotFoundError: a directory is missing.
        ValueError: a split has no class, a class has no image, or a file is not named like one.
    """
    is_split = any((root / split).exists() for split in ("train", "test"))
    if root.is_dir() and not is_split and any(path.is_dir() for path in visible_entries(root)):
        return {UNSPLIT: _load_split(root, "")}
    for directory in (root, root / "train", root / "test"):
        if not directory.is_dir():
            raise FileNotFoundError(
                f"{directory} is not a directory; expected {root}/train/CLASS/* and "
                f"{root}/test/CLASS/*"
            )
    return {split: _load_split(root, split) for split in ("train", "test")}


def _load_split(root: Path, split: str) -> Source:
    classes = {}
    for directory in visible_entries(root / split):
        if not directory.is_dir():
            continue
        members = visible_entries(directory)
        if not members:
            raise UserError(f"class folder {directory} holds no images; fill or remove it")
        for path in members:
            if not _is_named_like_image(path):
                raise UserError(
                    f"{path} is not named like an image ({', '.join(IMAGE_EXTENSIONS)}); "
                    "remove it from the class folder"
                )
        classes[directory.name] = [(str(path.relative_to(root)), str(path)) for path in members]
    if not classes:
        raise UserError(f"{root / split} holds no class folders; expected {root / split}/CLASS/*")
    return from_classes(classes)


def images_below(root: str | os.PathLike[str]) -> Source:
    """Returns all images below a directory; the class of an image is its directory.

    Raises:
        FileNotFoundError: there is no such directory, or no image in it.
    """
    classes, visited = {}, set()
    for directory, subdirectories, _ in os.walk(root, followlinks=True):
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        real_path = os.path.realpath(directory)
        if real_path in visited:  # A link to a parent directory would be followed without end.
            subdirectories.clear()
            continue
        visited.add(real_path)
        members = [
            (str(path.relative_to(root)), str(path))
            for path in visible_entries(Path(directory))
            if path.is_file() and _is_named_like_image(path)
        ]
        if members:
            classes[os.path.relpath(directory, root)] = members
    if not classes:
        raise FileNotFoundError(
            f"found no images in {root}; their names end in one of {', '.join(IMAGE_EXTENSIONS)}"
        )
    return from_classes(classes)


def visible_entries(directory: Path) -> list[Path]:
    """Returns the entries of a directory by name, without hidden files and those of file managers.

    Raises:
        OSError: the directory cannot be read.
    """
    return sorted(
        path
        for path in directory.iterdir()
        if not path.name.startswith(".") and path.name.lower() not in _NOT_IMAGES
    )


def _is_named_like_image(path: Path) -> bool:
    return path.name.lower().endswith(IMAGE_EXTENSIONS)
