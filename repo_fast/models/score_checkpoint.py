"""Folders of reward and cost models: their layouts, and how they are read.

Three layouts hold the same model, a trunk and a head with one output, or K:

| layout                    | class                            | head         | K            | names of the outputs |
|---------------------------|----------------------------------|--------------|--------------|----------------------|
| `score`                   | `LlamaForScore`                  | `score_head` | `score_dim`  | `score_names`        |
| `model-for-score`         | `LlamaModelForScore`             | `score_head` | `score_dim`  | `score_names`        |
| `sequence-classification` | `LlamaForSequenceClassification` | `score`      | `num_labels` | `id2label`           |

`score_names` is this package's: a list of K names, which Safe RLHF's classes, whose normalizers have K numbers then,
take for one more setting. Outputs without names go by their numbers, from "0" on. `score_heads`, beside it, says what
each was trained to call unsafe.

A folder of adapters (`adapters.py`), written where a score model was trained so, has all that and the same
`config.json`, whichever the layout; in place of the weights there are the adapters, and `score_head.safetensors` with
the head, as `score_head.weight` and `.bias`, and the buffers `normalizer.*`. The trunk's weights are its base's.

The first two are Safe RLHF's (https://github.com/PKU-Alignment/safe-rlhf, the Beaver models), the newer and the older.
They add `score_type`, `score_dim`, `do_normalize` and whether the head has a bias to the configuration (under `bias` or
`score_bias`, by release: both are read, and both are written), and the buffers `normalizer.mean`, `.var`
and `.count`. The third is Hugging Face's, which has no place for a score type, a normalizer or a bias. The trunk has
the same names in all three: those of the architecture's causal language model.

What the file says is kept with the model as a `ScoreFormat`, so that writing a loaded model gives back every bit.
"""

import difflib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from repo_fast.errors import InputError, first_line
from repo_fast.models.adapters import is_adapter, read_adapter
from repo_fast.models.model_config import load_config, set_aside
from repo_fast.models.weight_files import Checkpoint, find_file

_log = logging.getLogger(__name__)

# Safe RLHF's normalizer, by its `score_type`: (subtract the mean, divide by the standard deviation).
NORMALIZERS = {"reward": (True, True), "cost": (False, True), "critic": (False, False)}
NORMALIZER_PREFIX = "normalizer."
HEAD_FILE = "score_head.safetensors"


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


