"""Folders of reward and cost models written, and converted between the layouts of `score_checkpoint.py`."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from repo_fast.errors import InputError, readable
from repo_fast.models.adapters import Base
from repo_fast.models.lora import merged_state, save_adapter
from repo_fast.models.model_config import restored
from repo_fast.models.score_checkpoint import (
    HEAD_FILE,
    NORMALIZER_PREFIX,
    NORMALIZERS,
    Layout,
    ScoreCheckpoint,
    ScoreFormat,
    find_layout,
    read_settings,
)
from repo_fast.models.score_model import ScoreModel
from repo_fast.models.weight_files import find_file
from repo_fast.report.folders import publish, remove

SHARD_SIZE = "5GB"
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


def check_layout(path: str, model: ScoreModel, *, score_type: Literal["reward", "cost"], layout: str) -> None:
    """Raise `InputError` where a model, once it is trained, could not be written by `save_score_model`.

    Args:
        path: Where the model is from, for the message.
        model: As it is loaded.
        score_type, layout: As for `save_score_model`.
    """
    wanted, trunk = find_layout(layout), model.trunk
    # Whatever the bias is now, training moves it.
    bias = None if model.score_head.bias is None else torch.ones(len(model.normalization))
    _written_format(path, model.format, wanted, bias, score_type)
    _architecture(type(trunk).__name__.removesuffix("Model"), wanted, trunk.config.model_type)  # type: ignore[union-attr]


def save_score_model(
    folder: Path,
    model: ScoreModel,
    state: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    *,
    score_type: Literal["reward", "cost"],
    layout: str = "score",
    heads: Mapping[str, Any] | None = None,
    base: Base | None = None,
) -> None:
    """Write a score model that Safe RLHF, or with the third layout plain transformers, loads; adapters merged, and also
    by themselves in `adapter/`, with all that it takes to score by them on their base.

    Args:
        folder: Made where it does not exist.
        model: Gives configuration and format; its parameters may be shards.
        state: Its whole weights on the CPU, by name, as `Engine.whole_state` returns them.
        tokenizer: Saved beside them.
        score_type: What the score means.
        layout: One of `LAYOUTS`, by name.
        heads: What each of several outputs was trained to call unsafe, JSON values by its name; under `score_heads`.
        base: What adapters were put into; of a model with some.

    Raises:
        InputError: The layout is not known, or cannot hold the model.
    """
    wanted, form = find_layout(layout), model.format
    trunk: Any = model.trunk
    adapted, state = state, merged_state(model, state)
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
    if not has_bias:
        head.pop("score_head.bias", None)
    tensors = inner | {name.replace("score_head", wanted.head): tensor for name, tensor in head.items()}
    tensors |= written.normalizer

    dtype = str(next(tensor.dtype for tensor in inner.values() if tensor.is_floating_point())).removeprefix("torch.")
    # Under both names: transformers 4, which Safe RLHF runs on, knows only the second.
    settings |= {"dtype": dtype, "torch_dtype": dtype}
    rope = settings.get("rope_parameters") or {}
    if "rope_theta" in rope:
        settings["rope_theta"] = rope["rope_theta"]
    pad_token_id = form.aside.get("pad_token_id")
    settings["pad_token_id"] = tokenizer.pad_token_id if pad_token_id is None else pad_token_id
    if heads:
        settings["score_heads"] = dict(heads)
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(tensors, folder, max_shard_size=SHARD_SIZE)
    folders = [folder]
    if adapted is not state:
        assert base is not None
        folders.append(folder / "adapter")
        save_adapter(folder / "adapter", model, adapted, base.path, base.fingerprint)
        values = {name: tensor.contiguous() for name, tensor in (head | dict(written.normalizer)).items()}
        save_file(values, folder / "adapter" / HEAD_FILE, metadata={"format": "pt"})
    for each in folders:
        _write_settings(each, settings, architecture, wanted, written, has_bias)
        tokenizer.save_pretrained(each)


def convert_score_model(source: str, target: Path, *, layout: str, score_type: str | None = None) -> None:
    """Write a score model's folder in another layout: names change, and no bit of a tensor does.

    The model is never built, and one weight file is in memory at a time. PyTorch's files become safetensors.

    Args:
        source: Folder or hub name.
        target: The folder to make: written aside as `target.partial`, and renamed when it is complete.
        layout: One of `LAYOUTS`, by name.
        score_type: `reward`, `cost` or `critic`, in place of what the source says; needed where it says nothing.

    Raises:
        InputError: The target is not empty, the source is no score model with all its weights, or the layout is not
            known or cannot hold it.
    """
    wanted = find_layout(layout)
    if score_type is not None and score_type not in NORMALIZERS:
        raise InputError(f"score_type is {score_type!r}, expected one of {', '.join(NORMALIZERS)}")
    if score_type is not None and wanted.is_classifier:
        raise InputError(f"score_type is {score_type!r}, expected none: the layout {layout} cannot hold one")
    with readable(target):
        used = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if used:
        raise InputError(f"the target {str(target)!r} exists, expected a new or empty folder")
    checkpoint = ScoreCheckpoint(source)
    if checkpoint.adapter is not None:
        raise InputError(f"the source {source!r} holds adapters, expected the folder of the merged model")
    stem = checkpoint.architecture.removesuffix(checkpoint.layout.suffix)
    architecture = _architecture(stem, wanted, checkpoint.config.model_type)
    _, bias = checkpoint.head()
    written = _written_format(source, checkpoint.format(), wanted, bias, score_type)
    settings = read_settings(source)

    partial = target.with_name(f"{target.name}.partial")
    try:
        remove(partial)
        partial.mkdir(parents=True)
        _write_settings(partial, settings, architecture, wanted, written, bias is not None and not wanted.is_classifier)
        _convert_weights(checkpoint, partial, wanted, written)
        for name in _OTHER_FILES:
            if found := find_file(source, name):
                shutil.copyfile(found, partial / name)
        publish(partial, target)
    except OSError as error:
        raise InputError(f"the target {str(target)!r} cannot be written: {error.strerror}") from error
    finally:
        remove(partial)


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
        if any(own != (0.0, 1.0) for own in form.normalization):
            raise InputError(f"{path!r} has do_normalize, which the layout {layout.name} cannot hold")
        return ScoreFormat(normalizer={}, names=form.names)
    score_type = score_type or form.score_type
    if score_type is None:
        raise InputError(f"{path!r} does not say its score type, expected one to be given: reward or cost")
    if form.is_normalized and score_type != form.score_type:
        raise InputError(
            f"{path!r} has do_normalize as a {form.score_type} model: with score type {score_type!r} the same "
            "normalizer would give other scores"
        )
    return ScoreFormat(score_type, form.do_normalize, form.normalizer, names=form.names)


def _has_own_bias(model_type: str) -> bool:
    """Whether the architecture has a setting `bias` of its own, about its linear layers (Falcon)."""
    return hasattr(CONFIG_MAPPING[model_type](), "bias")


def _write_settings(
    folder: Path, settings: dict, architecture: str, layout: Layout, form: ScoreFormat, has_bias: bool
) -> None:
    bias_keys = ["score_bias"] if _has_own_bias(settings["model_type"]) else ["bias", "score_bias"]
    keys = ("score_type", "score_dim", "score_names", "do_normalize", *bias_keys)
    settings = {key: value for key, value in settings.items() if key not in keys} | {"architectures": [architecture]}
    if not layout.is_classifier:
        settings |= {"score_type": form.score_type, "do_normalize": form.do_normalize}
        settings |= {"score_dim": max(1, len(form.names))} | ({"score_names": form.names} if form.names else {})
        settings |= dict.fromkeys(bias_keys, has_bias)
    else:
        names = form.names or ("LABEL_0",)
        labels = {str(i): name for i, name in enumerate(names)}
        if form.names or len(settings.get("id2label", {})) != 1:
            settings |= {"id2label": labels, "label2id": {name: i for i, name in enumerate(names)}}
        if len(form.names) > 1:
            # Each output is a score of its own: Hugging Face's pipelines would take a softmax over them.
            settings |= {"problem_type": "multi_label_classification"}
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _convert_weights(checkpoint: ScoreCheckpoint, folder: Path, layout: Layout, form: ScoreFormat) -> None:
    source, old_head = checkpoint.weights, f"{checkpoint.layout.head}."
    weight_map: dict[str, str] = {}
    total_size = 0
    for file in dict.fromkeys(source.files.values()):
        tensors = {}
        for name, tensor in source.read_file(file, [name for name in source.files if source.files[name] == file]):
            # The normalizer comes from `form`; a bias that gets here and cannot be held is zero.
            if name.startswith(NORMALIZER_PREFIX) or (name == f"{old_head}bias" and layout.is_classifier):
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
