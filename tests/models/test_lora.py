"""LoRA under every ZeRO stage, on one and two ranks: what is trained, switched off, merged, saved, resumed."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    Qwen2Config,
)

from repo_fast.config import EngineConfig, OptimizerConfig, RolloutConfig
from repo_fast.data import Prompt
from repo_fast.engine import Engine, resolve_dtype, sharded_loading, start_distributed, stop_distributed
from repo_fast.errors import InputError
from repo_fast.models import policy as policies
from repo_fast.models.adapters import Base
from repo_fast.models.lora import (
    adapter_state,
    adapters_off,
    add_lora,
    describe,
    has_adapters,
    merged_state,
)
from repo_fast.models.loss_head import Projection
from repo_fast.models.policy import Policy
from repo_fast.models.score_model import ScoreModel
from repo_fast.models.score_writing import save_score_model
from repo_fast.models.vocabulary import fit_vocabulary
from repo_fast.ops import linear_log_probs
from repo_fast.packing.rows import PackedBatch, pack
from repo_fast.rollout.hf import Request, generate
from tests.job_runs import on_ranks, same_bits
from tests.tiny import save_beaver, save_policy, word_tokenizer

CPU = torch.device("cpu")
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup=0.0, gradient_clip=0.5)
LORA = {"rank": 4, "alpha": 6.0}
SETTINGS = {
    "stage 1": {"zero_stage": 1},
    "stage 2": {"zero_stage": 2},
    "stage 3": {},
    "stage 3, bfloat16": {"dtype": "bfloat16"},
    "stage 3, small parameters whole": {"parameter_persistence_threshold": 10_000},
    "stage 3, activation checkpointing": {"activation_checkpointing": True},
    "stage 2, activation checkpointing": {"zero_stage": 2, "activation_checkpointing": True},
}
EXACT = [name for name in SETTINGS if "bfloat16" not in name]
# What all ranks together learn from, a micro-batch each, and what the outputs are compared on.
LEARNED = [
    [([3, 9, 14], [15, 16, 17, 2]), ([5, 8], [20, 9])],
    [([12, 13, 14, 15, 16, 17, 18], [19, 20, 21, 22, 23, 24, 9, 10, 11, 2])],
]
TOKENS = 4 + 2 + 10
READ = ([1, 7, 9], [11, 20, 4, 2])


def packed(pairs: list[tuple[list[int], list[int]]]) -> PackedBatch:
    prompts, responses = zip(*pairs, strict=True)
    return pack([torch.tensor(p) for p in prompts], [torch.tensor(r) for r in responses], CPU)


def negative_log_likelihood(hidden: torch.Tensor, projection: Projection, batch: PackedBatch) -> torch.Tensor:
    return -linear_log_probs(hidden, projection.weight, batch.targets).sum() / TOKENS


@torch.no_grad()
def logits(policy: Engine | nn.Module) -> torch.Tensor:
    """Of the tokens that predict the response of `READ`."""
    return policy(packed([READ]), lambda hidden, projection, _: hidden @ projection.weight.T)


class OnARank:
    """What each rank does and notes down."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranks = start_distributed()

    def engine(self, **settings) -> Engine:
        config = EngineConfig(**{"dtype": "float32", "parameter_persistence_threshold": 0, **settings})
        with sharded_loading(config, CPU):
            policy = Policy.from_pretrained(
                str(self.folder / "policy"), dtype=resolve_dtype(config.dtype, CPU), attention="sdpa"
            )
        # Ranks that draw differently: the first one's adapters count.
        torch.manual_seed(self.ranks.rank)
        add_lora(policy.model, **LORA)
        if config.activation_checkpointing:
            policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            policy.model.enable_input_require_grads()
        return Engine(policy, config, self.ranks, OPTIMIZER, steps=10)

    def step(self, engine: Engine) -> dict[str, torch.Tensor]:
        """One optimizer step, with the base read in between; returns its gradients."""
        shares = LEARNED[self.ranks.rank :: self.ranks.size]
        for count, pairs in enumerate(shares, start=1):
            with adapters_off(engine.module):
                logits(engine)
            loss = engine(packed(pairs), negative_log_likelihood)
            engine.backward(loss, last=count == len(shares))
        parameters = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
        gradients = {name: safe_get_full_grad(parameter).clone() for name, parameter in parameters}
        assert engine.step().applied
        return gradients

    def policy(self, name: str, **settings) -> dict[str, Any]:
        engine = self.engine(**settings)
        module = engine.module
        found: dict[str, Any] = {"said": describe(module), "start": engine.whole_state(), "logits": [logits(engine)]}
        found["dtypes"] = {parameter.dtype for parameter in module.parameters()}
        found["trained"] = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        with adapters_off(module):
            found["off"] = [logits(engine)]
        found["gradients"] = [self.step(engine) for _ in range(3)]
        found["logits"].append(logits(engine))
        with adapters_off(module):
            found["off"].append(logits(engine))
            found["trained while off"] = [n for n, parameter in module.named_parameters() if parameter.requires_grad]
        with engine.gathered():
            found["logits"].append(logits(module))
            with adapters_off(module):
                found["off"].append(logits(module))
            torch.manual_seed(0)
            asked = [Request(Prompt(0, "tea"), torch.tensor([1, 12, 13]))]
            rollout = generate(module.model, word_tokenizer(), asked, [3], RolloutConfig(max_new_tokens=6), CPU)
            found["sampled"] = rollout.response_tokens[0], rollout.sampler_log_probs[0]
        found["logits"].append(logits(engine))

        state = engine.whole_state()
        found |= {"state": state, "merged": merged_state(module, state), "adapters": adapter_state(module, state)}
        if self.ranks.is_first:
            policies.save_policy(
                self.folder / name / "merged", module, state, word_tokenizer(), str(self.folder / "policy")
            )
        engine.save(self.folder / name / "checkpoint")
        resumed = self.engine(**settings)
        resumed.load(self.folder / name / "checkpoint")
        found["resumed"] = resumed.whole_state()
        self.step(engine)
        self.step(resumed)
        found["goes on"] = engine.whole_state(), resumed.whole_state()
        return found

    def critic(self, stage: int) -> dict[str, Any]:
        config = EngineConfig(dtype="float32", parameter_persistence_threshold=0, zero_stage=stage)
        with sharded_loading(config, CPU):
            model = ScoreModel.from_pretrained(str(self.folder / "critic"), dtype=torch.float32)
        add_lora(model.trunk, **LORA, targets=["q_proj", "down_proj"])
        engine = Engine(model, config, self.ranks, OPTIMIZER, steps=10)
        found = {"said": describe(model), "start": engine.whole_state()}
        for _ in range(2):
            engine.backward(score(engine).square().sum() / self.ranks.size, last=True)
            engine.step()
        with torch.no_grad():
            found["scores"] = score(engine)
        state = engine.whole_state()
        found |= {"state": state, "merged": merged_state(model, state)}
        folder = self.folder / f"critic-{stage}"
        if self.ranks.is_first:
            base = Base.of(str(self.folder / "critic"))
            save_score_model(folder, model, state, word_tokenizer(), score_type="reward", base=base)
        self.ranks.barrier()
        for name in (".", "adapter"):
            with sharded_loading(config, CPU, frozen=True):
                model = ScoreModel.from_pretrained(str(folder / name), dtype=torch.float32)
            sharded = any(hasattr(parameter, "ds_id") for parameter in model.trunk.parameters())
            loaded = Engine(model, config, self.ranks)
            with torch.no_grad():
                found[f"loaded {name}"] = sharded, score(loaded), loaded.whole_state()
        return found


