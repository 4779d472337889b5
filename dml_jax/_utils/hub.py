"""Data sets on the Hugging Face hub."""

import re
from pathlib import Path

# A revision or a folder with ".." would be a path outside of the hub's cache.
_DATA_SET = re.compile(
    r"hf:datasets/(?!.*\.\.)(?P<repo_id>[\w.-]+/[\w.-]+)(?P<folder>(?:/[\w.-]+)*)"
    r"(?:@(?P<revision>\w[\w./-]*))?"
)

_CONVERTED = "refs/convert/parquet"  # Branch on which the hub converts data sets of other formats.


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
    # Takes a fraction of a second, and most programs need it not.
    import huggingface_hub

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
