"""Whether a checkpoint is as it was written: a digest of each of its files, kept beside them."""

import hashlib
import json
from pathlib import Path

SEAL = "digests.json"


def seal(folder: Path) -> None:
    """Writes down the digests of the files in a folder's subfolders.

    Args:
        folder: a checkpoint's. What lies in it directly is orbax's own account of the time and the
            success of its writing, which it still changes and no restoring needs.
    """
    digests = {name: _digest(folder / name) for name in sorted(_names(folder))}
    (folder / SEAL).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, in a few words; None if it is as it was.

    Args:
        folder: that should have been sealed.
    """
    try:
        expected = dict(json.loads((folder / SEAL).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return f"{SEAL} is missing"
    except (ValueError, TypeError):
        return f"{SEAL} is not as it was written"
    except OSError as error:
        return f"{SEAL} cannot be read ({error.strerror})"
    names = _names(folder)
    for name in sorted(expected.keys() | names):
        if name not in names:
            return f"{name} is missing"
        try:
            digest = _digest(folder / name)
        except OSError as error:  # The disk is going.
            return f"{name} cannot be read ({error.strerror})"
        if digest != expected.get(name):
            return f"{name} is not as it was written"
    return None


def _names(folder: Path) -> set[str]:
    paths = (path for path in folder.glob("*/**/*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in paths}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
