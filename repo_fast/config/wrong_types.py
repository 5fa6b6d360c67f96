"""What the parser says of a value of the wrong type, in the words that every other error has: what it is, and what was
expected."""

import dataclasses
import re
import types
import typing
from typing import Any

_KEY = re.compile(r'Parser key "([^"]+)":\s*')
_UNION = "Does not validate against any of the Union subtypes"
_OF_A_SECTION = r'(?:Unable to load config "|path string: |Got value: )(.*?)"?(?:\n|$)'
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def describe(said: str, section: type) -> str:
    """One line for an error of the parser; its own where that is not about a type of an option.

    Args:
        said: The parser's text, of several lines.
        section: The configuration that was parsed into.
    """
    # Of a whole section it says the name again and again.
    keys = list(dict.fromkeys(_KEY.findall(said)))
    rest = _KEY.split(said)[-1]
    name, kind = _option(".".join(keys), section) if keys else ("", None)
    whole = kind is not None and _section(kind) is not None and len(keys) == 1
    if whole:
        found = re.search(_OF_A_SECTION, rest)
        # Of a mapping of sections it says the whole mapping, and what one of them was given.
        name, kind = f"{name}.NAME" if typing.get_origin(kind) is dict else name, _section(kind)
    else:
        found = re.search("Given value: (.*)" if rest.startswith(_UNION) else "Got value: (.*)", rest)
    if found is None or kind is None:
        return " ".join(_KEY.sub(r"--\1: ", said).split())
    bare = re.fullmatch(r"[{\[].*|[-+.\d]+(e[-+]?\d+)?|null|true|false", found[1])
    plain = {"None": "null", "True": "true", "False": "false"}.get(found[1])
    value = plain or (found[1] if bare else repr(found[1]))
    # Of a list or a mapping the value may be one of its own.
    within = typing.get_origin(kind) in (dict, tuple) and "Expected a <class 'dict'>" not in rest
    verb = "has" if within and "Expected a <class 'tuple'>" not in rest else "is"
    return f"{name} {verb} {value}, expected {_expected(kind)}"


def _option(dotted: str, section: type) -> tuple[str, Any]:
    """An option's name, and its type; None where there is no such option."""
    name, kind = "", typing.cast(Any, section)
    for part in dotted.split("."):
        inside = _section(kind)
        if inside is None:
            return dotted, None
        # Of a mapping of sections the parser does not say which.
        prefix = f"{name}.NAME." if typing.get_origin(kind) is dict else f"{name}." if name else ""
        fields = {entry.name: entry.type for entry in dataclasses.fields(inside)}
        if part not in fields:
            return dotted, None
        name, kind = f"{prefix}{part}", fields[part]
    return name, kind


def _section(kind: Any) -> Any:
    """The section that a type is, may be, or has by names; None where it is of none."""
    return next((own for own in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(own)), None)


def _expected(kind: Any) -> str:
    """Values of a type, in words."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ("one of " if len(parts) > 1 else "") + ", ".join(map(str, parts))
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(_expected(part) for part in parts)
    if origin is tuple:
        each = _expected(parts[0])
        if ... in parts:
            return f"a list, each {each}" if each.startswith("one of") else f"a list of {each}"
        return f"[{', '.join(map(_expected, parts))}]"
    if origin is dict:
        inside = _WORDS.get(parts[1])
        return f"a mapping from names to {inside}" if inside else "a mapping by names"
    if dataclasses.is_dataclass(kind):
        return "a mapping of options"
    return _WORDS.get(kind, str(kind))
