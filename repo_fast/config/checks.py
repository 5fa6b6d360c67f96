"""Checks of a configuration's values: one error that names the key, the value, and what was expected."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

from repo_fast.errors import InputError


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


def check_given(section: Any, prefix: str = "") -> None:
    """Raise `InputError` for the first value, in sections inside too, that is null where no null is meant, NaN, or a
    text with NUL.

    The parser lets null pass for a value of any type, and no comparison would find a NaN.
    """
    for entry in dataclasses.fields(section):
        value, key = getattr(section, entry.name), f"{prefix}{entry.name}"
        if value is None and type(None) not in typing.get_args(entry.type):
            raise InputError(f"{key} is null, expected a value")
        _check_parts(key, value)


def _check_parts(key: str, value: Any) -> None:
    if isinstance(value, str):
        # No file can have such a name, and YAML can write it.
        require("\0" not in value, key, value, "a text without the character NUL")
    if isinstance(value, float) and math.isnan(value):
        raise InputError(f"{key} is nan, expected a value that can be compared")
    if dataclasses.is_dataclass(value):
        check_given(value, f"{key}.")
    elif isinstance(value, dict):
        for name, part in value.items():
            _check_parts(f"{key}.{name}", part)
    elif isinstance(value, list | tuple):
        for part in value:
            _check_parts(key, part)
