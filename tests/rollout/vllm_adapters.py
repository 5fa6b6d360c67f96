"""LoRA policies with grown vocabularies, drawn by vLLM, for `tests/rollout/test_vllm_adapters.py`; on every rank."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from repo_fast import engine as engines
from repo_fast.collectives import Ranks
from repo_fast.config import EngineConfig, LoraConfig, ModelConfig, OptimizerConfig, RolloutConfig, RolloutVllmConfig
from repo_fast.data import Prompt, load_tokenizer
from repo_fast.engine import Engine, start_distributed, stop_distributed
from repo_fast.errors import InputError
from repo_fast.jobs.assembly import load_policy
from repo_fast.models import vocabulary
from repo_fast.models.lora import adapter_shape, adapter_state, base_one_by_one, merged_state, of_adapter
from repo_fast.rollout import Request, Rollout
from repo_fast.rollout import vllm as rollout_vllm
from repo_fast.rollout.vllm_sampler import VllmSampler
from repo_fast.train import main
from tests.evaluation.vllm_evaluations import keep_caches_small
from tests.job_runs import OPTIONS, PROMPTS, write_lines
from tests.rollout.vllm_architectures import SIZES, update
from tests.tiny import save_policy, word_tokenizer

STAGES = (1, 2, 3)
FORMS = ("merged", "adapter")
# All weights are trained; stage 3 alone.
PLAIN = "plain"
# The policy's base is in 4 bits; vLLM has it in full.
QUANTIZED = "nf4 "
EACH = [
    *((stage, form) for stage in STAGES for form in FORMS),
    (3, PLAIN),
    (3, f"{QUANTIZED}merged"),
    (2, f"{QUANTIZED}adapter"),
]
TOKENS = len(word_tokenizer())
LORA = LoraConfig(rank=3, alpha=6.0)
# Of the responses to `requests`.
SEEDS = range(4)
# vLLM caches prompts in whole pages, of 128 tokens on a CPU.
LONG = 300
LONGEST = LONG + 20


def make_inputs(folder: Path) -> Path:
    """`policy/`, whose tokenizer has no pad token and whose rows are its tokens, and a `FORM.yaml` for each form."""
    path = save_policy(folder / "policy", word_tokenizer(pad_token=None), max_position_embeddings=512, **SIZES)
    prompts = write_lines(folder / "prompts.jsonl", [{"prompt": text} for text in PROMPTS])
    options: dict[str, Any] = {
        name: dict(value) if isinstance(value, dict) else value for name, value in OPTIONS.items()
    }
    options["data"] |= {"prompts": str(prompts)}
    options["algorithm"] |= {"advantage": "rloo", "ptx_coefficient": 0.0}
    options |= {"total_steps": 4}
    options["policy"] = {"path": str(path), "pad_token": "<|pad|>", "pad_vocabulary_to": 16}
    options["policy"]["lora"] = {"rank": 3, "alpha": 6.0}
    for form in FORMS:
        options["rollout"] |= {"engine": "vllm", "temperature": 0.8, "vllm": {"compile": False, "lora": form}}
        (folder / f"{form}.yaml").write_text(yaml.safe_dump(options))
    return folder


@contextlib.contextmanager
def loud_rows() -> Iterator[None]:
    """While this is open, rows that are added to a vocabulary would almost always be drawn, where they could."""
    appended = vocabulary._with_mean_rows

    def loud(weight: torch.nn.Parameter, rows: int) -> torch.nn.Parameter:
        longer = appended(weight, rows)
        noise = torch.Generator().manual_seed(5)
        longer.data[TOKENS:] = torch.randn(longer[TOKENS:].shape, generator=noise)
        return longer

    vocabulary._with_mean_rows = loud
    try:
        yield
    finally:
        vocabulary._with_mean_rows = appended


def start(path: str, stage: int, form: str, parallel: int, ranks: Ranks) -> tuple[Engine, VllmSampler]:
    tokenizer = load_tokenizer(path)
    config = EngineConfig(zero_stage=stage, dtype="float32", parameter_persistence_threshold=0)
    with loud_rows():
        torch.manual_seed(0)
        grown = ModelConfig(pad_token="<|pad|>", pad_vocabulary_to=16, lora=LoraConfig() if form == PLAIN else LORA)
        if form.startswith(QUANTIZED):
            grown = replace(grown, quantize="nf4")
        policy = load_policy(path, tokenizer, grown, config, ranks)
    assert policy.model.config.vocab_size > TOKENS + 1
    optimizer = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup=0.0)
    engine = Engine(policy, config, ranks, optimizer, steps=8)
    handed = "adapter" if form.endswith("adapter") else "merged"
    vllm = RolloutVllmConfig(compile=False, tensor_parallel=parallel, lora=handed)
    settings = RolloutConfig(engine="vllm", temperature=0.8, max_new_tokens=8, vllm=vllm)
    sampler = VllmSampler(
        path, engine, tokenizer, settings, ranks, dtype=torch.float32, longest=LONGEST, seed=0, pad_is_new=True
    )
    return engine, sampler


def requests() -> list[Request]:
    long = torch.randint(4, TOKENS, (LONG,), generator=torch.Generator().manual_seed(1))
    prompts = [torch.tensor([1, 4, 20, 13, 15]), long]
    return [Request(Prompt(i, "p"), tokens) for i, tokens in enumerate(prompts) for _ in range(2)]


@torch.no_grad()
def peft_log_probs(policy: Engine, rollout: Rollout) -> torch.Tensor:
    """The responses' by transformers with peft's layers, among the tokens that may be drawn."""
    found = []
    with policy.gathered() as module:
        for prompt, response in zip(rollout.prompt_tokens, rollout.response_tokens, strict=True):
            logits = module.model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1, :TOKENS]
            found.append((logits / 0.8).log_softmax(-1).gather(1, response[:, None])[:, 0])
    return torch.cat(found)


def gap(policy: Engine, rollout: Rollout) -> float:
    return float((torch.cat(rollout.sampler_log_probs) - peft_log_probs(policy, rollout)).abs().max())


def adapters(policy: Engine) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in policy.weights_one_by_one(of_adapter)}


def unequal_weights(policy: Engine, sampler: VllmSampler, form: str) -> list[str]:
    """Those of the engine that are not, bit for bit, the merged ones, or the base's. On the first rank."""
    from tests.rollout.vllm_jobs import unequal, weights_of

    inside = sampler._engine._engine.collective_rpc(lambda worker: weights_of(worker.model_runner.model))[0]
    # Room for adapters has names of its own.
    inside = {name.replace(".base_layer", ""): value for name, value in inside.items()}
    state = policy.whole_state()
    if not state:
        return []
    if form.endswith("adapter"):
        kept = dict(base_one_by_one(policy.module, state.items()))
    else:
        kept = merged_state(policy.module, state)
    return unequal({name.removeprefix("model."): value for name, value in kept.items()}, inside)


