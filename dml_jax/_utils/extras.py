"""Imports of packages that belong to an extra of dml_jax, not to its core dependencies."""

import contextlib
from collections.abc import Iterator

from dml_jax._utils.errors import MissingExtraError


@contextlib.contextmanager
def required_by(*extras: str) -> Iterator[None]:
    """Names the install command if an import in this context finds no module.

    Args:
        extras: the extras of `pyproject.toml` that contain the package; any one of them suffices.

    Raises:
        MissingExtraError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        commands = " or ".join(f'pip install "dml_jax[{extra}]"' for extra in extras)
        package = str(error.name).partition(".")[0]
        message = f"the package {package} is not installed: {commands}"
        raise MissingExtraError(message, name=package) from None
