"""Every command and snippet in a block of a page of the site is run or parsed: a reader will copy it.

What is run stands in `tests/test_docs.py`, and `docs/start/your-own.md` is followed by `tests/test_strangers_path.py`.
"""

import importlib.util
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import torch

from docs.repository import pages
from repo_fast import __main__ as repo_fast_command
from repo_fast import launcher
from repo_fast.config import ScoreConfig, TrainConfig, parse

ROOT = Path(__file__).parent.parent
PLACES = {*pages().values(), *(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))}
SHOWN = sorted(PLACES - {"docs/start/your-own.md"})
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
# By how it begins, why a line is neither run nor parsed here.
NOT_RUN = {
    "source .venv/bin/activate": "the shell's own",
    "pip install": "needs a network",
    ".venv/bin/pip install": "needs a network",
    "jupyter lab": "opens a browser; tests/test_notebooks.py executes the notebooks",
    "bash .carry/": "prepare.sh makes these, for a machine with a GPU",
    "repo-fast score --convert": "test_docs.py runs it, on a model that is made there",
    "repo-fast score --check": "test_docs.py runs it, on what was converted",
    "repo-fast evaluate --verify": "test_strangers_path.py runs it, on a certificate that is made there",
}
# By how it begins, what a snippet of YAML leaves out.
LEFT_OUT = {"constraints:": "reward: {path: 'repo_fast.world.rules:reward'}\n", "heads:": "kind: cost\n"}


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for _, block in found]


def lines(page: str) -> list[str]:
    """The commands of its blocks, each of a loop by itself, without comments and what is set before them."""
    joined = "".join(blocks(page, "bash")).replace("\\\n", " ")
    found = [re.sub(r"^for \w+ in [^;]*; do (.*); done$", r"\1", line) for line in joined.splitlines()]
    words = [shlex.split(line, comments=True) for line in found]
    return [re.sub(r"^(\w+=\S* )+", "", shlex.join(own)) for own in words if own]


def not_run(line: str) -> list[str]:
    return [start for start in NOT_RUN if line.startswith(start)]


@pytest.fixture
def on_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs end where ranks would be started: once all of the command line is known to be good."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(launcher, "run_ranks", lambda *arguments: 0)


@pytest.mark.parametrize("page", [page for page in SHOWN if lines(page)])
def test_every_command_shown_parses(page: str, on_no_ranks: None) -> None:
    for line in lines(page):
        if not not_run(line):
            check(shlex.split(line))


def test_every_reason_not_to_run_a_command_is_needed() -> None:
    used = {start for page in PLACES for line in lines(page) for start in not_run(line)}
    assert NOT_RUN.keys() == used


def check(words: list[str]) -> None:
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "torchrun":
        program, rest = "python", rest[rest.index("-m") :]
    if program == "repo-fast":
        check_own(rest)
    elif program == "make":
        assert {word for word in rest if "=" not in word} <= TARGETS
        given = " ".join(word.partition("=")[2] for word in rest if word.startswith("ARGS="))
        if "train" in rest:
            check_own(["train", *shlex.split(given)])
    elif program == "python" and rest[0] == "-m" and rest[1].startswith("repo_fast."):
        check_own([rest[1].removeprefix("repo_fast."), *rest[2:]])
    elif program == "python" and rest[0] == "-m":
        found = importlib.util.find_spec(rest[1])
        if found is not None and found.submodule_search_locations is not None:
            found = importlib.util.find_spec(f"{rest[1]}.__main__")
        assert found is not None and found.origin is not None, f"no module {rest[1]}"
        check_options(Path(found.origin), rest[2:])
    elif program in ("python", "bash"):
        check_options(ROOT / rest[0], rest[1:])
    else:
        raise AssertionError(f"{shlex.join(words)}: it is not known how to parse it; NOT_RUN says why others are not")


def check_own(words: list[str]) -> None:
    """The words behind `repo-fast`."""
    command, rest = words[0], words[1:]
    if command in repo_fast_command.JOBS:
        assert repo_fast_command.main(words) == 0
    elif command == "doctor":
        assert not rest
    else:
        _, others = repo_fast_command.entry_point(command).command_line().parse_known_args(rest)
        if command == "plan":
            parse(others, TrainConfig)
        else:
            assert not others


def check_options(program: Path, words: list[str]) -> None:
    """Those of a program of the repository stand in its text."""
    text = program.read_text(encoding="utf-8")
    for option in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert f'"{option}"' in text, f"{program} has no {option}"


@pytest.mark.parametrize("page", [page for page in SHOWN if blocks(page, "yaml")])
def test_every_yaml_shown_parses(page: str, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(page, "yaml")):
        start = block.split(maxsplit=1)[0]
        packaged = re.match(r'--8<-- "(\S+)"', block)
        text = (ROOT / packaged[1]).read_text(encoding="utf-8") if packaged else LEFT_OUT.get(start, "") + block
        path = tmp_path / f"{number}.yaml"
        path.write_text(text, encoding="utf-8")
        config = parse(["--config", str(path)], ScoreConfig if start == "heads:" else TrainConfig)
        if start == "constraints:":
            assert isinstance(config, TrainConfig)
            assert list(config.constraints) == re.findall(r"^  (\w+):", block, re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in SHOWN if blocks(page, "python")])
def test_every_python_shown_compiles(page: str) -> None:
    for block in blocks(page, "python"):
        compile(block, page, "exec")
