"""Registries of losses, backbones, data sources and schedules, extensible from user files."""

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from dml_jax._utils.errors import UserError

T = TypeVar("T", bound=Callable)


class Registry(Generic[T]):
    """Classes or functions of one kind by name.

    A part is found by its registered name or by its import path `MODULE:NAME`, such as
    `my_losses:Banded` for a class in `my_losses.py` in the current folder.
    """

    def __init__(self, kind: str) -> None:
        """Creates an empty registry.

        Args:
            kind: kind of its parts, for error messages, such as "loss".
        """
        self.kind = kind
        self._parts: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Returns a decorator that registers a class or function under a name.

        Raises:
            ValueError: the name is taken by another part, or contains a colon.
        """

        def decorate(part: T) -> T:
            if ":" in name or self._parts.get(name, part) is not part:
                raise UserError(
                    f"the {self.kind} name {name!r} is taken or contains a colon; choose another"
                )
            self._parts[name] = part
            return part

        return decorate

    def names(self) -> tuple[str, ...]:
        """Returns the registered names, in the order of registration."""
        return tuple(self._parts)

    def get(self, name: str) -> T:
        """Returns the part with a name.

        Args:
            name: registered name, or import path `MODULE:NAME`.

        Raises:
            ValueError: there is no such part.
        """
        if name in self._parts:
            return self._parts[name]
        if ":" in name:
            return self._imported(name)
        raise UserError(f"unknown {self.kind} {name!r}; {self.choices}")

    @property
    def choices(self) -> str:
        """The allowed names in words, for error messages."""
        return f"choose one of {', '.join(self._parts)}, or MODULE:NAME of your own"

    def name_of(self, part: T) -> str:
        """Returns the registered name of a part, or its import path."""
        for name, registered in self._parts.items():
            if registered is part:
                return name
        return f"{part.__module__}:{part.__qualname__}"

    def options(self, name: str) -> dict[str, object]:
        """Returns the parameters of a part with their defaults."""
        parameters = inspect.signature(self.get(name)).parameters
        return {option: parameter.default for option, parameter in parameters.items()}

    def _imported(self, path: str) -> T:
        module, _, name = path.partition(":")
        # Other modules are not imported: the path may come from an untrusted run.
        if module not in sys.modules and not _in_current_folder(module):
            raise UserError(
                f"the {self.kind} {path!r} is not available: the module {module} is neither "
                "imported nor in the current folder"
            )
        try:
            part = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"the {self.kind} {path!r} cannot be imported: {error}") from error
        if not callable(part):
            raise UserError(f"the {self.kind} {path!r} is not a class or function")
        return part


def _in_current_folder(module: str) -> bool:
    """Returns whether a module is in the current folder; if so, makes it importable."""
    place = Path.cwd().joinpath(*module.split("."))
    if not (place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()):
        return False
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    return True