def identity_normalizer(outputs: int = 1) -> dict[str, torch.Tensor]:
    """The buffers of a Safe RLHF model that has seen no score yet."""
    return {
        f"{NORMALIZER_PREFIX}mean": torch.zeros(outputs),
        f"{NORMALIZER_PREFIX}var": torch.ones(outputs),
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
        names: Of its outputs, in order; empty for a single one without a name.
    """

    score_type: str | None = None
    do_normalize: bool = False
    normalizer: Mapping[str, torch.Tensor] = field(default_factory=identity_normalizer)
    aside: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    @property
    def is_normalized(self) -> bool:
        """Whether there is anything to normalise with."""
        return self.do_normalize and {f"{NORMALIZER_PREFIX}mean", f"{NORMALIZER_PREFIX}var"} <= self.normalizer.keys()

    @property
    def normalization(self) -> tuple[tuple[float, float], ...]:
        """For each output what is subtracted from it, in its units, and what divides the rest."""
        outputs = max(1, len(self.names))
        means, stds = [0.0] * outputs, [1.0] * outputs
        if self.is_normalized:
            subtracts, divides = NORMALIZERS[str(self.score_type)]
            if subtracts:
                means = self.normalizer[f"{NORMALIZER_PREFIX}mean"].flatten().tolist()
            if divides:
                variances = self.normalizer[f"{NORMALIZER_PREFIX}var"].flatten().float()
                stds = [std + 1e-8 for std in variances.sqrt().tolist()]
        return tuple(zip(means, stds, strict=True))


def output_names(path: str) -> tuple[str, ...]:
    """The names of a score model's outputs, by its configuration alone, also of an encoder's; empty for one output
    without a name.

    Raises:
        InputError: There is no readable model configuration at `path`, or it does not name each of its outputs once.
    """
    return _names_in(path, load_config(path))


def _names_in(path: str, config: PretrainedConfig) -> tuple[str, ...]:
    if (config.architectures or [""])[0].endswith(LAYOUTS["sequence-classification"].suffix):
        outputs, names = config.num_labels, [name for _, name in sorted((config.id2label or {}).items())]
        key, unnamed = "id2label", ["LABEL_0"]
    else:
        outputs, names = getattr(config, "score_dim", 1), getattr(config, "score_names", None)
        key, unnamed = "score_names", None
    if not isinstance(outputs, int) or outputs < 1:
        raise InputError(f"{path!r} has score_dim {outputs!r}, expected a whole number of at least 1")
    if names is None:
        names = [str(i) for i in range(outputs)] if outputs > 1 else []
    if names == unnamed:
        names = []
    valid = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    if not valid or len(set(names)) < len(names) or len(names) not in ({outputs} if outputs != 1 else {0, 1}):
        raise InputError(f"{path!r} has {key} {names!r}, expected {outputs} different names, one for each output")
    return tuple(names)


def find_output(path: str, head: str | None, key: str) -> int:
    """Which output of a score model is the score, from 0.

    Args:
        path: Folder or hub name.
        head: The output's name; None where the model has one.
        key: Of the option that names it, for messages.

    Raises:
        InputError: The model has several and none is named, or none of that name.
    """
    names = output_names(path)
    if head is None and len(names) > 1:
        raise InputError(f"{key} is null, and {path!r} has several outputs, expected one of {', '.join(names)}")
    if head is None:
        return 0
    if not names:
        raise InputError(f"{key} is {head!r}, and {path!r} has one output without a name, expected null")
    if head not in names:
        near = difflib.get_close_matches(head, names, n=1, cutoff=0.0)[0]
        raise InputError(f"{key} is {head!r}, and {path!r} has {', '.join(names)}, the nearest of them {near!r}")
    return names.index(head)


def read_settings(path: str) -> dict:
    """The `config.json` of a folder or hub name as it is."""
    try:
        return json.loads(Path(str(find_file(path, "config.json"))).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"the config.json of {path!r} cannot be read: {first_line(error)}") from error


class ScoreCheckpoint:
    """A score model's folder or hub name, checked: the right class, a head of the right shape.

    Args:
        path: Folder or hub name.

    Attributes:
        config: As `load_config` gives it, without its pad token.
        layout: How it is stored.
        names: Of its outputs, as in `ScoreFormat`.
        adapter: Of a folder of adapters, those; None of one with all weights.
        weights: Its tensors; of a folder of adapters, the head's and the normalizer's.

    Raises:
        InputError: It is not a score model of a known layout, or has no head for the outputs that it says it has; its
            adapters cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.config = load_config(path)
        self.architecture = (self.config.architectures or ["none"])[0]
        self.layout = self._find_layout()
        self.names = _names_in(path, self.config)
        self.adapter = read_adapter(path) if is_adapter(path) else None
        if self.adapter is not None and find_file(path, HEAD_FILE) is None:
            raise InputError(f"{path!r} has adapters and no score head, expected one in {HEAD_FILE}")
        self.weights = Checkpoint(path) if self.adapter is None else Checkpoint(path, [HEAD_FILE])
        if self._head("weight") not in self.weights.files:
            raise InputError(f"{path!r} has no score head: there is no {self._head('weight')} among its weights")
        weight = self.weights.read(self._head("weight"))
        if weight.shape != (self.outputs, self.config.hidden_size):
            raise InputError(
                f"{path!r} has {self._head('weight')} of shape {list(weight.shape)}, expected "
                f"[{self.outputs}, {self.config.hidden_size}]: a row for each score of a response"
            )
        self._weight = weight

    @property
    def outputs(self) -> int:
        """How many scores it gives a response."""
        return max(1, len(self.names))

    @property
    def has_bias(self) -> bool:
        """Whether the file has one, whatever the configuration says."""
        return self._head("bias") in self.weights.files

    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The head's weight [K, D] and bias [K], in the file's dtype; None without a bias.

        Raises:
            InputError: The bias has another shape.
        """
        if self.has_bias:
            bias = self.weights.read(self._head("bias"))
            if bias.numel() != self.outputs:
                shape = list(bias.shape)
                raise InputError(f"{self.path!r} has {self._head('bias')} of shape {shape}, expected [{self.outputs}]")
            return self._weight, bias
        # Both keys exist in checkpoints whose class was renamed later.
        if not self.layout.is_classifier and getattr(self.config, "score_bias", getattr(self.config, "bias", False)):
            _log.warning("%r says that its score head has a bias, but has none: loaded without", self.path)
        return self._weight, None

    def format(self) -> ScoreFormat:
        """What it says beside the weights.

        Raises:
            InputError: The normalizer cannot be used.
        """
        aside, outputs = set_aside(self.path), self.outputs
        if self.layout.is_classifier:
            return ScoreFormat(normalizer=identity_normalizer(outputs), aside=aside, names=self.names)
        score_type = getattr(self.config, "score_type", None)
        do_normalize = bool(getattr(self.config, "do_normalize", False))
        if do_normalize and score_type not in NORMALIZERS:
            raise InputError(f"{self.path!r} has score_type {score_type!r}, expected one of {', '.join(NORMALIZERS)}")
        names = [name for name in self.weights.files if name.startswith(NORMALIZER_PREFIX)]
        normalizer = {name: self.weights.read(name) for name in names}
        for name in ("mean", "var"):
            # Safe RLHF starts its buffers from these.
            value = getattr(self.config, name, None)
            if do_normalize and value is not None and f"{NORMALIZER_PREFIX}{name}" not in normalizer:
                normalizer[f"{NORMALIZER_PREFIX}{name}"] = torch.tensor(value, dtype=torch.float32).flatten()
        for name in (f"{NORMALIZER_PREFIX}mean", f"{NORMALIZER_PREFIX}var"):
            if name in normalizer and normalizer[name].numel() != outputs:
                shape = list(normalizer[name].shape)
                raise InputError(f"{self.path!r} has {name} of shape {shape}, expected [{outputs}]")
        form = ScoreFormat(score_type, do_normalize, normalizer, aside, self.names)
        if do_normalize and not form.is_normalized:
            _log.warning("%r has do_normalize, but no normalizer.mean and .var: scores are not normalised", self.path)
        return form

    def _head(self, tensor: str) -> str:
        return f"{self.layout.head if self.adapter is None else 'score_head'}.{tensor}"

    def _find_layout(self) -> Layout:
        fitting = [layout for layout in LAYOUTS.values() if self.architecture.endswith(layout.suffix)]
        if not fitting:
            raise InputError(
                f"{self.path!r} has no score head: its architecture is {self.architecture!r}, expected a score model: "
                "LlamaForScore or LlamaModelForScore (Safe RLHF), or a ...ForSequenceClassification"
            )
        # One suffix is the ending of another.
        return max(fitting, key=lambda layout: len(layout.suffix))


def find_layout(name: str) -> Layout:
    """A layout by its name; raises `InputError` where there is none."""
    if name not in LAYOUTS:
        raise InputError(f"the layout is {name!r}, expected one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
