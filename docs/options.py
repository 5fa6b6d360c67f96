"""A hook of MkDocs: the reference of every option, from the dataclasses that define them."""

import ast
import dataclasses
import inspect
import json
import textwrap
import typing
from collections.abc import Iterator

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from repo_fast.config import EvaluateConfig, JobConfig, ScoreConfig, SftConfig, TrainConfig

JOBS: dict[str, type[JobConfig]] = {
    "train": TrainConfig,
    "sft": SftConfig,
    "score": ScoreConfig,
    "evaluate": EvaluateConfig,
}

_GIVEN = (
    "On the command line an option is `--name value`; in the YAML file that `--config` names, each dot is a level. "
    "Recipes, `tiny` too, give values of their own: see [Recipes](recipes.md)."
)


@dataclasses.dataclass(frozen=True)
class Option:
    """An option, or a section of them.

    Attributes:
        name: Dotted; `NAME` stands for a name that users choose.
        type: As it is annotated; empty for a section.
        default: As in YAML; empty for a section, or where it has to be given.
        help: Its docstring, or the section's.
    """

    name: str
    type: str
    default: str
    help: str


def options(section: type, prefix: str = "", defaults: object = None) -> Iterator[Option]:
    """Every option of a configuration, each section's own before those in it.

    Args:
        section: Its dataclass.
        prefix: Of the names.
        defaults: One of it, whose values are the defaults, where they are not the dataclass's own.
    """
    texts, kinds = _docstrings(section), typing.get_type_hints(section)
    own = {
        entry.name: _default(entry) if defaults is None else getattr(defaults, entry.name)
        for entry in dataclasses.fields(section)
    }
    for name, default in own.items():
        if _section_of(kinds[name]) is None:
            yield Option(prefix + name, _type(kinds[name]), _yaml(default), texts.get(name, ""))
    for name, default in own.items():
        inner = _section_of(kinds[name])
        if inner is not None:
            named = ".NAME" if typing.get_origin(kinds[name]) is dict else ""
            yield Option(f"{prefix}{name}{named}", "", "", texts.get(name, "") or inspect.cleandoc(inner.__doc__ or ""))
            yield from options(inner, f"{prefix}{name}{named}.", default if isinstance(default, inner) else None)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for job, kind in JOBS.items():
        files.append(File.generated(config, f"reference/{job}.md", content=render(job, kind)))
    return files


def render(job: str, kind: type[JobConfig]) -> str:
    """A page of Markdown: a heading a section, a term an option."""
    lines = [f"# Options of `{job}`", "", inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0], ""]
    lines += [f"`repo-fast {job} --help` says the same. {_GIVEN}", ""]
    if kind.ALSO:
        lines += ["## On the command line alone { #command-line }", ""]
        for typed, does in kind.ALSO.items():
            lines += [f"`{typed}`{{ #{typed.partition(' ')[0].removeprefix('--')} }}", f":   {does}", ""]
        lines += ["## In the configuration { #configuration }", ""]
    for option in options(kind):
        if option.type:
            default = f", `{option.default}`" if option.default else ", to be given"
            lines += [
                f"`{option.name}`{{ #{option.name} }} *{option.type}{default}*",
                f":   {_one_line(option.help)}",
                "",
            ]
        else:
            lines += [f"## `{option.name}` {{ #{option.name} }}", "", option.help, ""]
    return "\n".join(lines)


def _docstrings(section: type) -> dict[str, str]:
    """Of fields: the strings below them, which Python itself does not keep."""
    found: dict[str, str] = {}
    for kind in reversed(section.__mro__):
        if dataclasses.is_dataclass(kind):
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
            body = typing.cast(ast.ClassDef, definition).body
            for field, text in zip(body, body[1:], strict=False):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(text, ast.Expr)
                    and isinstance(text.value, ast.Constant)
                ):
                    found[typing.cast(ast.Name, field.target).id] = inspect.cleandoc(str(text.value.value))
    return found


def _section_of(kind: typing.Any) -> type | None:
    """The dataclass that an option's value is, may be, or has by names."""
    return next((k for k in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(k)), None)


def _type(kind: typing.Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(f"`{choice}`" for choice in typing.get_args(kind))
    if typing.get_origin(kind) in (typing.Union, type(int | None)):
        return " | ".join(_type(part) for part in typing.get_args(kind))
    if kind is type(None):
        return "null"
    return getattr(kind, "__name__", str(kind)) if not typing.get_args(kind) else str(kind).replace("typing.", "")


def _default(entry: dataclasses.Field) -> object:
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()


def _yaml(value: object) -> str:
    if value is dataclasses.MISSING:
        return ""
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _one_line(text: str) -> str:
    return " ".join(text.split())
