"""What the plan says of memory against what runs hold."""

import contextlib
import copy
import gc
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from repo_fast import engine, train
from repo_fast.config import EngineConfig, LoraConfig, OptimizerConfig, ScorerConfig, TrainConfig, parse
from repo_fast.engine import Engine, start_distributed, stop_distributed
from repo_fast.jobs.run import Run
from repo_fast.models.adapters import Adapter, Base, put_adapter
from repo_fast.models.attention import PACKED
from repo_fast.models.critic import Critic
from repo_fast.models.lora import add_lora
from repo_fast.models.loss_head import LossHead, summed_cross_entropy
from repo_fast.models.policy import Policy
from repo_fast.models.score_model import ScoreModel
from repo_fast.models.sharing import SharedWeights
from repo_fast.packing.rows import pack
from repo_fast.plan.memory import memory
from repo_fast.plan.networks import network, networks
from repo_fast.speed.throughput import PHASES, Measured
from tests.job_runs import on_ranks, write_lines
from tests.tiny import save_policy, word_tokenizer

CPU = torch.device("cpu")
SCORER = ScorerConfig("package.module:function")
LLAMA = LlamaConfig(
    hidden_size=96,
    intermediate_size=200,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=3,
    vocab_size=1500,
)


def shrink_the_bucket(patch: pytest.MonkeyPatch, elements: int) -> None:
    """To less than the model has, as at the sizes that plans are for."""
    for module in ("repo_fast.engine", "repo_fast.plan.memory"):
        patch.setattr(f"{module}.REDUCE_BUCKET_ELEMENTS", elements)


