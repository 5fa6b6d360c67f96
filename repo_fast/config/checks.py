"""Checks of a configuration's values: one error that names the key, the value, and what was expected."""

import dataclasses
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


def check_nulls(section: Any, prefix: str = "") -> None:
    """Raise `InputError` for the first value, in sections inside too, that is null where no null is meant.

    The parser lets null pass for a value of any type.
    """
    for entry in dataclasses.fields(section):
        value, key = getattr(section, entry.name), f"{prefix}{entry.name}"
        if value is None and type(None) not in typing.get_args(entry.type):
            raise InputError(f"{key} is null, expected a value")
        inside = value.items() if isinstance(value, dict) else [("", value)]
        for name, part in inside:
            if dataclasses.is_dataclass(part):
                check_nulls(part, f"{key}.{name}." if name else f"{key}.")
