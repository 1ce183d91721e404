"""Which values a setting may have, stated in its annotation and checked from there.

@dataclasses.dataclass(frozen=True)
class Settings:
    kind: Literal["decay", "table"] = "decay"
    width: Annotated[int, at_least(1)] = 1024
    limit: Annotated[int, at_least(1)] | None = None

    def __post_init__(self):
        check_settings(self, "settings.")
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

from lazyattn.errors import require


@dataclasses.dataclass(frozen=True)
class Allowed:
    """A rule for a value of the annotated type.

    Attributes:
      holds: whether a value keeps it; NaN keeps none.
      words: what it says, continuing "it must be ...".
    """

    holds: Callable[[Any], bool]
    words: str


def at_least(least: float) -> Allowed:
    """Allows numbers from `least` on."""
    return Allowed(lambda value: value >= least, f"at least {least}")


def one_of(names: Iterable[str]) -> Allowed:
    """Allows names that are too many, or come from a table, for a `Literal`."""
    names = tuple(names)
    return Allowed(lambda value: value in names, "one of " + ", ".join(names))


FINITE = Allowed(math.isfinite, "finite")
POSITIVE = Allowed(lambda value: 0 < value < math.inf, "positive and finite")
NON_NEGATIVE = Allowed(lambda value: 0 <= value < math.inf, "non-negative and finite")
SHARE = Allowed(lambda value: 0 <= value <= 1, "from 0 to 1")
BELOW_ONE = Allowed(lambda value: 0 <= value < 1, "from 0 to below 1")


def check_settings(settings: Any, where: str) -> None:
    """Checks every field of a dataclass whose annotation says what is allowed.

    It may be a `Literal` of texts, or `Annotated` with one `Allowed`. None is always right where
    the type admits it; the message says so for `Annotated[int | None, rule]`, not for
    `Annotated[int, rule] | None`.

    Args:
      settings: an instance.
      where: what stands before a field's name in a message, e.g. "training." or "--".

    Raises:
      InputError: for the first field with another value.
    """
    cls: Any = type(settings)
    for name, rule in _rules(cls):
        value = getattr(settings, name)
        require(rule.holds(value), where + name, value, rule.words)


@functools.cache
def _rules(cls: Any) -> tuple[tuple[str, Allowed], ...]:
    hints = typing.get_type_hints(cls, include_extras=True)
    found = ((field.name, _rule(hints[field.name])) for field in dataclasses.fields(cls))
    return tuple((name, rule) for name, rule in found if rule is not None)


def _rule(hint: Any) -> Allowed | None:
    """Returns the rule in an annotation, if it has one."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        *most, last = parts
        words = f"{', '.join(most)} or {last}" if most else last
        return Allowed(lambda value: value in parts, words)
    if origin is typing.Annotated:
        rule = next((part for part in hint.__metadata__ if isinstance(part, Allowed)), None)
        if rule is not None and type(None) in typing.get_args(hint.__origin__):
            return _or_none(rule, f"None or {rule.words}")
        return rule
    if origin in (types.UnionType, typing.Union):
        rule = next(filter(None, map(_rule, parts)), None)
        return rule and _or_none(rule, rule.words)
    return None


def _or_none(rule: Allowed, words: str) -> Allowed:
    return Allowed(lambda value: value is None or rule.holds(value), words)
