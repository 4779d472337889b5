"""Models and data sets on the Hugging Face hub: hf:OWNER/NAME and hf:datasets/OWNER/NAME."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import huggingface_hub

from dml_jax._utils.errors import UserError

# A revision with ".." would be a path outside of the hub's cache.
_PATTERN = re.compile(r"hf:(?P<repo_id>[\w.-]+/[\w.-]+)(?:@(?P<revision>(?!.*\.\.)\w[\w./-]*))?")

# A folder with ".." would be one, too.
_DATA_SET = re.compile(
    r"hf:datasets/(?!.*\.\.)(?P<repo_id>[\w.-]+/[\w.-]+)(?P<folder>(?:/[\w.-]+)*)"
    r"(?:@(?P<revision>\w[\w./-]*))?"
)

_CONVERTED = "refs/convert/parquet"  # Branch on which the hub converts data sets of other formats.


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


def folder(location: str, names: Sequence[str], optional: Sequence[str] = ()) -> Path:
    """Returns a folder with files of one commit in the hub's local cache, downloaded if needed.

    Args:
        location: hf:OWNER/NAME or hf:OWNER/NAME@REVISION.
        names: names of the files.
        optional: names of files that need not exist.

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
                repo_id, revision=revision, allow_patterns=[*names, *optional]
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


def is_data_set(location: str) -> bool:
    """Returns whether a location is one of a data set, without accessing it.

    Args:
        location: valid are hf:datasets/OWNER/NAME and, for a part of it, a folder after the name,
            each with @REVISION or without.
    """
    return _DATA_SET.fullmatch(location) is not None


def data_set(location: str, suffix: str) -> Path:
    """Returns the local folder of a data set's files, which are downloaded if needed.

    They are kept in the hub's own cache. Without a revision, Parquet files are also looked for on
    the branch to which the hub converts data sets of other formats.

    Args:
        location: a location that `is_data_set`.
        suffix: end of the names of the files, such as ".parquet".

    Raises:
        FileNotFoundError: there is no such data set, it has no such files, or the hub cannot be
            reached and the cache lacks them.
    """
    found = _DATA_SET.fullmatch(location)
    assert found is not None, location
    repo_id, folder, revision = found["repo_id"], found["folder"].strip("/"), found["revision"]
    pattern = f"{folder}/*{suffix}" if folder else f"*{suffix}"
    revisions = [revision]
    if revision is None and suffix == ".parquet":
        revisions.append(_CONVERTED)
    reasons: list[str] = []
    for name in revisions:
        try:
            snapshot = huggingface_hub.snapshot_download(
                repo_id, repo_type="dataset", revision=name, allow_patterns=pattern
            )
        except Exception as error:  # Those of its HTTP client have no base class in common.
            reasons.append(str(error).strip().partition("\n")[0] or type(error).__name__)
            continue
        path = Path(snapshot, folder)
        if any(path.rglob(f"*{suffix}")):
            return path
        reasons.append(f"{name or 'its main branch'} has no {pattern}")
    raise FileNotFoundError(
        f"{location} cannot be read ({'; '.join(dict.fromkeys(reasons))}); check the name. Without "
        f"a network, run `hf download {repo_id} --repo-type=dataset` on another machine, then pass "
        "the path of its folder, or copy the cache and set HF_HUB_OFFLINE=1"
    )


def reason(error: Exception) -> str:
    """Returns the first line of an error of the hub's client."""
    return str(error).strip().partition("\n")[0]
