"""Generation under ZeRO-3: what this project does beside `generate` as peers call it. Run under torchrun:

    torchrun --standalone --nproc-per-node 2 -m bench.rollout_phase FOLDER OUT.json GEOMETRY

Every way draws one response for each of a rank's prompts, from the same engine, at temperature 1, with a cache:

    ours, Hugging Face      weights gathered once, hooks off, prompts batched by length
    ours, vLLM              with the handing over of the weights; where it can be imported
    hooks on                `generate` on the sharded model, ranks kept in step: the way of Safe RLHF. Every token's
                            forward gathers all weights anew
    gathered, one batch     weights gathered, hooks off, all prompts padded in one batch: the way of TRL

At the CPU's geometry a rank's prompts fit one batch, so there ours differs from the last way by how tokens are drawn
alone. `hooks on` runs once, after the others have warmed the machine up. The policy ends its responses by chance, so
ways differ in the tokens that they draw; what counts is tokens a second.
"""

import gc
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import StoppingCriteria, StoppingCriteriaList

from bench.measuring.suite import Results
from bench.measuring.tables import at_least, render
from bench.training_phase import GEOMETRIES, Geometry
from repo_fast.collectives import Ranks
from repo_fast.config import EngineConfig, ModelConfig, OptimizerConfig, RolloutConfig
from repo_fast.data import load_tokenizer
from repo_fast.data.readers import Prompt
from repo_fast.engine import Engine, start_distributed, stop_distributed
from repo_fast.jobs.assembly import load_policy
from repo_fast.rollout import Request, Rollout
from repo_fast.rollout.hf import HfSampler

ROUNDS = 3
OURS, OURS_VLLM, HOOKS_ON, ONE_BATCH = "ours, Hugging Face", "ours, vLLM", "hooks on", "gathered, one batch"
Draw = Callable[[], int]


def measure(folder: Path, geometry: Geometry, ranks: Ranks) -> dict[str, Any]:
    """Times every way, in turn, round by round; the first round is not counted. `hooks on` runs once.

    Args:
        folder: What `job_folder.write_job` wrote.
        geometry: Of the policy and its responses.
        ranks: This process among all.

    Returns:
        By way: `seconds` and `tokens` of each round over all ranks, and the median of `tokens_per_s`.
    """
    tokenizer = load_tokenizer(str(folder / "policy"))
    config = EngineConfig(zero_stage=3)
    policy = load_policy(str(folder / "policy"), tokenizer, ModelConfig(), config, ranks)
    engine = Engine(policy, config, ranks, OptimizerConfig(), steps=1)
    settings = RolloutConfig(max_new_tokens=geometry.responses[1])
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").open()]
    requests = [
        Request(Prompt(i, text), tokenizer(text, return_tensors="pt").input_ids[0]) for i, text in enumerate(prompts)
    ]
    mine, seeds = ranks.share(requests), ranks.share(range(len(requests)))
    ways: dict[str, Draw] = {
        OURS: lambda: _tokens(HfSampler(tokenizer, settings, ranks, pad_is_new=False).draw(engine, mine, seeds)),
        HOOKS_ON: lambda: generate_in_step(engine, mine, settings, ranks),
        ONE_BATCH: lambda: generate_gathered(engine, mine, settings, ranks),
    }
    if importlib.util.find_spec("vllm") is not None:
        from repo_fast.rollout.vllm_sampler import VllmSampler

        longest = geometry.prompts[1] + geometry.responses[1]
        dtype = torch.float32 if ranks.device.type == "cpu" else torch.bfloat16
        sampler = VllmSampler(
            str(folder / "policy"),
            engine,
            tokenizer,
            settings,
            ranks,
            dtype=dtype,
            longest=longest,
            seed=0,
            pad_is_new=False,
        )
        ways[OURS_VLLM] = lambda: _tokens(sampler.draw(engine, mine, seeds))
    rounds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(ROUNDS + 1):
        for way, draw in ways.items():
            # Minutes: nothing of it is slower for being the first.
            if way == HOOKS_ON and number != 1:
                continue
            gc.collect()
            ranks.barrier()
            start = time.perf_counter()
            drawn = draw()
            ranks.barrier()
            seconds = time.perf_counter() - start
            tokens = float(ranks.sum(torch.tensor([drawn]))[0])
            if number > 0:
                rounds[way].append((seconds, tokens))
    return {
        way: {
            "seconds": [seconds for seconds, _ in measured],
            "tokens": [tokens for _, tokens in measured],
            "tokens_per_s": statistics.median(tokens / seconds for seconds, tokens in measured),
        }
        for way, measured in rounds.items()
    }


