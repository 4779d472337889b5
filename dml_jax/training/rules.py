"""Rules that a setting's value keeps or breaks, and what each says is allowed."""

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np

_INT32 = 2**31 - 1


class Rule(NamedTuple):
    """What may be in one place of a configuration."""

    allowed: str
    """To be read behind the value that is not."""
    holds: Callable[[Any], bool]
    """Takes any value whatever."""


def whole(least: int, most: int = _INT32) -> Rule:
    """A whole number within bounds, which are allowed themselves."""

    def holds(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    return Rule(f"it must be a whole number from {least} to {most}", holds)


def number(
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
) -> Rule:
    """A number within bounds, finite, and still so when it is rounded to float32."""
    bounds = {"at least": least, "above": above, "below": below, "at most": most}
    said = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if abs(bound) < 1e38)

    def holds(value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > 1e38:
            return False
        rounded = float(np.float32(value))
        return least <= rounded <= most and above < rounded < below

    return Rule(" ".join(["it must be a finite number", said]).strip(), holds)


def flag() -> Rule:
    """True or False."""
    return Rule("it must be True or False", lambda value: isinstance(value, bool))


def choice(names: Collection[str]) -> Rule:
    """One of some names."""
    return Rule(
        f"choose one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names
    )


def text(allowed: str, holds: Callable[[str], bool]) -> Rule:
    """A string, without the character that no file's name may have."""
    return Rule(
        allowed, lambda value: isinstance(value, str) and "\0" not in value and holds(value)
    )


def optional(rule: Rule) -> Rule:
    """None, or what a rule allows."""
    return Rule(f"{rule.allowed}, or None", lambda value: value is None or rule.holds(value))


def several(each: Rule, allowed: str, holds: Callable[[Collection[Any]], bool]) -> Rule:
    """A tuple or list of what a rule allows, which keep another together."""

    def all_hold(values: Any) -> bool:
        return isinstance(values, tuple | list) and all(map(each.holds, values)) and holds(values)

    return Rule(allowed, all_hold)
