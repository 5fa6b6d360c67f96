"""The loop of a run. Each arrow of

    prompts -> Rollout -> scores -> Experience -> packed micro-batches -> loss -> step -> metrics, checkpoint

is one call in `Trainer._take_step`; what is learned from a rollout stands in `learning/learner.py`. Around the loop are
the evaluations on held-out prompts, before, after and while training, the logs, and the checkpoints.
"""

import contextlib
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy
import torch

from repo_fast.collectives import Ranks
from repo_fast.config import ONLY, SECOND_REWARD, TrainConfig
from repo_fast.data import PromptSampler
from repo_fast.engine import Engine
from repo_fast.errors import InputError
from repo_fast.jobs import best_policy, checkpoint
from repo_fast.jobs.assembly import build_models, build_sampler
from repo_fast.jobs.checkpoint import RandomState
from repo_fast.jobs.inputs import Inputs
from repo_fast.jobs.multiplier_start import describe_start, multipliers_from
from repo_fast.jobs.run import Run
from repo_fast.jobs.step_evaluations import StepEvaluations
from repo_fast.jobs.training_prompts import INSIDE, write_record
from repo_fast.jobs.watch import EXIT_STATUS, Watch
from repo_fast.learning.learner import Learner
from repo_fast.models.policy import save_policy
from repo_fast.objective.algorithm import prompt_means
from repo_fast.report.evaluations import read_evaluation, write_evaluation, written
from repo_fast.report.jsonl import Value
from repo_fast.report.measures import Evaluation, Thresholds, threshold_of
from repo_fast.report.metrics import read_metrics
from repo_fast.report.plots import plot_evaluations, plot_metrics
from repo_fast.report.samples import SampleLog
from repo_fast.report.tables import batch_size_table, before_after_table, table_measures
from repo_fast.rollout import Request, Rollout
from repo_fast.rollout.dealing import over_ranks
from repo_fast.rollout.units import Unit, units_of
from repo_fast.scoring import EarlyScores, FunctionScorer, JudgedScorer, finite_scores
from repo_fast.speed.profiling import draw_timeline, traced
from repo_fast.speed.throughput import Measured, Throughput, speed_table

# Sampling of the evaluations: the same for every run and resume of a seed, and apart from training's.
_EVALUATION_SEEDS = {"before": 1, "before_again": 2, "after": 3}


