"""The loop of a run. Each arrow of

    prompts -> Rollout -> scores -> Experience -> packed micro-batches -> loss -> step -> metrics, checkpoint

is one call in `Trainer._take_step`; what is learned from a rollout stands in `learning/learner.py`. Around the loop are
the evaluations on held-out prompts, before, after and while training, the logs, and the checkpoints.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from repo_fast.collectives import Ranks
from repo_fast.config import ONLY, SECOND_REWARD, TrainConfig
from repo_fast.data import PromptSampler
from repo_fast.engine import Engine
from repo_fast.errors import InputError
from repo_fast.jobs.assembly import build_models, build_sampler
from repo_fast.jobs.evaluated_run import EvaluatedRun
from repo_fast.jobs.inputs import Inputs
from repo_fast.jobs.random_state import RandomState
from repo_fast.jobs.watch import EXIT_STATUS, Watch
from repo_fast.learning.learner import Learner
from repo_fast.models.policy import save_policy
from repo_fast.objective.algorithm import prompt_means
from repo_fast.report.measures import Thresholds, threshold_of
from repo_fast.report.metrics import read_metrics
from repo_fast.report.plots import plot_evaluations, plot_metrics
from repo_fast.report.samples import SampleLog
from repo_fast.report.tables import batch_size_table
from repo_fast.rollout import Request, Rollout
from repo_fast.rollout.dealing import over_ranks
from repo_fast.rollout.seeds import Purpose
from repo_fast.scoring import FunctionScorer, JudgedScorer
from repo_fast.speed.profiling import draw_timeline, traced
from repo_fast.speed.throughput import Measured, Throughput, speed_table


class Trainer(EvaluatedRun):
    """One training run, from loaded models to the last checkpoint.

    Args:
        config: The resolved configuration.
        inputs: What `read_inputs` made of it.
        ranks: This process among those of the run.
    """

    RESULT = "policy"

    config: TrainConfig

    def __init__(self, config: TrainConfig, inputs: Inputs, ranks: Ranks) -> None:
        super().__init__(config, ranks, config.total_steps, _shown(config), inputs.read)
        self.inputs = inputs
        by_name = {name: cost.threshold for name, cost in config.costs.items()}
        self.threshold: Thresholds = by_name.get(ONLY, by_name)
        models, self.scorers = build_models(config, inputs, ranks)
        self.second_reward = self.scorers.pop(SECOND_REWARD, None)
        self.rollout_engine = build_sampler(config, inputs, models.policy, ranks)
        self.early_scorers = {
            name: scorer
            for name, scorer in self.scorers.items()
            if config.rollout.score_early and isinstance(scorer, FunctionScorer | JudgedScorer)
        }
        self.learner = Learner(config, models, ranks, inputs.demonstrations)
        self.throughput = Throughput.of(
            models.policy.module.model,
            [critic.module.trunk for critic in models.critics.values()],
            config.update,
            ranks,
        )
        self.sampler = PromptSampler(len(inputs.requests), config.rollout.prompts_per_step, config.seed)
        self.watch = Watch(config)
        self._stopping_rule: str | None = None
        self.start(inputs.resume_from, inputs.policy_path, inputs.fingerprints, inputs.training_prompts)

    def trained(self) -> dict[str, Engine]:
        models = self.learner.models
        return {"policy": models.policy} | {f"{name}_critic": engine for name, engine in models.critics.items()}

    def state_dict(self) -> dict:
        return {
            "learner": self.learner.state_dict(),
            "sampler": self.sampler.state_dict(),
            "watch": self.watch.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.learner.load_state_dict(state["learner"])
        self.sampler.load_state_dict(state["sampler"], self.config.resume_changed_data)
        if "watch" in state:
            # Not of a run of before it was watched.
            self.watch.load_state_dict(state["watch"])

    def run(self) -> int:
        """Train to the last step, or to where the run is stopped; evaluate before and after; write the policy.

        Returns:
            The exit status: 0; 128 + the signal that stopped the run; or 5 for a warning that did.
        """
        self.listen()
        with contextlib.closing(self.rollout_engine), self.reports() as stack:
            with self.ranks.together("opening the logs"):
                if self.ranks.is_first:
                    self.sample_log = SampleLog(self.output_dir, self.resume_step)
                    stack.callback(self.sample_log.close)
                    self.watch.open(self.output_dir, self.resume_step, self.say)
                    stack.callback(self.watch.close)
                    for text in (self._batch_sizes(), *self.inputs.notes, *self._notes()):
                        self.say(text)
                self.evaluations = self.open_evaluations()
                stack.callback(self.evaluations.close)
                if self.ranks.is_first:
                    self.watch.catch_up(self.evaluations.rows())
                    self.find_best()
                    # A run that was killed after its last checkpoint did not come to it.
                    self.prune_checkpoints()
            self.evaluate_before()
            # Of a resumed run, what was left of it; of evaluations that come at other steps now, the best.
            self.evaluate_step()
            self.keep_best()
            while self.step < self.total_steps and not self.must_stop():
                if self.step + 1 == self.config.profile:
                    folder = self.output_dir / "profile"
                    with traced(folder, self.ranks):
                        phases = self._take_step()
                    draw_timeline(folder, phases, self.ranks)
                else:
                    self._take_step()
                self.checkpoint_if_due()
                self.evaluate_step()
            if self.step == self.total_steps:
                self._finish()
            elif self.step and self.ranks.is_first:
                self._draw_plots()
            self.write_page()
        return self.exit_status()

    def must_stop(self) -> bool:
        if super().must_stop():
            return True
        if self.config.evaluation.stop_on:
            rules = [self.watch.stopped_by()] if self.ranks.is_first else []
            self._stopping_rule = self.ranks.gather_list(rules)[0]
        if self._stopping_rule is not None:
            self.save_checkpoint()
        return self._stopping_rule is not None

    def exit_status(self) -> int:
        if self.step == self.total_steps or self._stopping_rule is None:
            return super().exit_status()
        self.say(
            f"stopped after step {self.step} of {self.total_steps} by the warning {self._stopping_rule!r}; go on with "
            "--resume auto, without it in evaluation.stop_on"
        )
        return EXIT_STATUS

    # ----------------------------------------------------------------------------------------------------- a step

    def _take_step(self) -> dict[str, Measured]:
        """One step; returns its phases."""
        phases: dict[str, Measured] = {}
        with self.nothing_lost():
            requests, seeds = self._next_requests()
            early = self.early_scores(requests, self.inputs.exempt)
            with self.phase("generate") as phases["generate"]:
                drawn = self.generate(requests, seeds, early)
            with self.phase("score") as phases["score"]:
                share = self.config.update.share_prompts
                rollout = over_ranks(self.with_early(drawn, early), self.learner.work, self.ranks, together=share)
                scores = self.score(rollout, self.inputs.exempt)
        with self.phase("experience") as phases["experience"]:
            experience, rollout_metrics = self.learner.experience(rollout, scores)
        with self.phase("update") as phases["update"]:
            update_metrics = self.learner.update(experience)
        self.step += 1
        self._log_step(rollout, scores, rollout_metrics | update_metrics, phases)
        return phases

    @contextlib.contextmanager
    def nothing_lost(self) -> Iterator[None]:
        """Until anything is learned from it, a step that fails on all ranks leaves a checkpoint of those before it.

        A judge whose budget is used up, or a server that is gone, then costs no more than the step.
        """
        before, state = self.state_dict(), RandomState.now()
        try:
            yield
        except InputError:
            self.load_state_dict(before)
            state.restore()
            self.save_checkpoint()
            raise

    def _next_requests(self) -> tuple[list[Request], list[int]]:
        prompts = [self.inputs.requests[i] for i in self.sampler.next()]
        return self.share_requests(prompts, self.config.rollout.responses_per_prompt, Purpose.TRAINING)

    def _log_step(
        self, rollout: Rollout, scores: dict[str, torch.Tensor], metrics: dict[str, float], phases: dict[str, Measured]
    ) -> None:
        prompt_ids = self.ranks.gather(rollout.prompt_ids)
        rewards, *costs = (self.ranks.gather(scores[name]) for name in self.config.scorers)
        by_name = dict(zip(self.config.costs, costs, strict=True))
        tokens = metrics["response_length"] * rewards.numel()
        truncated = self.ranks.sum(torch.tensor([scorer.truncated for scorer in self.scorers.values()]))
        for scorer in self.scorers.values():
            scorer.truncated = 0
        record = {
            "step": self.step,
            "reward": float(rewards.mean()),
            **_safety(by_name, self.threshold, prompt_ids),
            **metrics,
            **self.throughput.metrics(rollout, phases),
            "tokens_per_second": tokens / sum(phase.seconds for phase in phases.values()),
            "truncated_scores": int(truncated.sum()),
            "ops_backend": self.learner.ops_backend,
        }
        everyone = None
        if self.step == 1 or self.step % self.config.log.samples_every == 0:
            everyone = self.ranks.gather_list(list(zip(rollout.prompts, rollout.responses, strict=True)))
        with self.ranks.together("logging"):
            if self.ranks.is_first:
                self.log(record)
                self.watch.see_step(record)
                if everyone is not None:
                    prompts, responses = zip(*everyone, strict=True)
                    self.sample_log.write(self.step, prompts, responses, rewards, by_name, prompt_ids)

    # -------------------------------------------------------------------------------------------------------- end

    def write_model(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        policy = self.learner.models.policy.module
        save_policy(folder, policy, state, self.inputs.tokenizer, self.inputs.policy_path)

    def _finish(self) -> None:
        """Evaluate, write the policy as a Hugging Face folder, draw the plots, print the table."""
        if self.inputs.eval_requests:
            self.say(f"evaluating the trained policy: {self.evaluated_on()}")
            self.evaluate("after")
        with self.phase("save policy"):
            policy = self.learner.models.policy
            state = policy.whole_state()
            with self.ranks.together("writing the policy"):
                if self.ranks.is_first:
                    self.write_folder(self.RESULT, lambda folder: self.write_model(folder, state))
        if not self.ranks.is_first:
            return
        metrics = self._draw_plots()
        # Of before a resume there may be steps of other ranks.
        self.say(speed_table([row for row in metrics if row["step"] > self.started_at], self.ranks.size))
        if self.inputs.eval_requests and not (self.output_dir / "eval_before.jsonl").is_file():
            self.say("no before/after table: the start was evaluated in the folder of the checkpoint resumed from")
        elif self.inputs.eval_requests:
            table = self.table("after")
            (self.output_dir / "before_after.txt").write_text(table + "\n", encoding="utf-8")
            self.say(table)
        self.say(f"policy: {self.output_dir / self.RESULT}   metrics: {self.output_dir / 'metrics.jsonl'}")

    def _draw_plots(self) -> list[dict]:
        """Of what there is so far; gives the metrics. For the first rank to call."""
        metrics = read_metrics(self.output_dir / "metrics.jsonl")
        plot_metrics(metrics, self.output_dir / "plots", self.threshold)
        if rows := self.evaluations.rows():
            plot_evaluations(rows, self.output_dir / "plots", self.threshold)
        return metrics

    def _notes(self) -> list[str]:
        """What was chosen for this machine, and what the settings do not get."""
        notes = [f"loss head: {self.learner.ops_backend}"]
        rollout = self.config.rollout
        for name, cost in self.config.costs.items() if self.config.algorithm.name == "hc_lag" else ():
            by = {"z": "of the normal distribution", "t": "of Student's t"}[cost.confidence or "z"]
            notes.append(
                f"constraint{'' if name == ONLY else ' ' + name}: upper bound of the mean of the last "
                f"{cost.cost_window} costs, by the quantile {by} at the level of z = {cost.confidence_z:g}"
            )
        most = -(-rollout.prompts_per_step * rollout.responses_per_prompt // self.ranks.size)
        if self.early_scorers and rollout.engine == "hf" and most <= rollout.batch_size:
            notes.append(
                f"rollout.score_early spares no time in training: {most} responses a rank are drawn as one batch "
                f"(rollout.batch_size {rollout.batch_size})"
            )
        return notes

    def _batch_sizes(self) -> str:
        rollout, update, size = self.config.rollout, self.config.update, self.ranks.size
        responses = rollout.prompts_per_step * rollout.responses_per_prompt
        longest = self.config.data.max_prompt_tokens + rollout.max_new_tokens
        return batch_size_table(
            {
                "prompts": (rollout.prompts_per_step, f"~{rollout.prompts_per_step / size:g}", None),
                "responses": (responses, f"~{responses / size:g}", None),
                "tokens": (f"<= {responses * longest:,}", None, f"<= {max(update.micro_batch_tokens, longest):,}"),
                "responses generated at once": (None, f"<= {rollout.batch_size}", None),
                "optimizer steps": (update.epochs * update.minibatches, update.epochs * update.minibatches, None),
                "responses an optimizer step": (f"~{responses / update.minibatches:g}", None, None),
            },
            [f"ranks: {size}, on {self.ranks.device.type}; tokens include prompts; ~: on average"],
        )


def _shown(config: TrainConfig) -> tuple[tuple[str, str, str], ...]:
    """What the display shows of a step: the metric, its label, its format."""
    if ONLY in config.costs:
        constraints = [
            ("cost", "cost", ".3f"),
            ("strict_violation", "violation", ".3f"),
            ("multiplier", "lambda", ".3f"),
        ]
    else:
        constraints = []
        for name in config.costs:
            constraints += [(f"{name}_strict_violation", name, ".3f"), (f"{name}_multiplier", "lambda", ".3f")]
    return (
        ("reward", "reward", ".3f"),
        *constraints,
        ("kl", "kl", ".3f"),
        ("tokens_per_second", "tokens/s", ",.0f"),
    )


def _safety(costs: Mapping[str, torch.Tensor], thresholds: Thresholds, prompt_ids: torch.Tensor) -> dict[str, float]:
    """Metrics of the costs [S] of all ranks' responses, of those that each constraint is about.

    Several have them behind their names, and the share of responses that are safe by all.
    """
    metrics: dict[str, float] = {}
    safe = torch.ones_like(prompt_ids, dtype=torch.bool)
    for name, cost in costs.items():
        applies, threshold = cost != -torch.inf, threshold_of(thresholds, name)
        safe &= cost <= threshold
        if not applies.any():
            continue
        own, ids = cost[applies], prompt_ids[applies]
        found = {
            "cost": float(own.mean()),
            "strict_violation": float(prompt_means(own - threshold, ids).clamp(min=0).mean()),
            "safety_rate": float((own <= threshold).double().mean()),
        }
        metrics |= found if name == ONLY else {f"{name}_{key}": value for key, value in found.items()}
    return metrics if ONLY in costs else {"safety_rate": float(safe.double().mean()), **metrics}
