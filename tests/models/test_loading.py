"""A policy is loaded with all its weights and without dropout, and written with what its folder said."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    MixtralConfig,
    OPTConfig,
    OPTForCausalLM,
)

from bench.trainer.architectures import config_of, save_model
from repo_fast.collectives import Ranks
from repo_fast.config import EngineConfig, OptimizerConfig
from repo_fast.engine import Engine, sharded_loading, start_distributed, stop_distributed
from repo_fast.errors import InputError
from repo_fast.models.model_config import load_config
from repo_fast.models.on_paper import check_positions
from repo_fast.models.policy import Policy
from repo_fast.models.policy import save_policy as write_policy
from repo_fast.models.score_model import ScoreModel
from repo_fast.models.score_writing import save_score_model
from repo_fast.models.trunk import train_last_layers
from tests.job_runs import on_ranks
from tests.tiny import save_policy, save_sequence_classifier, word_tokenizer

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    yield start_distributed()
    stop_distributed()


def changed(folder: Path, change: Callable[[Weights], Weights] = dict, **settings) -> Path:
    """A policy's folder with other weights, or other settings in its config.json."""
    save_policy(folder)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: value for name, value in weights.items() if part not in name}


def cut(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: value[:3].clone() if part in name else value for name, value in weights.items()}


def whole(weights: Weights) -> Weights:
    return {name: value.to(torch.int8) if "up_proj" in name else value for name, value in weights.items()}


def with_biases(weights: Weights) -> Weights:
    return weights | {f"model.layers.{i}.self_attn.q_proj.bias": torch.ones(32) for i in range(2)}


def prefixed(weights: Weights) -> Weights:
    return {f"module.{name}": value for name, value in weights.items()}


def keep(weights: Weights) -> Weights:
    return dict(weights)


# Name -> change of the weights, settings, what is said.
UNLOADABLE: dict[str, tuple[Callable[[Weights], Weights], dict, str]] = {
    "lacking": (without("layers.1.mlp"), {}, "lacks 3 weights of its architecture, .*mlp.down_proj.weight for one"),
    "prefixed": (prefixed, {}, "lacks 2[01] weights of its architecture"),
    "cut": (cut("layers.1.mlp.up_proj"), {}, r"cannot be loaded as .*layers.1.mlp.up_proj.weight.*3, 32.*64, 32"),
    "few rows": (cut("embed_tokens"), {}, r"cannot be loaded as .*embed_tokens.weight.*3, 32"),
    "quantised": (whole, {}, "2 weights are whole numbers, model.layers.0.mlp.up_proj.weight for one"),
    "short": (keep, {"num_hidden_layers": 1}, "has 9 weights that its configuration leaves out, model.layers.1"),
    "long": (keep, {"num_hidden_layers": 3}, "lacks 9 weights of its architecture"),
    "biases": (with_biases, {}, "has 2 weights that its configuration leaves out, .*q_proj.bias for one"),
}


def load_policy(path: Path) -> Policy:
    return Policy.from_pretrained(str(path), dtype=torch.float32, attention="sdpa")


def load_critic(path: Path) -> ScoreModel:
    return ScoreModel.from_policy(str(path), dtype=torch.float32)


@pytest.mark.parametrize("load", [load_policy, load_critic])
@pytest.mark.parametrize("name", UNLOADABLE)
def test_weights_that_do_not_fit_are_an_error(name: str, load: Callable, tmp_path: Path) -> None:
    change, settings, message = UNLOADABLE[name]
    with pytest.raises(InputError, match=message) as caught:
        load(changed(tmp_path / "policy", change, **settings))
    assert "\n" not in str(caught.value)


def said_of_shards(folder: Path) -> dict[str, str]:
    """On every rank: what loading into shards says of each folder."""
    from repo_fast.config import EngineConfig
    from repo_fast.engine import sharded_loading, start_distributed, stop_distributed

    ranks = start_distributed()
    said = {}
    for name in UNLOADABLE:
        with pytest.raises(InputError) as caught, sharded_loading(EngineConfig(zero_stage=3), ranks.device):
            load_policy(folder / name)
        said[name] = str(caught.value)
    stop_distributed()
    return said