def live_bytes() -> int:
    """Of the memory of all tensors that Python knows, each once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                # DeepSpeed keeps shapes as tensors without memory.
                if tensor is not None and not tensor.is_meta:
                    found[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return sum(found.values())


# ---------------------------------------------------------------------------------------------------- what stays


def make_policy(dtype: torch.dtype) -> Policy:
    model = LlamaForCausalLM._from_config(LLAMA, dtype=dtype, attn_implementation=PACKED)
    model.get_output_embeddings().__class__ = LossHead
    return Policy(model)


def backward(policy: Engine | Policy) -> torch.Tensor:
    tokens = torch.randint(1500, (40,))
    batch = pack([tokens[:9], tokens[9:15]], [tokens[15:20], tokens[20:]], CPU)
    return policy(batch, lambda hidden, projection, row: summed_cross_entropy(hidden, projection, row.targets))


def make_critic(dtype: torch.dtype) -> Critic:
    trunk = LlamaModel._from_config(LLAMA, dtype=dtype, attn_implementation=PACKED)
    return Critic(ScoreModel(trunk, torch.zeros(1, LLAMA.hidden_size)), ("reward",), dtype)


def values(critic: Engine) -> torch.Tensor:
    batch = pack([torch.randint(1500, (9,))], [torch.randint(1500, (31,))], CPU)
    return critic(batch.input_ids, batch.position_ids, batch.predictors).sum()


# What is trained, the stage, the dtype, and whether the optimizer is offloaded.
ENGINES = [
    *itertools.product(("policy",), (1, 2, 3), (torch.float32, torch.bfloat16), (False, True)),
    ("critic", 3, torch.float32, False),
]


def held_after_a_step(folder: Path) -> dict:
    """On each rank of a torchrun: what an engine of each kind holds."""
    held, engines = {}, []
    with pytest.MonkeyPatch.context() as patch:
        shrink_the_bucket(patch, 200_000)
        ranks = start_distributed()
        for role, stage, dtype, offload in ENGINES:
            make, loss = (make_policy, backward) if role == "policy" else (make_critic, values)
            before = live_bytes()
            settings = {"zero_stage": stage, "dtype": str(dtype).removeprefix("torch."), "offload_optimizer": offload}
            trained = Engine(
                make(dtype), EngineConfig(**settings, parameter_persistence_threshold=0), ranks, OptimizerConfig()
            )
            for _ in range(2):
                trained.backward(loss(trained), last=True)
                trained.step()
            held[role, stage, dtype, offload] = live_bytes() - before
            # Not let go of, or the next would be measured against what it frees.
            engines.append(trained)
        stop_distributed()
    return held


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_stays_is_what_deepspeed_holds(ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_the_bucket(monkeypatch, 200_000)
    for held in on_ranks(ranks, f"{__name__}:held_after_a_step", tmp_path):
        for (role, stage, dtype, offload), measured in held.items():
            engine = EngineConfig(zero_stage=stage, offload_optimizer=offload)
            trained = network(role, LLAMA, dtype, head=role == "policy")
            planned = memory(TrainConfig(engine=engine, reward=SCORER, cost=SCORER), [trained], ranks, dtype, CPU)
            # Here the host is the device. Below stage 3 the largest gradient has two buffers, which is little where
            # there are many layers.
            largest = LLAMA.vocab_size * LLAMA.hidden_size * dtype.itemsize
            buffers = 2 * largest if offload and stage < 3 else 0
            both = planned.resident_total + planned.offloaded + buffers
            assert both == pytest.approx(measured, rel=0.03), (role, stage, dtype, offload)


def test_what_is_trained_is_what_is_counted() -> None:
    whole = network("policy", LLAMA, torch.float32, head=True)
    parameters = sum(p.numel() for p in make_policy(torch.float32).parameters())
    assert whole.parameters == whole.trained == parameters and whole.layers == 3
    assert network("reference", LLAMA, torch.float32, head=True, frozen=True).trained == 0
    last = network("policy", LLAMA, torch.float32, head=True, last=1)
    assert 0 < last.trained < parameters // 3 and last.layers == 1
    adapters = network("policy", LLAMA, torch.float32, head=True, lora=LoraConfig(rank=4))
    assert 0 < adapters.trained < parameters // 10 and adapters.parameters == parameters + adapters.trained


def test_what_models_share_is_what_is_counted() -> None:
    """A score model's adapters that are kept beside the policy's base are its own, and its critic's."""
    base = LlamaForCausalLM._from_config(LLAMA, dtype=torch.bfloat16)
    pairs = {
        f"layers.{i}.self_attn.q_proj": (torch.randn(2, LLAMA.hidden_size), torch.randn(LLAMA.hidden_size, 2))
        for i in range(LLAMA.num_hidden_layers)
    }
    adapter = Adapter("reward", Base("policy", ""), None, 2, 4.0, pairs)
    lora, shared = LoraConfig(rank=4), SharedWeights()
    on = {"base": ("policy", None), "lora": lora}
    planned = [
        network("policy", LLAMA, torch.bfloat16, head=True, **on),
        network("reward", LLAMA, torch.bfloat16, frozen=True, base=("policy", None), adapter=adapter),
        network("reward critic", LLAMA, torch.bfloat16, adapter=adapter, **on),
        network("cost critic", LLAMA, torch.bfloat16, **on),
    ]
    for i, model in enumerate(planned):
        held = copy.deepcopy(base if model.role == "policy" else base.model)
        if model.adapter:
            put_adapter(held, adapter)
        if model.trained:
            add_lora(held, rank=lora.rank, alpha=lora.alpha)
        sizes = [(p.numel(), p.requires_grad) for p in held.parameters()]
        assert model.parameters == sum(size for size, _ in sizes)
        assert model.trained == sum(size for size, trained in sizes if trained)
        shared.take(model.role, held)
        spared = max((model.common_bytes(earlier, 2) for earlier in planned[:i]), default=0)
        assert spared == shared.spared[model.role], model.role
    adapters = 2 * sum(a.numel() + b.numel() for a, b in pairs.values())
    assert shared.spared["reward critic"] - shared.spared["reward"] == adapters > 0


