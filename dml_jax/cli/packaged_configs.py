"""The config files that come with the package, by name: `--config=cars196:ps`."""

from collections.abc import Sequence
from pathlib import Path

from dml_jax import configs
from dml_jax._utils.errors import UserError

_FOLDER = Path(configs.__file__).parent


def names() -> list[str]:
    """Returns the names of the packaged config files, sorted."""
    return sorted(file.stem for file in _FOLDER.glob("*.py") if file.stem != "__init__")


def path(name: str) -> Path:
    """Returns the path of a packaged config file.

    Raises:
        UserError: there is no packaged config of that name.
    """
    if name not in names():
        raise UserError(
            f"there is no config {name!r}: give the path of a .py file or one of "
            f"{', '.join(names())}"
        )
    return _FOLDER / f"{name}.py"


def shortened(file: str) -> str:
    """Returns the name of a packaged config file that is given by its absolute path.

    Other paths, such as `configs/cars196.py` in a checkout, are returned as they are.
    """
    is_packaged = Path(file).is_absolute() and Path(file).parent == _FOLDER
    return Path(file).stem if is_packaged else file


def resolve(arguments: Sequence[str]) -> list[str]:
    """Returns command-line arguments with the packaged config that `--config` names as a path.

    Raises:
        UserError: `--config` is neither a file nor the name of a packaged config.
    """
    resolved = list(arguments)
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if argument == "--":
            break
        if flag not in ("--config", "-config"):
            continue
        if equals:
            resolved[i] = f"{flag}={_resolve(value)}"
        elif i + 1 < len(arguments):
            resolved[i + 1] = _resolve(arguments[i + 1])
    return resolved


def _resolve(value: str) -> str:
    file, colon, variant = value.partition(":")
    if file.endswith(".py") or Path(file).is_file():
        return value
    return f"{path(file)}{colon}{variant}"
