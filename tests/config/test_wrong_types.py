"""Values of the wrong type: the option, the value, and what was expected, for every type that an option has."""

import dataclasses
import shlex
import typing
from pathlib import Path

import pytest

from repo_fast.config import EvaluateConfig, JobConfig, ScoreConfig, SftConfig, TrainConfig, parse
from repo_fast.errors import InputError


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--total_steps ten", "total_steps is 'ten', expected a whole number"),
        ("--total_steps 1.5", "total_steps is 1.5, expected a whole number"),
        ("--algorithm.threshold high", "algorithm.threshold is 'high', expected a number"),
        ("--checkpoint.background maybe", "checkpoint.background is 'maybe', expected true or false"),
        ("--engine.zero_stage 4", "engine.zero_stage is 4, expected one of 1, 2, 3"),
        ("--engine.share_base x", "engine.share_base is 'x', expected true or false, or auto"),
        ("--policy.lora.rank [1]", "policy.lora.rank is [1], expected a whole number"),
        ("--log.loggers [tensorboard,paper]", "log.loggers has 'paper', expected a list, each one of tensorboard,"),
        ("--log.loggers paper", "log.loggers is 'paper', expected a list, each one of tensorboard,"),
        ("--data.fields x", "data.fields is 'x', expected a mapping from names to text"),
        ("--reward.expect [file,x]", "reward.expect is ['file', 'x'], expected [text, a number], or null"),
        ("--total_steps true", "total_steps is true, expected a whole number"),
        ("--rollout null", "rollout is null, expected a mapping of options"),
        ("--rollout a:b", "rollout is 'a:b', expected a mapping of options"),
        ("--policy.lora [1]", "policy.lora is [1], expected a mapping of options"),
        ("--constraints.harm x", "constraints.NAME is 'x', expected a mapping of options"),
        ("--constraints.harm my_scores.harm", "constraints.NAME is 'my_scores.harm', expected a mapping of options"),
        ("--constraints.harm os.path", "constraints.NAME is 'os.path', expected a mapping of options"),
        ("--constraints.harm mine.yaml", "constraints.NAME is 'mine.yaml', expected a mapping of options"),
        ("""--constraints.harm 'a "b"'""", """constraints.NAME is 'a "b"', expected a mapping of options"""),
        ("""--rollout 'a "b"'""", """rollout is 'a "b"', expected a mapping of options"""),
        ("--rollout 'a\nb'", r"rollout is 'a\nb', expected a mapping of options"),
        ("--rollout [a", "rollout is [a, expected a mapping of options"),
        ("--constraints.harm 0.5", "constraints.NAME is 0.5, expected a mapping of options"),
        ("--constraints.harm ./a.yaml", "constraints.NAME is './a.yaml', expected a mapping of options"),
        ("--rollout os.path", "rollout is 'os.path', expected a mapping of options"),
        ("--constraints.harm.judge x.y", "constraints.NAME.judge is 'x.y', expected a mapping of options"),
        ("--constraints.harm.guard [a", "constraints.NAME.guard is [a, expected a mapping of options"),
        ("--constraints.harm.judge null", "the command line: constraints.harm.judge is null, expected a mapping of"),
        ("--constraints.harm.pid 'a\nb'", r"constraints.NAME.pid is 'a\nb', expected a mapping of options, or null"),
        ("--constraints.harm '{threshold: x}'", "constraints.NAME.threshold is 'x', expected a number"),
        ("--constraints.harm '{treshold: 1}'", "unknown option 'constraints.NAME.treshold' in the command line, the "),
        ("--constraints.harm.judge '{ulr: a}'", "unknown option 'constraints.NAME.judge.ulr' in the command line, the"),
        ("--constraints.harm.pid '{kpp: 1}'", "unknown option 'constraints.NAME.pid.kpp' in the command line, the "),
        ("--rollout '{temperature: x}'", "rollout.temperature is 'x', expected a number"),
        ("--rollout '{temprature: 1}'", "unknown option 'rollout.temprature' in the command line, the "),
        ("--policy '{lora: {rank: x}}'", "policy.lora.rank is 'x', expected a whole number"),
        ("--constraints.harm null", "constraints.NAME is null, expected a mapping of options"),
        ("--constraints.harm.pid.kp x", "constraints.NAME.pid.kp is 'x', expected a number"),
    ],
)
def test_in_the_words_of_an_options_reader(words: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(shlex.split(words))
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("data: {fields: {question: 1}}", TrainConfig, "data.fields has 1, expected a mapping from names to text"),
        ("rollout: null", TrainConfig, "rollout is null, expected a mapping of options"),
        ("constraints: {harm: null}", TrainConfig, "constraints.harm is null, expected a mapping of options"),
        ("constraints: {harm: {judge: null}}", TrainConfig, "constraints.harm.judge is null, expected a mapping"),
        ("constraints: [1]", TrainConfig, "constraints is [1], expected a mapping by names"),
        ("constraints: a b", TrainConfig, "constraints is 'a b', expected a mapping by names"),
        ("heads: 3", ScoreConfig, "heads is 3, expected a mapping by names"),
        ("suites: {sources: {a: [1]}}", EvaluateConfig, "suites.sources has [1], expected a mapping from names to "),
        ("certify: {claims: {a: {bounds: x}}}", EvaluateConfig, "certify.claims.NAME.bounds is 'x', expected a list, "),
        ("certify: {claims: [1]}", EvaluateConfig, "certify.claims is [1], expected a mapping by names"),
    ],
)
def test_of_a_file_too(tmp_path: Path, text: str, kind: type[JobConfig], said: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        parse(["--config", str(file)], kind)
    assert str(caught.value).removeprefix(f"{file}: ").startswith(said)


def options(section: type, prefix: str = "") -> dict[str, str]:
    """An option of each type."""
    found = {}
    for entry in dataclasses.fields(section):
        kinds = (entry.type, *typing.get_args(entry.type))
        inside = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        if inside is None:
            found[str(entry.type)] = prefix + entry.name
        elif typing.get_origin(entry.type) is not dict:
            found |= options(typing.cast(type, inside), f"{prefix}{entry.name}.")
    return found


@pytest.mark.parametrize("kind", [TrainConfig, SftConfig, ScoreConfig, EvaluateConfig])
def test_no_option_speaks_python(kind: type[JobConfig]) -> None:
    refused = 0
    for option in options(kind).values():
        try:
            parse([f"--{option}", "{no: [such, value]}"], kind)
        except InputError as error:
            refused += option in str(error)
            assert "<class" not in str(error) and "typing." not in str(error), str(error)
    assert refused > 10