def _tokens(rollout: Rollout) -> int:
    return sum(tokens.numel() for tokens in rollout.response_tokens)


def generate_in_step(engine: Engine, requests: list[Request], settings: RolloutConfig, ranks: Ranks) -> int:
    """`generate` on the shards, all ranks going on until the last is done; returns the tokens drawn."""
    return _generate(engine.module.model, requests, settings, ranks.device, _UntilAllEnd(engine.module.model, ranks))


def generate_gathered(engine: Engine, requests: list[Request], settings: RolloutConfig, ranks: Ranks) -> int:
    """`generate` on the whole weights, without DeepSpeed's hooks; returns the tokens drawn."""
    with engine.gathered() as module:
        return _generate(module.model, requests, settings, ranks.device)


class _UntilAllEnd(StoppingCriteria):
    """Goes on until every response of every rank has ended, with one all-reduce a token.

    That is what the option `synced_gpus` does. In transformers 5 it fails where a rank is done before another, with a
    mask of the wrong size.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self._end, self._ranks, self._ended = model.generation_config.eos_token_id, ranks, torch.tensor(False)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **unused: Any) -> torch.Tensor:
        self._ended = self._ended | (input_ids[:, -1] == self._end)
        done = not self._ranks.any(not bool(self._ended.all()))
        return torch.full(input_ids.shape[:1], done, device=input_ids.device)


@torch.no_grad()
def _generate(
    model: Any,
    requests: list[Request],
    settings: RolloutConfig,
    device: torch.device,
    in_step: StoppingCriteria | None = None,
) -> int:
    """All prompts in one batch, padded on the left; with `in_step`, that alone ends it."""
    pad, end = model.generation_config.pad_token_id, model.generation_config.eos_token_id
    longest = max(request.tokens.numel() for request in requests)
    input_ids = torch.full((len(requests), longest), pad)
    mask = torch.zeros_like(input_ids)
    for row, request in enumerate(requests):
        input_ids[row, longest - request.tokens.numel() :] = request.tokens
        mask[row, longest - request.tokens.numel() :] = 1
    model.eval()
    output = model.generate(
        input_ids=input_ids.to(device),
        attention_mask=mask.to(device),
        do_sample=True,
        top_k=0,
        max_new_tokens=settings.max_new_tokens,
        **({} if in_step is None else {"eos_token_id": None, "stopping_criteria": StoppingCriteriaList([in_step])}),
    )
    model.train()
    drawn = output[:, longest:] == end
    # Up to the first end token, and with it.
    return int(((drawn.cumsum(1) - drawn.long()) == 0).sum())


def judge(results: Results) -> dict[str, Any]:
    """The target of generation by vLLM on a GPU against what `measure` found, by name."""
    targets = {}
    for name, ways in results.items():
        if OURS_VLLM in ways and not name.startswith("tiny"):
            ratio = ways[OURS_VLLM]["tokens_per_s"] / ways[HOOKS_ON]["tokens_per_s"]
            targets[f"rollout, vLLM / hooks on, {name}"] = at_least(ratio, 5.0)
    return targets


def table(results: Results) -> str:
    """What `measure` found, as text."""
    ((name, ways),) = results.items()
    slowest = ways[HOOKS_ON]["tokens_per_s"]
    rows = [[way, f"{row['tokens_per_s']:.0f}", f"{row['tokens_per_s'] / slowest:.2f}"] for way, row in ways.items()]
    return render([f"rollout, {name}", "tokens/s", "x hooks on"], rows)


def main(folder: str, out: str, name: str) -> None:
    """Measure on all ranks; the first writes what came out."""
    ranks = start_distributed()
    torch.manual_seed(ranks.rank)
    results = measure(Path(folder), GEOMETRIES[name], ranks)
    if ranks.is_first:
        Path(out).write_text(json.dumps(results))
    stop_distributed()


if __name__ == "__main__":
    main(*sys.argv[1:])
