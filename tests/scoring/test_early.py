"""Functions called while other responses are still drawn: beside the drawing, and every response gets its own score."""

import re
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from repo_fast.config import SamplingConfig, TrainConfig, parse
from repo_fast.data import Prompt
from repo_fast.errors import InputError
from repo_fast.models.policy import Policy
from repo_fast.rollout import Request
from repo_fast.rollout.hf import check_generation, generate
from repo_fast.scoring import EarlyScores, FunctionScorer
from tests.job_runs import Job, assert_scored_by
from tests.scorers import cost
from tests.tiny import save_policy, word_tokenizer

CPU = torch.device("cpu")
entered, go_on = threading.Event(), threading.Event()
calls: list[tuple[list[str], list[str], str]] = []


def note(prompts: list[str], responses: list[str]) -> None:
    calls.append((prompts, responses, threading.current_thread().name))


def waits(prompts: list[str], responses: list[str]) -> list[float]:
    """Like a server that answers when it likes."""
    note(prompts, responses)
    entered.set()
    assert go_on.wait(timeout=60)
    return [float(response) for response in responses]


def fails(prompts: list[str], responses: list[str]) -> list[float]:
    note(prompts, responses)
    entered.set()
    raise OSError("503")


def noted(prompts: list[str], responses: list[str]) -> list[float]:
    note(prompts, responses)
    return [len(text) % 7 - 3.0 for text in responses]


@pytest.fixture(autouse=True)
def nothing_called() -> None:
    entered.clear()
    go_on.clear()
    calls.clear()


def requests(count: int) -> list[Request]:
    return [Request(Prompt(i, f"prompt {i}"), torch.tensor([4 + i])) for i in range(count)]


def scorers(**functions: str) -> dict[str, FunctionScorer]:
    return {name: FunctionScorer(f"{__name__}:{function}", name) for name, function in functions.items()}


def test_scores_go_to_their_responses_and_what_comes_meanwhile_is_scored_at_once() -> None:
    early = EarlyScores(scorers(reward="waits", cost="noted"), requests(7), CPU)
    early([2, 0], ["2.5", "0.5"])
    assert entered.wait(timeout=60)
    # The function still waits, and this goes on.
    for place in (6, 1, 3, 5, 4):
        early([place], [f"{place}.5"])
    go_on.set()
    scores = early.scores()
    assert [score["reward"] for score in scores] == [place + 0.5 for place in range(7)]
    assert all(score["cost"] == 0.0 for score in scores)
    first, later = ["prompt 2", "prompt 0"], [f"prompt {place}" for place in (6, 1, 3, 5, 4)]
    assert [prompts for prompts, _, _ in calls] == [first, first, later, later]
    assert {thread for _, _, thread in calls} == {"scores"}


def test_a_function_that_fails_is_an_error_and_not_called_again() -> None:
    early = EarlyScores(scorers(cost="fails"), requests(2), CPU)
    early([0], ["x"])
    assert entered.wait(timeout=60)
    early([1], ["x"])
    with pytest.raises(InputError, match=r"the cost function '.*:fails' raised OSError: 503"):
        early.scores()
    assert len(calls) == 1


def test_no_requests_have_no_scores() -> None:
    assert EarlyScores(scorers(cost="fails"), [], CPU).scores() == []


def test_each_batch_is_announced_before_the_next_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = word_tokenizer()
    policy = Policy.from_pretrained(str(save_policy(tmp_path / "policy")), dtype=torch.float32, attention="sdpa")
    events: list[Sequence[int] | str] = []
    texts: dict[int, str] = {}
    draw = type(policy.model).generate

    def watched(*arguments: object, **options: object) -> object:
        events.append("draw")
        return draw(*arguments, **options)

    def announce(places: Sequence[int], responses: Sequence[str]) -> None:
        events.append(places)
        texts.update(zip(places, responses, strict=True))

    check_generation(policy.model, 0, CPU, batch_size=2)  # once for a model; draws nothing
    monkeypatch.setattr(type(policy.model), "generate", watched)
    asked = [Request(Prompt(i, "x"), torch.arange(4, 4 + length)) for i, length in enumerate((3, 1, 2, 5, 4))]
    config = SamplingConfig(max_new_tokens=6, batch_size=2)
    rollout = generate(policy.model, tokenizer, asked, range(len(asked)), config, CPU, announce=announce)
    assert events == ["draw", [1, 2], "draw", [0, 4], "draw", [3]]
    assert [texts[place] for place in range(5)] == rollout.responses


@pytest.mark.parametrize(("early", "thread", "most"), [("false", "MainThread", 6), ("true", "scores", 2)])
def test_a_run_calls_a_function_from_its_thread(early: str, thread: str, most: int, tmp_path: Path) -> None:
    """Batch by batch; six responses a step."""
    job = Job.make(tmp_path)
    words = (f"--rollout.score_early {early}", f"--cost.path {__name__}:noted", "--rollout.batch_size 2")
    assert job.here(tmp_path / "run", *words, "--total_steps 1") == 0
    assert {name for _, _, name in calls} == {thread}
    assert sum(len(responses) for _, responses, _ in calls) == 6
    assert len(calls[0][1]) == most


@pytest.mark.slow
def test_ranks_exchange_responses_with_their_scores(tmp_path: Path) -> None:
    """The balance over ranks comes after the drawing."""
    job = Job.make(tmp_path)
    words = ("--rollout.score_early true", "--cost.path tests.scorers:early_cost", "--rollout.batch_size 1")
    finished = job.torchrun(2, tmp_path / "run", *words, "--total_steps 2", "--log.samples_every 1")
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert_scored_by(cost, tmp_path / "run", steps=2)


@pytest.mark.slow
def test_a_run_whose_function_fails_ends_with_one_line(tmp_path: Path) -> None:
    job = Job.make(tmp_path)
    failed = job.torchrun(2, tmp_path / "run", "--rollout.score_early true", "--cost.path tests.scorers:raises")
    assert failed.returncode != 0
    said = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    expected = (
        r"error: the cost function 'tests\.scorers:raises' raised KeyError: 'no such word', at .*scorers\.py line \d+"
    )
    assert len(said) == 1 and re.fullmatch(expected, said[0]), failed.stderr


def test_without_a_function_there_is_nothing_to_call_early() -> None:
    with pytest.raises(InputError, match=r"rollout.score_early is true .* expected a function for one of them"):
        parse(["--rollout.score_early", "true", "--reward.path", "a/b", "--cost.path", "c/d"], TrainConfig)