def test_weights_that_do_not_fit_are_an_error_under_zero3(tmp_path: Path) -> None:
    """There transformers reports neither all shapes nor what is left over."""
    for name, (change, settings, _) in UNLOADABLE.items():
        changed(tmp_path / name, change, **settings)
    for said in on_ranks(2, "tests.models.test_loading:said_of_shards", tmp_path):
        for name, (_, _, message) in UNLOADABLE.items():
            with pytest.raises(InputError, match=message):
                raise InputError(said[name])


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gptj", "xglm", "recurrent_gemma", "vaultgemma"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_buffers_are_the_same_in_shards(dtype: str, architecture: str, ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed makes all of a constructor in the dtype of the weights: rotary frequencies were rounded to bfloat16."""
    save_model(config_of(architecture), tmp_path)
    config = EngineConfig(zero_stage=3, dtype=dtype)
    options = {"dtype": getattr(torch, dtype), "attention": "eager"}
    whole = Policy.from_pretrained(str(tmp_path), **options)
    with sharded_loading(config, ranks.device):
        policy = Policy.from_pretrained(str(tmp_path), **options)
    Engine(policy, config, ranks, OptimizerConfig())
    sharded = dict(policy.named_buffers())
    assert sharded.keys() == dict(whole.named_buffers()).keys() and sharded
    for name, buffer in whole.named_buffers():
        assert sharded[name].dtype == buffer.dtype and torch.equal(sharded[name], buffer), name


