"""How a command line and a YAML file become a configuration.

A run is a YAML file of sections, chosen by name (`repo_fast/configs/`) or by path, with single values changed on the
command line: `--config tiny --rollout.temperature 0.8`. Of several files the later ones change what the earlier say.
`parse` returns the resolved configuration or raises `InputError`; checks that need only the configuration are all made
there, before anything is loaded.
"""

import argparse
import dataclasses
import datetime
import difflib
import sys
import typing
from pathlib import Path
from typing import TypeVar

import yaml

from repo_fast.config.sections import JobConfig
from repo_fast.config.train import TrainConfig
from repo_fast.config.wrong_types import describe
from repo_fast.errors import InputError, readable
from repo_fast.report.plain_yaml import load_yaml

CONFIG_FOLDER = Path(__file__).parent.parent / "configs"
Config = TypeVar("Config", bound=JobConfig)
_COMMAND_LINE = "the command line"


def known_keys(section: type = TrainConfig, prefix: str = "") -> list[str]:
    """The dotted names of every option and section."""
    keys = []
    for entry in dataclasses.fields(section):
        keys.append(prefix + entry.name)
        for kind in (entry.type, *typing.get_args(entry.type)):
            # A section, or one that may be null.
            if dataclasses.is_dataclass(kind) and typing.get_origin(entry.type) is not dict:
                keys += known_keys(typing.cast(type, kind), f"{prefix}{entry.name}.")
    return keys


def _tables(section: type, prefix: str = "") -> dict[str, type]:
    """The dotted names of the options that are mappings, and the type of their values."""
    found: dict[str, type] = {}
    for entry in dataclasses.fields(section):
        kind = typing.cast(type, entry.type)
        if dataclasses.is_dataclass(kind):
            found |= _tables(kind, f"{prefix}{entry.name}.")
        elif typing.get_origin(kind) is dict:
            found[prefix + entry.name] = typing.get_args(kind)[1]
    return found


def _reject_unknown(keys: list[str], where: str, section: type, prefix: str = "") -> None:
    known, tables = known_keys(section, prefix), _tables(section, prefix)
    for key in keys:
        if where == _COMMAND_LINE and dataclasses.is_dataclass(tables.get(key)):
            # The parser would take a part of those in the file for this.
            raise InputError(
                f"--{key} with a whole mapping, expected --{key}.NAME.OPTION, or `{key}:` in a file for --config"
            )
        table = next((table for table in tables if key.startswith(f"{table}.")), None)
        if table is not None and prefix and where == _COMMAND_LINE:
            raise InputError(f"--{key}: expected --{table} with all of it, as in --{table} '{{NAME: VALUE}}'")
        if table is not None:
            # What a table has below it are the user's own names; a section may follow.
            name, _, rest = key.removeprefix(f"{table}.").partition(".")
            if rest and dataclasses.is_dataclass(tables[table]):
                _reject_unknown([key], where, tables[table], f"{table}.{name}.")
        elif key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise InputError(f"unknown option {key!r} in {where}, the nearest valid name is {near!r}")


def _dotted(mapping: dict, prefix: str = "") -> list[str]:
    keys = []
    for key, value in mapping.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += _dotted(value, f"{prefix}{key}.")
    return keys


def find_config(name: str, kind: type[JobConfig] = TrainConfig) -> Path:
    """The file of a packaged configuration's name, or the path itself."""
    folder = CONFIG_FOLDER / kind.FOLDER
    packaged = folder / f"{name}.yaml"
    with readable(Path(name)):
        for path in (packaged, Path(name)):
            if path.is_file():
                return path
    names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise InputError(f"--config {name!r} is neither a file nor one of the packaged configurations: {names}")


