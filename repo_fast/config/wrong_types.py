"""What the parser says of a value of the wrong type, in the words that every other error has: what it is, and what was
expected."""

import ast
import dataclasses
import difflib
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
_UNKNOWN = re.compile(r"(?:Group '(?P<group>.*)' does not accept option|Option) '(?P<option>.*)'")
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
    as_said = " ".join(_KEY.sub(r"--\1: ", said).split())
    if unknown := _UNKNOWN.search(rest):
        where = _dotted([*keys, *filter(None, [unknown["group"]])])
        return _unknown(where, unknown["option"], section) or as_said
    name, kind = _option(_dotted(keys), section) if keys else ("", None)
    if kind is None:
        return as_said
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
        return as_said
    # It indents what follows a line break.
    value = re.sub(r"\n +", "\n", value)
    bare = re.fullmatch(r"[{\[].*|[-+.\d]+(e[-+]?\d+)?|null|true|false", value)
    plain = {"None": "null", "True": "true", "False": "false"}.get(value)
    given = plain or (value if bare else repr(value))
    # Of a list or a mapping the value may be one of its own.
    within = typing.get_origin(kind) in (dict, tuple) and _NO_MAPPING not in rest
    verb = "has" if within and "Expected a <class 'tuple'>" not in rest else "is"
    return f"{name} {verb} {given}, expected {_expected(kind)}"


def _dotted(keys: list[str]) -> str:
    """The whole name, of names of which some begin anew, and some where the one before ends."""
    name = ""
    for key in keys:
        name = key if not name or key == name or key.startswith(f"{name}.") else f"{name}.{key}"
    return name


def _unknown(dotted: str, option: str, section: type) -> str | None:
    """Of an option that a section is given in a mapping on the command line; None where there is no such section."""
    name, kind = _option(dotted, section)
    inside = _section(kind)
    if inside is None:
        return None
    own = f"{name}.NAME" if typing.get_origin(kind) is dict else name
    names = [entry.name for entry in dataclasses.fields(inside)]
    near = difflib.get_close_matches(option, names, n=1, cutoff=0.0)[0]
    return f"unknown option '{own}.{option}' in the command line, the nearest valid name is '{own}.{near}'"


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
    if origin is list:
        return f"a list, each {_expected(parts[0])}"
    if origin is dict:
        return "a mapping by names" if _section(parts[1]) else f"a mapping from names to {_expected(parts[1])}"
    if dataclasses.is_dataclass(kind):
        return "a mapping of options"
    return _WORDS.get(kind, str(kind))
