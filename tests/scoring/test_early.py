"""Functions called while other responses are still drawn: beside the drawing, and every response gets its own score."""

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
from repo_fast.rollout.hf import generate
from repo_fast.scoring import EarlyScores, FunctionScorer
from tests.jobs import Job, metrics, weights
from tests.tiny import save_policy, word_tokenizer

go_on = threading.Event()
calls: list[tuple[list[str], list[str]]] = []


def waits(prompts: list[str], responses: list[str]) -> list[float]:
    """Like a server that answers when it likes."""
    calls.append((prompts, responses))
    assert go_on.wait(timeout=60)
    return [float(response) for response in responses]


def fails(prompts: list[str], responses: list[str]) -> list[float]:
    raise OSError("503")


def requests(count: int) -> list[Request]:
    return [Request(Prompt(i, f"prompt {i}"), torch.tensor([4 + i])) for i in range(count)]


def scorers(**functions: str) -> dict[str, FunctionScorer]:
    return {name: FunctionScorer(f"{__name__}:{function}", name) for name, function in functions.items()}


def test_scores_come_from_a_thread_and_go_to_their_responses() -> None:
    go_on.clear()
    calls.clear()
    with EarlyScores(scorers(reward="waits", cost="waits"), requests(3)) as early:
        early([2, 0], ["2.5", "0.5"])
        # The function still waits, and this goes on.
        early([1], ["1.5"])
        go_on.set()
        assert early.scores() == [{"reward": value, "cost": value} for value in (0.5, 1.5, 2.5)]
    assert calls[0] == (["prompt 2", "prompt 0"], ["2.5", "0.5"]) and len(calls) == 4


def test_a_function_that_fails_is_an_error() -> None:
    with (
        pytest.raises(InputError, match=r"the cost function '.*:fails' raised OSError: 503"),
        EarlyScores(scorers(cost="fails"), requests(1)) as early,
    ):
        early([0], ["x"])
        early.scores()


def test_where_drawing_fails_no_more_functions_are_called() -> None:
    go_on.clear()
    calls.clear()
    with pytest.raises(RuntimeError, match="out of memory"), EarlyScores(scorers(cost="waits"), requests(9)) as early:
        for place in range(9):
            early([place], ["0"])
        threading.Timer(0.2, go_on.set).start()
        raise RuntimeError("out of memory")
    assert len(calls) == 1


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

    monkeypatch.setattr(type(policy.model), "generate", watched)
    asked = [Request(Prompt(i, "x"), torch.arange(4, 4 + length)) for i, length in enumerate((3, 1, 2, 5, 4))]
    config = SamplingConfig(max_new_tokens=6, batch_size=2)
    rollout = generate(policy.model, tokenizer, asked, config, torch.device("cpu"), announce=announce)
    assert events == ["draw", [1, 2], "draw", [0, 4], "draw", [3]]
    assert [texts[place] for place in range(5)] == rollout.responses


def test_a_run_learns_the_same(tmp_path: Path) -> None:
    """On two ranks, which exchange responses and their scores after they are drawn."""
    job = Job.make(tmp_path)
    options = ("--reward.path tests.scorers:cost", "--total_steps 2", "--rollout.batch_size 1")
    found = []
    for name, more in (("late", ()), ("early", ("--rollout.score_early true",))):
        finished = job.torchrun(2, tmp_path / name, *options, *more)
        assert finished.returncode == 0, finished.stderr[-4000:]
        found.append((metrics(tmp_path / name), weights(tmp_path / name)))
    (late, late_weights), (early, early_weights) = found
    assert early == late and len(late) == 2
    assert all(torch.equal(value, late_weights[name]) for name, value in early_weights.items())


def test_a_run_whose_function_fails_ends_with_one_line(tmp_path: Path) -> None:
    job = Job.make(tmp_path)
    failed = job.torchrun(2, tmp_path / "run", "--rollout.score_early true", "--cost.path tests.scorers:raises")
    assert failed.returncode != 0
    said = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert said == ["error: the cost function 'tests.scorers:raises' raised KeyError: 'no such word'"], failed.stderr


def test_without_a_function_there_is_nothing_to_call_early() -> None:
    with pytest.raises(InputError, match=r"rollout.score_early is true .* expected a function for one of them"):
        parse(["--rollout.score_early", "true", "--reward.path", "a/b", "--cost.path", "c/d"], TrainConfig)
