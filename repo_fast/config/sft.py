"""The configuration of `repo_fast.sft`: supervised fine-tuning of a causal language model."""

from dataclasses import dataclass, field
from typing import ClassVar

from repo_fast.config.supervised import ExamplesConfig, SupervisedConfig


@dataclass(frozen=True)
class SftDataConfig(ExamplesConfig):
    """Prompts with the responses to imitate."""

    train: str = "world:demonstrations"
    """Demonstrations to learn from: a .jsonl or .json file, a part of the embedded world, or a `datasets` hub name."""
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
