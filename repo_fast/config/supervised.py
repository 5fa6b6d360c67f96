"""What the configurations of the supervised jobs, `sft` and `score`, have in common."""

from dataclasses import dataclass, field
from typing import Literal

from repo_fast.config.checks import require, require_at_least
from repo_fast.config.sections import (
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    check_fields,
    check_model,
    check_optimizer,
)


@dataclass(frozen=True)
class ExamplesConfig:
    """Examples to learn from, and others to evaluate on."""

    train: str = ""
    """What is learned from: a file (.jsonl, .json or .csv, also as .gz, or .parquet) or a folder of such, a part of the
    embedded world, or a `datasets` hub name."""
    train_split: str = "train"
    """Split to read when `train` is a `datasets` name, or a folder with several."""
    limit: int | None = None
    """Learn from the first so many demonstrations or preferences only; the embedded world then makes so many. Null:
    all."""
    eval: str | None = None
    """What is held out, in the same forms. Null: no evaluation."""
    eval_split: str = "test"
    """Split to read when `eval` is a `datasets` name, or a folder with several."""
    fields: dict[str, str] = field(default_factory=dict)
    """What columns of the data are, where their names do not say it or they contradict each other: `prompt`,
    `response`, `chosen`, `rejected`, `history`, `system` or `ignore`, as `--data.fields.COLUMN ROLE`."""
    template: Literal["auto", "chat", "safe-rlhf", "plain"] = "auto"
    """How a prompt is put to the model. `auto`: the tokenizer's chat template, else Safe RLHF's."""
    max_tokens: int = 512
    """Longest prompt and response together (tokens)."""


@dataclass(frozen=True)
class SupervisedConfig(RunConfig):
    """Epochs over examples that are given, in packed micro-batches."""

    model: ModelConfig = field(default_factory=ModelConfig)
    epochs: int = 1
    """Passes over the training examples."""
    batch_size: int = 64
    """Examples of an optimizer step (demonstrations or preferences, over all ranks); fewer examples make one batch. A
    chat of several answers is one, unless its template writes an answer otherwise once the chat goes on."""
    micro_batch_tokens: int = 8192
    """Largest packed micro-batch on a rank (tokens). A longer example gets one of its own."""
    evaluate_every: int = 0
    """Steps between evaluations on the held-out examples; the last step is always evaluated. 0: only the last."""
    max_skipped_steps: int = 5
    """The run stops when this many optimizer steps in a row had a non-finite loss or gradient and were skipped."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: ExamplesConfig = field(default_factory=ExamplesConfig)

    def check(self) -> None:
        super().check()
        check_fields("data.fields", self.data.fields)
        check_model("model", self.model)
        check_optimizer("optimizer", self.optimizer)
        names = ("epochs", "batch_size", "micro_batch_tokens", "max_skipped_steps")
        require_at_least(1, {name: getattr(self, name) for name in names})
        require_at_least(1, {"data.limit": self.data.limit, "data.max_tokens": self.data.max_tokens})
        require_at_least(0, {"evaluate_every": self.evaluate_every})
        offload = self.engine.offload_frozen
        require(not offload, "engine.offload_frozen", offload, "false: this job has no frozen model")
        share = self.engine.share_base
        require(share == "auto", "engine.share_base", share, "auto: this job has one model")
