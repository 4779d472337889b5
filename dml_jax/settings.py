"""Settings as fields of frozen dataclasses: default, bounds, help, and whether they may change.

A group of settings is a frozen dataclass whose fields are made by `setting` or `group`. Checks that
involve several settings are methods decorated with `together`. `parse` makes an instance from plain
values and reports all errors together, by path.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from ml_collections import ConfigDict

from dml_jax._utils.registry import Registry

_INT32 = 2**31 - 1
_T = TypeVar("_T")

Resumable = bool | Callable[[Mapping[str, Any], Mapping[str, Any]], bool]
"""Whether a setting may change on resume: always, never, or given the old and the new settings."""


class Check(NamedTuple):
    """The values that a setting may have."""

    allowed: Callable[[], str]
    """Returns the allowed values in words, for the error message after the invalid value."""
    holds: Callable[[Any], bool]
    """Returns whether a value is allowed; accepts any object."""


class Setting(NamedTuple):
    """The metadata of a setting."""

    help: str
    check: Check | None
    """None for a check by the type of the default value."""
    resumable: Resumable


def setting(
    default: _T, check: Check | None = None, *, help: str, resumable: Resumable = False
) -> _T:
    """Returns a dataclass field that is a setting.

    Args:
        default: default value.
        check: the allowed values; by default all values of the type of `default`.
        help: description for the reference of all settings, with units.
        resumable: whether the setting may change when a run is resumed; a function of the old and
            new settings of its group if this depends on them.
    """
    about = Setting(help, check, resumable)
    return dataclasses.field(default=default, metadata={"setting": about})  # type: ignore[return-value]


def group(settings: type[_T], *, help: str, resumable: bool = False) -> _T:
    """Returns a dataclass field that is a group of settings.

    Args:
        settings: dataclass of the group; its defaults are those of the field.
        help: description of the group.
        resumable: whether all its settings may change when a run is resumed.
    """
    about = {"group": Setting(help, None, resumable)}
    return dataclasses.field(default_factory=settings, metadata=about)  # type: ignore[return-value]


def together(*paths: str) -> Callable[[_T], _T]:
    """Returns a decorator of a method that checks several settings against each other.

    The method returns an error message, or None if the settings are consistent. It is called only
    if each of the settings is valid by itself.

    Args:
        paths: paths of the settings that the method reads, relative to its group.
    """

    def decorate(method: _T) -> _T:
        method.checks_together = paths  # type: ignore[attr-defined]
        return method

    return decorate


def integer(least: int, most: int = _INT32) -> Check:
    """Returns a check that allows integers from `least` to `most`."""

    def holds(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    return Check(lambda: f"it must be an integer from {least} to {most}", holds)


def number(
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
) -> Check:
    """Returns a check that allows numbers within bounds that are finite in float32."""
    bounds = {"at least": least, "above": above, "below": below, "at most": most}
    limits = " and ".join(
        f"{word} {bound:g}" for word, bound in bounds.items() if abs(bound) < 1e38
    )

    def holds(value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > 1e38:
            return False
        rounded = float(np.float32(value))
        return least <= rounded <= most and above < rounded < below

    return Check(lambda: f"it must be a finite number {limits}".strip(), holds)


def flag() -> Check:
    """Returns a check that allows True and False."""
    return Check(lambda: "it must be True or False", lambda value: isinstance(value, bool))


def choice(names: Collection[str]) -> Check:
    """Returns a check that allows some names."""
    return Check(
        lambda: f"choose one of {', '.join(names)}",
        lambda value: isinstance(value, str) and value in names,
    )


def registered(registry: Registry) -> Check:
    """Returns a check that allows the names of a registry and valid import paths."""

    def holds(value: Any) -> bool:
        if not isinstance(value, str):
            return False
        try:
            registry.get(value)
        except ValueError:
            return False
        return True

    return Check(lambda: registry.choices, holds)


def text(allowed: str, holds: Callable[[str], bool] = lambda _: True) -> Check:
    """Returns a check that allows strings without NUL characters that fulfil a condition."""
    return Check(
        lambda: allowed, lambda value: isinstance(value, str) and "\0" not in value and holds(value)
    )


def optional(check: Check) -> Check:
    """Returns a check that allows None and the values of another check."""
    return Check(
        lambda: f"{check.allowed()}, or None", lambda value: value is None or check.holds(value)
    )


def several(each: Check, allowed: str, holds: Callable[[Collection[Any]], bool]) -> Check:
    """Returns a check that allows tuples and lists.

    Args:
        each: check of each element.
        allowed: the allowed values in words.
        holds: condition on the elements together.
    """

    def all_hold(values: Any) -> bool:
        return isinstance(values, tuple | list) and all(map(each.holds, values)) and holds(values)

    return Check(lambda: allowed, all_hold)


_BY_TYPE = {
    bool: flag(),
    int: integer(-(2**31)),
    float: number(),
    str: text("it must be text"),
}


def check_of(field: dataclasses.Field) -> Check:
    """Returns the check of a field; if it has none, the check for the type of its default.

    Raises:
        TypeError: the field has no check, and the type of its default value implies none.
    """
    about = field.metadata.get("setting")
    return about.check if about and about.check else _check_by_type(field.default, field.name)


def _check_by_type(default: Any, name: str) -> Check:
    if isinstance(default, tuple) and default:
        each = _check_by_type(default[0], name)
        allowed = f"it must be a sequence; of each element, {each.allowed()}"
        return several(each, allowed, lambda _: True)
    if type(default) not in _BY_TYPE:
        raise TypeError(
            f"the setting {name} is {default!r} by default, which implies no check; define it with "
            "dml_jax.settings.setting and a check"
        )
    return _BY_TYPE[type(default)]


def parse(
    settings: type[_T], values: Any, path: str, problems: dict[str, str], *, of: str = ""
) -> _T:
    """Returns a group of settings, parsed from plain values.

    Args:
        settings: dataclass of the group.
        values: mapping of values by name, nested as the groups are.
        path: path of the group, such as "config.data".
        problems: receives an error message for each invalid setting, by path.
        of: suffix of messages about unknown settings, such as " of cosface".

    Returns:
        The group; not valid if there are problems.
    """
    if not isinstance(values, Mapping | ConfigDict):
        problems[path] = f"{path} is {values!r}; it must be a group of settings"
        return settings()
    fields = {field.name: field for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    made: dict[str, Any] = {}
    for name, field in fields.items():
        where = f"{path}.{name}"
        if name not in values:
            problems[where] = f"{where} is missing"
        elif "parse" in field.metadata:
            made[name] = field.metadata["parse"](values[name], where, problems)
        elif "group" in field.metadata:
            made[name] = parse(field.default_factory, values[name], where, problems)  # type: ignore[arg-type]
        else:
            made[name] = _checked(field, values[name], where, problems)
    for name in sorted(values.keys() - fields.keys()):
        problems[f"{path}.{name}"] = f"{path}.{name} is no setting{of}"
    instance = settings(**made)
    for method, paths in _checks_together(settings):
        read = {f"{path}.{name}" for name in paths}
        if not any(_is_below(problem, read) for problem in problems):
            message = method(instance)
            if message is not None:
                problems[f"{path}.{method.__name__}"] = message
    return instance


def _is_below(problem: str, paths: set[str]) -> bool:
    return any(problem == path or problem.startswith(f"{path}.") for path in paths)


def _checked(field: dataclasses.Field, value: Any, path: str, problems: dict[str, str]) -> Any:
    check = check_of(field)
    if not check.holds(value):
        problems[path] = f"{path} is {value!r}; {check.allowed()}"
        return field.default
    return tuple(value) if isinstance(value, list) else value


def _checks_together(settings: type) -> Iterator[tuple[Callable[[Any], str | None], Sequence[str]]]:
    for method in vars(settings).values():
        if hasattr(method, "checks_together"):
            yield method, method.checks_together


def to_dict(settings: Any) -> dict[str, Any]:
    """Returns the plain values of a group, nested as the groups are; the inverse of `parse`."""
    values = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if "to_dict" in field.metadata:
            value = field.metadata["to_dict"](value)
        elif "group" in field.metadata:
            value = to_dict(value)
        values[field.name] = value
    return values


class Described(NamedTuple):
    """A setting with its path, for the reference of all settings and the resume policy."""

    path: str
    default: Any
    about: Setting
    allowed: str
    """Empty for a group."""


def describe(settings: type, path: str = "config", resumable: bool = False) -> Iterator[Described]:
    """Yields every setting and group of settings below a group.

    Args:
        settings: dataclass of the group.
        path: path of the group.
        resumable: whether all settings of the group may change when a run is resumed.
    """
    for field in dataclasses.fields(settings):
        where = f"{path}.{field.name}"
        if "group" in field.metadata:
            about = field.metadata["group"]
            yield Described(where, None, about, "")
            if "parse" not in field.metadata:
                yield from describe(field.default_factory, where, bool(about.resumable))  # type: ignore[arg-type]
        else:
            about = field.metadata.get("setting") or Setting("", None, False)
            if resumable:
                about = about._replace(resumable=True)
            yield Described(where, field.default, about, check_of(field).allowed())


def groups(settings: type) -> Iterator[tuple[str, type | None, Setting]]:
    """Yields the groups of settings directly below a group: name, dataclass and metadata.

    The dataclass is None if it depends on the values, as that of the loss does.
    """
    for field in dataclasses.fields(settings):
        if "group" in field.metadata:
            inner = None if "parse" in field.metadata else field.default_factory
            yield field.name, inner, field.metadata["group"]  # type: ignore[misc]
