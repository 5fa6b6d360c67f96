"""A folder in which everything is right, commands for it, and trials of both with one thing wrong.

What has to come of that is one line that names the thing, the exit status for it, and nothing touched.
"""

import atexit
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from tests.campaign.book import Trial
from tests.campaign.entry_points import Ended, end_of
from tests.job_runs import DEMONSTRATIONS, OPTIONS, PROMPTS, write_lines
from tests.supervised_runs import COMMON, PAIRS
from tests.tiny import save_beaver, save_policy

# The commands that are right, from which a trial's differs in one thing.
TRAIN = ("repo_fast.train", "--config", "train.yaml", "--output_dir", "out")
SFT = ("repo_fast.sft", "--config", "sft.yaml", "--output_dir", "out")
SCORE = ("repo_fast.score", "--config", "score.yaml", "--output_dir", "out")
EVALUATE = (
    *("repo_fast.evaluate", "--policy", "before=policy", "--prompts", "prompts.jsonl", "--resamples", "20"),
    *("--samples_per_prompt", "2", "--sampling.max_new_tokens", "4", "--output_dir", "out"),
    *("--reward.path", "tests.campaign.given:reward", "--cost.path", "tests.scorers:cost"),
)
PLAN = ("repo_fast.plan", "--config", "train.yaml", "--gpus", "1")
PIPELINE = ("repo_fast.pipeline", "--output_dir", "out")


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    """The same each time."""
    return [len(set(text.split())) / 4 for text in responses]


@dataclass(frozen=True)
class Bad:
    """A bad input.

    Attributes:
        name: What is wrong, in words.
        words: The command.
        says: What the line has to have, a pattern: the name of the option or file, and of the problem.
        change: What is wrong in the folder.
        status: The exit status.
        lines: How many lines are said; of damage one a file.
        leaves: New paths that are meant, a pattern.
        as_nobody: Whether it runs without root's rights.
    """

    name: str
    words: tuple[str, ...]
    says: str
    change: Callable[[Path], object] = lambda folder: None
    status: int = 2
    lines: int = 1
    leaves: str = "(?!)"
    as_nobody: bool = False

    def trial(self) -> Trial:
        return Trial(self.name, self._try)

    def _try(self, folder: Path) -> str:
        place = folder / "given"
        shutil.copytree(given(), place, symlinks=True)
        self.change(place)
        if self.as_nobody:
            _let_nobody_in(folder)
        before = _content(place)
        ended = end_of(self.words, place, as_nobody=self.as_nobody)
        line = _check(ended, self)
        after = _content(place)
        for path in sorted(before.keys() | after.keys()):
            assert path in after, f"{path} is gone"
            assert path in before or re.fullmatch(self.leaves, path), f"{path} was left behind"
            assert path not in before or before[path] == after[path], f"{path} was changed"
        return f"{line} (exit status {ended.status})"


def _check(ended: Ended, bad: Bad) -> str:
    """The line that was said."""
    said = f"exit status {ended.status}, stderr: {ended.err[-1500:]!r}, stdout: {ended.out[-300:]!r}"
    assert not ended.late, f"hung: {said}"
    assert "Traceback" not in ended.err + ended.out, f"a traceback: {said}"
    # What else transformers has to say of a folder is its own.
    lines = [line for line in ended.err.splitlines() if not line.startswith("[transformers] ")]
    assert len(lines) == bad.lines and all(line.startswith("error: ") for line in lines), f"not one line: {said}"
    assert ended.status == bad.status, f"expected the exit status {bad.status}: {said}"
    assert re.search(bad.says, lines[0]), f"expected {bad.says!r}: {said}"
    assert len(lines[0]) < 1500, f"too long: {said}"
    return lines[0]


def _content(folder: Path) -> dict[str, bytes | str | None]:
    """Every path below a folder, with the content of files and the aims of links."""
    found: dict[str, bytes | str | None] = {}
    for path in folder.rglob("*"):
        content = None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = path.read_bytes()
        found[str(path.relative_to(folder))] = content
    return found


def _let_nobody_in(folder: Path) -> None:
    if os.geteuid() != 0:
        return
    for path in (folder, *folder.rglob("*")):
        mode = path.stat().st_mode & 0o777
        # What is closed stays closed.
        if mode & 0o400:
            path.chmod(mode | (0o777 if path.is_dir() else 0o666))


@cache
def given() -> Path:
    """The folder in which everything is right; made once."""
    top = Path(tempfile.mkdtemp(prefix="campaign-given-"))
    atexit.register(shutil.rmtree, top, ignore_errors=True)
    folder = top / "given"
    folder.mkdir()
    save_policy(folder / "policy")
    save_policy(folder / "wide", hidden_size=48)
    save_beaver(folder / "cost", config_overrides={"score_type": "cost"})
    write_lines(folder / "prompts.jsonl", [{"prompt": text} for text in PROMPTS])
    shown = [{"prompt": text, "response": answer} for text, answer in DEMONSTRATIONS]
    write_lines(folder / "demonstrations.jsonl", shown)
    write_lines(folder / "pairs.jsonl", PAIRS)
    model = {"path": "policy"}
    data = OPTIONS["data"] | {"prompts": "prompts.jsonl", "ptx": "demonstrations.jsonl"}
    configurations = {
        "train": OPTIONS | {"total_steps": 2, "checkpoint": {"every": 1, "keep": 2}, "policy": model, "data": data},
        "sft": COMMON | {"model": model, "data": {"train": "demonstrations.jsonl", "eval": None}},
        "score": COMMON | {"model": model, "data": {"train": "pairs.jsonl", "eval": None}, "kind": "cost"},
    }
    for name, options in configurations.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(options))
    claim = ("--claim", "unsafe_prompts=0.9")
    for words in ((*TRAIN[:-1], "run"), (*EVALUATE[:-5], "certificate", *EVALUATE[-4:], *claim)):
        ended = end_of(words, folder)
        assert ended.status in (0, 3, 4), ended.err[-3000:]
    return folder
