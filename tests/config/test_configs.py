"""The packaged configurations, and how the command line and YAML files become a configuration."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from repo_fast.config import (
    CONFIG_FOLDER,
    ScoreConfig,
    SftConfig,
    TrainConfig,
    known_keys,
    parse,
    to_dict,
    to_yaml,
)
from repo_fast.errors import InputError
from repo_fast.jobs.inputs import read_inputs
from tests.job_runs import metrics, run
from tests.tiny import WORDS, save_beaver, save_policy, word_tokenizer

NAMES = sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))
RECIPES = ("alpaca-7b", "llama3.2-3b")
SCORERS = ["--reward.path", "some.module:reward", "--cost.path", "some.module:cost"]
GPUS = 8
# A thousand million values in thirty lines.
DOUBLED = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 31))

# Safe RLHF's published settings for Alpaca-7B, which the RePO paper builds on.
PUBLISHED = {
    "data.prompts": "PKU-Alignment/PKU-SafeRLHF",
    "data.ptx": "tatsu-lab/alpaca",
    "data.template": "safe-rlhf",
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "reward.path": "PKU-Alignment/beaver-7b-v1.0-reward",
    "cost.path": "PKU-Alignment/beaver-7b-v1.0-cost",
    "algorithm.name": "repo",
    "algorithm.advantage": "gae",
    "algorithm.threshold": 0.0,
    "algorithm.kl_coefficient": 0.01,
    "algorithm.clip_low": 0.2,
    "algorithm.clip_high": 0.2,
    "algorithm.score_clamp": 50.0,
    "algorithm.value_clip": 5.0,
    "algorithm.gamma": 1.0,
    "algorithm.gae_lambda": 0.95,
    "algorithm.reduction": "sequence_mean",
    "algorithm.multiplier_init": 1.0,
    "algorithm.multiplier_learning_rate": 0.1,
    "algorithm.multiplier_max": 5.0,
    "algorithm.ptx_coefficient": 16.0,
    "policy_optimizer.learning_rate": 1e-5,
    "policy_optimizer.schedule": "cosine",
    "policy_optimizer.warmup": 0.03,
    "policy_optimizer.weight_decay": 0.01,
    "policy_optimizer.betas": [0.9, 0.95],
    "policy_optimizer.gradient_clip": 1.0,
    "critic_optimizer.learning_rate": 5e-6,
    "critic_optimizer.schedule": "constant",
    "critic_optimizer.weight_decay": 0.0,
    "critic_optimizer.betas": [0.9, 0.95],
    "critic_optimizer.gradient_clip": 1.0,
    "engine.dtype": "bfloat16",
    "engine.zero_stage": 3,
}


def flat(mapping: dict, prefix: str = "") -> dict:
    entries = {}
    for key, value in mapping.items():
        entries |= flat(value, f"{prefix}{key}.") if value and isinstance(value, dict) else {f"{prefix}{key}": value}
    return entries


def leaves() -> list[str]:
    """The options, without the sections."""
    keys = known_keys()
    return [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


# ------------------------------------------------------------------------------------------- the packaged recipes


def test_tiny_and_the_recipes_of_the_paper_are_packaged():
    assert {"tiny", *RECIPES} <= set(NAMES)


def test_tiny_is_the_default():
    assert parse([]) == parse(["--config", "tiny"])


@pytest.mark.parametrize("name", NAMES)
def test_a_packaged_configuration_comes_back_from_what_print_config_prints(name, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["--config", name, "--seed", "7", "--print_config"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    again = parse(["--config", write(tmp_path / "printed.yaml", printed)])
    assert again == parse(["--config", name, "--seed", "7"]) and again.seed == 7
    shown = {"constraints" if key.startswith("constraints.") else key for key in flat(yaml.safe_load(printed))}
    assert shown == set(leaves())


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, path.stem)
        for kind in (SftConfig, ScoreConfig)
        for path in sorted((CONFIG_FOLDER / kind.FOLDER).iterdir())
    ],
)
def test_so_does_one_of_a_supervised_job(kind, name, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(["--config", name, "--seed", "7", "--print_config"], kind)
    again = parse(["--config", write(tmp_path / "printed.yaml", capsys.readouterr().out)], kind)
    assert again == parse(["--config", name, "--seed", "7"], kind) and again.seed == 7
    assert again.output_dir != kind.__dataclass_fields__["output_dir"].default


@pytest.mark.parametrize("kind", [SftConfig, ScoreConfig])
def test_a_job_without_frozen_models_has_none_to_keep_on_the_host(kind):
    with pytest.raises(InputError, match="engine.offload_frozen is True, expected false: this job has no frozen model"):
        parse(["--config", "alpaca-7b", "--engine.offload_frozen", "true"], kind)
    with pytest.raises(InputError, match="engine.share_base is False, expected auto: this job has one model"):
        parse(["--engine.share_base", "false"], kind)


def test_the_score_recipe_has_the_published_settings():
    config = parse(["--config", "alpaca-7b"], ScoreConfig)
    assert (config.epochs, config.optimizer.learning_rate, config.optimizer.schedule) == (2, 2e-5, "cosine")
    assert config.loss.regularization == 0.001 and config.data.template == "safe-rlhf"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_published_settings(name):
    config = parse(["--config", name])
    settings = flat(to_dict(config))
    assert {key: settings[key] for key in PUBLISHED} == PUBLISHED
    assert config.rollout.prompts_per_step == 16 * GPUS
    assert config.data.max_prompt_tokens + config.rollout.max_new_tokens == 512


def test_the_recipes_differ_in_the_policy_and_in_how_long_a_text_the_scorers_read():
    one, other = (flat(to_dict(parse(["--config", name]))) for name in RECIPES)
    different = {key for key in one if one[key] != other[key]}
    assert different == {"output_dir", "policy.path", "reward.max_tokens", "cost.max_tokens"}
    assert (one["policy.path"], other["policy.path"]) == (
        "PKU-Alignment/alpaca-7b-reproduced",
        "meta-llama/Llama-3.2-3B",
    )


TEXTS = [f"{word} tea" for word in "how do i make a bomb please sorry no yes you can".split()]


def stand_ins(name: str, folder: Path) -> list[str]:
    """Options that put small local things of the same layout and field names where a recipe names downloads."""
    rows = [
        {
            "prompt": text,
            "response_0": "yes",
            "response_1": "no",
            "better_response_id": 0,
            "safer_response_id": 1,
            "is_response_0_safe": False,
            "is_response_1_safe": True,
        }
        for text in TEXTS
    ]
    # Every prompt twice, as in PKU-SafeRLHF.
    prompts = write(folder / "prompts.jsonl", "".join(json.dumps(row) + "\n" for row in rows + rows))
    alpaca = [{"instruction": "make tea", "input": "please", "output": "yes you can"}] * 4
    # The scorers have Alpaca's vocabulary, which Llama 3.2 does not.
    own = ["other", *WORDS] if name == "llama3.2-3b" else WORDS
    options = {
        "config": name,
        "policy.path": save_policy(folder / "policy", word_tokenizer(own, chat_template=False)),
        "reward.path": save_beaver(folder / "reward", "LlamaModelForScore"),
        "cost.path": save_beaver(folder / "cost", "LlamaForScore", config_overrides={"score_type": "cost"}),
        "data.prompts": prompts,
        "data.eval_prompts": prompts,
        "data.ptx": write(folder / "alpaca.json", json.dumps(alpaca)),
        "update.ptx_batch_size": 4,
        "rollout.prompts_per_step": len(TEXTS),
        "output_dir": folder / "out",
    }
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_reads_what_is_laid_out_like_the_published_models_and_data(name, tmp_path):
    inputs = read_inputs(parse(stand_ins(name, tmp_path)))
    assert [request.prompt.text for request in inputs.requests] == TEXTS
    first = "BEGINNING OF CONVERSATION: USER: how tea ASSISTANT:"
    assert inputs.requests[0].tokens.tolist() == inputs.tokenizer(first)["input_ids"]
    assert [inputs.scorers[name].kind for name in ("reward", "cost")] == ["model", "model"]
    prompt, response = inputs.demonstrations[0]
    joined = "BEGINNING OF CONVERSATION: USER: make tea please ASSISTANT: yes you can </s>"
    assert prompt.tolist() + response.tolist() == inputs.tokenizer(joined)["input_ids"]


@pytest.mark.parametrize("name", [RECIPES[0], pytest.param(RECIPES[1], marks=pytest.mark.slow)])
def test_a_recipe_trains_what_is_laid_out_like_the_published_models_and_data(name, tmp_path):
    """In bfloat16, with activation checkpointing, PTX loss and two critics, as on a GPU."""
    shorter = ["--total_steps", "1", "--rollout.max_new_tokens", "8", "--evaluation.samples_per_prompt", "1"]
    words = [*stand_ins(name, tmp_path), *shorter, "--reward.max_tokens", "64", "--cost.max_tokens", "64"]
    finished = run([sys.executable, "-m", "repo_fast.train", *words])
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    (step,) = metrics(tmp_path / "out")
    assert step["steps_skipped"] == 0 and step["gradient_norm"] > 0
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("policy", "out/policy"))
    assert any(not torch.equal(before[key].bfloat16(), after[key]) for key in before)


# ----------------------------------------------------------------------------------------------- the command line


def test_the_command_line_is_above_the_file_and_the_file_above_the_defaults(tmp_path):
    file = write(tmp_path / "mine.yaml", "total_steps: 5\nseed: 3\nrollout: {top_p: 0.5}\n")
    config = parse(["--config", file, *SCORERS, "--seed", "4", "--rollout.temperature=0.5"])
    assert (config.total_steps, config.seed, config.rollout.top_p, config.rollout.temperature) == (5, 4, 0.5, 0.5)
    assert config.rollout.max_new_tokens == TrainConfig.__dataclass_fields__["rollout"].default_factory().max_new_tokens


def test_to_yaml_keeps_every_kind_of_value(tmp_path):
    config = parse(
        [*SCORERS, "--rollout.stop", '["\\n\\n", "# end"]', "--data.eval_prompts", "null", "--log.loggers", "[]"]
    )
    assert config.rollout.stop == ("\n\n", "# end") and config.data.eval_prompts is None and config.log.loggers == ()
    assert parse(["--config", write(tmp_path / "again.yaml", to_yaml(config))]) == config


def test_help_explains_every_option_with_its_default(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"])
    assert stopped.value.code == 0
    entries = {entry.split()[0]: entry for entry in re.split(r"\n  --", capsys.readouterr().out)[1:]}
    for key in leaves():
        explained, _, typed = " ".join(entries[key].split()).rpartition(" (type: ")
        name, metavar, words = explained.split(maxsplit=2)
        assert name == key and len(words.split()) > 1 and ", default: " in typed, entries[key]


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("rollout.temprature", "rollout.temperature"),
        ("total_step", "total_steps"),
        ("temperature", "rollout.temperature"),
        ("rollout.top_k", "rollout.top_p"),
    ],
)
def test_an_unknown_option_fails_with_the_nearest_valid_name(word, nearest, tmp_path):
    with pytest.raises(InputError, match=rf"^unknown option '{word}' in the command line.* '{nearest}'$"):
        parse([f"--{word}", "1"])
    section, _, key = word.rpartition(".")
    file = write(tmp_path / "mine.yaml", f"{section}: {{{key}: 1}}\n" if section else f"{key}: 1\n")
    with pytest.raises(InputError, match=rf"^unknown option '{word}' in {file}.* '{nearest}'$"):
        parse(["--config", file])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("total_steps", "many"),
        ("total_steps", "2.5"),
        ("rollout.temperature", "hot"),
        ("rollout.temperature", "nan"),
        ("algorithm.name", "dpo"),
        ("engine.zero_stage", "4"),
        ("engine.offload_optimizer", "perhaps"),
        ("policy_optimizer.betas", "[0.9]"),
        ("log.loggers", "[papyrus]"),
        ("evaluation.prompts", "some"),
    ],
)
def test_a_value_of_the_wrong_type_is_one_line_that_names_the_option(key, value, tmp_path):
    section, _, name = key.rpartition(".")
    file = write(tmp_path / "mine.yaml", f"{section}: {{{name}: {value}}}\n" if section else f"{name}: {value}\n")
    for words in ([f"--{key}", value], ["--config", file]):
        with pytest.raises(InputError) as raised:
            parse([*words, *SCORERS])
        message = str(raised.value)
        assert key in message and value.strip("[]") in message and "\n" not in message


def test_numbers_with_an_exponent_need_no_dot(tmp_path):
    """YAML 1.1 takes `1e-5` for a string."""
    file = write(tmp_path / "mine.yaml", "policy_optimizer: {learning_rate: 1e-5}\n")
    assert parse(["--config", file, *SCORERS]).policy_optimizer.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rollout: [1,\n", "is not valid YAML"),
        ("&a\nengine: *a\n", "is not valid YAML: its aliases stand for more than 100,000 values"),
        ("a: b: c\n", "is not valid YAML"),
        (f"seed: {'[' * 5000}", "is not valid YAML: it is nested too deeply"),
        (f"seed: {'9' * 5000}", "is not valid YAML: Exceeds the limit"),
        ("seed: &a [*a]\n", "is not valid YAML: its aliases stand for more than 100,000 values"),
        (DOUBLED, "is not valid YAML: its aliases stand for more than 100,000 values"),
        ("seed: !!python/object/apply:os.getcwd []\n", "is not valid YAML: could not determine a constructor"),
        ("- seed\n", "holds a list, expected a mapping"),
        ("", "expected a mapping"),
        ("rollout: 3\n", "rollout"),
        ("rollout:\n", "rollout"),
    ],
)
def test_a_file_that_is_no_mapping_of_options_is_one_line_that_names_it(text, said, tmp_path):
    file = write(tmp_path / "mine.yaml", text)
    with pytest.raises(InputError) as raised:
        parse(["--config", file, *SCORERS])
    message = str(raised.value)
    assert file in message and said in message and "\n" not in message


def test_a_file_that_is_not_there_lists_the_packaged_names(tmp_path):
    with pytest.raises(InputError, match="neither a file nor .*: alpaca-7b, .*tiny"):
        parse(["--config", str(tmp_path / "missing.yaml")])


def test_a_number_that_no_float_holds_is_one_line(tmp_path):
    file = write(tmp_path / "mine.yaml", f"algorithm: {{gamma: {10**400}}}")
    for words in (["--algorithm.gamma", str(10**400)], ["--config", file]):
        with pytest.raises(InputError, match="a whole number of more than 308 digits, expected one that a float holds"):
            parse([*words, *SCORERS])


def test_words_that_are_no_options_are_refused():
    for words in (["seed"], ["--seed"], ["--config"]):
        with pytest.raises(InputError):
            parse(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--total_steps 0", "total_steps is 0, expected a whole number of at least 1"),
        ("--stop_after 0", "stop_after is 0"),
        ("--seed -1", "seed is -1"),
        ("--rollout.responses_per_prompt 0", "rollout.responses_per_prompt is 0"),
        ("--rollout.temperature 0", "rollout.temperature is 0.0, expected a number above 0"),
        ("--rollout.top_p 0", "rollout.top_p is 0.0"),
        ("--rollout.top_p 1.5", "rollout.top_p is 1.5"),
        ("--algorithm.margin -0.1", "algorithm.margin is -0.1"),
        ("--algorithm.clip_low 1", "algorithm.clip_low is 1.0"),
        ("--algorithm.gae_lambda 1.1", "algorithm.gae_lambda is 1.1"),
        ("--algorithm.multiplier_init 0", "algorithm.multiplier_init is 0.0"),
        ("--algorithm.multiplier_init 6", "expected at most algorithm.multiplier_max (5.0)"),
        ("--policy_optimizer.warmup 1", "policy_optimizer.warmup is 1.0"),
        ("--critic_optimizer.betas [0.9,1.0]", "critic_optimizer.betas is (0.9, 1.0)"),
        ("--checkpoint.keep -1", "checkpoint.keep is -1"),
        ("--update.minibatches 65", "update.minibatches is 65, expected at most the 64 responses"),
        ("--reward.path= --config tiny", "reward.path is ''"),
        (
            "--algorithm.name ppo_lag --algorithm.scope response",
            "algorithm.scope is 'response' with algorithm.name 'ppo_lag'",
        ),
        ("--algorithm.advantage rloo --rollout.responses_per_prompt 1", "expected at least 2"),
        ("--algorithm.advantage grpo --rollout.responses_per_prompt 1", "expected at least 2"),
        ("--algorithm.ptx_coefficient 1", "a PTX loss needs both"),
        ("--data.ptx world:demonstrations", "a PTX loss needs both"),
        (
            "--engine.offload_parameters true --engine.zero_stage 2",
            "engine.offload_parameters is true with engine.zero_stage 2",
        ),
        (
            "--engine.offload_frozen true --engine.zero_stage 1",
            "engine.offload_frozen is true with engine.zero_stage 1",
        ),
        (
            "--engine.offload_frozen true --policy.lora.rank 4",
            "engine.offload_frozen is true with policy.lora.rank 4 and scoring functions",
        ),
        ("--engine.share_base true", "engine.share_base is true with engine.zero_stage 3"),
        (
            "--engine.share_base true --engine.zero_stage 2 --critics.lora.rank 2",
            "engine.share_base is true with policy.lora.rank 0, expected adapters",
        ),
        (
            "--engine.share_base true --engine.zero_stage 2 --policy.lora.rank 2",
            "engine.share_base is true with critics.lora.rank 0, expected adapters",
        ),
        ("--algorithm.kl_coefficient .inf", "algorithm.kl_coefficient is inf, expected a finite number"),
        ("--policy_optimizer.betas [0.9,-.inf]", "policy_optimizer.betas is (0.9, -inf), expected"),
        ('--rollout.stop [""]', "rollout.stop is [''], expected texts that are not empty"),
        ("--data.prompts a\0b", "data.prompts is 'a\\x00b', expected a text without a zero byte"),
        ("--output_dir=", "output_dir is '', expected a folder"),
        ("--rollout.vllm.tensor_parallel 2", "rollout.vllm.tensor_parallel is 2, expected its default with"),
        ("--algorithm.importance_cap 0", "algorithm.importance_cap is 0"),
        ("--algorithm.importance_cap .inf", "algorithm.importance_cap is inf, expected a finite number above 0"),
        ("--algorithm.importance_mask [0.5,.inf]", "algorithm.importance_mask is (0.5, inf), expected finite numbers"),
        ("--algorithm.importance_mask [2,5]", "algorithm.importance_mask is (2.0, 5.0), expected finite numbers [low,"),
        ("--algorithm.importance_mask [-0.1,5]", "algorithm.importance_mask is (-0.1, 5.0), expected"),
        ("--algorithm.importance_mask [0.5,.nan]", "algorithm.importance_mask is nan"),
        ("--algorithm.importance_mask 3", "algorithm.importance_mask"),
        (
            "--algorithm.importance_mask [0.5,2] --algorithm.importance_cap 2",
            "algorithm.importance_cap is 2.0, expected a number inside algorithm.importance_mask (0.5, 2.0), or null",
        ),
        (
            "--algorithm.importance_level sequence",
            "algorithm.importance_level is 'sequence' with algorithm.importance_cap and algorithm.importance_mask null",
        ),
        (
            "--algorithm.importance_level sequence --algorithm.importance_cap 2 --rollout.top_p 0.9",
            "rollout.top_p is 0.9 with algorithm.importance_level 'sequence', expected 1.0",
        ),
        ("--algorithm.advantage_scale joint", "algorithm.advantage_scale is 'joint' with algorithm.advantage 'gae'"),
        (
            "--algorithm.advantage rloo --algorithm.advantage_scale none",
            "algorithm.advantage_scale is 'none' with algorithm.advantage 'rloo'",
        ),
        (
            "--algorithm.advantage grpo --algorithm.advantage_scale separate --algorithm.whiten true",
            "algorithm.whiten is true with algorithm.advantage_scale 'separate', expected false",
        ),
        ("--algorithm.confidence t", "algorithm.confidence is 't' with algorithm.name 'repo'"),
        (
            "--update.old_log_probs sampler --update.epochs 2",
            "update.epochs is 2, expected 1 with update.old_log_probs",
        ),
        ("--update.old_log_probs sampler --update.minibatches 2", "update.minibatches is 2, expected 1"),
        (
            "--update.old_log_probs sampler --update.minibatches 1 --rollout.top_p 0.9",
            "rollout.top_p is 0.9, expected 1.0",
        ),
        (
            "--update.old_log_probs sampler --update.minibatches 1 --algorithm.importance_cap 2",
            "algorithm.importance_cap is 2.0, expected None",
        ),
        (
            "--update.old_log_probs sampler --update.minibatches 1 --algorithm.importance_mask [0,3]",
            "algorithm.importance_mask is (0.0, 3.0), expected None with update.old_log_probs",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(words, said):
    with pytest.raises(InputError) as raised:
        parse(words.split())
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_second_file_changes_what_the_first_says(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("rollout: {max_new_tokens: 7}\ndata: {fields: {question: prompt}}\n")
    (tmp_path / "more.yaml").write_text("rollout: {temperature: 0.5}\ndata: {fields: {kind: ignore}}\n")
    words = ["--config", "tiny", f"--config={tmp_path / 'mine.yaml'}", "--config", str(tmp_path / "more.yaml")]
    config, tiny = parse([*words, "--total_steps", "3"]), parse(["--config", "tiny"])
    assert (config.rollout.max_new_tokens, config.rollout.temperature, config.total_steps) == (7, 0.5, 3)
    assert config.data.fields == {"question": "prompt", "kind": "ignore"}
    assert (config.reward, config.rollout.prompts_per_step) == (tiny.reward, tiny.rollout.prompts_per_step)
    with pytest.raises(InputError, match="--config 'nowhere' is neither a file nor"):
        parse(["--config", "nowhere", "--config", "tiny"])


def test_help_names_the_command(capsys: pytest.CaptureFixture) -> None:
    for kind, command in ((TrainConfig, "train"), (ScoreConfig, "score"), (SftConfig, "sft")):
        with pytest.raises(SystemExit):
            parse(["--help"], kind)
        assert capsys.readouterr().out.startswith(f"usage: repo-fast {command} ")
