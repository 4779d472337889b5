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

    def __init__(self, kind: str, base: type | None = None) -> None:
        """Creates an empty registry.

        Args:
            kind: kind of its parts, for error messages, such as "loss".
            base: the class that imported parts must be derived from; None for functions.
        """
        self.kind, self._base = kind, base
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
        # Only files of the current folder: the path may come from an untrusted run, which must not
        # reach `os:system`.
        file = _file_in_current_folder(module)
        if file is None:
            raise UserError(
                f"the {self.kind} {path!r} is not available: there is no {module.replace('.', '/')}"
                ".py in the current folder"
            )
        try:
            imported = importlib.import_module(module)
            part = getattr(imported, name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"the {self.kind} {path!r} cannot be imported: {error}") from error
        if Path(imported.__file__ or "").resolve() != file.resolve():
            raise UserError(
                f"the {self.kind} {path!r} is not available: another module is called {module}; "
                f"rename {file.name}"
            )
        if not callable(part) or getattr(part, "__module__", None) != module:
            raise UserError(
                f"the {self.kind} {path!r} is not a class or function that {file.name} defines"
            )
        if self._base and not (isinstance(part, type) and issubclass(part, self._base)):
            raise UserError(
                f"the {self.kind} {path!r} is not derived from {self._base.__qualname__}"
            )
        return part


def _file_in_current_folder(module: str) -> Path | None:
    """Returns the file of a module in the current folder, made importable, or None."""
    place = Path.cwd().joinpath(*module.split("."))
    for file in (place.with_suffix(".py"), place / "__init__.py"):
        if file.is_file():
            if str(Path.cwd()) not in sys.path:
                sys.path.append(str(Path.cwd()))
            return file
    return None
