"""Checks of a configuration's values: one error that names the key, the value, and what was expected."""

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from repo_fast.errors import InputError

# Limits: of these infinity says that there is none.
MAY_BE_INFINITE = ("clip_high", "gradient_clip", "kl_bound", "multiplier_max", "score_clamp", "value_clip")


def require(condition: bool, key: str, value: object, expected: str) -> None:
    """Raise `InputError` unless a value is as expected."""
    if not condition:
        raise InputError(f"{key} is {value!r}, expected {expected}")


def require_at_least(minimum: int, values: Mapping[str, float | None]) -> None:
    """Raise `InputError` for the first value below the minimum; null is none."""
    for key, value in values.items():
        if value is not None:
            kind = "whole number" if minimum else "number"
            require(value >= minimum, key, value, f"a {kind} of at least {minimum}")


def check_given(section: Any) -> None:
    """Raise `InputError` for the first value, in sections inside too, that is null where no null is meant, NaN, or a
    text with a zero byte, which no path has.

    The parser lets null pass for a value of any type, and no comparison would find a NaN.
    """
    for key, value in _values(section):
        if isinstance(value, float) and math.isnan(value):
            raise InputError(f"{key} is nan, expected a value that can be compared")
        if isinstance(value, str) and "\0" in value:
            raise InputError(f"{key} is {value!r}, expected a text without a zero byte")


def check_finite(section: Any) -> None:
    """Raise `InputError` for the first number, in sections inside too, that is infinite where that is no limit."""
    for key, value in _values(section):
        unlimited = key.split(".")[-1] in MAY_BE_INFINITE
        if isinstance(value, float) and math.isinf(value) and not unlimited:
            raise InputError(f"{key} is {value}, expected a finite number")


def check_unused(key: str, section: Any, expected: str) -> None:
    """Raise `InputError` for the first value of a section that is not its default."""
    default = type(section)()
    for entry in dataclasses.fields(section):
        value = getattr(section, entry.name)
        require(value == getattr(default, entry.name), f"{key}.{entry.name}", value, expected)


def _values(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a section and of those inside, by their dotted names."""
    for entry in dataclasses.fields(section):
        value, key = getattr(section, entry.name), f"{prefix}{entry.name}"
        if value is None and type(None) not in typing.get_args(entry.type):
            raise InputError(f"{key} is null, expected a value")
        yield from _parts(key, value)


def _parts(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(value):
        yield from _values(value, f"{key}.")
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _parts(f"{key}.{name}", part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _parts(key, part)
    else:
        yield key, value
