"""A wrong value for every option, made from its type; half of them in a configuration file."""

import dataclasses
import itertools
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from repo_fast.config import EvaluateConfig, ScoreConfig, SftConfig, TrainConfig
from repo_fast.config.checks import MAY_BE_INFINITE
from tests.campaign.given import EVALUATE, SCORE, SFT, TRAIN, Bad

_JOBS = ((TrainConfig, TRAIN), (SftConfig, SFT), (ScoreConfig, SCORE), (EvaluateConfig, EVALUATE))
# Sections of the same type as `reward`.
_SKIPPED = re.compile(r"evaluation\.second_reward\..*|(cost|suites\.refusal)\.(guard|judge)\..*")
# May be below zero; all other numbers may not.
_SIGNED = {
    "algorithm.threshold",
    "threshold",
    "algorithm.reward_cap",
    "suites.refusal.threshold",
    "algorithm.confidence_z",
}


def bad() -> Iterator[Bad]:
    seen: set[str] = set()
    # The kinds of wrong take turns, for each type.
    turns: dict[str, Iterator[int]] = {}
    for kind, words in _JOBS:
        for name, type_ in _options(kind):
            if name in seen or _SKIPPED.fullmatch(name):
                continue
            seen.add(name)
            wrong = _wrong(name, type_)
            turn = next(turns.setdefault(f"{type_}", itertools.count()))
            yield _bad(words, name, *wrong[turn % len(wrong)])


def _options(section: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for entry in dataclasses.fields(section):
        if dataclasses.is_dataclass(entry.type):
            yield from _options(typing.cast(type, entry.type), f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, entry.type


def _wrong(name: str, type_: Any) -> list[tuple[str, Any]]:
    """Ways in which a value can be wrong: where it stands, and the value. In a file it is not a text."""
    inner = [kind for kind in typing.get_args(type_) if kind is not type(None)]
    is_union = typing.get_origin(type_) in (typing.Union, types.UnionType)
    may_be_null = is_union and len(inner) < len(typing.get_args(type_))
    if is_union and len(inner) == 1:
        return [way for way in _wrong(name, inner[0]) if way[1] is not None]
    null = [] if may_be_null else [("file", None)]
    origin = typing.get_origin(type_)
    if type_ is bool or is_union:
        return [("line", "perhaps"), ("file", [True]), ("line", "2"), *null]
    if type_ in (int, float):
        ways: list[tuple[str, Any]] = [("line", "many"), ("file", [1, 2]), *null, ("file", {"a": 1})]
        ways += [] if name in _SIGNED else [("line", "-1")]
        ways += [("line", "1.5")] if type_ is int else [("line", "nan")]
        return ways + ([] if type_ is int or name.split(".")[-1] in MAY_BE_INFINITE else [("file", float("inf"))])
    if origin is typing.Literal:
        return [("line", "abacus"), ("file", ["abacus"]), ("file", 7.5), *null]
    if type_ is str:
        return [("file", {"a": "b"}), ("misspelt", "x"), ("file", ["a", "b"]), *null]
    if origin is tuple:
        return [("file", {"a": 1}), ("line", "[[1]]"), ("file", 7), *null]
    assert origin is dict, type_
    return [("file", [1]), ("file", "abacus"), *null]


def _bad(words: tuple[str, ...], name: str, where: str, value: Any) -> Bad:
    job = words[0].removeprefix("repo_fast.")
    said = re.escape(name)
    if where == "misspelt":
        wrong = name[:-2] + name[-1] + "q"
        says = rf"unknown option '{re.escape(wrong)}' in the command line, the nearest valid name is "
        return Bad(f"{job} --{wrong} {value}", (*words, f"--{wrong}", str(value)), says)
    if where == "line":
        # An option that is given twice is the last.
        return Bad(
            f"{job} --{name} {value}", (*words, f"--{name}={value}"), rf"{said}\b.*{re.escape(value.strip('[]'))}"
        )

    def write(folder: Path) -> None:
        path = folder / (words[words.index("--config") + 1] if "--config" in words else "none")
        content = yaml.safe_load(path.read_text()) if path.exists() else {}
        options = content
        *sections, option = name.split(".")
        for section in sections:
            options = options.setdefault(section, {})
        options[option] = value
        (folder / "wrong.yaml").write_text(yaml.safe_dump(content))

    # Words would take the place of what the file says.
    if f"--{name}" in words:
        at = words.index(f"--{name}")
        words = (*words[:at], *words[at + 2 :])
    shown = "null" if value is None else str(value)
    return Bad(f"{job} {name}: {shown} in a file", (*words, "--config", "wrong.yaml"), said, write)