# ------------------------------------------------------------------------------------------- what comes and goes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_on_paper_are_those_of_a_forward(dtype: torch.dtype) -> None:
    policy = make_policy(dtype)
    weights = {parameter.untyped_storage()._cdata for parameter in policy.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    tokens = torch.randint(1500, (400,))
    batch = pack([tokens[:150], tokens[150:300]], [tokens[300:350], tokens[350:]], CPU)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        policy(batch, lambda hidden, projection, row: hidden.sum())
    measured = sum(storage.nbytes() for storage in kept.values())
    planned = network("policy", LLAMA, dtype, head=True)
    total = 400 * (planned.layers * planned.layer_activations + planned.other_activations)
    # The CPU's attention keeps some tensors once more than FlashAttention.
    assert total == pytest.approx(measured, rel=0.15)


VARIANTS = {
    1: ["--engine.zero_stage 3", "--engine.zero_stage 1"],
    2: [
        "--engine.zero_stage 2",
        "--engine.zero_stage 3",
        "--engine.zero_stage 3 --engine.dtype bfloat16 --engine.activation_checkpointing true",
    ],
}


def job(folder: Path, options: str) -> list[str]:
    """The command line of a run whose responses are all as long as they may be, nearly."""
    settings = {
        "policy.path": folder / "policy",
        "data.prompts": folder / "prompts.jsonl",
        "data.eval_prompts": "null",
        "data.max_prompt_tokens": 16,
        "reward.path": "tests.scorers:reward",
        "cost.path": "tests.scorers:cost",
        "algorithm.advantage": "gae",
        "rollout.prompts_per_step": 8,
        "rollout.responses_per_prompt": 2,
        "rollout.max_new_tokens": 48,
        "rollout.batch_size": 8,
        "update.micro_batch_tokens": 256,
        "update.minibatches": 1,
        "policy_optimizer.learning_rate": 1e-8,
        "critic_optimizer.learning_rate": 1e-8,
        "engine.dtype": "float32",
        "engine.parameter_persistence_threshold": 0,
        "log.loggers": "[]",
        "total_steps": 2,
    }
    return [*(word for key, value in settings.items() for word in (f"--{key}", str(value))), *options.split()]


def most_added(folder: Path) -> dict[str, dict[str, int]]:
    """On each rank of a torchrun: by options, how many bytes each phase of a run's last step held beside what stays."""
    engine.stop_distributed = lambda: None
    found = {}
    for number, options in enumerate(VARIANTS[int(os.environ["WORLD_SIZE"])]):
        found[options] = {}
        with pytest.MonkeyPatch.context() as patch:
            shrink_the_bucket(patch, 600_000)
            patch.setattr(Run, "phase", noting_what_is_allocated(Run.phase, found[options]))
            assert train.main([*job(folder, options), "--output_dir", str(folder / f"run-{number}")]) == 0
    return found


Phase = Callable[[Run, str], contextlib.AbstractContextManager[Measured]]


def noting_what_is_allocated(phase: Phase, most: dict[str, int]) -> Phase:
    """`Run.phase`, which writes the most bytes beyond those at its start to `most`; the last step's stay."""

    @contextlib.contextmanager
    def noted(run: Run, name: str) -> Iterator[Measured]:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, phase(run, name) as measured:
            yield measured
        events = profiler.profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        most[name] = max(itertools.accumulate((size for _, size in changes), initial=0))

    return noted


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_a_phase_adds_is_what_is_planned(ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_the_bucket(monkeypatch, 600_000)
    tokenizer = word_tokenizer([f"w{i}" for i in range(1980)])
    sizes = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4, "initializer_range": 0.02}
    save_policy(tmp_path / "policy", tokenizer, **sizes)
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": " ".join(f"w{i + j}" for j in range(10))} for i in range(8)])
    everyone = on_ranks(ranks, f"{__name__}:most_added", tmp_path)
    for options in VARIANTS[ranks]:
        config = parse(job(tmp_path, options), TrainConfig)
        dtype = getattr(torch, config.engine.dtype)
        planned = memory(config, networks(config, dtype), ranks, dtype, CPU).phases
        measured = {phase: max(rank[options][phase] for rank in everyone) for phase in PHASES}
        shares = {phase: planned[phase] / measured[phase] for phase in ("generate", "experience", "update")}
        # Of a forward without a backward, the plan has all that one with it would keep of a layer. In an update, gloo's
        # threads let go of gradients when they get to it: on a busy machine up to all of them are held once more.
        limits = {"generate": (0.85, 1.15), "experience": (0.7, 3.0), "update": (0.5, 1.5)}
        for phase, (least, most) in limits.items():
            assert least < shares[phase] < most, (options, shares)
