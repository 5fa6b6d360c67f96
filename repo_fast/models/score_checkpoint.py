"""Folders of reward and cost models: their layouts, and how they are read.

Three layouts hold the same model, a trunk and a head with one output:

| layout                    | class                            | head         |
|---------------------------|----------------------------------|--------------|
| `score`                   | `LlamaForScore`                  | `score_head` |
| `model-for-score`         | `LlamaModelForScore`             | `score_head` |
| `sequence-classification` | `LlamaForSequenceClassification` | `score`      |

The first two are Safe RLHF's (https://github.com/PKU-Alignment/safe-rlhf, the Beaver models), the newer and the older.
They add `score_type`, `score_dim`, `do_normalize` and whether the head has a bias to the configuration (under `bias` or
`score_bias`, by release: both are read, and both are written), and the buffers `normalizer.mean`, `.var`
and `.count`. The third is Hugging Face's, which has no place for a score type, a normalizer or a bias. The trunk has
the same names in all three: those of the architecture's causal language model.

What the file says is kept with the model as a `ScoreFormat`, so that writing a loaded model gives back every bit.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from repo_fast.errors import InputError, first_line
from repo_fast.models.model_config import load_config, set_aside
from repo_fast.models.weight_files import Checkpoint, find_file

_log = logging.getLogger(__name__)

# Safe RLHF's normalizer, by its `score_type`: (subtract the mean, divide by the standard deviation).
NORMALIZERS = {"reward": (True, True), "cost": (False, True), "critic": (False, False)}
NORMALIZER_PREFIX = "normalizer."


@dataclass(frozen=True)
class Layout:
    """How a folder stores a score model.

    Attributes:
        name: As the user gives it.
        suffix: Of the class in `architectures`, after the architecture's own name.
        head: The module that the head's tensors are named after.
        is_classifier: Whether it is Hugging Face's, without Safe RLHF's additions and without a bias.
    """

    name: str
    suffix: str
    head: str
    is_classifier: bool = False


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("score", "ForScore", "score_head"),
        Layout("model-for-score", "ModelForScore", "score_head"),
        Layout("sequence-classification", "ForSequenceClassification", "score", is_classifier=True),
    )
}


def _identity_normalizer() -> dict[str, torch.Tensor]:
    """The buffers of a Safe RLHF model that has seen no score yet."""
    return {
        f"{NORMALIZER_PREFIX}mean": torch.zeros(1),
        f"{NORMALIZER_PREFIX}var": torch.ones(1),
        f"{NORMALIZER_PREFIX}count": torch.zeros(1, dtype=torch.int64),
    }


@dataclass(frozen=True, eq=False)
class ScoreFormat:
    """What a score model's folder says beside its weights: what it takes to score alike, and to write it back.

    Attributes:
        score_type: `reward`, `cost` or `critic`; None where it does not say.
        do_normalize: Whether scores are normalised, as `score_type` says (`NORMALIZERS`).
        normalizer: The tensors `normalizer.*` by name, as they are in the file; empty where it has none.
        aside: What is taken out of its configuration while it is used (`model_config.set_aside`).
    """

    score_type: str | None = None
    do_normalize: bool = False
    normalizer: Mapping[str, torch.Tensor] = field(default_factory=_identity_normalizer)
    aside: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_normalized(self) -> bool:
        """Whether there is anything to normalise with."""
        return self.do_normalize and {f"{NORMALIZER_PREFIX}mean", f"{NORMALIZER_PREFIX}var"} <= self.normalizer.keys()

    @property
    def mean(self) -> float:
        """What is subtracted from the head's output, in its units."""
        if self.is_normalized and NORMALIZERS[str(self.score_type)][0]:
            return self.normalizer[f"{NORMALIZER_PREFIX}mean"].item()
        return 0.0

    @property
    def std(self) -> float:
        """What divides the rest."""
        if self.is_normalized and NORMALIZERS[str(self.score_type)][1]:
            return self.normalizer[f"{NORMALIZER_PREFIX}var"].float().sqrt().item() + 1e-8
        return 1.0


def read_settings(path: str) -> dict:
    """The `config.json` of a folder or hub name as it is."""
    try:
        return json.loads(Path(str(find_file(path, "config.json"))).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"the config.json of {path!r} cannot be read: {first_line(error)}") from error


