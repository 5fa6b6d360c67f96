"""Where multipliers start that are to be what the reference's responses ask for (`multiplier_init: dual`)."""

from collections.abc import Sequence

import numpy as np
import torch

from repo_fast.config import TrainConfig
from repo_fast.learning.constraints import LEAST
from repo_fast.objective.constraints import DualStart, capped_rewards, dual_start
from repo_fast.report.measures import Evaluation, costs_of

# Fewer effective samples a prompt are hardly more than its best one.
_FEW = 2.0


def multipliers_from(config: TrainConfig, evaluations: Sequence[Evaluation]) -> DualStart:
    """Multipliers at which the reference, tilted, meets the constraints on its scored responses.

    Args:
        config: Of the run; constraints whose start is a number keep it.
        evaluations: Of the reference, each with as many responses to each prompt.
    """
    costs = list(config.costs.values())
    starts = [cost.multiplier_init for cost in costs]
    ids = np.concatenate([np.asarray(evaluation.prompt_ids) for evaluation in evaluations])
    order, prompts = np.argsort(ids, kind="stable"), len(np.unique(ids))

    def by_prompt(columns: Sequence[Sequence[float]]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([np.asarray(own) for own in columns])[order].reshape(prompts, -1))

    names = list(config.costs)
    scores = torch.stack([by_prompt([costs_of(evaluation)[name] for evaluation in evaluations]) for name in names])
    rewards = by_prompt([evaluation.rewards for evaluation in evaluations])  # type: ignore[misc]
    return dual_start(
        capped_rewards(rewards, config.algorithm.reward_cap),
        scores,
        (scores != -torch.inf).all(2),
        [cost.threshold - cost.margin for cost in costs],
        [cost.multiplier_max if start == "dual" else start for cost, start in zip(costs, starts, strict=True)],  # type: ignore[misc]
        minima=[0.0 if start == "dual" else start for start in starts],  # type: ignore[misc]
        kl_coefficient=config.algorithm.kl_coefficient,
    )


def describe_start(config: TrainConfig, start: DualStart) -> str:
    """What to say of it."""
    found = []
    for (name, cost), value, infeasible in zip(config.costs.items(), start.multipliers, start.infeasible, strict=True):
        if cost.multiplier_init != "dual":
            continue
        said = ", its largest: infeasible on these samples" if infeasible else ""
        if cost.controller == "fixed" and value == 0:
            said = ", for ever: these samples ask for no constraint"
        elif cost.controller == "dual" and value < LEAST:
            value, said = LEAST, ", the least: these samples ask for none"
        found.append(f"{name} {value:.4g}{said}")
    text = (
        f"lambda from the reference's responses: {'; '.join(found)} (gap {start.gap:.3g}, effective samples a prompt "
        f"{start.effective_samples:.3g})"
    )
    if start.effective_samples < _FEW:
        text += f"; fewer than {_FEW:g} effective samples: it says little, a larger algorithm.kl_coefficient says more"
    return text if start.converged else f"{text}; it did not converge"
