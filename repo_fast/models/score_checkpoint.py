"""Folders of reward and cost models: read, written, and converted from one layout to another.

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
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from repo_fast.errors import InputError, first_line
from repo_fast.files import publish
from repo_fast.models.model_config import load_config, restored, set_aside
from repo_fast.models.weight_files import Checkpoint, find_file

if TYPE_CHECKING:
    from repo_fast.models.score_model import ScoreModel

_log = logging.getLogger(__name__)

SHARD_SIZE = "5GB"
# Safe RLHF's normalizer, by its `score_type`: (subtract the mean, divide by the standard deviation).
NORMALIZERS = {"reward": (True, True), "cost": (False, True), "critic": (False, False)}
_NORMALIZER = "normalizer."
# What a model folder may hold beside weights and config.json, and what is copied when it is converted.
_OTHER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


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
        f"{_NORMALIZER}mean": torch.zeros(1),
        f"{_NORMALIZER}var": torch.ones(1),
        f"{_NORMALIZER}count": torch.zeros(1, dtype=torch.int64),
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
        return self.do_normalize and {f"{_NORMALIZER}mean", f"{_NORMALIZER}var"} <= self.normalizer.keys()

    @property
    def mean(self) -> float:
        """What is subtracted from the head's output, in its units."""
        if self.is_normalized and NORMALIZERS[str(self.score_type)][0]:
            return self.normalizer[f"{_NORMALIZER}mean"].item()
        return 0.0

    @property
    def std(self) -> float:
        """What divides the rest."""
        if self.is_normalized and NORMALIZERS[str(self.score_type)][1]:
            return self.normalizer[f"{_NORMALIZER}var"].float().sqrt().item() + 1e-8
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
        names = [name for name in self.weights.files if name.startswith(_NORMALIZER)]
        normalizer = {name: self.weights.read(name) for name in names}
        for name in (f"{_NORMALIZER}mean", f"{_NORMALIZER}var"):
            if name in normalizer and normalizer[name].numel() != 1:
                raise InputError(f"{self.path!r} has {name} of shape {list(normalizer[name].shape)}, expected [1]")
        for name in ("mean", "var"):
            # Safe RLHF starts its buffers from these.
            value = getattr(self.config, name, None)
            if do_normalize and value is not None and f"{_NORMALIZER}{name}" not in normalizer:
                normalizer[f"{_NORMALIZER}{name}"] = torch.tensor(value, dtype=torch.float32).reshape(1)
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


def check_layout(path: str, model: "ScoreModel", *, score_type: Literal["reward", "cost"], layout: str) -> None:
    """Raise `InputError` where a model, once it is trained, could not be written by `save_score_model`.

    Args:
        path: Where the model is from, for the message.
        model: As it is loaded.
        score_type, layout: As for `save_score_model`.
    """
    wanted, trunk = find_layout(layout), model.trunk
    # Whatever the bias is now, training moves it.
    bias = None if model.score_head.bias is None else torch.ones(1)
    _written_format(path, model.format, wanted, bias, score_type)
    _architecture(type(trunk).__name__.removesuffix("Model"), wanted, trunk.config.model_type)  # type: ignore[union-attr]