class ScoreCheckpoint:
    """A score model's folder or hub name, checked: the right class, one output, a head of the right shape.

    Args:
        path: Folder or hub name.

    Attributes:
        config: As `load_config` gives it, without its pad token.
        layout: How it is stored.
        weights: Its tensors.

    Raises:
        InputError: It is not a score model of a known layout, has not exactly one output, or no head.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.config = load_config(path)
        self.architecture = (self.config.architectures or ["none"])[0]
        self.layout = self._find_layout()
        self.weights = Checkpoint(path)
        if self._head("weight") not in self.weights.files:
            raise InputError(f"{path!r} has no score head: there is no {self._head('weight')} among its weights")
        weight = self.weights.read(self._head("weight"))
        if weight.shape != (1, self.config.hidden_size):
            raise InputError(
                f"{path!r} has {self._head('weight')} of shape {list(weight.shape)}, expected "
                f"[1, {self.config.hidden_size}]: one score a response"
            )
        self._weight = weight

    @property
    def has_bias(self) -> bool:
        """Whether the file has one, whatever the configuration says."""
        return self._head("bias") in self.weights.files

    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The head's weight [1, D] and bias [1], in the file's dtype; None without a bias."""
        if self.has_bias:
            return self._weight, self.weights.read(self._head("bias"))
        # Both keys exist in checkpoints whose class was renamed later.
        if not self.layout.is_classifier and getattr(self.config, "score_bias", getattr(self.config, "bias", False)):
            _log.warning("%r says that its score head has a bias, but has none: loaded without", self.path)
        return self._weight, None

    def format(self) -> ScoreFormat:
        """What it says beside the weights.

        Raises:
            InputError: The normalizer cannot be used.
        """
        aside = set_aside(self.path)
        if self.layout.is_classifier:
            return ScoreFormat(aside=aside)
        score_type = getattr(self.config, "score_type", None)
        do_normalize = bool(getattr(self.config, "do_normalize", False))
        if do_normalize and score_type not in NORMALIZERS:
            raise InputError(f"{self.path!r} has score_type {score_type!r}, expected one of {', '.join(NORMALIZERS)}")
        names = [name for name in self.weights.files if name.startswith(NORMALIZER_PREFIX)]
        normalizer = {name: self.weights.read(name) for name in names}
        for name in (f"{NORMALIZER_PREFIX}mean", f"{NORMALIZER_PREFIX}var"):
            if name in normalizer and normalizer[name].numel() != 1:
                raise InputError(f"{self.path!r} has {name} of shape {list(normalizer[name].shape)}, expected [1]")
        for name in ("mean", "var"):
            # Safe RLHF starts its buffers from these.
            value = getattr(self.config, name, None)
            if do_normalize and value is not None and f"{NORMALIZER_PREFIX}{name}" not in normalizer:
                normalizer[f"{NORMALIZER_PREFIX}{name}"] = torch.tensor(value, dtype=torch.float32).reshape(1)
        form = ScoreFormat(score_type, do_normalize, normalizer, aside)
        if do_normalize and not form.is_normalized:
            _log.warning("%r has do_normalize, but no normalizer.mean and .var: scores are not normalised", self.path)
        return form

    def _head(self, tensor: str) -> str:
        return f"{self.layout.head}.{tensor}"

    def _find_layout(self) -> Layout:
        fitting = [layout for layout in LAYOUTS.values() if self.architecture.endswith(layout.suffix)]
        if not fitting:
            raise InputError(
                f"{self.path!r} has no score head: its architecture is {self.architecture!r}, expected a score model: "
                "LlamaForScore or LlamaModelForScore (Safe RLHF), or a ...ForSequenceClassification with one output"
            )
        # One suffix is the ending of another.
        layout = max(fitting, key=lambda layout: len(layout.suffix))
        key, default = ("num_labels", 2) if layout.is_classifier else ("score_dim", 1)
        outputs = getattr(self.config, key, default)
        if outputs != 1:
            raise InputError(f"{self.path!r} has {key} {outputs}, expected 1: one score a response")
        return layout


def find_layout(name: str) -> Layout:
    """A layout by its name; raises `InputError` where there is none."""
    if name not in LAYOUTS:
        raise InputError(f"the layout is {name!r}, expected one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
