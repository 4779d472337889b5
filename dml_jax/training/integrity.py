"""Integrity of checkpoints: SHA-256 digests of their files, stored beside them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

SEAL = "digests.json"


def digests(folder: Path) -> dict[str, str]:
    """Returns the digest of each file in the subfolders of a checkpoint.

    Args:
        folder: folder of the checkpoint. Files directly in it are orbax's records of the save,
            which it changes later and does not read when restoring.
    """
    return {name: _digest(folder / name) for name in sorted(_names(folder))}


def write(folder: Path, of_files: Mapping[str, str]) -> None:
    """Seals a checkpoint with the digests of its files; see `digests`."""
    text = json.dumps(dict(sorted(of_files.items())), indent=2) + "\n"
    (folder / SEAL).write_text(text, encoding="utf-8")


def missing(folder: Path) -> set[str]:
    """Returns the names of the files of a sealed folder that are not there.

    Args:
        folder: folder of a checkpoint.
    """
    return _expected(folder).keys() - _names(folder)


def is_partly_deleted(folder: Path) -> bool:
    """Returns whether a file of a sealed folder is missing, as after an interrupted deletion.

    Args:
        folder: folder of a checkpoint.
    """
    try:
        return bool(missing(folder))
    except FileNotFoundError:
        return True
    except (ValueError, TypeError, OSError):
        return False


def damage(folder: Path) -> str | None:
    """Returns a description of the damage to a sealed folder; None if it is intact.

    Args:
        folder: folder of a checkpoint.
    """
    try:
        expected = _expected(folder)
    except FileNotFoundError:
        return f"{SEAL} is missing"
    except (ValueError, TypeError):
        return f"{SEAL} has changed since it was written"
    except OSError as error:
        return f"{SEAL} cannot be read ({error.strerror})"
    names = _names(folder)
    for name in sorted(expected.keys() | names):
        if name not in names:
            return f"{name} is missing"
        try:
            digest = _digest(folder / name)
        except OSError as error:  # For example an input/output error of a failing disk.
            return f"{name} cannot be read ({error.strerror})"
        if digest != expected.get(name):
            return f"{name} has changed since it was written"
    return None


def _expected(folder: Path) -> dict[str, str]:
    """Returns the digest of each file of a sealed folder."""
    return dict(json.loads((folder / SEAL).read_text(encoding="utf-8")))


def _names(folder: Path) -> set[str]:
    paths = (path for path in folder.glob("*/**/*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in paths}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
