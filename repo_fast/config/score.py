"""The configuration of `repo_fast.score`: training of reward and cost models on preferences."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from repo_fast.config.checks import require, require_at_least
from repo_fast.config.heads import HeadConfig, check_heads
from repo_fast.config.supervised import ExamplesConfig, SupervisedConfig
from repo_fast.errors import InputError

Layout = Literal["score", "model-for-score", "sequence-classification"]
LAYOUTS = get_args(Layout)


@dataclass(frozen=True)
class PreferenceDataConfig(ExamplesConfig):
    """Pairs of responses of which one is preferred, or single responses labelled safe or not."""

    train: str = "world:preferences"
    """Preferences to learn from: a file (.jsonl, .json or .csv, also as .gz, or .parquet) or a folder of such, a part
    of the embedded world, or a `datasets` hub name."""
    max_tokens: int = 512
    """Longest prompt and response together (tokens). Longer ones lose their beginning and are counted."""
    unusable: Literal["error", "drop"] = "error"
    """What to do with a row whose two responses are equal, or one is blank: stop, or drop and count it."""


@dataclass(frozen=True)
class PreferenceLossConfig:
    """The losses of Safe RLHF (Dai et al. 2023, arXiv 2310.12773, equations 5 and 6), and what users add to them."""

    regularization: float = 0.001
    """Weight of the mean squared score, which keeps scores near 0."""
    margin: float = 0.0
    """What the score of the preferred response must exceed the other by, inside the ranking loss (score units)."""
    label_smoothing: float = 0.0
    """Share of the preferences and labels that are taken to be wrong, in [0, 0.5)."""


@dataclass(frozen=True)
class ScoreConfig(SupervisedConfig):
    """Train a reward model or a cost model on preferences, as Safe RLHF does."""

    PROGRAM: ClassVar[str] = "repo-fast score"
    FOLDER: ClassVar[str] = "score"
    ALSO: ClassVar[Mapping[str, str]] = {
        "--convert FOLDER": "Nothing is trained: write this score model (folder or hub name) in another layout, "
        "`layout`, to the folder of `--to`.",
        "--to FOLDER": "Folder to make of the converted model.",
        "--check FOLDER": "Nothing is trained: load this score model, and compare it with a known score, `expect`.",
        "--head NAME": "Of a converted or checked model with several, the one that gives the known score.",
    }

    output_dir: str = "outputs/score"
    """Folder for everything the run writes."""
    kind: Literal["reward", "cost"] = "reward"
    """`reward`: higher is better. `cost`: above 0 is unsafe; needs preferences for safety, or safety labels."""
    heads: dict[str, HeadConfig] = field(default_factory=dict)
    """`cost`: several outputs by name, each with the harm that it is about, from PKU-SafeRLHF's categories and
    severities; in use, `cost.head` names one. Empty: one output, about what is labelled unsafe."""
    layout: Layout = "score"
    """Layout of the saved model: Safe RLHF's (`score`; `model-for-score` is its older one), or Hugging Face's."""
    expect: tuple[str, float] | None = None
    """Where `model.path` is a score model: a whole text, template included, and the score it is known to give it. On
    the command line `--expect TEXT SCORE`."""
    data: PreferenceDataConfig = field(default_factory=PreferenceDataConfig)
    loss: PreferenceLossConfig = field(default_factory=PreferenceLossConfig)

    def check(self) -> None:
        super().check()
        check_heads(self.heads, self.kind)
        if self.heads and self.expect is not None:
            heads = ", ".join(self.heads)
            raise InputError(f"expect is given with heads {heads}, expected none: `--check --head NAME` compares one's")
        require_at_least(0, {"loss.regularization": self.loss.regularization, "loss.margin": self.loss.margin})
        smoothing = self.loss.label_smoothing
        require(0 <= smoothing < 0.5, "loss.label_smoothing", smoothing, "a share in [0, 0.5)")