def score(model: Engine | nn.Module) -> torch.Tensor:
    ids = torch.tensor([READ[0] + READ[1]])
    return model(ids, torch.arange(ids.shape[1])[None], torch.tensor([2, 6]))


def measure(folder: Path) -> dict[str, Any]:
    """On each rank of a torchrun."""
    on = OnARank(folder)
    found: dict[str, Any] = {name: on.policy(name, **settings) for name, settings in SETTINGS.items()}
    found["critic"] = {stage: on.critic(stage) for stage in (1, 3)}
    stop_distributed()
    return found


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["one rank", "two ranks"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder, and what each rank of a run found."""
    folder = tmp_path_factory.mktemp("lora")
    save_policy(folder / "policy")
    save_beaver(folder / "critic", bias=True)
    return folder, on_ranks(request.param, "tests.models.test_lora:measure", folder)


@pytest.fixture
def plain(tmp_path: Path) -> Policy:
    """A policy with adapters, never given to DeepSpeed, that have left their start."""
    policy = Policy.from_pretrained(str(save_policy(tmp_path / "policy")), dtype=torch.float32, attention="sdpa")
    add_lora(policy.model, **LORA)
    move(policy)
    return policy


@torch.no_grad()
def move(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape) * 0.1)


def of_base(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights that were there before the adapters, under their own names."""
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}


