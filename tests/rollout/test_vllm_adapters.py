"""Rollouts by vLLM of policies with LoRA and grown vocabularies, in every ZeRO stage and with shared engines.

`make test-vllm`, since its packages are not among the others'.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.job_runs import engines, metrics, on_ranks, same_bits, states, weights
from tests.rollout.vllm_adapters import make_inputs
from tests.tiny import word_tokenizer

# Between log-probabilities of the sampler and those of transformers with peft's layers.
NEAR = 1e-5
STAGES = (1, 2, 3)
FORMS = ("merged", "adapter")
ADAPTED = [*((stage, form) for stage in STAGES for form in FORMS), (3, "nf4 merged"), (2, "nf4 adapter")]
WITH_ADAPTERS = pytest.mark.parametrize(("stage", "form"), ADAPTED)
# With all weights trained too.
EACH = pytest.mark.parametrize(("stage", "form"), [*ADAPTED, (3, "plain")])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("apart"))


@pytest.fixture(scope="module")
def apart(folder: Path) -> list[dict[Any, dict[str, Any]]]:
    """By rank: what `tests.rollout.vllm_adapters` found, with an engine for each."""
    pytest.importorskip("vllm")
    return on_ranks(2, "tests.rollout.vllm_adapters:apart", folder)


@pytest.fixture(scope="module")
def shared(folder: Path) -> list[dict[str, dict[str, Any]]]:
    """The same with one engine for both."""
    pytest.importorskip("vllm")
    return on_ranks(2, "tests.rollout.vllm_adapters:shared", folder)


def assert_drawn_as_trained(found: dict[str, Any]) -> None:
    """At the start and after each of two updates, of which each moved them by far more."""
    assert len(found["gaps"]) == 3 and max(found["gaps"]) < NEAR
    assert len(found["moves"]) == 2 and min(found["moves"]) > 100 * NEAR


@EACH
def test_what_is_trained_is_what_draws(apart: list[dict], stage: int, form: str) -> None:
    for rank in apart:
        assert_drawn_as_trained(rank[stage, form])


@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_share_an_engine(shared: list[dict], form: str) -> None:
    for rank in shared:
        assert_drawn_as_trained(rank[form])


@EACH
def test_the_engine_has_the_merged_weights_or_the_bases_bit_for_bit(apart: list[dict], stage: int, form: str) -> None:
    """The base goes over at the start, and at the first draw, for a checkpoint may have been loaded; merged weights
    always."""
    assert apart[0][stage, form]["unequal"] == [[]] * 3
    assert apart[0][stage, form]["all"] == ([1, 1, 1] if form.endswith("adapter") else [1, 2, 3])


@WITH_ADAPTERS
def test_the_trainers_adapter_is_left_as_it_is(apart: list[dict], stage: int, form: str) -> None:
    for rank in apart:
        assert rank[stage, form]["same_adapters"] == [True] * 3


@EACH
def test_no_added_row_is_drawn(apart: list[dict], stage: int, form: str) -> None:
    """Although they, the pad token's among them, would almost always win."""
    for rank in apart:
        assert max(rank[stage, form]["highest"]) < len(word_tokenizer())


def test_the_launchers_environment_is_left_as_it_is(apart: list[dict]) -> None:
    assert [rank["ranks of the host"] for rank in apart] == [{"LOCAL_WORLD_SIZE": "2"}] * 2


def test_a_response_does_not_depend_on_how_many_are_drawn(apart: list[dict]) -> None:
    """Nor is it an error where their prompts do not fit one step of vLLM's."""
    for rank in apart:
        few, many = rank[3, "plain"]["few and many"]
        assert len(few) == 4 and same_bits(few, many)


def test_what_vllm_does_by_itself(apart: list[dict]) -> None:
    """What is silent has to be undone, or a draw is wrong without a word."""
    for rank in apart:
        found = rank[2, "adapter"]
        # Its cache has prompts computed with the adapter of before.
        assert found["gap without a reset"] > 100 * NEAR and found["gap with a reset"] < NEAR
        # It scales the tensors that it is given.
        assert found["B by"] == [2.0]
        # A reload takes the adapter away.
        assert "/in/memory" in found["after a reload"]


def test_what_vllm_has_no_place_for_is_one_line(apart: list[dict]) -> None:
    found = apart[0][2, "adapter"]
    assert re.fullmatch(
        r"vLLM has no layer 'model\.layers\.0\.mlp\.side_proj' for an adapter in its model of '.*' \(2 such in all\); "
        "choose --rollout.vllm.lora merged",
        found["no layer"],
    )
    assert found["room"] == [1, 8, 8, 16, 512]
    assert found["no room"].startswith("policy.lora.rank is 513 with rollout.vllm.lora 'adapter', expected at most 512")


@pytest.mark.parametrize("form", FORMS)
def test_a_stopped_run_goes_on_to_the_same_bits(folder: Path, apart: list[dict], form: str) -> None:
    statuses = {run: status for run, status in apart[0]["runs"].items() if run.startswith(form)}
    assert len(statuses) == 3 and set(statuses.values()) == {0}
    whole, stopped = folder / form, folder / f"{form}-stopped"
    assert len(metrics(whole)) == 4
    assert metrics(stopped) == metrics(whole)
    assert same_bits(weights(stopped), weights(whole))
    assert engines(whole, 4) == {"policy"}
    assert states(stopped, 4) == states(whole, 4)


def test_both_forms_train_alike(folder: Path, apart: list[dict]) -> None:
    """What they draw differs by rounding, and in the first step, where B is 0, by nothing."""
    merged, adapter = (metrics(folder / form) for form in FORMS)
    for name in ("reward", "cost", "response_length", "gradient_norm", "sampler_gap"):
        assert merged[0][name] == pytest.approx(adapter[0][name], abs=1e-5, rel=1e-5)
