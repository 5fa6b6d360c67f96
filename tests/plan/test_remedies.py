"""What the plan says to change where a run does not fit: it helps, is needed, and can be typed as it stands."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from repo_fast.config import TrainConfig, parse
from repo_fast.plan.remedies import Change, Plan, remedies
from repo_fast.plan.speed import DEVICES
from tests.plan.folders import save_adapters, save_models, words_of

# A 7B takes seconds to build on paper: these have its width, and so much memory as goes with their layers.
LAYERS = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """By whether score models are whole, or adapters on the policy: the paths by section."""
    folder = save_models(tmp_path_factory.mktemp("models"), LAYERS)
    policy, score = folder / "policy", str(folder / "score")
    return {
        "whole": {"policy": str(policy), "reward": score, "cost": score},
        "adapters": save_adapters(folder / "adapters", policy, LAYERS),
    }


def plan_of(words: list[str], gigabytes: float, gpus: int = 1) -> Plan:
    device = replace(DEVICES["h100"], memory=gigabytes * 1e9)
    return Plan(parse(words, TrainConfig), gpus, device, torch.bfloat16)


def typed(change: Change) -> list[str]:
    return [word for option, value in change.items() for word in (f"--{option}", str(value).lower())]


HF = ("--rollout.engine", "hf")
VLLM = ("--rollout.engine", "vllm")
ALL = {f"{name}.quantize": "nf4" for name in ("policy", "critics", "reward", "cost")}
CASES = {
    # Of one base all or none: the policy alone would part it from the others.
    "one base": (
        "alpaca-7b-lora",
        "adapters",
        HF,
        3,
        [{"update.micro_batch_tokens": 512}, {"rollout.batch_size": 16}, ALL],
    ),
    "of their own": (
        "alpaca-7b-lora",
        "whole",
        VLLM,
        6,
        [
            {"rollout.vllm.memory_share": 0.45},
            {"policy.quantize": "nf4"},
            {name: value for name, value in ALL.items() if name != "policy.quantize"},
        ],
    ),
    "vLLM needs more": ("alpaca-7b-24gb", "adapters", VLLM, 6, [{"rollout.vllm.memory_share": 0.45}]),
    "vLLM needs less": (
        "alpaca-7b-24gb",
        "adapters",
        (*VLLM, "--rollout.vllm.memory_share", "0.85"),
        7,
        [{"rollout.vllm.memory_share": 0.39}],
    ),
    "no room for vLLM": (
        "alpaca-7b-24gb",
        "adapters",
        VLLM,
        3,
        [{"rollout.engine": "hf", "rollout.batch_size": 16}, {"update.micro_batch_tokens": 512}],
    ),
    "trained whole": (
        "alpaca-7b",
        "whole",
        ("--engine.zero_stage", "2"),
        20,
        [{"update.micro_batch_tokens": 512}, {"critics.shared_trunk": True}, {"engine.offload_optimizer": True}],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_advised_helps_and_is_needed(folders: dict[str, dict[str, str]], case: str) -> None:
    recipe, kind, more, gigabytes, expected = CASES[case]
    words = words_of(recipe, folders[kind], *more)
    plan = plan_of(words, gigabytes)
    assert not plan.fits
    steps = remedies(plan)
    assert [change for change, _ in steps] == expected and steps[-1][1].fits
    for change, changed in steps:
        assert not plan.fits and (changed.held.peak < plan.held.peak or (change is steps[0][0] and not plan.holds_vllm))
        plan = changed
    changes = [typed(change) for change, _ in steps]
    assert parse([*words, *sum(changes, [])], TrainConfig) == plan.config
    for left_out in changes:
        others = sum((change for change in changes if change is not left_out), [])
        assert not plan_of([*words, *others], gigabytes).fits


def test_what_no_change_makes_fit(folders: dict[str, dict[str, str]]) -> None:
    """Everything that helps is there, also what needs another stage, which is not there before it."""
    words = words_of("alpaca-7b", folders["whole"], "--engine.zero_stage", "2")
    plan = plan_of(words, 5)
    steps = remedies(plan)
    changes = [change for change, _ in steps]
    assert {"engine.offload_parameters": True} in changes and not steps[-1][1].fits
    peaks = [plan.held.peak, *(changed.held.peak for _, changed in steps)]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)
    # Stages that share cannot be left where that is asked for.
    adapted = words_of("alpaca-7b-24gb", folders["adapters"], "--engine.share_base", "true")
    options = {option for change, _ in remedies(plan_of(adapted, 1, gpus=2)) for option in change}
    assert options and not any(option.startswith(("engine.zero", "engine.offload_p")) for option in options)


def test_scorers_of_every_section_are_quantised(folders: dict[str, dict[str, str]], tmp_path: Path) -> None:
    score = {"path": folders["whole"]["reward"]}
    options = {
        "policy": {"path": folders["whole"]["policy"], "lora": {"rank": 16}, "quantize": "nf4"},
        "reward": score,
        "constraints": {"harm": score, "lies": score, "rude": {"path": "tests.scorers:cost"}},
        "evaluation": {"second_reward": score},
        "algorithm": {"advantage": "rloo"},
        "engine": {"zero_stage": 2, "activation_checkpointing": True},
        "update": {"micro_batch_tokens": 512},
        "rollout": {"batch_size": 4},
    }
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(options))
    plan = plan_of(["--config", str(tmp_path / "options.yaml")], 3.2)
    ((change, changed),) = remedies(plan)
    sections = ("reward", "constraints.harm", "constraints.lies", "evaluation.second_reward")
    assert change == {f"{section}.quantize": "nf4" for section in sections} and changed.fits
    assert {name: own.quantize for name, own in changed.config.all_scorers.items()} == {
        **dict.fromkeys(("reward", "harm", "lies", "second_reward"), "nf4"),
        "rude": None,
    }