# ------------------------------------------------------------------------------------------------- without DeepSpeed


def test_only_the_adapters_are_trained_and_change_nothing_at_first(tmp_path: Path) -> None:
    policy = Policy.from_pretrained(str(save_policy(tmp_path / "policy")), dtype=torch.float32, attention="sdpa")
    before, names = logits(policy), list(policy.state_dict())
    add_lora(policy.model, **LORA)
    assert torch.equal(logits(policy), before)
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in policy.named_parameters() if ".lora_" in name}
    assert {name.rpartition(".lora_")[0].rpartition(".")[2] for name in trained} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    assert list(of_base(policy.state_dict())) == names


def test_equal_seeds_give_equal_adapters(tmp_path: Path) -> None:
    path = str(save_policy(tmp_path / "policy"))
    states = []
    for seed in (3, 3, 4):
        policy = Policy.from_pretrained(path, dtype=torch.float32, attention="sdpa")
        torch.manual_seed(seed)
        add_lora(policy.model, **LORA)
        states.append(policy.state_dict())
    assert same_bits(dict(states[0]), dict(states[1]))
    assert not same_bits(dict(states[0]), dict(states[2]))


def test_targets(tmp_path: Path) -> None:
    policy = Policy.from_pretrained(str(save_policy(tmp_path / "policy")), dtype=torch.float32, attention="sdpa")
    # Outside the blocks a name means something else.
    policy.model.side = nn.ModuleDict({"v_proj": nn.Linear(2, 2)})
    add_lora(policy.model, **LORA, targets=["v_proj"])
    assert has_adapters(policy) and type(policy.model.side["v_proj"]) is nn.Linear
    del policy.model.side
    # 2 layers x rank 4 x (32 in + 16 out).
    assert describe(policy) == "LoRA rank 4 on 2 layers: 384 of 20,768 parameters trained (1.8 %)"


def test_without_adapters(tmp_path: Path) -> None:
    policy = Policy.from_pretrained(str(save_policy(tmp_path / "policy")), dtype=torch.float32, attention="sdpa")
    state = policy.state_dict()
    assert merged_state(policy, state) is state and not has_adapters(policy)
    assert describe(policy) == "20,384 of 20,384 parameters trained (100.0 %)"
    with adapters_off(policy):
        logits(policy)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "the LoRA rank is 0, expected at least 1"),
        ({"alpha": 0.0}, "the LoRA alpha is 0.0, expected more than 0"),
        ({"alpha": float("nan")}, "the LoRA alpha is nan, expected more than 0"),
        (
            {"targets": ["q_proj", "query"]},
            "the LoRA target 'query' is no linear layer, expected some of: "
            "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
        ),
        ({"targets": ["lm_head"]}, "the LoRA target 'lm_head' is no linear layer"),
    ],
)
def test_bad_input(tmp_path: Path, settings: dict, message: str) -> None:
    policy = Policy.from_pretrained(str(save_policy(tmp_path / "policy")), dtype=torch.float32, attention="sdpa")
    with pytest.raises(InputError) as error:
        add_lora(policy.model, **{**LORA, **settings})
    assert str(error.value).startswith(message)
    assert all(parameter.requires_grad for parameter in policy.parameters())


