"""Checks of a configuration's values: one error that names the key, the value, and what was expected."""

from collections.abc import Mapping

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
