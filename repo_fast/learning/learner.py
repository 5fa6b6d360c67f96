"""What is learned from a rollout: experience and update, in the order of `algorithm.md` of the paper's method.

`Learner.experience` computes everything the losses need of this rank's responses: log-probabilities of policy and
reference, violations, the multiplier, values, advantages (steps 2 to 4 and 9 of an update). `Learner.update` takes the
optimizer steps: weights, policy loss, critic losses, PTX loss (steps 5 to 8). The token loss itself is
`repo_fast.ops.fused_rectified_policy_loss`; it runs inside the policy's head (`models/loss_head.py`).

Responses are dealt over the ranks without regard to prompts. What an algorithm needs of a prompt's other responses, or
of the whole batch, is one number a response, gathered from all ranks.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from repo_fast.collectives import Ranks
from repo_fast.config import TrainConfig
from repo_fast.data import PromptSampler
from repo_fast.engine import Engine, StepResult
from repo_fast.errors import InputError
from repo_fast.learning.constraints import Constraints
from repo_fast.learning.experience import Experience, MicroBatch
from repo_fast.learning.imitation import Shown, imitation_backward, learned_tokens
from repo_fast.learning.skipped_steps import SkippedSteps
from repo_fast.models.attention import PACKED, PADDED
from repo_fast.models.loss_head import Projection
from repo_fast.objective import algorithm as alg
from repo_fast.objective.constraints import Controller, capped_rewards, wholly_capped
from repo_fast.objective.importance import importance_metrics, importance_weights
from repo_fast.ops import (
    PolicyLoss,
    fused_rectified_policy_loss,
    generalized_advantages,
    linear_log_probs,
)
from repo_fast.ops.dispatch import resolve
from repo_fast.packing.balance import micro_batches, share_out, split_by_tokens
from repo_fast.packing.rows import PackedBatch, idle_batch, in_step, pack, with_last
from repo_fast.rollout import Rollout
from repo_fast.speed.flops import Shape, forward_work

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Models:
    """What a run computes with.

    Attributes:
        policy: Under training.
        reference: Its frozen start.
        critics: Engines around `Critic`s, only with `gae`, by any name. Their streams are `reward` and, where the
            algorithm has cost streams, the names of the constraints.
    """

    policy: Engine
    reference: Callable[..., Any]
    critics: dict[str, Engine]


class Learner:
    """The algorithm on one rank.

    Args:
        config: The resolved configuration.
        models: The engines.
        ranks: This process among those of the run.
        demonstrations: For the PTX loss; empty without one.
        constraints: None: those of the configuration.
    """

    def __init__(
        self,
        config: TrainConfig,
        models: Models,
        ranks: Ranks,
        demonstrations: Sequence[Shown] = (),
        constraints: Constraints | None = None,
    ) -> None:
        self.config, self.models, self.ranks, self.demonstrations = config, models, ranks, demonstrations
        self.ops_backend = resolve("fused_rectified_policy_loss", config.engine.ops_backend, ranks.device)
        # Then the update's own forward gives log pi_old.
        self.on_policy = config.update.old_log_probs == "sampler"
        settings = config.algorithm
        self.row = alg.ALGORITHMS[settings.name]
        self.constraints = Constraints.of(config) if constraints is None else constraints
        self.ptx_sampler = None
        if demonstrations:
            self.ptx_sampler = PromptSampler(len(demonstrations), config.update.ptx_batch_size, config.seed)
        self._shape = Shape.of(models.policy.module.model)
        model = models.policy.module.model
        implementation = PADDED if getattr(model.base_model, PADDED, False) else model.config._attn_implementation
        if config.update.share_prompts and implementation != PACKED:
            raise InputError(
                f"update.share_prompts is true with attention {implementation!r}, expected policy.attention 'packed'"
            )
        self._warned = False
        self.skipped = SkippedSteps(config.update.max_skipped_steps, "update.max_skipped_steps")

    @property
    def multiplier(self) -> Controller:
        """That of the only constraint."""
        (name,) = self.constraints.names
        return self.constraints[name].controller

    def work(self, prompt: int, response: int = 0) -> float:
        """What a sequence costs, by the tokens of its prompt and its response: operations of the policy's forward."""
        return forward_work(self._shape, [prompt + response], response)

    def state_dict(self) -> dict:
        """The state that a resumed run needs beside the engines', as plain numbers and lists."""
        return {
            **self.constraints.state_dict(),
            "ptx_sampler": None if self.ptx_sampler is None else self.ptx_sampler.state_dict(),
            "skipped": self.skipped.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.constraints.load_state_dict(state)
        if self.ptx_sampler is not None:
            self.ptx_sampler.load_state_dict(state["ptx_sampler"], self.config.resume_changed_data)
        self.skipped.load_state_dict(state["skipped"])

    # --------------------------------------------------------------------------------------- 3, 4, 9: experience

    def experience(self, rollout: Rollout, scores: dict[str, torch.Tensor]) -> tuple[Experience, dict[str, float]]:
        """Everything the losses need of this rank's responses (steps 2 to 4, and 9, the multiplier).

        Args:
            rollout: This rank's responses.
            scores: float32 [S] each: `reward`, and of each constraint, which are -inf where it does not apply.

        Returns:
            The experience, and the metrics of the rollout over all ranks.
        """
        settings, ranks = self.config.algorithm, self.ranks
        lengths = torch.tensor([tokens.numel() for tokens in rollout.response_tokens], dtype=torch.int64)
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
        sequence_ids = torch.repeat_interleave(torch.arange(lengths.numel()), lengths)
        sampled = torch.cat([torch.empty(0), *rollout.sampler_log_probs])
        old_log_probs = sampled if self.on_policy else self.log_probs(self.models.policy, rollout)
        ref_log_probs = self.log_probs(self.models.reference, rollout)
        kl = old_log_probs - ref_log_probs
        kl_sums = kl.new_zeros(lengths.numel()).index_add_(0, sequence_ids, kl)

        reward = capped_rewards(scores["reward"], settings.reward_cap)
        costs = torch.stack([scores[name] for name in self.constraints.names])
        if self.row.shaped:
            reward = reward - settings.shaping_weight * costs[0]
        violations = self.constraints.violations(costs, rollout.prompt_ids, ranks.group)
        prompt_ids, all_violations = ranks.gather(rollout.prompt_ids), ranks.gather(violations)
        lagrangian = self.constraints.update_multipliers(ranks.gather(costs), all_violations, prompt_ids)
        weights = alg.stream_weights(violations, self.constraints.multipliers, rectify=self.constraints.rectify)

        applies = violations != -torch.inf
        values: dict[str, torch.Tensor] = {}
        if settings.advantage == "gae":
            advantages, values = self._gae_advantages(rollout, reward, costs, applies, kl, cu_seqlens, sequence_ids)
        else:
            per_response = self._critic_free_advantages(reward, costs, applies, kl_sums, prompt_ids, weights)
            advantages = per_response[:, sequence_ids]
        if not self.row.has_cost_stream:
            advantages = torch.stack([advantages[0], torch.zeros_like(kl)])
        if settings.whiten:
            advantages = self._whitened(advantages, weights, applies, sequence_ids)

        factors, correction = None, {}
        if settings.importance:
            factors, sums = importance_weights(old_log_probs - sampled, cu_seqlens, **settings.importance)
            correction = importance_metrics(ranks.sum(sums))
        experience = Experience(
            rollout=rollout,
            cu_seqlens=cu_seqlens,
            costs=self.constraints.plain(costs),
            violations=self.constraints.plain(violations),
            old_log_probs=old_log_probs,
            reward_advantages=advantages[0],
            cost_advantages=self.constraints.plain(advantages[1:]),
            importance_weights=factors,
            **values,
        )
        if settings.reward_cap is not None:
            correction["capped_prompts"] = self._capped_prompts(ranks.gather(scores["reward"]), prompt_ids)
        metrics = self._rollout_metrics(rollout, kl_sums) | self._gap(sampled, old_log_probs) | correction | lagrangian
        return experience, metrics

    def _gae_advantages(
        self,
        rollout: Rollout,
        reward: torch.Tensor,
        costs: torch.Tensor,
        applies: torch.Tensor,
        kl: torch.Tensor,
        cu_seqlens: torch.Tensor,
        sequence_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Token advantages [C, T] of the streams that have critics, and the values and returns that these learn."""
        settings, device, beta = self.config.algorithm, self.ranks.device, self.config.algorithm.kl_coefficient
        names = [stream for critic in self.models.critics.values() for stream in critic.module.streams]
        streams = {"reward": (reward, kl, beta)}
        for name, cost, applicable in zip(self.constraints.names, costs, applies, strict=True):
            streams[name] = (*_exempted(cost, kl, applicable, sequence_ids), -beta)
        rewards = [
            alg.token_rewards(score, own_kl, cu_seqlens, kl_coefficient=beta, clamp=settings.score_clamp)
            for score, own_kl, beta in (streams[name] for name in names)
        ]
        values = torch.cat([self.values(critic, rollout) for critic in self.models.critics.values()])
        advantages, returns = generalized_advantages(
            torch.stack(rewards).to(device),
            values.to(device),
            cu_seqlens.to(device),
            gamma=settings.gamma,
            lam=settings.gae_lambda,
            backend=self.ops_backend,
        )
        # Reward first, and the constraints in their order.
        order = [names.index("reward"), *(names.index(name) for name in self.constraints.names if name in names)]
        advantages, values, returns = (streams[order] for streams in (advantages.cpu(), values, returns.cpu()))
        learned = {"reward_values": values[0], "reward_returns": returns[0]}
        if len(names) > 1:
            advantages[1:] *= applies[:, sequence_ids]
            costs_learned = {"cost_values": values[1:], "cost_returns": returns[1:]}
            learned |= {name: self.constraints.plain(streams) for name, streams in costs_learned.items()}
        return advantages, learned

    def _critic_free_advantages(
        self,
        reward: torch.Tensor,
        costs: torch.Tensor,
        applies: torch.Tensor,
        kl_sums: torch.Tensor,
        prompt_ids: torch.Tensor,
        weights: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Advantages [1 + K, S] of this rank's responses, from those of all ranks; `prompt_ids` is of all ranks."""
        settings, ranks = self.config.algorithm, self.ranks
        beta, clamp, scale = settings.kl_coefficient, settings.score_clamp, settings.advantage_scale
        costs = torch.where(applies, costs, 0.0)
        if scale == "separate":
            parts = (reward.clamp(-clamp, clamp), costs.clamp(-clamp, clamp), kl_sums, applies)
            rewards, costs, kl_sums, applies = (ranks.gather(part) for part in parts)
            advantages = alg.separately_scaled_advantages(
                rewards, costs, kl_sums, prompt_ids, applies, kl_coefficient=beta
            )
        else:
            shaped = alg.penalised_scores(reward, kl_sums, kl_coefficient=beta, clamp=clamp)
            shaped_costs = alg.penalised_scores(costs, kl_sums, kl_coefficient=-beta, clamp=clamp)
            parts = (shaped, torch.where(applies, shaped_costs, 0.0), *weights)
            rewards, costs, reward_weights, cost_weights = (ranks.gather(part) for part in parts)
            advantages = alg.critic_free_advantages(
                settings.advantage, rewards, costs, prompt_ids, reward_weights, cost_weights, scaled=scale != "none"
            )
        counts = ranks.gather(torch.tensor([reward.numel()])).tolist()
        start = sum(counts[: ranks.rank])
        return torch.cat([advantages[0][None], advantages[1]])[:, start : start + reward.numel()]

    def _capped_prompts(self, rewards: torch.Tensor, prompt_ids: torch.Tensor) -> float:
        """The share of prompts whose rewards all reach the cap, from those of all ranks."""
        settings = self.config.algorithm
        share = wholly_capped(rewards, prompt_ids, settings.reward_cap)
        joint = settings.advantage == "grpo" and settings.advantage_scale in (None, "joint")
        if share > 0 and joint and not self._warned and self.ranks.is_first:
            self._warned = True
            _log.warning(
                "all rewards of some prompts reach algorithm.reward_cap %g: the joint scale of grpo blows what is "
                "left, KL penalties, up to unit size; algorithm.advantage_scale separate or none does not",
                settings.reward_cap,
            )
        return share

    def _whitened(
        self,
        advantages: torch.Tensor,
        weights: tuple[torch.Tensor, torch.Tensor],
        applies: torch.Tensor,
        ids: torch.Tensor,
    ) -> torch.Tensor:
        """The streams [1 + K, T] centred where they apply, all divided by the one scale of their weighted sum."""
        reward, costs, applies = advantages[0], advantages[1:], applies[:, ids]
        mixed = weights[0][ids] * reward - (weights[1][:, ids] * costs).sum(0)
        everyone, mixed = self.ranks.gather(advantages), self.ranks.gather(mixed)
        white = []
        for own, all_own, all_apply in zip(costs, everyone[1:], self.ranks.gather(applies), strict=True):
            reward_centre, centre, factor = alg.whitening(everyone[0], all_own[all_apply], mixed)
            white.append((own - centre) * factor)
        return torch.stack([(reward - reward_centre) * factor, *white]).where(
            torch.cat([torch.ones_like(applies[:1]), applies]), 0.0
        )

    def _rollout_metrics(self, rollout: Rollout, kl_sums: torch.Tensor) -> dict[str, float]:
        """Of all ranks: KL to the reference (nats a response), lengths."""
        tokens = sum(response.numel() for response in rollout.response_tokens)
        counts = [torch.tensor(float(count)) for count in (tokens, kl_sums.numel())]
        parts = torch.stack([kl_sums.sum(), rollout.finished.sum(), *counts])
        kl, finished, tokens, responses = self.ranks.sum(parts).tolist()
        return {
            "kl": kl / responses,
            "response_length": tokens / responses,
            "finished_share": finished / responses,
        }

    def _gap(self, sampled: torch.Tensor, computed: torch.Tensor) -> dict[str, float]:
        """How the sampler's log-probabilities [T] differ from the trainer's, a token, over all ranks."""
        gap = sampled - computed
        parts = torch.stack([gap.sum(), gap.abs().sum(), torch.tensor(float(gap.numel()))])
        gaps, absolute, tokens = self.ranks.sum(parts).tolist()
        return {"sampler_gap": gaps / tokens, "sampler_gap_absolute": absolute / tokens}

    def log_probs(self, engine: Callable[..., Any], rollout: Rollout) -> torch.Tensor:
        """Token log-probabilities (nats) of this rank's responses, at the rollout's temperature.

        Returns:
            float32 [T], packed, on the CPU.
        """

        def at_head(hidden: torch.Tensor, projection: Projection, batch: PackedBatch) -> torch.Tensor:
            return linear_log_probs(
                hidden,
                projection.weight,
                batch.targets,
                temperature=self.config.rollout.temperature,
                backend=self.ops_backend,
                **projection.options,
            )

        return self._over_rollout(rollout, lambda batch: engine(batch, at_head))

    def values(self, critic: Engine, rollout: Rollout) -> torch.Tensor:
        """The critic's values before each response token: float32 [C, T] of its C streams, packed, on the CPU."""
        values = self._over_rollout(
            rollout, lambda batch: critic(batch.input_ids, batch.position_ids, batch.predictors, batch.bounds)
        )
        return values.reshape(len(critic.module.streams), -1)

    def response_kl(self, rollout: Rollout) -> torch.Tensor:
        """The sum over each response of log pi - log pi_ref (nats): float32 [S], on the CPU."""
        kl = self.log_probs(self.models.policy, rollout) - self.log_probs(self.models.reference, rollout)
        lengths = [tokens.numel() for tokens in rollout.response_tokens]
        return torch.stack([part.sum() for part in kl.split(lengths)]) if lengths else kl.new_zeros(0)

    @torch.no_grad()
    def _over_rollout(self, rollout: Rollout, compute: Callable[[PackedBatch], torch.Tensor]) -> torch.Tensor:
        """Run packed micro-batches of a rollout, and put their results [..., T'] in the responses' order: [..., T]."""
        lengths = [tokens.numel() for tokens in rollout.response_tokens]
        rows = self._rows(rollout, range(len(lengths)))
        results: list[torch.Tensor] = [torch.empty(0)] * len(lengths)
        for row in in_step(rows, self.ranks):
            if not row:
                compute(idle_batch(self.ranks.device))
                continue
            batch = pack(
                [rollout.prompt_tokens[i] for i in row],
                [rollout.response_tokens[i] for i in row],
                self.ranks.device,
                self.config.update.share_prompts,
            )
            parts = compute(batch).float().cpu().split([lengths[i] for i in row], dim=-1)
            for i, part in zip(row, parts, strict=True):
                results[i] = part
        return torch.cat(results, dim=-1) if results else torch.empty(0)

    def _rows(self, rollout: Rollout, indices: Sequence[int]) -> list[list[int]]:
        """Deal some of this rank's responses over micro-batches of about equal work; a prompt's follow each other."""
        settings = self.config.update
        rows = micro_batches(
            [rollout.prompt_tokens[i].numel() for i in indices],
            [rollout.response_tokens[i].numel() for i in indices],
            settings.micro_batch_tokens,
            self.work,
            [int(rollout.prompt_ids[i]) for i in indices] if settings.share_prompts else None,
        )
        return [[indices[i] for i in row] for row in rows]

    # ------------------------------------------------------------------------------------------- 5 to 8: update

    def update(self, experience: Experience) -> dict[str, float]:
        """Optimizer steps on one rollout (steps 5 to 8): `epochs` passes of `minibatches` steps each.

        Returns:
            Metrics over all ranks and optimizer steps.
        """
        settings = self.config.update
        steps = []
        skipped = self.skipped.total
        for _ in range(settings.epochs):
            order = list(range(experience.responses))
            if settings.minibatches > 1:
                order = torch.randperm(experience.responses).tolist()
            for part in range(settings.minibatches):
                bounds = [experience.responses * i // settings.minibatches for i in (part, part + 1)]
                steps.append(self.optimizer_step(experience, sorted(order[bounds[0] : bounds[1]])))
        return {key: sum(step[key] for step in steps) / len(steps) for key in steps[0]} | {
            "steps_skipped": self.skipped.total - skipped,
            "skipped_steps": self.skipped.total,
            "learning_rate": steps[-1]["learning_rate"],
        }

    def optimizer_step(self, experience: Experience, indices: Sequence[int]) -> dict[str, float]:
        """One step of the policy and of each critic on some of this rank's responses.

        Every loss is normalised by the whole global batch, so neither the split into micro-batches nor the number of
        ranks changes the gradient.

        Args:
            experience: Of this rank's responses.
            indices: Those to learn from; may be empty on some ranks.

        Returns:
            Metrics over all ranks.

        Raises:
            InputError: Too many steps in a row had a non-finite loss or gradient.
        """
        settings, ranks = self.config.algorithm, self.ranks
        rows = self._rows(experience.rollout, indices)
        share = self.config.update.share_prompts
        batches = [experience.select(row, ranks.device, share) for row in in_step(rows, ranks)]
        tokens = sum(experience.rollout.response_tokens[i].numel() for i in indices)
        counts = ranks.sum(torch.tensor([len(indices), tokens])).tolist()
        denominator = max(1.0, counts[0] if settings.reduction == "sequence_mean" else counts[1])
        metrics: dict[str, float] = {}

        ptx = self._ptx_batches()
        # Added up where they are: a number that is read back in between would make a GPU idle.
        totals = torch.zeros(4, dtype=torch.float64, device=ranks.device)
        gaps = [(torch.empty(0), torch.empty(0))]
        for batch, last in with_last(batches, after=ptx):
            outputs = self.models.policy(batch.batch, self._policy_loss(batch, denominator))
            self.models.policy.backward(outputs.loss, last=last)
            valid = (batch.batch.targets != -100).sum()
            shares = [outputs.loss, outputs.clip_fraction * valid, outputs.approx_kl * valid, outputs.entropy.sum()]
            totals += torch.stack([share.detach().double() for share in shares])
            if self.on_policy:
                own = batch.batch.targets != -100
                gaps.append((batch.old_log_probs[own].cpu(), outputs.log_probs.detach()[own].cpu()))
        loss, clipped, approx_kl, entropy = ranks.sum(totals).tolist()
        metrics |= {
            "loss": loss,
            "clip_fraction": clipped / max(1.0, counts[1]),
            "approx_kl": approx_kl / max(1.0, counts[1]),
            "entropy": entropy / max(1.0, counts[1]),
        }
        if self.on_policy:
            metrics |= self._gap(*(torch.cat(parts) for parts in zip(*gaps, strict=True)))
        if ptx:
            metrics["ptx_loss"] = self._ptx_backward(ptx)
        step = self.models.policy.step()
        metrics |= {"gradient_norm": step.gradient_norm, "learning_rate": step.learning_rate}
        applied = [step]
        denominators = self._critic_denominators(experience, indices, denominator)
        for critic in self.models.critics.values():
            losses, critic_step = self._critic_step(critic, batches, denominators)
            metrics |= losses
            applied.append(critic_step)
        self.skipped.count(all(step.applied for step in applied))
        return metrics

    def _policy_loss(self, batch: MicroBatch, denominator: float) -> Callable[..., PolicyLoss]:
        settings = self.config.algorithm

        def at_head(hidden: torch.Tensor, projection: Projection, packed: PackedBatch) -> PolicyLoss:
            return fused_rectified_policy_loss(
                hidden,
                projection.weight,
                packed.targets,
                None if self.on_policy else batch.old_log_probs,
                batch.reward_advantages,
                batch.cost_advantages,
                packed.sequence_ids,
                batch.costs,
                batch.prompt_ids,
                violations=batch.violations,
                surrogate=settings.surrogate or self.row.surrogate,
                clip=(settings.clip_low, settings.clip_high),
                temperature=self.config.rollout.temperature,
                importance_weights=batch.importance_weights,
                entropy_coefficient=settings.entropy_coefficient,
                reduction=settings.reduction,
                denominator=denominator,
                backend=self.ops_backend,
                **self.constraints.loss_options,
                **projection.options,
            )

        return at_head

    def _ptx_batches(self) -> list[list[Shown]]:
        """This rank's demonstrations of one optimizer step, in micro-batches as many as the other ranks have."""
        if self.ptx_sampler is None:
            return []

        def work(shown: Shown) -> float:
            learned = learned_tokens(shown)
            return self.work(sum(part.numel() for part in shown) - learned, learned)

        mine = share_out([self.demonstrations[i] for i in self.ptx_sampler.next()], work, self.ranks)
        totals = [sum(part.numel() for part in shown) for shown in mine]
        rows = split_by_tokens(totals, self.config.update.micro_batch_tokens, [work(shown) for shown in mine])
        return [[mine[i] for i in row] for row in in_step(rows, self.ranks)]

    def _ptx_backward(self, rows: list[list[Shown]]) -> float:
        """Step 8: cross-entropy on demonstrations, token mean over the global batch, temperature 1."""
        tokens = self.ranks.sum(torch.tensor(sum(learned_tokens(shown) for row in rows for shown in row)))
        scale = self.config.algorithm.ptx_coefficient / float(tokens)
        total = imitation_backward(self.models.policy, rows, scale, self.ranks.device, self.ops_backend)
        return float(self.ranks.sum(total) / tokens)

    def _critic_step(
        self, critic: Engine, batches: Sequence[MicroBatch], denominators: dict[str, float]
    ) -> tuple[dict[str, float], StepResult]:
        """Step 7: the clipped value losses of a critic's streams, and its optimizer step."""
        settings, streams = self.config.algorithm, critic.module.streams
        totals = torch.zeros(len(streams), dtype=torch.float64, device=self.ranks.device)
        for batch, last in with_last(batches):
            packed = batch.batch
            values = critic(packed.input_ids, packed.position_ids, packed.predictors, packed.bounds)
            losses = []
            for stream, value in zip(streams, values, strict=True):
                old_values, returns, learned = self._learned(batch, stream)
                token_losses = alg.clipped_value_losses(value, old_values, returns, clip=settings.value_clip)
                losses.append(
                    alg.reduce_tokens(
                        torch.where(learned, token_losses, 0.0),
                        packed.sequence_ids,
                        reduction=settings.reduction,
                        sequences=packed.sequences,
                        denominator=denominators[stream],
                    )
                )
            by_stream = torch.stack(losses)
            critic.backward(by_stream.sum(), last=last)
            totals += by_stream.detach().double()
        names = [f"{stream}_value_loss" for stream in streams]
        return dict(zip(names, self.ranks.sum(totals).tolist(), strict=True)), critic.step()

    def _learned(self, batch: MicroBatch, stream: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A stream's old values and returns of a micro-batch's tokens, and which of these its critic learns from."""
        # All tokens are valid, but in an idle batch none: its loss is 0 and keeps the graph.
        valid = batch.batch.targets != -100
        if stream == "reward":
            return batch.reward_values, batch.reward_returns, valid
        k = self.constraints.names.index(stream)
        values, returns, violations = (
            torch.atleast_2d(streams)[k] for streams in (batch.cost_values, batch.cost_returns, batch.violations)
        )
        return values, returns, valid & (violations != -torch.inf)[batch.batch.sequence_ids]

    def _critic_denominators(
        self, experience: Experience, indices: Sequence[int], denominator: float
    ) -> dict[str, float]:
        """By stream: the sequences or tokens of the global optimizer step that it applies to, at least 1."""
        sizes = torch.ones(len(indices), dtype=torch.float64)
        if self.config.algorithm.reduction == "token_mean":
            sizes = experience.cu_seqlens.diff()[list(indices)].double()
        applies = torch.atleast_2d(experience.violations)[:, list(indices)] != -torch.inf
        counts = self.ranks.sum((applies * sizes).sum(1)).clamp(min=1).tolist()
        return {"reward": denominator, **dict(zip(self.constraints.names, counts, strict=True))}


def _exempted(
    cost: torch.Tensor, kl: torch.Tensor, applies: torch.Tensor, sequence_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Costs [S] and KL [T], 0 for the responses that a constraint does not apply to."""
    return torch.where(applies, cost, 0.0), kl * applies[sequence_ids]