def test_a_model_without_linear_layers_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    with pytest.raises(InputError, match="GPT2LMHeadModel has no linear layers in its blocks"):
        add_lora(model, **LORA)


def test_adapters_come_back_after_an_error(plain: Policy) -> None:
    on, gradients = logits(plain), [parameter.requires_grad for parameter in plain.parameters()]
    with pytest.raises(RuntimeError, match="within"), adapters_off(plain):
        off = logits(plain)
        with adapters_off(plain):
            pass
        assert torch.equal(logits(plain), off)
        raise RuntimeError("within")
    assert torch.equal(logits(plain), on) and not torch.equal(off, on)
    assert [parameter.requires_grad for parameter in plain.parameters()] == gradients


def test_merging_rounds_once(plain: Policy) -> None:
    plain.to(torch.bfloat16)
    state = {name: value.clone() for name, value in plain.state_dict().items()}
    kept = dict(state)
    merged = merged_state(plain, state)
    assert same_bits(state, kept)
    name = "model.model.layers.1.mlp.down_proj"
    w, a, b = (state[f"{name}.{part}.weight"].double() for part in ("base_layer", "lora_A.default", "lora_B.default"))
    exact = w + LORA["alpha"] / LORA["rank"] * (b @ a)
    assert merged[f"{name}.weight"].dtype == torch.bfloat16
    # Half a unit in the last of bfloat16's 8 bits, and a little for float32's own error.
    assert ((merged[f"{name}.weight"].double() - exact).abs() <= exact.abs() * 2.0**-8 * 1.001).all()


