"""Several constraints in a configuration: both forms, what the rest is given of them, and what cannot be honoured."""

import shlex
from pathlib import Path

import pytest

from repo_fast.config import ConstraintConfig, PidConfig, ScorerConfig, TrainConfig, parse, to_yaml
from repo_fast.config.train import AlgorithmConfig
from repo_fast.errors import InputError

TWO = """
reward: {path: "m:reward"}
constraints:
  harm: {path: "m:harm", threshold: 0.5}
  refusal:
    path: some/model
    applies_to: {category: [harmless, 3]}
    controller: pid
    pid: {kp: 2}
"""


def parsed(folder: Path, words: str = "", text: str = TWO) -> TrainConfig:
    path = folder / "two.yaml"
    path.write_text(text)
    return parse(["--config", str(path), *shlex.split(words)])


def test_several_are_a_mapping(tmp_path: Path) -> None:
    config = parsed(tmp_path)
    assert list(config.constraints) == ["harm", "refusal"]
    assert config.constraints["refusal"].pid == PidConfig(kp=2.0)
    assert config.costs["refusal"].applies_to == {"category": ["harmless", 3]}
    assert [config.section_of(name) for name in config.scorers] == ["reward", "constraints.harm", "constraints.refusal"]


def test_they_read_back_equal(tmp_path: Path) -> None:
    config = parsed(tmp_path, "--constraints.harm.multiplier_init dual")
    assert parsed(tmp_path, text=to_yaml(config)) == config


def test_texts_of_a_file_stay_texts(tmp_path: Path) -> None:
    """Those that would be something else as YAML: a number, a truth value, a mapping."""
    text = (
        "reward: {path: 'm:f'}\n"
        "constraints:\n"
        "  a: {path: 'm:f', applies_to: {level: '1', safe: 'no', number: 1, flag: true, some: ['1', 2, 'a: b']}}\n"
        "  b: {path: 'guard:x', guard: {preset: shieldgemma, template_arguments: {guideline: 'No insults: ...'}}}\n"
    )
    config = parsed(tmp_path, text=text)
    wanted = {"level": "1", "safe": "no", "number": 1, "flag": True, "some": ["1", 2, "a: b"]}
    assert config.constraints["a"].applies_to == wanted
    assert {type(value) for value in config.constraints["a"].applies_to.values()} == {str, int, bool, list}
    assert config.constraints["b"].guard.template_arguments == {"guideline": "No insults: ..."}
    assert parsed(tmp_path, text=to_yaml(config)) == config


def test_a_value_of_one_is_set_on_the_command_line(tmp_path: Path) -> None:
    config = parsed(tmp_path, "--constraints.harm.threshold 2 --constraints.harm.applies_to '{category: x}'")
    assert config.constraints["harm"].threshold == 2
    assert config.constraints["harm"].applies_to == {"category": "x"}
    assert config.constraints["refusal"] == parsed(tmp_path).constraints["refusal"]


def test_what_is_null_has_the_values_of_one_constraint() -> None:
    settings = AlgorithmConfig()
    config = TrainConfig(
        reward=ScorerConfig("m:f"), constraints={"a": ConstraintConfig("m:f"), "b": ConstraintConfig("m:f")}
    )
    for own in config.costs.values():
        assert own.scope == "prompt"
        for name in ("init", "learning_rate", "max"):
            assert getattr(own, f"multiplier_{name}") == getattr(settings, f"multiplier_{name}")
        assert (own.cost_window, own.confidence_z, own.confidence) == (128, 1.645, "z")