def draws(path: str, stage: int, form: str, parallel: int, ranks: Ranks) -> dict[str, Any]:
    """At the start and after each of two updates, and what else became of the trainer and the engine."""
    policy, sampler = start(path, stage, form, parallel, ranks)
    found: dict[str, Any] = {name: [] for name in ("gaps", "moves", "same_adapters", "highest", "unequal", "all")}
    given, load = [], sampler._engine.load
    sampler._engine.load = lambda weights: (given.append(1), load(weights))[1]
    for updates in range(3):
        before = adapters(policy)
        rollout = sampler.draw(policy, requests(), SEEDS)
        after = adapters(policy)
        found["same_adapters"].append(all(torch.equal(before[name], after[name]) for name in before))
        found["gaps"].append(gap(policy, rollout))
        found["highest"].append(max(int(response.max()) for response in rollout.response_tokens))
        found["all"].append(len(given))
        if parallel == 1:
            found["unequal"].append(unequal_weights(policy, sampler, form))
        if updates < 2:
            ours = peft_log_probs(policy, rollout)
            update(policy, rollout)
            found["moves"].append(float((peft_log_probs(policy, rollout) - ours).abs().mean()))
    if (stage, form, parallel) == (2, "adapter", 1):
        found |= traps(policy, sampler, rollout)
    if form == PLAIN:
        # More tokens of prompts than vLLM takes at once; of equal ones it computes one.
        texts = torch.randint(4, TOKENS, (30, LONG), generator=torch.Generator().manual_seed(2))
        others = [Request(Prompt(2 + i, "p"), tokens) for i, tokens in enumerate(texts)]
        drawn = []
        for more in ([], others):
            asked = requests() + more
            drawn.append(sampler.draw(policy, asked, range(len(asked))).response_tokens[: len(requests())])
        found["few and many"] = drawn
    sampler.close()
    return found


