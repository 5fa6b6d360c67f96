"""The loop of the supervised jobs: examples -> packed micro-batches -> loss -> step -> metrics, checkpoint.

`finetuning.py` and `score_training.py` say what an example is, what its loss is, and how it is evaluated. The order of
the examples depends on seed and epoch alone, and losses are normalised by the global batch, so neither the number of
ranks nor the split into micro-batches changes an update.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from repo_fast.collectives import Ranks
from repo_fast.config import SupervisedConfig
from repo_fast.data import PromptSampler, PromptTemplate
from repo_fast.engine import Engine
from repo_fast.jobs.fingerprints import Fingerprint
from repo_fast.jobs.run import Run
from repo_fast.jobs.training_prompts import Record
from repo_fast.learning.skipped_steps import SkippedSteps
from repo_fast.ops.dispatch import resolve
from repo_fast.packing.balance import share_out, split_by_tokens
from repo_fast.packing.rows import in_step
from repo_fast.report.metrics import read_metrics
from repo_fast.report.panels import Panel
from repo_fast.report.plots import plot_panels
from repo_fast.report.tables import batch_size_table
from repo_fast.speed.flops import Shape, forward_work

Example = TypeVar("Example")


@dataclass(frozen=True)
class SupervisedInputs(Generic[Example]):
    """What a supervised run starts from.

    Attributes:
        model_path: Folder or hub name of the model; an embedded one resolved to its folder.
        tokenizer: The model's.
        template: How prompts are put to it.
        examples: What is learned from, tokenised.
        held_out: What is evaluated on; empty without an evaluation.
        resume_from: Folder of the checkpoint to go on from; None for a new run.
        notes: What the user should know of the data.
        fingerprints: Of the files that the run reads, as `repo_fast.jobs.fingerprints` makes them.
        training_prompts: What the model will have seen, as `repo_fast.jobs.training_prompts` has it.
    """

    model_path: str
    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate
    examples: Sequence[Example]
    held_out: Sequence[Example]
    resume_from: Path | None
    notes: list[str]
    fingerprints: dict[str, Fingerprint] = field(default_factory=dict)
    training_prompts: Record = ()


class SupervisedRun(Run, Generic[Example]):
    """Epochs over examples. A subclass gives the model, the loss, the evaluation and the files.

    Args:
        config: The resolved configuration.
        inputs: The examples.
        ranks: This process among those of the run.
        shown: The metrics that the display shows.
        panels: The pictures of the run, as `plot_panels` takes them.
    """

    config: SupervisedConfig

    def __init__(
        self,
        config: SupervisedConfig,
        inputs: SupervisedInputs[Example],
        ranks: Ranks,
        shown: tuple[tuple[str, str, str], ...],
        panels: Mapping[str, Sequence[Panel]],
    ) -> None:
        self.batch_size = min(config.batch_size, len(inputs.examples))
        total_steps = -(-config.epochs * len(inputs.examples) // self.batch_size)
        super().__init__(config, ranks, total_steps, shown, inputs.fingerprints)
        self.inputs, self.panels = inputs, panels
        self.ops_backend = resolve("fused_rectified_policy_loss", config.engine.ops_backend, ranks.device)
        self.engine = Engine(self.load_model(), config.engine, ranks, config.optimizer, total_steps)
        self._shape = Shape.of(self.transformer())
        self.sampler = PromptSampler(len(inputs.examples), self.batch_size, config.seed)
        self.skipped = SkippedSteps(config.max_skipped_steps, "max_skipped_steps")
        self.start(inputs.resume_from, inputs.model_path, inputs.fingerprints, inputs.training_prompts)

    # ------------------------------------------------------------------------------------- what a subclass provides

    def load_model(self) -> nn.Module:
        """The model to train; under ZeRO-3 as shards. All ranks call it."""
        raise NotImplementedError

    def transformer(self) -> nn.Module:
        """The transformers model inside the engine."""
        raise NotImplementedError

    def lengths(self, example: Example) -> list[int]:
        """Tokens of each sequence of an example."""
        raise NotImplementedError

    def weight(self, example: Example) -> int:
        """How much an example counts in the mean that the loss is, as many positions as a head sees of it: its response
        tokens, or 1."""
        raise NotImplementedError

    def backward(self, rows: list[list[Example]], scale: float) -> dict[str, float]:
        """Add the gradients of this rank's micro-batches, each loss times `scale`; empty ones keep ranks in step.

        Returns:
            Sums over this rank's examples, by the name of the metric, before the scale.
        """
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        """Metrics of the held-out examples, over all ranks."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------ the run

    def trained(self) -> dict[str, Engine]:
        return {"model": self.engine}

    def state_dict(self) -> dict:
        return {"sampler": self.sampler.state_dict(), "skipped": self.skipped.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.sampler.load_state_dict(state["sampler"], self.config.resume_changed_data)
        self.skipped.load_state_dict(state["skipped"])

    def run(self) -> int:
        """Train to the last step, or to where the run is stopped; write the model and the plots.

        Returns:
            The exit status: 0, or 128 + the signal that stopped the run.
        """
        self.listen()
        with self.reports():
            with self.ranks.together("removing old checkpoints"):
                if self.ranks.is_first:
                    # A run that was killed after its last checkpoint did not come to it.
                    self.prune_checkpoints()
            for text in (self._batch_sizes(), f"loss head: {self.ops_backend}", *self.inputs.notes):
                self.say(text)
            while self.step < self.total_steps and not self.must_stop():
                with self.phase("update") as update:
                    metrics = self.update([self.inputs.examples[i] for i in self.sampler.next()])
                self.step += 1
                every = self.config.evaluate_every
                if self.inputs.held_out and (self.step == self.total_steps or (every and self.step % every == 0)):
                    with self.phase("evaluate") as evaluate:
                        metrics |= self.evaluate()
                    metrics["evaluate_seconds"] = evaluate.seconds
                metrics |= {"update_seconds": update.seconds, "tokens_per_second": metrics["tokens"] / update.seconds}
                with self.ranks.together("logging"):
                    if self.ranks.is_first:
                        self.log({"step": self.step, **metrics, "ops_backend": self.ops_backend})
                self.checkpoint_if_due()
            if self.step == self.total_steps:
                self._finish()
            self.write_page()
        return self.exit_status()

    def update(self, batch: list[Example]) -> dict[str, Any]:
        """One optimizer step on a global batch, of which this rank takes its share.

        Returns:
            Metrics over all ranks.

        Raises:
            InputError: Too many steps in a row had a non-finite loss or gradient.
        """
        mine = share_out(batch, self.work, self.ranks)
        rows = [[mine[i] for i in row] for row in self.micro_batches(mine)]
        total = sum(self.weight(example) for example in batch)
        sums = self.backward(rows, 1 / total)
        names = list(sums)
        values = self.ranks.sum(torch.tensor([sums[name] for name in names], dtype=torch.float64)).tolist()
        step = self.engine.step()
        skipped = self.skipped.total
        self.skipped.count(step.applied)
        return {name: value / total for name, value in zip(names, values, strict=True)} | {
            "gradient_norm": step.gradient_norm,
            "learning_rate": step.learning_rate,
            "epoch": self.sampler.epochs,
            "tokens": sum(self.tokens(example) for example in batch),
            "steps_skipped": self.skipped.total - skipped,
        }

    def tokens(self, example: Example) -> int:
        return sum(self.lengths(example))

    def work(self, example: Example) -> int:
        """Operations of the model's forward on an example."""
        return forward_work(self._shape, self.lengths(example), self.weight(example))

    def micro_batches(self, examples: Sequence[Example]) -> list[list[int]]:
        """This rank's examples, by index, in micro-batches of the token budget, as many as the other ranks have."""
        lengths, works = [self.tokens(example) for example in examples], [self.work(example) for example in examples]
        return in_step(split_by_tokens(lengths, self.config.micro_batch_tokens, works), self.ranks)

    def _finish(self) -> None:
        """Write the model and the plots."""
        with self.phase("save model"):
            state = self.engine.whole_state()
            with self.ranks.together("writing the model"):
                if self.ranks.is_first:
                    self.write_folder(self.RESULT, lambda folder: self.write_model(folder, state))
        if self.ranks.is_first:
            plot_panels(read_metrics(self.output_dir / "metrics.jsonl"), self.panels, self.output_dir / "plots")
        self.say(f"model: {self.output_dir / self.RESULT}   metrics: {self.output_dir / 'metrics.jsonl'}")

    def _batch_sizes(self) -> str:
        settings, size = self.config, self.ranks.size
        longest = max(self.tokens(example) for example in self.inputs.examples)
        return batch_size_table(
            {
                "examples": (self.batch_size, f"~{self.batch_size / size:g}", None),
                "tokens": (None, None, f"<= {max(settings.micro_batch_tokens, longest):,}"),
            },
            [
                f"ranks: {size}, on {self.ranks.device.type}; {len(self.inputs.examples)} examples, "
                f"{settings.epochs} epochs, {self.total_steps} optimizer steps; ~: on average"
            ],
        )
