"""The plan's formulas against what runs hold, and what its command says."""

import gc
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from repo_fast.config import EngineConfig, LoraConfig, OptimizerConfig, ScorerConfig, TrainConfig, parse
from repo_fast.engine import Engine, start_distributed, stop_distributed
from repo_fast.experience import pack
from repo_fast.models.attention import PACKED
from repo_fast.models.critic import Critic
from repo_fast.models.loss_head import LossHead, summed_cross_entropy
from repo_fast.models.policy import Policy
from repo_fast.models.score_model import ScoreModel
from repo_fast.plan.__main__ import USABLE, largest_micro_batch, main
from repo_fast.plan.memory import memory
from repo_fast.plan.networks import network, networks
from repo_fast.plan.speed import DEVICES, Workload, step_seconds
from tests.jobs import on_ranks

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
STAGES = [(stage, dtype) for stage in (1, 2, 3) for dtype in (torch.float32, torch.bfloat16)]
LARGE = LlamaConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_attention_heads=32,
    num_hidden_layers=32,
    vocab_size=32001,
    architectures=["LlamaForCausalLM"],
)


def make_policy(dtype: torch.dtype) -> Policy:
    model = LlamaForCausalLM._from_config(LLAMA, dtype=dtype, attn_implementation=PACKED)
    model.get_output_embeddings().__class__ = LossHead
    return Policy(model)


def backward(policy: Engine | Policy) -> torch.Tensor:
    tokens = torch.randint(1500, (40,))
    batch = pack([tokens[:9], tokens[9:15]], [tokens[15:20], tokens[20:]], CPU)
    return policy(batch, lambda hidden, weight, row: summed_cross_entropy(hidden, weight, row.targets))


def live_bytes() -> int:
    """Of all tensors that Python knows, each memory once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    found[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return sum(found.values())


def make_critic(dtype: torch.dtype) -> Critic:
    trunk = LlamaModel._from_config(LLAMA, dtype=dtype, attn_implementation=PACKED)
    return Critic(ScoreModel(trunk, torch.zeros(1, LLAMA.hidden_size)), ("reward",), dtype)


def values(critic: Engine) -> torch.Tensor:
    batch = pack([torch.randint(1500, (9,))], [torch.randint(1500, (31,))], CPU)
    return critic(batch.input_ids, batch.position_ids, batch.predictors).sum()


ROLES = {"policy": (make_policy, backward), "critic": (make_critic, values)}


def held_after_a_step(folder: Path) -> dict:
    """On each rank of a torchrun: what an engine holds, by stage, dtype and what it trains."""
    ranks = start_distributed()
    held, engines = {}, []
    for (stage, dtype), role in itertools.product(STAGES, ROLES):
        make, loss = ROLES[role]
        before = live_bytes()
        config = EngineConfig(
            zero_stage=stage, dtype=str(dtype).removeprefix("torch."), parameter_persistence_threshold=0
        )
        engine = Engine(make(dtype), config, ranks, OptimizerConfig())
        for _ in range(2):
            engine.backward(loss(engine), last=True)
            engine.step()
        held[stage, dtype, role] = live_bytes() - before
        # Not let go of, or the next would be measured against what it frees.
        engines.append(engine)
    stop_distributed()
    return held


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_stays_is_what_deepspeed_holds(ranks: int, tmp_path: Path) -> None:
    for held in on_ranks(ranks, "tests.test_plan:held_after_a_step", tmp_path):
        for (stage, dtype, role), measured in held.items():
            config = TrainConfig(engine=EngineConfig(zero_stage=stage), reward=SCORER, cost=SCORER)
            trained = network(role, LLAMA, dtype, head=role == "policy")
            planned = memory(config, [trained], ranks, dtype, CPU).resident_total
            assert planned == pytest.approx(measured, rel=0.03), (stage, dtype, role)


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
        policy(batch, lambda hidden, weight, row: hidden.sum())
    measured = sum(storage.nbytes() for storage in kept.values())
    planned = network("policy", LLAMA, dtype, head=True)
    total = 400 * (planned.layers * planned.layer_activations + planned.other_activations)
    # The CPU's attention keeps some tensors once more than FlashAttention.
    assert total == pytest.approx(measured, rel=0.15)


def test_what_is_trained_is_what_is_counted() -> None:
    whole = network("policy", LLAMA, torch.float32, head=True)
    parameters = sum(p.numel() for p in make_policy(torch.float32).parameters())
    assert whole.parameters == whole.trained == parameters and whole.layers == 3
    assert network("reference", LLAMA, torch.float32, head=True, frozen=True).trained == 0
    last = network("policy", LLAMA, torch.float32, head=True, last=1)
    assert 0 < last.trained < parameters // 3 and last.layers == 1
    adapters = network("policy", LLAMA, torch.float32, head=True, lora=LoraConfig(rank=4))
    assert 0 < adapters.trained < parameters // 10 and adapters.parameters == parameters + adapters.trained


# ------------------------------------------------------------------------------------------------- the 7B on paper


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of Alpaca-7B with models that are configurations alone."""
    folder = tmp_path_factory.mktemp("large")
    LARGE.save_pretrained(folder / "policy")
    replaced = LlamaConfig(**{**LARGE.to_dict(), "architectures": ["LlamaForScore"]})
    replaced.save_pretrained(folder / "score")
    paths = {"policy": "policy", "reward": "score", "cost": "score"}
    words = [word for section, name in paths.items() for word in (f"--{section}.path", str(folder / name))]
    return ["--config", "alpaca-7b", *words]


