"""The configuration of `repo_fast.sft`: supervised fine-tuning of a causal language model."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from repo_fast.config.supervised import ExamplesConfig, SupervisedConfig


@dataclass(frozen=True)
class SftDataConfig(ExamplesConfig):
    """Prompts with the responses to imitate."""

    train: str = "world:demonstrations"
    """Demonstrations to learn from: a file (.jsonl, .json or .csv, also as .gz, or .parquet) or a folder of such, a
    part of the embedded world, or a `datasets` hub name."""
    max_tokens: int = 512
    """Longest demonstration, prompt and response together (tokens). Longer ones are dropped and counted."""
    train_on: Literal["last", "all"] = "all"
    """Which answers of a chat are learned: its last, or all, those in `history` too, but for those in a chat that is
    given as the `prompt` of a response. An answer is learned behind what the model would be given as its prompt."""


@dataclass(frozen=True)
class SftConfig(SupervisedConfig):
    """Fine-tune a causal language model on demonstrations, with the loss on response tokens only."""

    PROGRAM: ClassVar[str] = "repo-fast sft"
    FOLDER: ClassVar[str] = "sft"

    output_dir: str = "outputs/sft"
    """Folder for everything the run writes."""
    data: SftDataConfig = field(default_factory=SftDataConfig)
