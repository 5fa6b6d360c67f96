"""Hosts whose ranks were given other options, or have other files, are told so before anything is written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from repo_fast.collectives import Ranks
from repo_fast.config import EvaluateConfig, SftConfig, parse, to_dict
from repo_fast.errors import InputError
from repo_fast.jobs.agreement import _without_places, check_same_files, check_same_options
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
    words = ["--date", "2024-07-26"]
    mine, other = parse(words, SftConfig), parse([*words, f"--{option}", value], SftConfig)
    check_same_options(mine, Ranks(0, 1, torch.device("cpu")))
    with pytest.raises(InputError, match=said):
        check_same_options(mine, beside(_without_places(to_dict(other)), monkeypatch))


def test_names_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of a score model's outputs is whose goes by it, and which policy is drawn from next."""
    words = ["--date", "2024-07-26", "--prompts", "p", "--reward.path", "a:b", "--cost.path", "a:b"]
    mine = parse([*words, "--policies", '{"a": "x", "b": "y"}'], EvaluateConfig)
    other = parse([*words, "--policies", '{"b": "y", "a": "x"}'], EvaluateConfig)
    with pytest.raises(InputError, match="ranks 0 and 1 have the options in another order, expected the same command"):
        check_same_options(mine, beside(_without_places(to_dict(other)), monkeypatch))


def test_a_host_may_have_its_own_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--date", "2024-07-26", "--reward.path", "judge:m", "--reward.judge.rubric", "x", "--reward.judge.url"]
    found = []
    monkeypatch.setattr(Ranks, "gather_list", lambda self, items: found.append(items) or items)
    for url in ("http://n0/v1", "http://n1/v1"):
        check_same_options(parse([*words, url]), Ranks(0, 1, torch.device("cpu")))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"data.train": {"a.jsonl": "2"}, "model.path": {"x": "1"}}, "a.jsonl of data.train"),
        ({"data.train": {"a.jsonl": "1", "b.jsonl": "1"}, "model.path": {"x": "1"}}, "b.jsonl of data.train"),
        ({"data.train": {"a.jsonl": "1"}}, "x of model.path"),
        ({"data.train": {"a.jsonl": "1"}, "model.path": {"x": "1"}, "data.eval": {"e": "1"}}, "e of data.eval"),
    ],
)
def test_files(other: dict, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"data.train": {"a.jsonl": "1"}, "model.path": {"x": "1"}}
    with pytest.raises(InputError, match=f"^ranks 0 and 1 do not have the same {said}, expected the same files on all"):
        check_same_files(mine, beside(other, monkeypatch))


def two_prompts(folder: Path) -> None:
    for rank in range(2):
        write_lines(folder / f"host-{rank}" / "p.jsonl", [{"prompt": text} for text in PROMPTS[rank : rank + 3]])


def two_policies(folder: Path) -> None:
    for rank in range(2):
        save_policy(folder / f"host-{rank}" / "policy", hidden_size=32 * (rank + 1))


TRAIN = ("--total_steps 1", "--algorithm.advantage rloo", "--data.ptx null", "--algorithm.ptx_coefficient 0")


@pytest.mark.parametrize(
    ("module", "words", "make", "said"),
    [
        ("train", [*TRAIN, "--seed RANK"], None, "error: seed is 0 on rank 0 and 1 on rank 1, expected the same"),
        (
            "train",
            [*TRAIN, "--data.prompts p.jsonl"],
            two_prompts,
            "error: ranks 0 and 1 do not have the same p.jsonl of data.prompts, ",
        ),
        (
            "train",
            [*TRAIN, "--policy.path policy"],
            two_policies,
            "error: ranks 0 and 1 do not have the same config.json of policy.path, ",
        ),
        (
            "evaluate",
            ["--prompts p.jsonl"],
            two_prompts,
            "error: ranks 0 and 1 do not have the same prompts of the evaluation, ",
        ),
        (
            "evaluate",
            ["--policy one=policy"],
            two_policies,
            "error: ranks 0 and 1 do not have the same config.json of policies.one, ",
        ),
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


def test_a_scoring_function_of_another_text(job: Job, tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"host-{rank}").mkdir()
        text = f"def cost(prompts, responses):\n    return [{rank}.0] * len(prompts)\n"
        (tmp_path / f"host-{rank}" / "own_cost.py").write_text(text)
    given = job.words(tmp_path / "run", *TRAIN, "--cost.path own_cost:cost")
    (tmp_path / "call.json").write_text(json.dumps(["train", given]))
    assert on_ranks(2, "tests.jobs.test_agreement:called", tmp_path) == [2, 2]
    said = "error: ranks 0 and 1 do not have the same own_cost of the function own_cost:cost, expected the same files"
    assert (tmp_path / "said-0.txt").read_text().splitlines()[-1].startswith(said)


def test_copies_of_a_policy_with_other_dates_are_one(job: Job, tmp_path: Path) -> None:
    """An evaluation draws once for all hosts, and finds it again."""
    for rank in range(2):
        folder = Path(shutil.copytree(job.folder / "policy", tmp_path / f"host-{rank}" / "policy"))
        for file in folder.iterdir():
            os.utime(file, (rank, rank))
    words = ["--policy", "one=policy", "--prompts", str(job.folder / "prompts.jsonl"), "--samples_per_prompt", "2"]
    words += ["--reward.path", "tests.scorers:reward", "--cost.path", "tests.scorers:cost"]
    words += ["--output_dir", str(tmp_path / "report"), "--sampling.max_new_tokens", "4"]
    (tmp_path / "call.json").write_text(json.dumps(["evaluate", words]))
    for complete in (0, 20):
        assert on_ranks(2, "tests.jobs.test_agreement:called", tmp_path) == [0, 0]
        assert f"20 responses, {complete} of them in the cache" in (tmp_path / "said-0.txt").read_text()


def called(folder: Path) -> int:
    import importlib

    from repo_fast.jobs import launch

    # There is no launcher that would end the first.
    launch._SECONDS_FOR_THE_FIRST = 0
    module, words = json.loads((folder / "call.json").read_text())
    os.chdir(folder / f"host-{os.environ['RANK']}")
    return importlib.import_module(f"repo_fast.{module}").main(
        [word.replace("RANK", os.environ["RANK"]) for word in words]
    )