def test_both_forms_of_one_constraint_are_the_same_to_a_run() -> None:
    mapped = TrainConfig(
        reward=ScorerConfig("m:f"), constraints={"harm": ConstraintConfig("m:g", threshold=0.5, margin=0.25)}
    )
    plain = TrainConfig(
        reward=ScorerConfig("m:f"), cost=ScorerConfig("m:g"), algorithm=AlgorithmConfig(threshold=0.5, margin=0.25)
    )
    assert mapped.costs == plain.costs
    assert list(plain.costs) == ["cost"]
    assert plain.critic_streams == mapped.critic_streams == [("reward",), ("cost",)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", [("reward", "harm", "refusal")]),
        ("--critics.shared_trunk false", [("reward",), ("harm",), ("refusal",)]),
        ("--algorithm.advantage rloo", []),
    ],
)
def test_critics_share_a_trunk_unless_told_otherwise(tmp_path: Path, words: str, expected: list) -> None:
    assert parsed(tmp_path, words).critic_streams == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--constraints.harm.thresold 0.3", r"unknown option 'constraints\.harm\.thresold' in the command line, .*"),
        ("--constraints.refusal.pid.kq 1", r".* the nearest valid name is 'constraints\.refusal\.pid\.kp'"),
        ("--cost.path a:b", r"cost\.path is 'a:b' with constraints harm, refusal, expected one form: .*"),
        ("--algorithm.threshold 1", r"algorithm\.threshold is 1\.0 with constraints, .* constraints\.harm\.threshold"),
        ("--algorithm.multiplier_max 9", r"algorithm\.multiplier_max is 9\.0 with constraints, .*"),
        ("--algorithm.name ppo", r"constraints has harm, refusal with algorithm\.name 'ppo', .*"),
        ("--algorithm.name reward_shaping", r"constraints has harm, refusal with algorithm\.name 'reward_shaping', .*"),
        (
            "--algorithm.name hc_lag --constraints.harm.scope response",
            r"constraints\.harm\.scope is 'response' with algorithm\.name 'hc_lag', .* expected batch or null",
        ),
        ("--constraints.reward.path a:b", r"the constraint name is 'reward', expected one that no other .* has"),
        ("--constraints.most_strict.path a:b", r"the constraint name is 'most_strict', .*"),
        ("--constraints.kl.path a:b", r"the constraint name is 'kl', .*"),
        ("--constraints.a-b.path a:b", r"the constraint name is 'a-b', expected a letter, .*"),
        ("--constraints.more.margin 1", r"constraints\.more\.path is '', expected a callable .*"),
        ("--constraints.harm.margin -1", r"constraints\.harm\.margin is -1\.0, expected a number of at least 0"),
        (
            "--constraints.refusal.multiplier_learning_rate 1",
            r"constraints\.refusal\.multiplier_learning_rate is 1\.0 with constraints\.refusal\.controller 'pid', .*",
        ),
        ("--constraints.harm.pid.kp 1", r"constraints\.harm\.pid is PidConfig\(.*\) with .*controller 'dual', .*"),
        (
            "--constraints.harm.controller fixed --constraints.harm.multiplier_max 3",
            r"constraints\.harm\.multiplier_max is 3\.0 with constraints\.harm\.controller 'fixed', .*",
        ),
        ("--constraints.harm.cost_window 3", r"constraints\.harm\.cost_window is 3 with the scope 'prompt', .*"),
        ("--constraints.harm.confidence t", r"constraints\.harm\.confidence is 't' with algorithm\.name 'repo', .*"),
        ("--constraints.harm.multiplier_init 0", r"constraints\.harm\.multiplier_init is 0\.0, .* above 0, or dual"),
        ("--constraints.harm.multiplier_init 7", r"constraints\.harm\.multiplier_init is 7\.0, .* \(5\)"),
        ("--constraints.harm.multiplier_max 0.5", r"constraints\.harm\.multiplier_init is 1\.0, .* \(0\.5\)"),
        (
            "--constraints.harm.multiplier_init dual --data.eval_prompts null",
            r"constraints\.harm\.multiplier_init is 'dual' with data\.eval_prompts null, expected held-out prompts: .*",
        ),
        (
            "--constraints.harm.multiplier_init dual --algorithm.kl_coefficient 0",
            r"constraints\.harm\.multiplier_init is 'dual' with algorithm\.kl_coefficient 0, .*",
        ),
        ("--constraints.refusal.pid.ki 0", r"constraints\.refusal\.pid\.ki is 0\.0, expected a number above 0"),
        ("--constraints.refusal.pid.smoothing 1", r"constraints\.refusal\.pid\.smoothing is 1\.0, .* \[0, 1\)"),
        ("--constraints.harm.applies_to '{a: []}'", r"constraints\.harm\.applies_to\.a is \[\], expected a value, .*"),
        ("--constraints.harm.applies_to '{a: {b: c}}'", r"constraints\.harm\.applies_to\.a is \{'b': 'c'\}, .*"),
        ("--constraints.harm.applies_to_missing true", r"constraints\.harm\.applies_to_missing is True without .*"),
        ("--constraints.harm 3", r"constraints\.NAME is 3, expected a mapping of options"),
        (
            "--constraints '{harm: {threshold: 1}}'",
            r"--constraints with a whole mapping, expected --constraints\.NAME.*",
        ),
        (
            "--constraints.harm.applies_to.category x",
            r"--constraints\.harm\.applies_to\.category: expected --constraints\.harm\.applies_to with all of it, .*",
        ),
        ("--constraints.harm.controller null", r"constraints\.harm\.controller is null, expected a value"),
        ("--constraints.harm.applies_to null", r"constraints\.harm\.applies_to is null, expected a value"),
        ("--constraints.refusal.pid.kp null", r"constraints\.refusal\.pid\.kp is null, expected a value"),
    ],
)
def test_what_cannot_be_honoured_is_one_line(tmp_path: Path, words: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$") as raised:
        parsed(tmp_path, words)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("constraints: {harm: {path: a}, harm: {path: b}}", r".* is not valid YAML: 'harm' is there twice .*"),
        ("seed: 1\nseed: 2", r".* is not valid YAML: 'seed' is there twice .*line 2.*"),
        ("constraints: {harm: a:b}", r".*: constraints\.harm is 'a:b', expected a mapping of options"),
        ("constraints: {a.b: {path: 'm:f'}}", r".*: constraints has the name 'a\.b', expected one without a dot"),
        ("constraints: {harm: {path: null}}", r"constraints\.harm\.path is null, expected a value"),
        (
            "constraints: {harm: {threshold: .nan}}",
            r"constraints\.harm\.threshold is nan, expected a value that can be compared",
        ),
        (
            "constraints: {harm: {applies_to: {a: [.nan]}}}",
            r"constraints\.harm\.applies_to\.a is nan, expected a value that can be compared",
        ),
        ("algorithm: {reward_cap: .nan}", r"algorithm\.reward_cap is nan, expected a value that can be compared"),
        (
            "policy_optimizer: {betas: [0.9, .nan]}",
            r"policy_optimizer\.betas is nan, expected a value that can be compared",
        ),
        ("constraints: {harm: {pth: a}}", r"unknown option 'constraints\.harm\.pth' in .*'constraints\.harm\.path'"),
        ("constraints: {harm: {pid: {k: 1}}}", r"unknown option 'constraints\.harm\.pid\.k' in .*"),
        (
            "reward: {path: 'a:b'}\nconstraints: {1: {path: 'a:b'}}",
            r"the constraint name is '?1'?, expected a letter, .*",
        ),
    ],
)
def test_a_file_that_is_wrong_says_where(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        parsed(tmp_path, text=text)