def test_the_paper_s_setting_fits_eight_large_gpus(large: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpus", "8", *large]) == 0
    said = capsys.readouterr().out
    assert "It fits" in said and "update.micro_batch_tokens" in said
    for row in ("policy", "reference", "reward critic", "cost critic", "+ generate", "+ update", "at most"):
        assert f"| {row} " in said


def test_what_does_not_fit_says_what_to_switch_on(large: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpus", "2", *large]) == 0
    said = capsys.readouterr().out
    assert "It does not fit" in said and "engine.offload_optimizer true" in said
    assert [line for line in said.splitlines() if line.startswith("  with ")][-1].endswith(", fits")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "--gpus"),
        (["--gpus", "8", "--device", "abacus"], "abacus"),
        (["--gpus", "8", "--policy.pth", "x"], "policy.path"),
        ([], "--gpus"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr()
    assert message in said.err and len(said.err.strip().splitlines()) == 1 and not said.out


def test_the_largest_micro_batch_is_the_largest(large: list[str]) -> None:
    config, device = parse(large, TrainConfig), DEVICES["h100"]
    models = networks(config, torch.bfloat16)
    largest = largest_micro_batch(config, models, 8, device, torch.bfloat16)

    def peak(tokens: int) -> float:
        changed = replace(config, update=replace(config.update, micro_batch_tokens=tokens))
        return memory(changed, models, 8, torch.bfloat16, torch.device("cuda")).peak

    assert peak(largest) <= USABLE * device.memory < peak(2 * largest)


def test_vllm_takes_its_share_while_it_draws_or_all_the_time(large: list[str]) -> None:
    def phases(*words: str) -> dict[str, float]:
        config = parse([*large, "--rollout.engine", "vllm", *words], TrainConfig)
        models = networks(config, torch.bfloat16)
        return memory(config, models, 8, torch.bfloat16, torch.device("cuda"), 80e9).phases

    asleep, awake = phases(), phases("--rollout.vllm.sleep", "false")
    share = 0.35 * 80e9
    assert asleep["generate"] == awake["generate"] == share
    for phase in ("score", "experience", "update"):
        assert awake[phase] == asleep[phase] + share


def test_time_follows_the_work(large: list[str]) -> None:
    config, device = parse(large, TrainConfig), DEVICES["h100"]
    models = networks(config, torch.bfloat16)

    def seconds(ranks: int = 8, changed: TrainConfig = config, mean: float | None = None) -> dict[str, float]:
        return step_seconds(changed, models, ranks, torch.bfloat16, device, Workload.of(changed, ranks, mean))

    usual = seconds()
    assert list(usual) == ["generate", "score", "experience", "update"]
    fewer = seconds(ranks=4)
    assert all(fewer[phase] > usual[phase] for phase in ("score", "experience", "update"))
    assert all(seconds(mean=40)[phase] < usual[phase] for phase in ("generate", "experience", "update"))
    kept = replace(config, engine=replace(config.engine, activation_checkpointing=False))
    assert seconds(changed=kept)["update"] < usual["update"]
    without = replace(
        config, algorithm=replace(config.algorithm, ptx_coefficient=0.0), data=replace(config.data, ptx=None)
    )
    assert seconds(changed=without)["update"] < usual["update"]
    quick = replace(config, rollout=replace(config.rollout, engine="vllm"))
    assert seconds(changed=quick)["generate"] < usual["generate"]


def test_a_workload_has_the_lengths_asked_for(large: list[str]) -> None:
    config = parse(large, TrainConfig)
    work = Workload.of(config, 8)
    assert len(work.lengths) == 16 and work.responses / 16 == pytest.approx(385 / 2, abs=1)
    assert Workload.of(config, 8, mean_response=50).responses / 16 == pytest.approx(50, abs=1)