def traps(policy: Engine, sampler: VllmSampler, rollout: Rollout) -> dict[str, Any]:
    """What vLLM does by itself."""
    engine = sampler._engine
    found: dict[str, Any] = {}
    # Without a reset of the cache of prompts.
    reset, engine._engine.reset_prefix_cache = engine._engine.reset_prefix_cache, lambda: True
    update(policy, rollout)
    found["gap without a reset"] = gap(policy, sampler.draw(policy, requests(), SEEDS))
    engine._engine.reset_prefix_cache = reset
    found["gap with a reset"] = gap(policy, sampler.draw(policy, requests(), SEEDS))

    # With tensors that are not copied.
    class Uncopied:
        def __init__(self, value: torch.Tensor) -> None:
            self.value, self.device = value, value.device

        def clone(self) -> torch.Tensor:
            return self.value

    given = adapter_state(policy.module, adapters(policy))
    kept = {name: value.clone() for name, value in given.items()}
    shape = adapter_shape(policy.module)
    uncopied = {name: Uncopied(value) for name, value in given.items()}
    engine._engine.collective_rpc(rollout_vllm._adapt, args=(uncopied, shape))
    factors = {float((value / kept[name]).nanmedian()) for name, value in given.items() if ".lora_B." in name}
    found["B by"] = sorted(round(factor, 4) for factor in factors)
    # After a reload, which drops the adapter.
    sampler._hand_over_all(policy)
    try:
        engine.draw(requests(), SEEDS)
    except Exception as error:
        found["after a reload"] = f"{type(error).__name__}: {error}"
    other = {name.replace("down_proj", "side_proj"): value for name, value in kept.items()}
    try:
        engine.adapt(other)
    except InputError as error:
        found["no layer"] = str(error)
    found["room"] = [rollout_vllm._room_for(rank) for rank in (1, 2, 8, 9, 512)]
    try:
        rollout_vllm._room_for(513)
    except InputError as error:
        found["no room"] = str(error)
    return found


def apart(folder: Path) -> dict[Any, dict[str, Any]]:
    """Each rank has an engine of its own: by stage and form what was drawn; and runs, stopped and gone on with."""
    keep_caches_small()
    ranks, path = start_distributed(), str(folder / "policy")
    found: dict[Any, dict[str, Any]] = {(stage, form): draws(path, stage, form, 1, ranks) for stage, form in EACH}
    found["runs"] = runs(folder)
    found["ranks of the host"] = {"LOCAL_WORLD_SIZE": os.environ["LOCAL_WORLD_SIZE"]}
    stop_distributed()
    return found


def shared(folder: Path) -> dict[str, dict[str, Any]]:
    """An engine on both ranks: by form what was drawn."""
    keep_caches_small()
    ranks, path = start_distributed(), str(folder / "policy")
    found = {form: draws(path, 3, form, 2, ranks) for form in FORMS}
    stop_distributed()
    return found


def runs(folder: Path) -> dict[str, int]:
    """By form: `FORM/` at once, and `FORM-stopped/` in two parts; exit statuses."""
    stop, engines.stop_distributed = engines.stop_distributed, lambda: None
    statuses = {}
    for form in FORMS:

        def run(name: str, *words: str, config: Path = folder / f"{form}.yaml") -> None:
            options = ["--config", str(config), "--output_dir", str(folder / name), *words]
            statuses[f"{name} {' '.join(words)}"] = main(options)

        run(form)
        run(f"{form}-stopped", "--stop_after", "2")
        run(f"{form}-stopped", "--resume", "auto")
    engines.stop_distributed = stop
    return statuses
