"""What the parser says of a value of the wrong type, in the words that every other error has: what it is, and what was
expected."""

import ast
import dataclasses
import re
import types
import typing
from typing import Any

_KEY = re.compile(r'Parser key "([^"]+)":\s*')
_NO_MAPPING = "Expected a <class 'dict'>"
_UNION = "Does not validate against any of the Union subtypes"
_NO_SECTION = re.compile(
    r"path string: ((?:.|\n)*)|path format: ((?:.|\n)*)|given class_path '(.*)'|Import path (.*) does not correspond|"
    r"thus '(.*)' is not accepted as class_path|Got value: (.*)"
)
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def describe(said: str, section: type) -> str:
    """One line for an error of the parser; its own where that is not about a type of an option.

    Args:
        said: The parser's text, of several lines.
        section: The configuration that was parsed into.
    """
    parts = _KEY.split(said)
    # Of a whole section it says the name again and again.
    keys, rest = list(dict.fromkeys(parts[1::2])), parts[-1]
    name, kind = _option(".".join(keys), section) if keys else ("", None)
    if kind is None:
        return " ".join(_KEY.sub(r"--\1: ", said).split())
    if rest.startswith(_UNION):
        value = rest.partition("Given value: ")[2]
    elif _section(kind) is None:
        found = re.search("Got value: (.*)", rest)
        value = found and found[1]
    else:
        value = _of_a_section(parts[2 * parts[1::2].index(keys[-1]) + 2])
        # Of a mapping of sections it says the whole mapping, and what one of them was given.
        if typing.get_origin(kind) is dict and _NO_MAPPING not in rest:
            name, kind = f"{name}.NAME", _section(kind)
    if value is None:
        return f"{name} cannot be read as given, expected {_expected(kind)}"
    # It indents what follows a line break.
    value = re.sub(r"\n +", "\n", value)
    bare = re.fullmatch(r"[{\[].*|[-+.\d]+(e[-+]?\d+)?|null|true|false", value)
    plain = {"None": "null", "True": "true", "False": "false"}.get(value)
    given = plain or (value if bare else repr(value))
    # Of a list or a mapping the value may be one of its own.
    within = typing.get_origin(kind) in (dict, tuple) and _NO_MAPPING not in rest
    verb = "has" if within and "Expected a <class 'tuple'>" not in rest else "is"
    return f"{name} {verb} {given}, expected {_expected(kind)}"


def _of_a_section(said: str) -> str | None:
    """What a section was given that is no mapping, in the ways in which the parser says it."""
    if quoted := re.match(r"Unable to load config ('.*'|\".*\")$", said, re.MULTILINE):
        return ast.literal_eval(quoted[1])
    found = _NO_SECTION.search(said)
    return found and next(part for part in found.groups() if part is not None)


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
