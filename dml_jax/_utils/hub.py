"""Repositories on the Hugging Face hub: hf:OWNER/NAME and hf:OWNER/NAME@REVISION."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import huggingface_hub

from dml_jax._utils.errors import UserError

# A revision with ".." would be a path outside of the hub's cache.
_PATTERN = re.compile(r"hf:(?P<repo_id>[\w.-]+/[\w.-]+)(?:@(?P<revision>(?!.*\.\.)\w[\w./-]*))?")


class Location(NamedTuple):
    """A repository of the hub at a revision; None is the newest one."""

    repo_id: str
    revision: str | None


def is_location(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is meant as a location on the hub."""
    return os.fspath(path).startswith("hf:")


def parse(location: str) -> Location | None:
    """Returns the repository and the revision of a location; None if it is not a valid one."""
    found = _PATTERN.fullmatch(location)
    return Location(**found.groupdict()) if found else None


def file(location: Location, name: str) -> Path:
    """Returns the path of a file in the hub's local cache, downloaded if needed.

    Raises:
        OSError: the file does not exist or cannot be downloaded.
        ValueError: the hub allows no such name.
    """
    repo_id, revision = location
    return Path(huggingface_hub.hf_hub_download(repo_id, name, revision=revision))


def folder(location: str, names: Sequence[str]) -> Path:
    """Returns a folder with files of one commit in the hub's local cache, downloaded if needed.

    Args:
        location: hf:OWNER/NAME or hf:OWNER/NAME@REVISION.
        names: names of the files.

    Raises:
        ValueError: the location is invalid.
        FileNotFoundError: a file does not exist or cannot be downloaded.
    """
    parsed = parse(location)
    if parsed is None:
        raise UserError(f"{location} is not hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    repo_id, revision = parsed
    try:
        found = Path(
            huggingface_hub.snapshot_download(
                repo_id, revision=revision, allow_patterns=list(names)
            )
        )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{location} cannot be reached ({reason(error)}); check the name and, if it is "
            f"private, log in with `hf auth login`. Without a network, run `hf download {repo_id}` "
            "on another machine, then pass the path of the folder, or copy the cache and set "
            "HF_HUB_OFFLINE=1"
        ) from None
    for name in names:
        if not (found / name).is_file():
            raise FileNotFoundError(f"{location} is not an export of dml_jax: it has no {name}")
    return found


def reason(error: Exception) -> str:
    """Returns the first line of an error of the hub's client."""
    return str(error).strip().partition("\n")[0]
