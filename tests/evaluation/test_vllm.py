"""Evaluations whose responses vLLM draws. `make test-vllm`, since its packages are not among the others'."""

from pathlib import Path
from typing import Any

import pytest

from repo_fast.config import EvaluateConfig, parse
from repo_fast.errors import InputError
from repo_fast.evaluate import main
from repo_fast.rollout.units import Unit, grouped, units_of
from tests.evaluation.vllm_evaluations import VLLM, K, drawn, make_inputs, words
from tests.job_runs import PROMPTS, on_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    pytest.importorskip("vllm")
    return on_ranks(1, "tests.evaluation.vllm_evaluations:compare", folder)[0]


def test_what_is_likeliest_is_what_hugging_face_draws(found: dict[str, Any]) -> None:
    """The same template, weights, and end of a response."""
    ours, theirs = found["vllm, likeliest"], found["hf, likeliest"]
    assert ours["status"] == theirs["status"] == 0
    # The reference has a second sample.
    assert len(ours["rows"]) == 3 * K * len(PROMPTS)
    assert ours["rows"] == theirs["rows"]


def test_responses_to_a_prompt_differ(found: dict[str, Any]) -> None:
    rows = found["vllm"]["rows"]
    assert len(rows) == 3 * K * len(PROMPTS)
    assert len({response for policy, prompt, _, response in rows if (policy, prompt) == ("one", 0)}) > 1
    assert rows != found["vllm, likeliest"]["rows"]


def test_a_stopped_one_goes_on_and_draws_nothing_twice(found: dict[str, Any]) -> None:
    """Of the 6 units of 5 responses that the reference has, 2 were there."""
    assert "stopped" not in found
    assert found["gone on"]["status"] == 0
    assert found["gone on"]["rows"] == [row for row in found["vllm"]["rows"] if row[0] == "one"]
    # Two before, and four after it.
    assert found["draws"] == 2


def test_what_it_does_not_compute_as_transformers_does_is_refused(found: dict[str, Any]) -> None:
    """A head beside the embedding, which vLLM never loads for this architecture."""
    refused = found["no head"]
    assert refused["status"] == 2
    assert "error: vLLM does not compute what the policy" in refused["errors"]
    assert "expected at most 0.001 in float32; choose --sampling.engine hf" in refused["errors"]


def test_ranks_that_share_an_engine_draw_the_same(folder: Path, found: dict[str, Any]) -> None:
    assert on_ranks(2, "tests.evaluation.vllm_evaluations:on_two_ranks", folder) == [0, 0]
    assert drawn(folder / "shared") == found["vllm, likeliest"]["rows"]


def test_units_are_drawn_together_and_never_cut() -> None:
    units = [Unit(sample, [None] * size, [0] * size) for sample, size in enumerate((2, 2, 1, 4, 1))]
    groups = grouped(units, lambda unit: len(unit.requests), 5)
    assert [[unit.sample for unit in group] for group in groups] == [[0, 1, 2], [3, 4]]
    assert units_of([], 2, 3, 0) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sampling.vllm.tensor_parallel", "2"], "its default with sampling.engine 'hf'"),
        ([*VLLM, "--sampling.temperature", "0.001"], r"sampling.temperature is 0.001, expected at least 0.01 with"),
        ([*VLLM, "--sampling.vllm.memory_share", "0"], r"sampling.vllm.memory_share is 0.0, expected a number"),
        (
            [*VLLM, "--sampling.vllm.tensor_parallel", "0"],
            r"sampling.vllm.tensor_parallel is 0, expected a whole number",
        ),
    ],
)
def test_what_cannot_be_is_an_error(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(words(tmp_path, tmp_path / "out", *options, policies=()) + ["--policies", '{"one": "x"}'], EvaluateConfig)


def test_without_it_nothing_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from repo_fast.rollout import vllm

    monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda name: None)
    assert main(words(make_inputs(tmp_path), tmp_path / "out", *VLLM)) == 2
    assert "sampling.engine is 'vllm', which is not installed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
