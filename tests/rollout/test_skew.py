"""Lengths drawn at random and dealt as unevenly as can be: two ranks never block each other, and learn as one does."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from repo_fast.collectives import Ranks
from repo_fast.engine import start_distributed, stop_distributed
from repo_fast.rollout import Rollout
from tests.job_runs import on_ranks
from tests.learning import learner_worker as worker
from tests.tiny import save_policy

DRAWS = 12
SEED_FILE = "seed.txt"
COMPARED = ("loss", "gradient_norm", "kl", "reward_value_loss", "cost_value_loss", "entropy")


def draw_rollout(seed: int, ranks: Ranks) -> tuple[Rollout, dict[str, torch.Tensor], int]:
    """This rank's part of what a seed stands for, with its scores, and the largest micro-batch.

    Most sequences have a few tokens and some a hundred times as many; a rank gets any number of them, also none or all.
    """
    dice = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    count = dice.randint(1, 14)
    lengths = [dice.choice([1, 1, 2, 3, 7, 150]) for _ in range(count)]
    prompts = [torch.randint(3, 24, (dice.choice([1, 1, 2, 5, 60]),), generator=generator) for _ in range(4)]
    first_share = dice.choice([0.0, 0.0, 0.1, 0.5, 1.0])
    owners = [0 if dice.random() < first_share else 1 for _ in range(count)]
    prompt_ids = [dice.randrange(4) for _ in range(count)]
    responses = [torch.randint(3, 24, (length,), generator=generator) for length in lengths]
    scores = torch.randn(2, count, generator=generator)
    mine = [i for i in range(count) if ranks.size == 1 or owners[i] == ranks.rank]
    rollout = Rollout(
        prompt_ids=torch.tensor([prompt_ids[i] for i in mine], dtype=torch.int64),
        prompts=["p"] * len(mine),
        responses=["r"] * len(mine),
        prompt_tokens=[prompts[prompt_ids[i]] for i in mine],
        response_tokens=[responses[i] for i in mine],
        finished=torch.ones(len(mine), dtype=torch.bool),
        sampler_log_probs=[torch.zeros(lengths[i]) for i in mine],
    )
    return rollout, {"reward": scores[0, mine], "cost": scores[1, mine]}, dice.choice([1, 16, 100, 4096])


def learn(folder: Path) -> list[dict[str, float]]:
    """On each rank of a torchrun: the metrics of an update from each draw; the weights stay as they are."""
    first = int((folder / SEED_FILE).read_text())
    ranks = start_distributed()
    learner = worker.make_learner(worker.make_config({"advantage": "gae"}), folder / "policy", ranks, rate=0.0)
    start, found = learner.multiplier.state_dict(), []
    for seed in range(first, first + DRAWS):
        rollout, scores, micro_batch_tokens = draw_rollout(seed, ranks)
        # Every second time, the responses that a rank has of a prompt share it.
        update = replace(
            learner.config.update, micro_batch_tokens=micro_batch_tokens, share_prompts=bool((seed + ranks.size) % 2)
        )
        learner.config = replace(learner.config, update=update)
        learner.multiplier.load_state_dict(start)
        experience, metrics = learner.experience(rollout, scores)
        metrics |= learner.update(experience)
        found.append({name: metrics[name] for name in COMPARED})
    stop_distributed()
    return found


@pytest.mark.slow
def test_no_deal_of_lengths_blocks_two_ranks_or_changes_what_they_learn(tmp_path: Path) -> None:
    save_policy(tmp_path / "policy")
    first = random.randrange(10**6)
    (tmp_path / SEED_FILE).write_text(str(first))
    one, two = (on_ranks(count, "tests.rollout.test_skew:learn", tmp_path) for count in (1, 2))
    assert two[0] == two[1]
    for seed, alone, together in zip(range(first, first + DRAWS), one[0], two[0], strict=True):
        for name in COMPARED:
            assert together[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-5), (seed, name)