def test_what_is_of_other_uses_is_no_error(tmp_path: Path) -> None:
    """Value heads, and tables that older releases kept beside the weights."""
    others = {
        "v_head.summary.weight": torch.zeros(1, 32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    load_policy(changed(tmp_path / "policy", lambda weights: weights | others))
    save_policy(tmp_path / "tied", tie_word_embeddings=True)
    model = load_policy(tmp_path / "tied").model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_adapter_beside_the_weights_is_an_error(tmp_path: Path) -> None:
    import peft

    folder = save_policy(tmp_path / "policy")
    model = AutoModelForCausalLM.from_pretrained(folder)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    with pytest.raises(
        InputError, match="holds an adapter beside its weights, expected a model that it is merged into"
    ):
        load_policy(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": "32"}, "'hidden_size' expected int, got str"),
        ({"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
        ({"num_hidden_layers": -1}, "config.json with num_hidden_layers -1, expected a whole number of at least 1"),
        ({"dtype": "float7"}, "not a Hugging Face model folder"),
        ({"model_type": "nope"}, "not a Hugging Face model folder"),
        ({"auto_map": {"AutoConfig": "x.Y"}, "model_type": "foo"}, "custom code"),
    ],
)
def test_a_configuration_that_cannot_be_is_one_line(settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_config(str(changed(tmp_path / "policy", **settings)))
    assert "\n" not in str(caught.value)


def test_an_architecture_that_cannot_be_built_is_one_line(tmp_path: Path) -> None:
    path = str(changed(tmp_path / "policy", hidden_act="swoosh"))
    with pytest.raises(InputError, match=f"'{path}' cannot be built as its config.json says: KeyError: 'swoosh"):
        check_positions(path, 3, "a prompt")


# Dropout in modules, in plain numbers of the layers, of whole layers, and the noise of a router.
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 64}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
NOISY = {
    "gpt2": GPT2Config(**GPT2_SIZES, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3),
    "opt": OPTConfig(
        **SIZES, ffn_dim=48, word_embed_proj_dim=32, dropout=0.3, attention_dropout=0.3, layerdrop=0.5, pad_token_id=1
    ),
    "starcoder": GPTBigCodeConfig(**GPT2_SIZES, resid_pdrop=0.3, attn_pdrop=0.3),
    "bloom": BloomConfig(**SIZES, hidden_dropout=0.3, attention_dropout=0.3),
    "mixtral": MixtralConfig(
        **SIZES, intermediate_size=32, num_key_value_heads=2, num_local_experts=4, router_jitter_noise=0.3
    ),
}


@pytest.mark.parametrize("name", NOISY)
def test_dropout_and_router_noise_are_off_in_training(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(NOISY[name]).save_pretrained(tmp_path)
    policy = Policy.from_pretrained(str(tmp_path), dtype=torch.float32, attention="eager").train()
    ids = torch.randint(3, 61, (2, 17))
    with torch.no_grad():
        first, second = (policy.model(input_ids=ids, use_cache=False).logits for _ in range(2))
        expected = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(input_ids=ids, use_cache=False).logits
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)


def written(policy: Policy, folder: Path) -> dict:
    state = {name: value.clone() for name, value in policy.named_parameters(remove_duplicate=False)}
    write_policy(folder, policy, state, word_tokenizer(), "base")
    return json.loads((folder / "config.json").read_text())


def test_a_policy_is_written_with_the_pad_token_and_dropout_of_its_folder(tmp_path: Path) -> None:
    save_policy(tmp_path / "policy", pad_token_id=0, attention_dropout=0.1)
    policy = load_policy(tmp_path / "policy")
    assert policy.model.config.pad_token_id is None and policy.model.config.attention_dropout == 0
    settings = written(policy, tmp_path / "out")
    assert (settings["pad_token_id"], settings["attention_dropout"]) == (0, 0.1)
    # While it is written, and no longer: an embedding with a pad token cannot be built under ZeRO-3.
    assert policy.model.config.pad_token_id is None
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=1)
    assert classifier(input_ids=torch.tensor([[5, 6, 7], [8, 9, 0]])).logits.shape == (2, 1)
    save_policy(tmp_path / "without")
    assert written(load_policy(tmp_path / "without"), tmp_path / "out2").get("pad_token_id") is None


def test_a_score_model_is_written_with_the_dropout_of_its_folder(tmp_path: Path) -> None:
    save_sequence_classifier(tmp_path / "model", attention_dropout=0.1)
    model = ScoreModel.from_pretrained(str(tmp_path / "model"), dtype=torch.float32)
    state = {name: value.clone() for name, value in model.named_parameters()}
    save_score_model(tmp_path / "out", model, state, word_tokenizer(), score_type="reward")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["attention_dropout"] == 0.1


def last_norm(model: torch.nn.Module) -> Iterator[str]:
    return (name for name, parameter in model.named_parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("model", "norm"),
    [
        (lambda: GPT2LMHeadModel(NOISY["gpt2"]), "transformer.ln_f"),
        (lambda: OPTForCausalLM(NOISY["opt"]), "model.decoder.final_layer_norm"),
        (lambda: BloomForCausalLM(NOISY["bloom"]), "transformer.ln_f"),
        (lambda: AutoModelForCausalLM.from_config(NOISY["mixtral"]), "model.norm"),
        # It is called after the embeddings, and stands behind the layers.
        (lambda: AutoModelForCausalLM.from_config(config_of("lfm2")), "model.embedding_norm"),
    ],
)
def test_the_final_norm_is_trained_whatever_it_is_called(model: Callable[[], torch.nn.Module], norm: str) -> None:
    built = model()
    train_last_layers(built, 1)
    trained = {name.rpartition(".")[0] for name in last_norm(built)}
    outside = {name for name in trained if ".1." not in name}
    assert outside == {norm}
    assert any(".1." in name for name in trained) and not any(".0." in f"{name}." for name in trained)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, {"do_sample": True, "temperature": 0.9, "top_p": 0.6}),
        ({"temperature": 0.9, "length_penalty": 2.0}, {"do_sample": True, "temperature": 0.9}),
        ({"early_stopping": True, "pad_token_id": -1}, {}),
        ({"temperature": 0.9, "do_sample": True}, {"do_sample": True, "temperature": 0.9}),
        # Said to be greedy: it stays so.
        ({"temperature": 0.7, "do_sample": False}, {"do_sample": False}),
        ({"temperature": 0.0}, {}),
    ],
)
def test_generation_settings_that_transformers_reads_and_refuses_to_write(
    settings: dict, expected: dict, tmp_path: Path
) -> None:
    """The first is what published Vicuna and Llama 2 folders have."""
    folder = save_policy(tmp_path / "policy")
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": 2}))
    written(load_policy(folder), tmp_path / "out")
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    found = {name: value for name, value in found.items() if name != "transformers_version" and value is not None}
    assert found == expected | {"eos_token_id": 2}
