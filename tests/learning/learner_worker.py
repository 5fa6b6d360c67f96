"""One update of a fixed rollout, on as many ranks as started this: for `test_learner.py`, in-process and by torchrun.

torchrun --nproc-per-node 2 -m tests.learning.learner_worker POLICY_FOLDER OUTPUT_FILE MICRO_BATCH_TOKENS
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_grad

from repo_fast.collectives import Ranks
from repo_fast.config import AlgorithmConfig, EngineConfig, RolloutConfig, ScorerConfig, TrainConfig, UpdateConfig
from repo_fast.data import PromptTemplate, load_tokenizer
from repo_fast.engine import start_distributed, stop_distributed
from repo_fast.jobs.assembly import build_models
from repo_fast.jobs.inputs import Inputs
from repo_fast.learning.learner import Learner
from repo_fast.rollout import Rollout
from repo_fast.scoring import load_scorer_spec

SETTINGS = {
    "gae": {"name": "repo", "advantage": "gae", "ptx_coefficient": 0.7},
    "grpo": {"name": "repo", "advantage": "grpo", "reduction": "token_mean", "whiten": True}
    # Of the nine responses' weights some lie below, between, and above all of these.
    | {"importance_level": "sequence", "importance_mask": (0.5, 50.0), "importance_cap": 3.0},
    "lagrangian": {"name": "ppo_lag", "advantage": "rloo", "reduction": "sum"},
}
PROMPTS, PER_PROMPT = 3, 3
SAID = -5.0  # What the sampler says of every token (nats); the tiny policy says about as much of one.


def make_config(settings: dict, micro_batch_tokens: int = 4096, **sections) -> TrainConfig:
    return TrainConfig(
        reward=ScorerConfig(path="builtins:list"),
        cost=ScorerConfig(path="builtins:list"),
        rollout=RolloutConfig(prompts_per_step=PROMPTS, responses_per_prompt=PER_PROMPT, temperature=0.7),
        algorithm=AlgorithmConfig(kl_coefficient=0.1, **settings),
        update=UpdateConfig(micro_batch_tokens=micro_batch_tokens, ptx_batch_size=4),
        engine=EngineConfig(dtype="float32", zero_stage=3, parameter_persistence_threshold=0),
        **({"data": sections["data"]} if "data" in sections else {}),
    )


def make_rollout(ranks: Ranks, vocabulary: int = 24) -> tuple[Rollout, dict[str, torch.Tensor], torch.Tensor]:
    """This rank's share of nine responses of uneven lengths to three prompts, interleaved, with scores and noise."""
    generator = torch.Generator().manual_seed(3)
    count = PROMPTS * PER_PROMPT

    def tokens(low: int, high: int) -> torch.Tensor:
        return torch.randint(
            3, vocabulary, (int(torch.randint(low, high, (), generator=generator)),), generator=generator
        )

    prompts = [tokens(1, 9) for _ in range(PROMPTS)]
    responses = [tokens(1, 14) for _ in range(count)]
    scores = torch.randn(2, count, generator=generator) * 2
    noise = [torch.randn(len(response), generator=generator) * 0.3 for response in responses]
    mine = ranks.share(range(count))
    rollout = Rollout(
        prompt_ids=torch.tensor([i % PROMPTS for i in mine]),
        prompts=["p"] * len(mine),
        responses=["r"] * len(mine),
        prompt_tokens=[prompts[i % PROMPTS] for i in mine],
        response_tokens=[responses[i] for i in mine],
        finished=torch.ones(len(mine), dtype=torch.bool),
        sampler_log_probs=[torch.full((len(responses[i]),), SAID) for i in mine],
    )
    return rollout, {"reward": scores[0, mine], "cost": scores[1, mine]}, torch.cat([noise[i] for i in mine])


def demonstrations() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.arange(3, 5 + i), torch.arange(10, 12 + 2 * i)) for i in range(4)]


@contextlib.contextmanager
def plain_descent(rate: float) -> Iterator[None]:
    """The engines step by w - rate g, so that the weights show the gradient and no optimizer state hides it."""
    adam = torch.optim.AdamW
    torch.optim.AdamW = lambda groups, lr, betas, fused: torch.optim.SGD(  # type: ignore[assignment,misc]
        [{"params": group["params"]} for group in groups], lr=rate
    )
    try:
        yield
    finally:
        torch.optim.AdamW = adam  # type: ignore[misc]


def make_learner(config: TrainConfig, policy: Path, ranks: Ranks, rate: float = 0.1) -> Learner:
    tokenizer = load_tokenizer(str(policy))
    scorers = dict.fromkeys(config.scorers, load_scorer_spec("builtins:list", "reward"))
    inputs = Inputs(str(policy), tokenizer, PromptTemplate(tokenizer), [], [], [], scorers, None, None, [])
    with plain_descent(rate):
        models, _ = build_models(config, inputs, ranks)
    shown = demonstrations() if config.algorithm.ptx_coefficient else []
    return Learner(config, models, ranks, shown)


def one_update(learner: Learner, ranks: Ranks) -> dict:
    """Gradients of every engine just before its step, weights after it, and the metrics."""
    rollout, scores, noise = make_rollout(ranks)
    experience, metrics = learner.experience(rollout, scores)
    # As after some steps: ratios on both sides of both clips.
    object.__setattr__(experience, "old_log_probs", experience.old_log_probs + noise)
    engines = {"policy": learner.models.policy} | learner.models.critics
    gradients: dict[str, torch.Tensor] = {}
    for name, engine in engines.items():
        step = engine.step

        def observed(name=name, engine=engine, step=step):
            for parameter_name, parameter in engine.module.named_parameters():
                if parameter.requires_grad:
                    gradients[f"{name}/{parameter_name}"] = safe_get_full_grad(parameter).clone()
            return step()

        engine.step = observed  # type: ignore[method-assign]
    metrics |= learner.update(experience)
    weights = {}
    for name, engine in engines.items():
        weights |= {f"{name}/{key}": value for key, value in engine.whole_state().items()}
    return {"gradients": gradients, "weights": weights, "metrics": metrics, "experience": experience}


def main(policy: str, output: str, micro_batch_tokens: str) -> None:
    from repo_fast.config import DataConfig

    ranks = start_distributed()
    results = {}
    for name, settings in SETTINGS.items():
        data = {"data": DataConfig(ptx="given")} if "ptx_coefficient" in settings else {}
        config = make_config(settings, int(micro_batch_tokens), **data)
        result = one_update(make_learner(config, Path(policy), ranks), ranks)
        results[name] = {key: result[key] for key in ("gradients", "weights", "metrics")}
    if ranks.is_first:
        torch.save(results, output)
    stop_distributed()


if __name__ == "__main__":
    main(*sys.argv[1:])
