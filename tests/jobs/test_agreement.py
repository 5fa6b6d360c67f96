"""Hosts whose ranks were given other options, or have other files, are told so before anything is written."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from repo_fast.collectives import Ranks
from repo_fast.config import SftConfig, parse
from repo_fast.errors import InputError
from repo_fast.jobs.agreement import check_same_files, check_same_options
from tests.job_runs import PROMPTS, Job, on_ranks, write_lines
from tests.tiny import save_policy


def beside(other: object, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    """The first of two ranks; of what both say, the second says another sum, and then this."""
    said = iter(["another sum", other])
    monkeypatch.setattr(Ranks, "gather_list", lambda self, items: [*items, next(said)])
    return Ranks(0, 2, torch.device("cpu"))


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("date", "2024-07-27", "date is '2024-07-26' on rank 0 and '2024-07-27' on rank 1, .* all ranks; give --date$"),
        (
            "optimizer.learning_rate",
            "0.5",
            r"optimizer\.learning_rate is 0\.003 on rank 0 and 0\.5 on rank 1, expected",
        ),
    ],
)
def test_options(option: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from repo_fast.config import to_dict

    words = ["--date", "2024-07-26"]
    mine, other = parse(words, SftConfig), parse([*words, f"--{option}", value], SftConfig)
    check_same_options(mine, Ranks(0, 1, torch.device("cpu")))
    with pytest.raises(InputError, match=said):
        check_same_options(mine, beside(to_dict(other), monkeypatch))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"data.train": {"a.jsonl": "2"}, "model.path": {"x": "1"}}, "a.jsonl of data.train is"),
        ({"data.train": {"a.jsonl": "1", "b.jsonl": "1"}, "model.path": {"x": "1"}}, "b.jsonl of data.train is"),
        ({"data.train": {"a.jsonl": "1"}}, "x of model.path is"),
        ({"data.train": {"a.jsonl": "1"}, "model.path": {"x": "1"}, "data.eval": {"e": "1"}}, "e of data.eval is"),
    ],
)
def test_files(other: dict, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"data.train": {"a.jsonl": "1"}, "model.path": {"x": "1"}}
    with pytest.raises(
        InputError, match=f"^{said} not the same on ranks 0 and 1, expected the same files on all hosts"
    ):
        check_same_files(mine, beside(other, monkeypatch))


def two_prompts(folder: Path) -> None:
    for rank in range(2):
        write_lines(folder / f"host-{rank}" / "p.jsonl", [{"prompt": text} for text in PROMPTS[rank : rank + 3]])


def two_policies(folder: Path) -> None:
    for rank in range(2):
        save_policy(folder / f"host-{rank}" / "policy", seed=rank)


TRAIN = ("--total_steps 1", "--algorithm.advantage rloo", "--data.ptx null", "--algorithm.ptx_coefficient 0")


@pytest.mark.parametrize(
    ("module", "words", "make", "said"),
    [
        ("train", [*TRAIN, "--seed RANK"], None, "error: seed is 0 on rank 0 and 1 on rank 1, expected the same"),
        ("train", [*TRAIN, "--data.prompts p.jsonl"], two_prompts, "error: p.jsonl of data.prompts is not the same on"),
        ("train", [*TRAIN, "--policy.path policy"], two_policies, "error: model.safetensors of policy.path is not the"),
        (
            "evaluate",
            ["--prompts p.jsonl"],
            two_prompts,
            "error: the texts of prompts is not the same on ranks 0 and 1",
        ),
        ("evaluate", ["--policy one=policy"], two_policies, "error: model.safetensors of policies.one is not the same"),
    ],
)
def test_two_ranks_of_other_hosts(
    job: Job, tmp_path: Path, module: str, words: list[str], make: Callable[[Path], None] | None, said: str
) -> None:
    """Each in a folder of its own, as paths of the same name are on hosts that share none."""
    for rank in range(2):
        (tmp_path / f"host-{rank}").mkdir()
    if make is not None:
        make(tmp_path)
    run = tmp_path / "run"
    if module == "train":
        given = job.words(run, *words)
    else:
        scorers = ["--reward.path", "tests.scorers:reward", "--cost.path", "tests.scorers:cost"]
        prompts = [] if "--prompts p.jsonl" in words else ["--prompts", str(job.folder / "prompts.jsonl")]
        policy = [] if "--policy one=policy" in words else ["--policy", f"one={job.folder / 'policy'}"]
        given = [*scorers, *prompts, *policy, *" ".join(words).split(), "--output_dir", str(run)]
    (tmp_path / "call.json").write_text(json.dumps([module, given]))
    assert on_ranks(2, "tests.jobs.test_agreement:called", tmp_path) == [2, 2]
    assert (tmp_path / "said-0.txt").read_text().splitlines()[-1].startswith(said)
    assert not run.exists()


def called(folder: Path) -> int:
    import importlib

    module, words = json.loads((folder / "call.json").read_text())
    os.chdir(folder / f"host-{os.environ['RANK']}")
    return importlib.import_module(f"repo_fast.{module}").main(
        [word.replace("RANK", os.environ["RANK"]) for word in words]
    )