def save_score_model(
    folder: Path,
    model: "ScoreModel",
    state: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    *,
    score_type: Literal["reward", "cost"],
    layout: str = "score",
) -> None:
    """Write a score model that Safe RLHF, or with the third layout plain transformers, loads.

    Args:
        folder: Made where it does not exist.
        model: Gives configuration and format; its parameters may be shards.
        state: Its whole weights on the CPU, by name, as `Engine.whole_state` returns them.
        tokenizer: Saved beside them.
        score_type: What the score means.
        layout: One of `LAYOUTS`, by name.

    Raises:
        InputError: The layout is not known, or cannot hold the model.
    """
    wanted, form = find_layout(layout), model.format
    trunk: Any = model.trunk
    head = {name: tensor for name, tensor in state.items() if name.startswith("score_head.")}
    with restored(trunk.config, form.aside):
        settings = json.loads(trunk.config.to_json_string())
    bias = head.get("score_head.bias")
    written = _written_format(str(folder), form, wanted, bias, score_type)
    architecture = _architecture(type(trunk).__name__.removesuffix("Model"), wanted, trunk.config.model_type)
    has_bias = bias is not None and not wanted.is_classifier

    inner = {name.removeprefix("trunk."): tensor for name, tensor in state.items() if name.startswith("trunk.")}
    # A mixture of experts has other names and shapes in memory than in its files.
    inner = {name: _own_memory(tensor) for name, tensor in revert_weight_conversion(trunk, inner).items()}
    prefix = f"{trunk.base_model_prefix}."
    if not all(name.startswith(prefix) for name in inner):
        inner = {prefix + name: tensor for name, tensor in inner.items()}
    tensors = inner | {f"{wanted.head}.weight": head["score_head.weight"]}
    if has_bias:
        tensors[f"{wanted.head}.bias"] = head["score_head.bias"]
    if not wanted.is_classifier:
        tensors |= written.normalizer

    dtype = str(next(tensor.dtype for tensor in inner.values() if tensor.is_floating_point())).removeprefix("torch.")
    # Under both names: transformers 4, which Safe RLHF runs on, knows only the second.
    settings |= {"dtype": dtype, "torch_dtype": dtype}
    rope = settings.get("rope_parameters") or {}
    if "rope_theta" in rope:
        settings["rope_theta"] = rope["rope_theta"]
    pad_token_id = form.aside.get("pad_token_id")
    settings["pad_token_id"] = tokenizer.pad_token_id if pad_token_id is None else pad_token_id
    folder.mkdir(parents=True, exist_ok=True)
    _write_settings(folder, settings, architecture, wanted, written, has_bias)
    save_torch_state_dict(tensors, folder, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(folder)


def convert_score_model(source: str, target: Path, *, layout: str, score_type: str | None = None) -> None:
    """Write a score model's folder in another layout: names change, and no bit of a tensor does.

    The model is never built, and one weight file is in memory at a time. PyTorch's files become safetensors.

    Args:
        source: Folder or hub name.
        target: The folder to make: written aside as `target.partial`, and renamed when it is complete.
        layout: One of `LAYOUTS`, by name.
        score_type: `reward`, `cost` or `critic`, in place of what the source says; needed where it says nothing.

    Raises:
        InputError: The target is not empty, the source is no score model, or the layout is not known or cannot hold it.
    """
    wanted = find_layout(layout)
    if score_type is not None and score_type not in NORMALIZERS:
        raise InputError(f"score_type is {score_type!r}, expected one of {', '.join(NORMALIZERS)}")
    if score_type is not None and wanted.is_classifier:
        raise InputError(f"score_type is {score_type!r}, expected none: the layout {layout} cannot hold one")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"the target {str(target)!r} exists, expected a new or empty folder")
    checkpoint = ScoreCheckpoint(source)
    stem = checkpoint.architecture.removesuffix(checkpoint.layout.suffix)
    architecture = _architecture(stem, wanted, checkpoint.config.model_type)
    _, bias = checkpoint.head()
    written = _written_format(source, checkpoint.format(), wanted, bias, score_type)
    settings = read_settings(source)

    partial = target.with_name(f"{target.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    _write_settings(partial, settings, architecture, wanted, written, bias is not None and not wanted.is_classifier)
    _convert_weights(checkpoint, partial, wanted, written)
    for name in _OTHER_FILES:
        if found := find_file(source, name):
            shutil.copyfile(found, partial / name)
    publish(partial, target)


def find_layout(name: str) -> Layout:
    """A layout by its name; raises `InputError` where there is none."""
    if name not in LAYOUTS:
        raise InputError(f"the layout is {name!r}, expected one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def _own_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied where it is a part of another one: safetensors refuses those."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _architecture(stem: str, layout: Layout, model_type: str) -> str:
    """The class that a folder of that layout names."""
    name = stem + layout.suffix
    # An encoder's has its head under other names.
    if layout.is_classifier and MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(model_type) != name:
        raise InputError(f"the layout is {layout.name!r}, but transformers has no {name} for {model_type!r}")
    return name


def _written_format(
    path: str, form: ScoreFormat, layout: Layout, bias: torch.Tensor | None, score_type: str | None
) -> ScoreFormat:
    """What is to be written: the score type given, or the model's own; an error where it would change a score."""
    if layout.is_classifier:
        if bias is not None and bias.any():
            raise InputError(f"{path!r} has a score head with a bias, which the layout {layout.name} cannot hold")
        if form.mean != 0 or form.std != 1:
            raise InputError(f"{path!r} has do_normalize, which the layout {layout.name} cannot hold")
        return ScoreFormat(normalizer={})
    score_type = score_type or form.score_type
    if score_type is None:
        raise InputError(f"{path!r} does not say its score type, expected one to be given: reward or cost")
    if form.is_normalized and score_type != form.score_type:
        raise InputError(
            f"{path!r} has do_normalize as a {form.score_type} model: with score type {score_type!r} the same "
            "normalizer would give other scores"
        )
    return ScoreFormat(score_type, form.do_normalize, form.normalizer)


def _has_own_bias(model_type: str) -> bool:
    """Whether the architecture has a setting `bias` of its own, about its linear layers (Falcon)."""
    return hasattr(CONFIG_MAPPING[model_type](), "bias")


def _write_settings(
    folder: Path, settings: dict, architecture: str, layout: Layout, form: ScoreFormat, has_bias: bool
) -> None:
    bias_keys = ["score_bias"] if _has_own_bias(settings["model_type"]) else ["bias", "score_bias"]
    keys = ("score_type", "score_dim", "do_normalize", *bias_keys)
    settings = {key: value for key, value in settings.items() if key not in keys} | {"architectures": [architecture]}
    if not layout.is_classifier:
        settings |= {"score_type": form.score_type, "score_dim": 1, "do_normalize": form.do_normalize}
        settings |= dict.fromkeys(bias_keys, has_bias)
    elif len(settings.get("id2label", {})) != 1:
        settings |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _convert_weights(checkpoint: ScoreCheckpoint, folder: Path, layout: Layout, form: ScoreFormat) -> None:
    source, old_head = checkpoint.weights, f"{checkpoint.layout.head}."
    weight_map: dict[str, str] = {}
    total_size = 0
    for file in dict.fromkeys(source.files.values()):
        tensors = {}
        for name, tensor in source.read_file(file, [name for name in source.files if source.files[name] == file]):
            # The normalizer comes from `form`; a bias that gets here and cannot be held is zero.
            if name.startswith(_NORMALIZER) or (name == f"{old_head}bias" and layout.is_classifier):
                continue
            renamed = f"{layout.head}.{name.removeprefix(old_head)}" if name.startswith(old_head) else name
            # safetensors wants memory of its own for each; PyTorch's files share it between tied weights.
            tensors[renamed] = tensor.contiguous() if file.endswith(".safetensors") else tensor.contiguous().clone()
        if source.files[f"{old_head}weight"] == file:
            tensors |= form.normalizer
        if not tensors:
            continue
        new_file = file.replace("pytorch_model", "model").replace(".bin", ".safetensors")
        save_file(tensors, folder / new_file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, new_file)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    if source.index is not None:
        index = {"metadata": source.index.get("metadata", {}) | {"total_size": total_size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
