"""The configuration of `repo_fast.sft`: supervised fine-tuning of a causal language model."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from repo_fast.config.sections import require_at_least
from repo_fast.config.supervised import SupervisedConfig


@dataclass(frozen=True)
class SftDataConfig:
    """Prompts with the responses to imitate."""

    train: str = "world:demonstrations"
    """Demonstrations: a .jsonl or .json file, `world:demonstrations`, or a `datasets` hub name."""
    train_split: str = "train"
    """Split to read when `train` is a `datasets` name."""
    eval: str | None = None
    """Held-out demonstrations, in the same forms. Null: no evaluation."""
    eval_split: str = "test"
    """Split to read when `eval` is a `datasets` name."""
    template: Literal["auto", "chat", "safe-rlhf", "plain"] = "auto"
    """How a prompt is put to the model. `auto`: the tokenizer's chat template, else Safe RLHF's."""
    max_tokens: int = 512
    """Longest demonstration, prompt and response together (tokens). Longer ones are dropped and counted."""


@dataclass(frozen=True)
class SftConfig(SupervisedConfig):
    """Fine-tune a causal language model on demonstrations, with the loss on response tokens only."""

    PROGRAM: ClassVar[str] = "torchrun -m repo_fast.sft"
    FOLDER: ClassVar[str] = "sft"

    output_dir: str = "outputs/sft"
    """Folder for everything the run writes."""
    data: SftDataConfig = field(default_factory=SftDataConfig)

    def check(self) -> None:
        super().check()
        require_at_least(1, {"data.max_tokens": self.data.max_tokens})
