"""A hook of MkDocs: the reference of the tools beside the jobs, from the parsers of their command lines."""

import argparse
from collections.abc import Iterator

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from repo_fast.__main__ import TOOLS, entry_point


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "reference/tools.md", content=render()))
    return files


def render() -> str:
    """A page of Markdown: a heading a tool, a term an argument or option."""
    lines = ["# The tools", "", "What is around the jobs. `repo-fast TOOL --help` says the same.", ""]
    for tool, summary in TOOLS.items():
        lines += [f"## {tool} {{ #{tool} }}", "", f"{summary[0].upper()}{summary[1:]}.", ""]
        module = entry_point(tool)
        if hasattr(module, "command_line"):
            lines += _described(tool, module.command_line())
        else:
            lines += [f"`repo-fast {tool}` takes no options.", ""]
    return "\n".join(lines)


def _described(tool: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    usage = " ".join(parser.format_usage().removeprefix("usage: ").replace("[-h] ", "").split())
    yield from ("```", usage, "```", "")
    # What its first line says is said above.
    yield from ((parser.description or "").partition("\n\n")[2], "")
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction):
            name = action.option_strings[0] if action.option_strings else action.dest
            yield f"`{' '.join([name, *_values(action)])}`{{ #{tool}.{action.dest} }} *{_default(action)}*"
            # The default has its own place here.
            yield from (f":   {(action.help or '').replace(' (default: %(default)s)', '')}", "")
    if parser.epilog:
        yield from (parser.epilog, "")


def _values(action: argparse.Action) -> list[str]:
    """What follows an option."""
    if not action.option_strings or action.nargs == 0:
        return []
    if action.choices is not None:
        return ["|".join(map(str, action.choices))]
    named = action.metavar or action.dest.upper()
    return [named] if isinstance(named, str) else list(named)


def _default(action: argparse.Action) -> str:
    if action.nargs == 0:
        return "off unless given"
    if action.required:
        return "to be given"
    return "none" if action.default is None else f"`{action.default}`"