class Trainer(Run):
    """One training run, from loaded models to the last checkpoint.

    Args:
        config: The resolved configuration.
        inputs: What `read_inputs` made of it.
        ranks: This process among those of the run.
    """

    RESULT = "policy"

    config: TrainConfig

    def __init__(self, config: TrainConfig, inputs: Inputs, ranks: Ranks) -> None:
        super().__init__(config, ranks, config.total_steps, _shown(config))
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
            if self.ranks.is_first:
                self.sample_log = SampleLog(self.output_dir, self.resume_step)
                stack.callback(self.sample_log.close)
                self.watch.open(self.output_dir, self.resume_step, self.say)
                stack.callback(self.watch.close)
                self._drop_later_best()
                for text in (self._batch_sizes(), *self.inputs.notes, *self._notes()):
                    self.say(text)
            self.evaluations = self._step_evaluations()
            stack.callback(self.evaluations.close)
            self._evaluate_before()
            # Of a resumed run, what was left of it.
            self._evaluate_step()
            while self.step < self.total_steps and not self.must_stop():
                if self.step + 1 == self.config.profile:
                    folder = self.output_dir / "profile"
                    with traced(folder, self.ranks):
                        phases = self._take_step()
                    draw_timeline(folder, phases, self.ranks)
                else:
                    self._take_step()
                self.checkpoint_if_due()
                self._evaluate_step()
            if self.step == self.total_steps:
                self._finish()
        return self.exit_status()

    def must_stop(self) -> bool:
        if super().must_stop():
            return True
        if self.config.evaluation.stop_on:
            rules = [self.watch.stopped_by(self.step)] if self.ranks.is_first else []
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
            requests = self._next_requests()
            early = self._early_scores(requests, self.inputs.exempt)
            with self.phase("generate") as phases["generate"]:
                drawn = self.generate(requests, early)
            with self.phase("score") as phases["score"]:
                share = self.config.update.share_prompts
                rollout = over_ranks(self._with_early(drawn, early), self.learner.work, self.ranks, together=share)
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

    def _next_requests(self) -> list[Request]:
        prompts = self.sampler.next()
        return self._requests([self.inputs.requests[i] for i in prompts], self.config.rollout.responses_per_prompt)

    def _requests(self, prompts: Sequence[Request], responses_per_prompt: int) -> list[Request]:
        """This rank's share of the responses to draw; a prompt's may lie on two ranks."""
        return self.ranks.share([prompt for prompt in prompts for _ in range(responses_per_prompt)])

    def generate(self, requests: Sequence[Request], early: EarlyScores | None = None) -> Rollout:
        """Draw a response for each of this rank's requests from the current policy, scored meanwhile by `early`."""
        return self.rollout_engine.draw(self.learner.models.policy, requests, early)

    def _early_scores(self, requests: Sequence[Request], exempt: Mapping[str, frozenset[int]]) -> EarlyScores | None:
        if not self.early_scorers:
            return None
        return EarlyScores(self.early_scorers, requests, self.ranks.device, exempt)

    def _with_early(self, rollout: Rollout, early: EarlyScores | None) -> Rollout:
        """The responses with the scores that they were given meanwhile; waits for the last of these."""
        if early is None:
            return rollout
        with self.ranks.together("scoring"):
            return replace(rollout, scores=early.scores())

    def score(
        self, rollout: Rollout, exempt: Mapping[str, frozenset[int]] = MappingProxyType({})
    ) -> dict[str, torch.Tensor]:
        """Rewards and costs of this rank's responses: float32 [S] each, on the CPU.

        Args:
            rollout: This rank's responses.
            exempt: By constraint, ids of prompts that it is not about: their responses are not scored, and have -inf.
        """
        scores = {}
        for name, scorer in self.scorers.items():
            if rollout.scores is not None and name in self.early_scorers:
                scores[name] = torch.tensor([score[name] for score in rollout.scores])
                continue
            with self.ranks.together(f"the {scorer.name}"):
                scores[name] = finite_scores(scorer, rollout, exempt.get(name, ()))
        return scores

    def _log_step(
        self, rollout: Rollout, scores: dict[str, torch.Tensor], metrics: dict[str, float], phases: dict[str, Measured]
    ) -> None:
        prompt_ids = self.ranks.gather(rollout.prompt_ids)
        rewards, *costs = (self.ranks.gather(scores[name]) for name in self.config.scorers)
        by_name = dict(zip(self.config.costs, costs, strict=True))
        tokens = metrics["response_length"] * rewards.numel()
        truncated = self.ranks.sum(torch.tensor([scorer.truncated for scorer in self.scorers.values()]))
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
        if self.ranks.is_first:
            self.log(record)
            self.watch.see_step(record)
            if everyone is not None:
                prompts, responses = zip(*everyone, strict=True)
                self.sample_log.write(self.step, prompts, responses, rewards, by_name, prompt_ids)

    # ------------------------------------------------------------------------------------------------- evaluation

    def _evaluate_before(self) -> None:
        """Twice, from independent samples: the difference between the two is what sampling alone does."""
        if not self.inputs.eval_requests or self.step:
            return
        for name in ("before", "before_again"):
            self._evaluate(name)
        if self.config.evaluation.every is not None:
            with self.ranks.together("a first evaluation"):
                if self.ranks.is_first:
                    self._note_evaluation(self._start_measures())
        self._begin_multipliers()
        with self.ranks.together("a first table"):
            if self.ranks.is_first:
                # For what is wrong with the last one would take the run's results with it.
                self._table("before_again")

    def _evaluate(self, name: str) -> None:
        """Sample and score the held-out prompts, into `eval_NAME.jsonl`. Leaves the random state as it was."""
        devices = [self.ranks.device] if self.ranks.device.type == "cuda" else []
        with self.phase(f"evaluate {name}"), torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.config.seed * 1_000_003 + _EVALUATION_SEEDS[name] * 10_007 + self.ranks.rank)
            count = self.config.evaluation.samples_per_prompt
            requests = self._requests(self.inputs.eval_requests, count)
            early = self._early_scores(requests, self.inputs.eval_exempt)
            rollout = self._with_early(self.generate(requests, early), early)
            scores = self.score(rollout, self.inputs.eval_exempt)
            # Before the first step the policy is the reference.
            kl = self.learner.response_kl(rollout) if self.step else torch.zeros(len(rollout.responses))
        rows = self.ranks.gather_list(self._evaluated(rollout, scores, kl))
        if self.ranks.is_first:
            write_evaluation(self._evaluation_file(name), ({"step": self.step, **row} for row in rows))

    def _evaluated(self, rollout: Rollout, scores: dict[str, torch.Tensor], kl: torch.Tensor) -> list[dict[str, Value]]:
        """This rank's responses as `write_evaluation` takes them, but for the step."""
        columns = {
            "prompt_id": rollout.prompt_ids.tolist(),
            "category": [self.inputs.categories[i] for i in rollout.prompt_ids.tolist()],
            "prompt": rollout.prompts,
            "response": rollout.responses,
            **{name: [written(score) for score in own.tolist()] for name, own in scores.items()},
            "kl": kl.tolist(),
            "response_length": [tokens.numel() for tokens in rollout.response_tokens],
        }
        if self.inputs.well_formed is not None:
            with self.ranks.together("the well-formed check"):
                columns["well_formed"] = self.inputs.well_formed.score(rollout).tolist()
        if self.second_reward is not None:
            with self.ranks.together(f"the {self.second_reward.name}"):
                columns[SECOND_REWARD] = finite_scores(self.second_reward, rollout).tolist()
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _evaluation_file(self, name: str) -> Path:
        return self.output_dir / f"eval_{name}.jsonl"

    def _read_evaluation(self, path: Path) -> Evaluation:
        """For the first rank to call."""
        # One that is not about all prompts is told from others as several are.
        by_name = ONLY not in self.config.costs or any(self.inputs.eval_exempt.values())
        constraints = list(self.config.costs) if by_name else []
        return read_evaluation(path, constraints)[0]

    def _begin_multipliers(self) -> None:
        """Start those multipliers that are to be what the reference's responses ask for, and say what that is."""
        asked = [name for name, cost in self.config.costs.items() if cost.multiplier_init == "dual"]
        if not asked:
            return
        found: list[tuple[str, float]] = []
        with self.ranks.together("the start of the multipliers"):
            if self.ranks.is_first:
                files = [self._evaluation_file(name) for name in ("before", "before_again")]
                start = multipliers_from(self.config, [self._read_evaluation(file) for file in files])
                found = list(zip(self.config.costs, start.multipliers, strict=True))
                self.say(describe_start(self.config, start))
        for name, multiplier in self.ranks.gather_list(found):
            if name in asked:
                self.learner.constraints.begin(name, multiplier)

    # --------------------------------------------------------------------------------- evaluations while training

    def _step_evaluations(self) -> StepEvaluations:
        evaluation, size = self.config.evaluation, self.config.rollout.batch_size
        units: list[Unit] = []
        if evaluation.every is not None:
            units = units_of(self.inputs.eval_requests, evaluation.samples_per_prompt, size, self.config.seed)
        return StepEvaluations(self.output_dir, units, self.ranks, self.resume_step)

    def _evaluate_step(self) -> None:
        """Evaluate the policy at the steps that the configuration says, behind a checkpoint of it.

        Of a resumed run also its first step, where that is one of them: what is on disk of it is not drawn again, and
        what follows from it is made sure of.
        """
        every = self.config.evaluation.every
        if every is None or self.step == 0 or self.step % every:
            return
        self.save_checkpoint()
        if not self.ranks.any(self.evaluations.row(self.step) is not None):
            with self.phase("evaluate"), self._nothing_changed():
                if not self.evaluations.draw(self.step, self._draw_unit, self._leave_evaluation):
                    return
            with self.ranks.together("the measures of an evaluation"):
                if self.ranks.is_first:
                    self._note_evaluation(self._step_measures())
        elif self.ranks.is_first:
            self.watch.see_evaluation(self.evaluations.row(self.step) or {})
        self._keep_best()

    @contextlib.contextmanager
    def _nothing_changed(self) -> Iterator[None]:
        """What comes after is as if nothing had been drawn or scored inside."""
        state, scorers = RandomState.now(), [*self.scorers.values()]
        truncated = [scorer.truncated for scorer in scorers]
        try:
            yield
        finally:
            state.restore()
            for scorer, count in zip(scorers, truncated, strict=True):
                scorer.truncated = count

    def _draw_unit(self, unit: Unit | None) -> list[dict[str, Value]]:
        """The scored responses of a unit; of none on a rank without one. All ranks must call it."""
        if unit is not None:
            # Scorers may draw from these. torch's has been set.
            random.seed(unit.seed)
            numpy.random.seed(unit.seed % 2**32)
        rollout = self.generate([] if unit is None else unit.requests)
        scores = self.score(rollout, self.inputs.eval_exempt)
        return self._evaluated(rollout, scores, self.learner.response_kl(rollout))

    def _leave_evaluation(self) -> bool:
        """Whether a signal has come that ends the run here: it goes on with this evaluation when it is resumed."""
        return self.step < self.total_steps and self.ranks.any(self.stop_signal is not None)

    def _start_measures(self) -> dict[str, Value]:
        """As the table's column "before": interference is that of the second sample."""
        before, again = (self._read_evaluation(self._evaluation_file(name)) for name in ("before", "before_again"))
        sampled = table_measures(again, before, self.threshold)
        return {
            name: sampled[name] if name.endswith("interference_rate") else value
            for name, value in table_measures(before, before, self.threshold).items()
        }

    def _step_measures(self) -> dict[str, Value]:
        evaluation = self._read_evaluation(self.evaluations.responses(self.step))
        file, before = self._evaluation_file("before"), None
        if file.is_file():
            # Not in the folder of a run that was resumed from another one's.
            before = self._read_evaluation(file)
            if set(before.prompt_ids) != set(evaluation.prompt_ids):  # type: ignore[arg-type]
                # The run was gone on with, with other data.
                before = None
        return {**table_measures(evaluation, before, self.threshold)}

    def _note_evaluation(self, measures: dict[str, Value]) -> None:
        """Write and show an evaluation, and look at it. For the first rank to call."""
        row = {"step": self.step, **measures}
        self.evaluations.write(row)
        self.metrics_log.show({"step": self.step} | {f"evaluation/{name}": value for name, value in measures.items()})
        shown = [
            (name, value) for name, value in measures.items() if name.endswith(("reward", "violation", "safety_rate"))
        ]
        self.say(f"evaluation at step {self.step}: " + ", ".join(f"{name} {value:.3f}" for name, value in shown))
        self.watch.see_evaluation(row)

    def _keep_best(self) -> None:
        """Write the policy where this step's evaluation is the best so far. All ranks must call it."""
        best = self.watch.best
        is_new = self.ranks.is_first and best is not None and best.step == self.step
        if not self.ranks.any(is_new and best_policy.read_best(self.output_dir) != best):
            return
        with self.phase("save best policy"):
            state = self.learner.models.policy.whole_state()
            with self.ranks.together("writing the best policy"):
                if self.ranks.is_first and best is not None:

                    def write(folder: Path) -> None:
                        self.write_model(folder, state)
                        write_record(folder, INSIDE, self.inputs.training_prompts)
                        best_policy.write_best(folder, best)

                    self.write_folder(best_policy.FOLDER, write)
                    self.prune_checkpoints()

    def prune_checkpoints(self) -> None:
        best = self.watch.best
        checkpoint.prune(self.output_dir, self.config.checkpoint.keep, None if best is None else best.step)

    def _drop_later_best(self) -> None:
        """Remove the policy of a step that this run has not come to yet. For the first rank to call."""
        written, best = best_policy.read_best(self.output_dir), self.watch.best
        if written is not None and written.step > self.step:
            shutil.rmtree(self.output_dir / best_policy.FOLDER)
            written = None
        if best is not None and best.step < self.step and written != best:
            self.say(
                f"the best evaluation so far, {best.measure} {best.value:.4g} at step {best.step}, has no policy in "
                f"{self.output_dir / best_policy.FOLDER}: one comes with the first that is better"
            )

    # -------------------------------------------------------------------------------------------------------- end

    def write_model(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        policy = self.learner.models.policy.module
        save_policy(folder, policy, state, self.inputs.tokenizer, self.inputs.policy_path)

    def _finish(self) -> None:
        """Evaluate, write the policy as a Hugging Face folder, draw the plots, print the table."""
        if self.inputs.eval_requests:
            self._evaluate("after")
        with self.phase("save policy"):
            policy = self.learner.models.policy
            state = policy.whole_state()
            if self.ranks.is_first:
                self.write_folder(self.RESULT, lambda folder: self.write_model(folder, state))
        if not self.ranks.is_first:
            return
        metrics = read_metrics(self.output_dir / "metrics.jsonl")
        plot_metrics(metrics, self.output_dir / "plots", self.threshold)
        if rows := self.evaluations.rows():
            plot_evaluations(rows, self.output_dir / "plots", self.threshold)
        self.say(speed_table(metrics, self.ranks.size))
        if self.inputs.eval_requests and not (self.output_dir / "eval_before.jsonl").is_file():
            self.say("no before/after table: the start was evaluated in the folder of the checkpoint resumed from")
        elif self.inputs.eval_requests:
            table = self._table("after")
            (self.output_dir / "before_after.txt").write_text(table + "\n", encoding="utf-8")
            self.say(table)
        self.say(f"policy: {self.output_dir / self.RESULT}   metrics: {self.output_dir / 'metrics.jsonl'}")

    def _table(self, after: str) -> str:
        """The start beside another evaluation. For the first rank to call."""
        files = [self._evaluation_file(name) for name in ("before", "before_again", after)]
        before, again, other = (self._read_evaluation(file) for file in files)
        return before_after_table(before, other, self.threshold, before_again=again)

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
            [f"{size} ranks on {self.ranks.device.type}; tokens include prompts; ~: on average"],
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
