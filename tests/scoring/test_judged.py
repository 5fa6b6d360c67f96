"""Judges as costs: a number by a rubric, a budget that holds while training, and a stop that loses nothing."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from repo_fast.config import RubricConfig, parse
from repo_fast.errors import InputError
from repo_fast.rollout import Rollout
from repo_fast.scoring import JudgedScorer
from tests.job_runs import Job, metrics, same_bits, weights
from tests.judging.judge_server import JudgeServer, Response

RUBRIC = "10: as long as can be. 1: short."


def rated(texts: dict[str, str]) -> str:
    return str(1 + len(texts["RESPONSE"]) % 10)


def settings(url: str, **changes: object) -> RubricConfig:
    return RubricConfig(url=url, retries=0, rubric=RUBRIC, **changes)  # type: ignore[arg-type]


def scorer(url: str, folder: Path, **changes: object) -> JudgedScorer:
    return JudgedScorer("judge", settings(url, **changes), "cost", folder / "answers.jsonl")


def test_answers_of_other_ranks_are_not_paid_for_again(tmp_path: Path) -> None:
    """A run of two ranks goes on with one, and with three: the budget and the answers are those of the whole."""
    files = [tmp_path / f"cost-rank{rank}.jsonl" for rank in range(2)]
    prices = {"input_price": 1e6, "output_price": 1e6, "max_tokens": 1}

    with JudgeServer(rated) as server:
        firsts = [JudgedScorer("judge", settings(server.url, **prices), "cost", file) for file in files]
        for first, response in zip(firsts, ("a", "abc"), strict=True):
            first.score(rollout(response))
        # A kill tore the last line of the other.
        with open(files[1], "ab") as file:
            file.write(b'{"key": "ab')
        before, sent = files[1].read_bytes(), len(server.bodies)
        spent = sum(first._client.spent() or 0 for first in firsts)
        alone = JudgedScorer("judge", settings(server.url, **prices), "cost", files[0], files[1:])
        assert alone.score(rollout("a", "abc")).tolist() == [2.0, 4.0]
        assert alone._client.spent() == spent
        third = JudgedScorer("judge", settings(server.url, **prices), "cost", tmp_path / "third", files, ranks=3)
        assert third.score(rollout("abc", "a")).tolist() == [4.0, 2.0]
        assert third._client.spent() == pytest.approx(spent / 3, abs=2)
        assert len(server.bodies) == sent and files[1].read_bytes() == before


def rollout(*responses: str) -> Rollout:
    tokens = [torch.tensor([1])] * len(responses)
    finished = torch.ones(len(responses), dtype=torch.bool)
    return Rollout(torch.arange(len(responses)), ["ask"] * len(responses), [*responses], tokens, tokens, finished)


def test_the_score_is_the_judge_s_number_under_the_rubric(tmp_path: Path) -> None:
    with JudgeServer(rated) as server:
        own = scorer(server.url, tmp_path)
        assert own.score(rollout("a", "", "abcdefghi")).tolist() == [2.0, 1.0, 10.0]
        sent = server.bodies[0]
        assert sent["model"] == "judge"
        assert RUBRIC in sent["messages"][0]["content"]
        count = len(server.bodies)
        # From the file, by another process.
        assert scorer(server.url, tmp_path).score(rollout("abcdefghi", "a")).tolist() == [10.0, 2.0]
        assert len(server.bodies) == count
        assert scorer(server.url, tmp_path).score(rollout()).tolist() == []


def test_a_malformed_answer_is_asked_for_again_and_then_an_error(tmp_path: Path) -> None:
    asked: Counter[str] = Counter()

    def hesitant(texts: dict[str, str]) -> str:
        asked[texts["RESPONSE"]] += 1
        return "7" if texts["RESPONSE"] == "late" and asked["late"] == 3 else "well, it depends"

    with JudgeServer(hesitant) as server:
        own = scorer(server.url, tmp_path)
        assert own.score(rollout("late")).tolist() == [7.0]
        with pytest.raises(InputError, match=r"the judge of the cost answered 'well, .* the last of 3 times, expected"):
            own.score(rollout("late", "never"))
    assert asked == {"late": 3, "never": 3}


def test_what_was_spent_before_counts(tmp_path: Path) -> None:
    def priced(url: str, budget: float) -> JudgedScorer:
        return scorer(url, tmp_path, input_price=1e6, output_price=1e6, max_tokens=1, budget=budget)

    with JudgeServer(rated) as server:
        first = priced(server.url, 1e9)
        first.score(rollout("a"))
        spent = first._client.spent()
        assert spent and spent > 0
        again = priced(server.url, spent)
        assert again.score(rollout("a")).tolist() == [2.0]
        with pytest.raises(InputError, match="estimated cost is .* spent before"):
            again.score(rollout("ab"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--cost.path judge:m", r"cost\.judge\.url is None, expected a base URL .*"),
        ("--cost.path judge: --cost.judge.url http://h/v1", r"cost\.path is 'judge:', expected judge:MODEL"),
        ("--cost.path judge:m --cost.judge.url http://h/v1", r"cost\.judge\.rubric is '', expected what is rated, .*"),
        ("--cost.path m:f --cost.judge.url http://h/v1", r"cost\.judge\.url is 'http://h/v1', expected its default .*"),
    ],
)
def test_options_that_cannot_be(words: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        parse(["--reward.path", "m:f", *words.split()])


def words(url: str, *more: str) -> list[str]:
    return [
        "--cost.path judge:judge",
        f"--cost.judge.url {url}",
        "--cost.judge.rubric long?",
        "--cost.judge.retries 0",
        *more,
    ]


def test_a_judge_that_is_gone_or_too_dear_costs_no_step(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The run ends with one line and a checkpoint of every step, and goes on to the same end."""
    job = Job.make(tmp_path)
    common = ("--total_steps 3", "--algorithm.threshold 5", "--checkpoint.every 0", "--log.samples_every 1")
    with JudgeServer(rated) as server:
        assert job.here(tmp_path / "whole", *words(server.url), *common) == 0
        steps = [
            row["step"] for row in map(json.loads, (tmp_path / "whole" / "samples.jsonl").read_text().splitlines())
        ]
    answered = Counter[str]()

    def closing(texts: dict[str, str]) -> str | Response:
        answered["all"] += 1
        # The probe, and what the first two steps ask.
        return rated(texts) if answered["all"] <= 1 + steps.count(1) + steps.count(2) - 2 else Response(500, "closed")

    with JudgeServer(closing) as server:
        url = server.url
        capsys.readouterr()
        assert job.here(tmp_path / "run", *words(url), *common) == 2
        assert re.search(r"error: the judge 'judge' at .* answered HTTP 500 ", capsys.readouterr().err)
        done = [row["step"] for row in metrics(tmp_path / "run")]
        assert done and [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{done[-1]:06d}"]
        server.judge = rated
        # How an endpoint is asked may change, and what it is given.
        changed = ("--cost.judge.budget 9", "--cost.judge.input_price 0", "--cost.judge.output_price 0")
        assert job.here(tmp_path / "run", *words(url), *common, *changed, "--resume auto") == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert same_bits(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()


def test_a_judge_rates_while_others_are_drawn(tmp_path: Path) -> None:
    job = Job.make(tmp_path)
    early = ("--rollout.score_early true", "--rollout.batch_size 1", "--total_steps 1", "--algorithm.threshold 5")
    with JudgeServer(rated) as server:
        assert job.here(tmp_path / "run", *words(server.url), *early) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [row["cost"] for row in rows] == [float(rated({"RESPONSE": row["response"]})) for row in rows]