def read_config_file(path: Path, kind: type = TrainConfig) -> dict:
    """The mapping of a YAML file, with unknown keys rejected.

    Raises:
        InputError: The file cannot be read, is not YAML, not a mapping, or has an unknown key or one twice.
    """
    with readable(path):
        content = path.read_bytes()
    try:
        mapping = load_yaml(content.decode("utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(mapping, dict):
        raise InputError(f"{path} holds a {type(mapping).__name__}, expected a mapping of options")
    if isinstance(mapping.get("date"), datetime.date):
        # YAML's own type, where it stands without quotes.
        mapping["date"] = mapping["date"].isoformat()
    _check_job(list(mapping), kind, str(path))
    _check_sections(mapping, kind, str(path))
    _reject_unknown(_dotted(mapping), str(path), kind)
    return mapping


def _check_job(names: list[str], kind: type, where: str) -> None:
    """Raises InputError for a file that is a configuration, but of another job: the nearest names would not help."""
    if not issubclass(kind, JobConfig) or set(names) <= _names(kind):
        return
    for other in _jobs(JobConfig):
        if set(names) <= _names(other):
            raise InputError(f"{where} is a configuration of `{other.PROGRAM}`, expected one of `{kind.PROGRAM}`")


def _names(kind: type) -> set[str]:
    return {entry.name for entry in dataclasses.fields(kind)}


def _jobs(kind: type[JobConfig]) -> list[type[JobConfig]]:
    """The configurations of all jobs."""
    found = [job for child in kind.__subclasses__() for job in _jobs(child)]
    return found + [kind] * hasattr(kind, "PROGRAM")


def _check_sections(mapping: dict, section: type, where: str, prefix: str = "") -> None:
    for entry in dataclasses.fields(section):
        if dataclasses.is_dataclass(entry.type) and entry.name in mapping:
            value = mapping[entry.name]
            if not isinstance(value, dict):
                raise InputError(f"{where}: {prefix}{entry.name} is {_plain(value)}, expected a mapping of options")
            _check_sections(value, typing.cast(type, entry.type), where, f"{prefix}{entry.name}.")
    for table, kind in _tables(section, prefix).items():
        value = mapping.get(table.removeprefix(prefix))
        if dataclasses.is_dataclass(kind) and isinstance(value, dict):
            for name, own in value.items():
                if "." in str(name):
                    raise InputError(f"{where}: {table} has the name {name!r}, expected one without a dot")
                if not isinstance(own, dict):
                    raise InputError(f"{where}: {table}.{name} is {_plain(own)}, expected a mapping of options")
                _check_sections(own, kind, where, f"{table}.{name}.")


def _plain(value: object) -> str:
    return "null" if value is None else repr(value)


def _parser(kind: type[JobConfig]):
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=kind.PROGRAM, description=(kind.__doc__ or "").partition("\n")[0], exit_on_error=False
    )
    parser.add_argument(
        "--config",
        default=kind.DEFAULT,
        help="Packaged configuration by name, or a YAML file; given again, what it says is changed in the one before.",
    )
    parser.add_argument("--print_config", action="store_true", help="Print the resolved configuration and exit.")
    parser.add_class_arguments(kind)
    return parser


def _add_what_else_there_is(parser, kind: type[JobConfig]) -> None:
    """To what `--help` lists: none of it is an option of the configuration, so the parser must not take it."""
    if kind.ALSO:
        group = parser.add_argument_group("on the command line alone")
        for typed, does in kind.ALSO.items():
            name, _, value = typed.partition(" ")
            shape = {"metavar": value} if value else {"action": "store_true"}
            group.add_argument(name, help=does, default=argparse.SUPPRESS, **shape)


def parse(arguments: list[str] | None = None, kind: type[Config] = TrainConfig) -> Config:  # type: ignore[assignment]
    """Resolve the command line.

    Args:
        arguments: Command-line words; `sys.argv[1:]` by default.
        kind: The configuration of the job.

    Returns:
        The resolved configuration. `--help` and `--print_config` print and exit with status 0.

    Raises:
        InputError: An unknown option (with the nearest valid name), a value of the wrong type, or a combination that
            cannot be honoured.
    """
    import jsonargparse

    arguments = sys.argv[1:] if arguments is None else arguments
    options = [word.split("=")[0][2:] for word in arguments if word.startswith("--")]
    _reject_unknown([o for o in options if o not in ("config", "print_config", "help")], _COMMAND_LINE, kind)
    parser = _parser(kind)
    try:
        helped = [word for word in arguments if word in ("--help", "-h")]
        if helped:
            _add_what_else_there_is(parser, kind)
        base: dict = {}
        for words in [helped] if helped else _config_words(arguments) or [[]]:
            name = parser.parse_args(words).config
            base = base if name is None else _changed(base, read_config_file(find_config(name, kind), kind))
        # Through the parser, which checks types, as for the command line; defaults it would take as they are.
        namespace = parser.parse_object(base)
        namespace = parser.parse_args([word for word in arguments if word != "--print_config"], namespace=namespace)
        # Below names that users choose the parser takes null for a section.
        _check_sections(namespace.as_dict(), kind, _COMMAND_LINE)
        built = parser.instantiate_classes(namespace)
    except (jsonargparse.ArgumentError, TypeError, KeyError) as error:
        raise InputError(describe(str(error), kind)) from error
    except OverflowError as error:
        raise InputError(
            "an option is a whole number of more than 308 digits, expected one that a float holds"
        ) from error
    # By item: a section's name may also be that of one of the namespace's methods.
    config = kind(**{entry.name: built[entry.name] for entry in dataclasses.fields(kind)})
    if "--print_config" in arguments:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def _config_words(arguments: list[str]) -> list[list[str]]:
    """The words of each `--config` of a command line."""
    words = []
    for index, word in enumerate(arguments):
        if word.startswith("--config="):
            words.append([word])
        elif word == "--config":
            words.append(arguments[index : index + 2])
    return words


def _changed(mapping: dict, by: dict) -> dict:
    """A file's options, with those of a later one in their place."""
    changed = dict(mapping)
    for name, value in by.items():
        before = mapping.get(name)
        both = isinstance(before, dict) and isinstance(value, dict)
        changed[name] = _changed(before, value) if both else value
    return changed


def to_dict(config: JobConfig) -> dict:
    """The configuration as plain mappings, lists and scalars."""

    return typing.cast(dict, as_plain(config))


def as_plain(value: typing.Any) -> typing.Any:
    """A section, or a value of an option, as plain mappings, lists and scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return as_plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {key: as_plain(entry) for key, entry in value.items()}
    return [as_plain(entry) for entry in value] if isinstance(value, (tuple, list)) else value


def to_yaml(config: JobConfig) -> str:
    """The configuration as YAML that `--config` reads back to an equal one."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)