@pytest.mark.parametrize("config", [Qwen2Config, GPTNeoXConfig])
def test_layers_with_biases(config: type, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    plain = AutoModelForCausalLM.from_config(config(vocab_size=32, num_key_value_heads=2, **sizes))
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    plain.save_pretrained(tmp_path / "policy")
    policy = Policy.from_pretrained(str(tmp_path / "policy"), dtype=torch.float32, attention="sdpa")
    add_lora(policy.model, **LORA)
    move(policy)
    merged = merged_state(policy, policy.state_dict())
    assert list(merged) == [f"model.{name}" for name in plain.state_dict()]
    before = logits(policy)
    policy = Policy.from_pretrained(str(tmp_path / "policy"), dtype=torch.float32, attention="sdpa")
    assert (logits(policy) - before).abs().max() > 0.1
    policy.load_state_dict(merged)
    assert torch.allclose(logits(policy), before, atol=1e-5)


@pytest.mark.parametrize("fitted_first", [True, False])
def test_with_a_vocabulary_that_has_grown(tmp_path: Path, fitted_first: bool) -> None:
    """The merged model has the new rows; the adapter goes to the base as it was, and knows its tokens."""
    tokenizer = word_tokenizer(pad_token=None)
    base = save_policy(tmp_path / "policy", tokenizer, tie_word_embeddings=True)
    policy = Policy.from_pretrained(str(base), dtype=torch.float32, attention="sdpa")
    fit = partial(fit_vocabulary, policy.model, tokenizer, pad_token="<filling>", multiple=16)
    if fitted_first:
        assert fit()
    add_lora(policy.model, **LORA)
    if not fitted_first:
        assert fit()
    move(policy)
    assert all(p.requires_grad == (".lora_" in name) for name, p in policy.named_parameters())
    policies.save_policy(tmp_path / "saved", policy, dict(policy.state_dict()), tokenizer, str(base))
    ids = torch.tensor([READ[0] + READ[1]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(ids).logits[0, 2:-1]
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "saved" / "adapter")
        old_rows = model(ids).logits[0, 2:-1]
    assert merged.shape[1] == 32 and torch.allclose(merged, logits(policy), atol=1e-5)
    assert torch.allclose(old_rows, logits(policy)[:, :28], atol=1e-5)


# ---------------------------------------------------------------------------------------------------- with DeepSpeed


def each(ranks: list[dict[str, Any]], names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((name, rank[name]) for name in names for rank in ranks)


def test_the_start_is_the_base_with_the_first_ranks_adapters(runs) -> None:
    folder, ranks = runs
    base = load_file(folder / "policy" / "model.safetensors")
    policy = Policy.from_pretrained(str(folder / "policy"), dtype=torch.float32, attention="sdpa")
    torch.manual_seed(0)
    add_lora(policy.model, **LORA)
    for name in EXACT:
        start = ranks[0][name]["start"]
        assert same_bits(of_base(start), {f"model.{key}": value for key, value in base.items()}), name
        assert same_bits(start, {key: parameter.data for key, parameter in policy.named_parameters()}), name
    for name, found in each(ranks, list(SETTINGS)):
        assert found["said"] == "LoRA rank 4 on 14 layers: 4,096 of 24,480 parameters trained (16.7 %)"
        assert found["dtypes"] == {torch.bfloat16 if "bfloat16" in name else torch.float32}
        assert torch.equal(found["logits"][0], found["off"][0])


def test_steps_move_the_adapters_and_nothing_else(runs) -> None:
    for name, found in each(runs[1][:1], list(SETTINGS)):
        assert same_bits(of_base(found["state"]), of_base(found["start"])), name
        moved = [key for key, value in found["state"].items() if not torch.equal(value, found["start"][key])]
        assert moved == found["trained"] == [key for key in found["start"] if ".lora_" in key]


def test_adapters_off_is_the_base_to_the_last_bit(runs) -> None:
    for name, found in each(runs[1], list(SETTINGS)):
        assert all(torch.equal(off, found["off"][0]) for off in found["off"]), name
        assert found["trained while off"] == found["trained"]
        start, *trained = found["logits"]
        assert all(torch.equal(on, trained[0]) for on in trained) and (trained[0] - start).abs().max() > 0.1


def test_no_adapter_is_without_a_gradient(runs) -> None:
    for name, found in each(runs[1], list(SETTINGS)):
        first, second, _ = found["gradients"]
        # B starts at 0, so A has a gradient from the second step on.
        assert all(bool(gradient.any()) == (".lora_B." in key) for key, gradient in first.items()), name
        assert all(gradient.any() for gradient in second.values()), name


def test_gradients_are_those_of_plain_torch(runs) -> None:
    folder, ranks = runs
    policy = Policy.from_pretrained(str(folder / "policy"), dtype=torch.float32, attention="sdpa")
    torch.manual_seed(0)
    add_lora(policy.model, **LORA)
    trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    adam = torch.optim.AdamW(trained.values(), lr=1e-2, betas=OPTIMIZER.betas, weight_decay=OPTIMIZER.weight_decay)
    for step in range(3):
        adam.zero_grad()
        for pairs in LEARNED:
            policy(packed(pairs), negative_log_likelihood).backward()
        for name, found in each(ranks, EXACT):
            for key, parameter in trained.items():
                error = (found["gradients"][step][key] - parameter.grad).norm()
                assert error <= 1e-4 * parameter.grad.norm() + 1e-7, (name, step, key)
        torch.nn.utils.clip_grad_norm_(trained.values(), OPTIMIZER.gradient_clip)
        adam.step()


def test_the_merged_model_computes_what_the_adapters_do(runs) -> None:
    folder, ranks = runs
    ids = torch.tensor([READ[0] + READ[1]])
    for name, found in each(ranks[:1], list(SETTINGS)):
        assert list(found["merged"]) == list(of_base(found["state"]))
        model = AutoModelForCausalLM.from_pretrained(folder / name / "merged")
        with torch.no_grad():
            outputs = model(ids).logits[0, len(READ[0]) - 1 : -1]
        assert outputs.dtype == found["logits"][1].dtype
        # In bfloat16 the sum of base and adapter is rounded after each product, or once, in the merged weight.
        limit = 0.1 if "bfloat16" in name else 1e-5
        assert (outputs - found["logits"][1]).abs().max() <= limit, name
    for rank in ranks[1:]:
        assert rank["stage 3"]["merged"] == rank["stage 3"]["adapters"] == {}


def test_the_saved_adapter_is_pefts(runs) -> None:
    folder, ranks = runs
    ids = torch.tensor([READ[0] + READ[1]])
    for name, found in each(ranks[:1], list(SETTINGS)):
        adapter = folder / name / "merged" / "adapter"
        config = json.loads((adapter / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(folder / "policy") and config["task_type"] == "CAUSAL_LM"
        base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"], dtype=found["logits"][1].dtype)
        model = PeftModel.from_pretrained(base, adapter)
        with torch.no_grad():
            outputs = model(ids).logits[0, len(READ[0]) - 1 : -1]
        # In bfloat16 peft computes its part in float32.
        limit = 0.1 if "bfloat16" in name else 1e-5
        assert (outputs - found["logits"][1]).abs().max() <= limit, name


def test_generation_reads_the_adapters(runs) -> None:
    """The sampler's log-probabilities are those of the trained policy, which all ranks share."""
    folder, ranks = runs
    for name, found in each(ranks, EXACT):
        tokens, log_probs = found["sampled"]
        model = AutoModelForCausalLM.from_pretrained(folder / name / "merged")
        with torch.no_grad():
            scores = model(torch.cat([torch.tensor([1, 12, 13]), tokens])[None]).logits[0, 2:-1].log_softmax(-1)
        assert torch.allclose(log_probs, scores.gather(1, tokens[:, None])[:, 0], atol=1e-5), name


def test_resuming_is_exact(runs) -> None:
    for name, found in each(runs[1], list(SETTINGS)):
        assert same_bits(found["resumed"], found["state"]), name
        ours, theirs = found["goes on"]
        assert same_bits(ours, theirs) and (not ours or not same_bits(ours, found["state"])), name


@pytest.mark.parametrize("stage", [1, 3])
def test_a_critic_trains_its_adapters_and_its_head(runs, stage: int) -> None:
    folder, ranks = runs
    found = ranks[0]["critic"][stage]
    # 2 layers x rank 4 x (32 + 32 and 64 + 32), and 32 + 1 of the head.
    assert found["said"] == "LoRA rank 4 on 4 layers: 1,313 of 20,801 parameters trained (6.3 %)"
    moved = {name for name, value in found["state"].items() if not torch.equal(value, found["start"][name])}
    assert moved == {name for name in found["start"] if ".lora_" in name or name.startswith("score_head.")}
    plain = ScoreModel.from_pretrained(str(folder / "critic"), dtype=torch.float32)
    plain.load_state_dict(found["merged"])
    assert all(torch.allclose(score(plain), rank["critic"][stage]["scores"], atol=1e-5) for rank in ranks)

    for rank in ranks:
        (sharded, merged, whole), (_, adapted, state) = (rank["critic"][stage][f"loaded {n}"] for n in (".", "adapter"))
        assert sharded == (stage == 3) and torch.equal(adapted, merged) and same_bits(state, whole)
        assert torch.allclose(adapted, found["scores"], atol=1e-5)

    saved = folder / f"critic-{stage}" / "adapter"
    plain = ScoreModel.from_pretrained(str(folder / "critic"), dtype=torch.float32)
    plain.trunk = PeftModel.from_pretrained(AutoModel.from_pretrained(folder / "critic"), saved)
    head = load_file(saved / "score_head.safetensors")
    plain.score_head.load_state_dict({part: head[f"score_head.{part}"] for part in ("weight", "bias")})
    assert torch.allclose(score(plain), found["scores"], atol=1e-5)
