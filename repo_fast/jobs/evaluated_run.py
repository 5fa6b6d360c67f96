"""What a training run draws and scores of its policy, and its evaluations on held-out prompts: before and after, and
every so many steps while training.

Those while training come in units (`repo_fast/rollout/units.py`), behind a checkpoint of the weights that draw them.
All random states are put back after: the training is the same with and without.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch

from repo_fast.config import ONLY, SECOND_REWARD, TrainConfig
from repo_fast.jobs import checkpoint
from repo_fast.jobs.inputs import Inputs
from repo_fast.jobs.multiplier_start import describe_start, multipliers_from
from repo_fast.jobs.random_state import RandomState, seed_everything
from repo_fast.jobs.run import Run
from repo_fast.jobs.step_evaluations import StepEvaluations
from repo_fast.jobs.training_prompts import INSIDE, write_record
from repo_fast.jobs.watch import Watch
from repo_fast.learning.learner import Learner
from repo_fast.report import best as best_policy
from repo_fast.report.evaluations import read_evaluation, write_evaluation, written
from repo_fast.report.folders import remove
from repo_fast.report.jsonl import Value
from repo_fast.report.measures import Evaluation, Thresholds
from repo_fast.report.plots import plot_evaluations
from repo_fast.report.tables import before_after_table, table_measures
from repo_fast.rollout import Request, Rollout, Sampler
from repo_fast.rollout.seeds import Purpose, response_seeds
from repo_fast.rollout.units import Unit, units_of
from repo_fast.scoring import EarlyScores, FunctionScorer, JudgedScorer, Scorer, finite_scores

_PURPOSES = {"before": Purpose.BEFORE, "before_again": Purpose.BEFORE_AGAIN, "after": Purpose.AFTER}


class EvaluatedRun(Run):
    """A training run around its steps, of which `trainer.py` says what they are.

    Attributes, which a subclass sets before the run starts:
        inputs: What `read_inputs` made of the configuration.
        threshold: d, or that of each of several constraints.
        learner: The policy, and what else learns.
        rollout_engine: What draws from it.
        scorers: By the names of their columns; `early_scorers` those that are called while responses are drawn.
        second_reward: The one that nothing is trained on; None where there is none.
        watch: What is told of evaluations.
    """

    config: TrainConfig
    inputs: Inputs
    threshold: Thresholds
    learner: Learner
    rollout_engine: Sampler
    scorers: dict[str, Scorer]
    early_scorers: dict[str, FunctionScorer | JudgedScorer]
    second_reward: Scorer | None
    watch: Watch

    # ---------------------------------------------------------------------------------------------- drawing and scoring

    def share_requests(
        self, prompts: Sequence[Request], responses_per_prompt: int, purpose: Purpose
    ) -> tuple[list[Request], list[int]]:
        """This rank's share of the responses to draw at this step, and their seeds; a prompt's may lie on two ranks."""
        requests = [prompt for prompt in prompts for _ in range(responses_per_prompt)]
        seeds = response_seeds(len(requests), self.config.seed, purpose, self.step)
        return self.ranks.share(requests), self.ranks.share(seeds)

    def generate(self, requests: Sequence[Request], seeds: Sequence[int], early: EarlyScores | None = None) -> Rollout:
        """Draw a response for each of this rank's requests from the current policy, scored meanwhile by `early`."""
        return self.rollout_engine.draw(self.learner.models.policy, requests, seeds, early)

    def early_scores(self, requests: Sequence[Request], exempt: Mapping[str, frozenset[int]]) -> EarlyScores | None:
        if not self.early_scorers:
            return None
        return EarlyScores(self.early_scorers, requests, self.ranks.device, exempt)

    def with_early(self, rollout: Rollout, early: EarlyScores | None) -> Rollout:
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

    # ------------------------------------------------------------------------------------------------- before and after

    def evaluate_before(self) -> None:
        """Twice, from independent samples: the difference between the two is what sampling alone does."""
        if not self.inputs.eval_requests or self.step:
            return
        self.say(f"evaluating the start, twice: {self.evaluated_on()}")
        for name in ("before", "before_again"):
            self.evaluate(name)
        if self.config.evaluation.every is not None:
            with self.ranks.together("a first evaluation"):
                if self.ranks.is_first:
                    self._note_evaluation(self._start_measures())
        self._begin_multipliers()
        with self.ranks.together("a first table"):
            if self.ranks.is_first:
                # For what is wrong with the last one would take the run's results with it.
                self.table("before_again")

    def evaluated_on(self) -> str:
        """How much an evaluation draws, in words."""
        prompts, count = len(self.inputs.eval_requests), self.config.evaluation.samples_per_prompt
        return f"held-out prompts: {prompts:,}, responses to each: {count}"

    def evaluate(self, name: str) -> None:
        """Sample and score the held-out prompts, into `eval_NAME.jsonl`."""
        with self.phase(f"evaluate {name}"), self._nothing_changed():
            purpose, count = _PURPOSES[name], self.config.evaluation.samples_per_prompt
            # Scorers may draw from these.
            seed_everything(self.config.seed, purpose, self.ranks.rank)
            requests, seeds = self.share_requests(self.inputs.eval_requests, count, purpose)
            early = self.early_scores(requests, self.inputs.eval_exempt)
            rollout = self.with_early(self.generate(requests, seeds, early), early)
            scores = self.score(rollout, self.inputs.eval_exempt)
            # Before the first step the policy is the reference.
            kl = self.learner.response_kl(rollout) if self.step else torch.zeros(len(rollout.responses))
        rows = self.ranks.gather_list(self._evaluated(rollout, scores, kl))
        with self.ranks.together("writing an evaluation"):
            if self.ranks.is_first:
                write_evaluation(self.evaluation_file(name), ({"step": self.step, **row} for row in rows))

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

    def evaluation_file(self, name: str) -> Path:
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
                files = [self.evaluation_file(name) for name in ("before", "before_again")]
                start = multipliers_from(self.config, [self._read_evaluation(file) for file in files])
                found = list(zip(self.config.costs, start.multipliers, strict=True))
                self.say(describe_start(self.config, start))
        for name, multiplier in self.ranks.gather_list(found):
            if name in asked:
                self.learner.constraints.begin(name, multiplier)

    def table(self, after: str) -> str:
        """The start beside another evaluation. For the first rank to call."""
        files = [self.evaluation_file(name) for name in ("before", "before_again", after)]
        before, again, other = (self._read_evaluation(file) for file in files)
        return before_after_table(before, other, self.threshold, before_again=again)

    # --------------------------------------------------------------------------------------------------- while training

    def open_evaluations(self) -> StepEvaluations:
        evaluation, size = self.config.evaluation, self.config.rollout.batch_size
        units: list[Unit] = []
        if evaluation.every is not None:
            units = units_of(self.inputs.eval_requests, evaluation.samples_per_prompt, size, self.config.seed)
        # Units of before are of other prompts then, or scored by others.
        keep = not self.config.resume_changed_data
        return StepEvaluations(self.output_dir, units, self.ranks, self.resume_step, keep_units=keep)

    def evaluate_step(self) -> None:
        """Evaluate the policy at the steps that the configuration says and at the last, behind a checkpoint of it.

        Of a resumed run also its first step, where that is one of them: what is on disk of it is not drawn again, and
        what follows from it is made sure of.
        """
        every = self.config.evaluation.every
        if every is None or self.step == 0 or (self.step % every and self.step < self.total_steps):
            return
        self.save_checkpoint()
        row = self.evaluations.row(self.step)
        if not self.ranks.any(row is not None):
            with self.phase("evaluate"), self._nothing_changed():
                if not self.evaluations.draw(self.step, self._draw_unit, self._leave_evaluation):
                    return
            with self.ranks.together("the measures of an evaluation"):
                if self.ranks.is_first:
                    self._note_evaluation(self._step_measures())
        elif row is not None:
            self.watch.see_evaluation(row)
        self.keep_best()

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
        if unit is None:
            rollout = self.generate([], [])
        else:
            # Scorers may draw from these.
            seed_everything(unit.seeds[0])
            rollout = self.generate(unit.requests, unit.seeds)
        scores = self.score(rollout, self.inputs.eval_exempt)
        return self._evaluated(rollout, scores, self.learner.response_kl(rollout))

    def _leave_evaluation(self) -> bool:
        """Whether a signal has come that ends the run here: it goes on with this evaluation when it is resumed."""
        return self.step < self.total_steps and self.ranks.any(self.stop_signal is not None)

    def _start_measures(self) -> dict[str, Value]:
        """As the table's column "before": interference is that of the second sample."""
        before, again = (self._read_evaluation(self.evaluation_file(name)) for name in ("before", "before_again"))
        sampled = table_measures(again, before, self.threshold)
        return {
            name: sampled[name] if name.endswith("interference_rate") else value
            for name, value in table_measures(before, before, self.threshold).items()
        }

    def _step_measures(self) -> dict[str, Value]:
        evaluation = self._read_evaluation(self.evaluations.responses(self.step))
        file, before = self.evaluation_file("before"), None
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
        plot_evaluations(self.evaluations.rows(), self.output_dir / "plots", self.threshold)
        self.watch.see_evaluation(row)

    def keep_best(self) -> None:
        """Write the policy where this step's evaluation is the best so far. All ranks must call it."""
        best, is_new = self.watch.best, False
        with self.ranks.together("looking at the best policy"):
            if self.ranks.is_first and best is not None and best.step == self.step:
                is_new = best_policy.read_best(self.output_dir / best_policy.FOLDER) != best
        if not self.ranks.any(is_new):
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
                    start = "" if best.value_at_start is None else f" (at the start {best.value_at_start:.4g})"
                    self.say(f"best policy so far: {best.measure} {best.value:.4g} at step {best.step}{start}")

    def prune_checkpoints(self) -> None:
        best = self.watch.best
        checkpoint.prune(self.output_dir, self.config.checkpoint.keep, None if best is None else best.step)

    def find_best(self) -> None:
        """Of a resumed run: see to it that the best policy on disk is that of the best evaluation, and say where it is
        none; set that of a step which this run has not come to yet aside. For the first rank to call."""
        folder, best = self.output_dir / best_policy.FOLDER, self.watch.best
        written = best_policy.read_best(folder)
        if written is not None and written.step > self.step:
            aside = folder.with_name(f"{folder.name}-before-resume")
            remove(aside)
            folder.rename(aside)
            self.say(f"{folder} is of step {written.step}, which this run has yet to come to: it is {aside} now")
            written = None
        if best is None or written == best:
            return
        if written is not None and written.step == best.step:
            # It was the best by another measure.
            best_policy.write_best(folder, best)
        elif best.step < self.step:
            self.say(
                f"the best evaluation so far, {best.measure} {best.value:.4g} at step {best.step}, has no policy in "
                f"{folder}: one comes with the first that is better"
            )
