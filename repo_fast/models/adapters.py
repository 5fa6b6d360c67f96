"""Folders of adapters (peft's format) read, and put onto the base that they were trained on.

What `lora.save_adapter` writes is small and computes nothing without its base, the folder or hub name that peft's
`adapter_config.json` has as `base_model_name_or_path`. On another base, of the same shapes, the numbers would be wrong
without a word; so the folder says by a fingerprint which weights it was trained on, all of them, and other ones are
refused. A base that was moved is named anew in that file; the fingerprint says whether it is the same.

There are two ways to use a folder. A model that is loaded alone gets its adapters merged into its weights
(`merge_adapter`): it computes what the merged folder does, to the last bit in the dtype that it was trained in, and no
slower. One whose weights others have too, or are in 4 bits, keeps them beside its weights (`put_adapter`), which then
are those of the base; it computes the same but for rounding.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from repo_fast.engine import whole_parameters
from repo_fast.errors import InputError, first_line
from repo_fast.models.lora import ADAPTER_FILE, BASE_FINGERPRINT, BASE_QUANTIZE, merged_weight, named_from_anywhere
from repo_fast.models.weight_files import WEIGHT_FILES, Checkpoint, find_file

CONFIG_FILE = "adapter_config.json"
# peft's name for adapters that are kept as they are; `add_lora` may put others beside them.
_FROZEN = "frozen"
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# What `add_lora` sets, what says nothing of what is computed once training is over, and peft's defaults of what is only
# read beside other settings. Any other setting, if it is not off, would change what the adapters compute.
_KNOWN = {
    *("peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "task_type", "base_model_name_or_path"),
    *("inference_mode", "init_lora_weights", "lora_dropout", "peft_version", "megatron_core", "qalora_group_size"),
}


@dataclass(frozen=True)
class Base:
    """The model that adapters are put into.

    Attributes:
        path: Its folder, absolute, or hub name.
        fingerprint: Of its weights (`Checkpoint.fingerprint`).
    """

    path: str
    fingerprint: str

    @classmethod
    def of(cls, path: str) -> "Base":
        """That at a path, as options name it; its weights are read.

        Raises:
            InputError: They cannot be.
        """
        return cls(named_from_anywhere(path), Checkpoint(path).fingerprint())


@dataclass(frozen=True, eq=False)
class Adapter:
    """What a folder of adapters holds.

    Attributes:
        path: The folder or hub name.
        base: What they were trained on.
        quantize: How the base was quantised while they were trained; None: it was not.
        rank, alpha: As in `add_lora`.
        pairs: A [rank, in] and B [out, rank] of each linear layer, CPU, in the file's dtype, by the layer's name in the
            transformer that they were put into.
    """

    path: str
    base: Base
    quantize: str | None
    rank: int
    alpha: float
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    @property
    def scaling(self) -> float:
        """What multiplies B A."""
        return self.alpha / self.rank

    def check_base(self) -> None:
        """Raise `InputError` where the base is not there, or is not what the adapters were trained on."""
        rename = f"another path of it may be named as base_model_name_or_path in {CONFIG_FILE}"
        if Path(self.base.path).is_absolute() and not Path(self.base.path).is_dir():
            raise InputError(f"{self.path!r} needs its base {self.base.path!r}: it is no folder; {rename}")
        try:
            found = Checkpoint(self.base.path).fingerprint()
        except InputError as error:
            raise InputError(f"{self.path!r} needs its base {self.base.path!r}: {error}; {rename}") from error
        if found != self.base.fingerprint:
            raise InputError(
                f"{self.path!r} was trained on other weights than its base {self.base.path!r} has: fingerprint "
                f"{found:.12}, expected {self.base.fingerprint:.12}; {rename}"
            )


def is_adapter(path: str) -> bool:
    """Whether a folder or hub name holds adapters, and not the weights of a model."""
    files = (f"{name}{ending}" for name in WEIGHT_FILES for ending in ("", ".index.json"))
    return find_file(path, CONFIG_FILE) is not None and not any(find_file(path, file) for file in files)


def read_adapter(path: str) -> Adapter:
    """Read a folder of adapters; of its base, nothing.

    Args:
        path: Folder or hub name.

    Raises:
        InputError: It is not one that `save_adapter` wrote: a file or the base's fingerprint is missing, or peft was
            told more than a rank, an alpha and targets.
    """
    settings = _read_settings(path)
    for name, value in settings.items():
        if name not in _KNOWN and value and (name, value) != ("bias", "none"):
            raise InputError(
                f"the adapters of {path!r} have {name} {value!r}, expected plain LoRA, as repo_fast writes it"
            )
    kind, rank, alpha = (settings.get(key) for key in ("peft_type", "r", "lora_alpha"))
    base = settings.get("base_model_name_or_path")
    valid = kind == "LORA" and type(rank) is int and rank > 0 and type(alpha) in (int, float) and 0 < alpha < math.inf
    if not valid or not isinstance(base, str):
        raise InputError(
            f"the {CONFIG_FILE} of {path!r} has peft_type {kind!r}, r {rank!r}, lora_alpha {alpha!r}, "
            f"base_model_name_or_path {base!r}, expected LORA, two numbers above 0 and a path"
        )
    found = find_file(path, ADAPTER_FILE)
    if found is None:
        raise InputError(f"{path!r} has no {ADAPTER_FILE}, expected the adapters that its {CONFIG_FILE} is about")
    try:
        with safe_open(found, framework="pt") as file:
            noted = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"the {ADAPTER_FILE} of {path!r} cannot be read: {first_line(error)}") from error
    if (fingerprint := noted.get(BASE_FINGERPRINT)) is None:
        raise InputError(
            f"the {ADAPTER_FILE} of {path!r} lacks {BASE_FINGERPRINT}, which says what weights it was trained on, and "
            "which earlier versions and other programs leave out; expected the folder of the merged model"
        )
    pairs = _pairs(path, rank, tensors)
    return Adapter(path, Base(base, fingerprint), noted.get(BASE_QUANTIZE), rank, float(alpha), pairs)


def _read_settings(path: str) -> dict[str, Any]:
    try:
        settings = json.loads(Path(str(find_file(path, CONFIG_FILE))).read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it is no mapping")
    except (OSError, ValueError) as error:
        raise InputError(f"the {CONFIG_FILE} of {path!r} cannot be read: {first_line(error)}") from error
    return settings


def _pairs(path: str, rank: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if (match := _TENSOR.fullmatch(name)) is None:
            raise InputError(
                f"the {ADAPTER_FILE} of {path!r} has {name}, expected LoRA matrices of linear layers alone"
            )
        parts.setdefault(match[1], {})[match[2]] = tensor
    for name, own in parts.items():
        shapes = {part: list(tensor.shape) for part, tensor in sorted(own.items())}
        if own.keys() != {"A", "B"} or len(shapes["A"]) != 2 or shapes["A"][0] != rank or shapes["B"][1:] != [rank]:
            expected = f"A [{rank}, in] and B [out, {rank}]"
            raise InputError(f"the adapter of {name} in {path!r} has {shapes}, expected {expected}")
    if not parts:
        raise InputError(f"the {ADAPTER_FILE} of {path!r} is empty, expected adapters")
    return {name: (own["A"], own["B"]) for name, own in parts.items()}


@torch.no_grad()
def merge_adapter(transformer: nn.Module, adapter: Adapter) -> None:
    """Add adapters to the weights of a model, in place; before DeepSpeed starts. All ranks must call it.

    Args:
        transformer: What they were trained on; its parameters may be shards.
        adapter: Of the folder.

    Raises:
        InputError: They are not of its layers.
    """
    layers = _layers(transformer, adapter)
    for name, (a, b) in adapter.pairs.items():
        weight = layers[name].weight
        with whole_parameters([weight], changed=True):
            weight.copy_(merged_weight(weight, a.to(weight.device), b.to(weight.device), adapter.scaling))


def put_adapter(transformer: nn.Module, adapter: Adapter) -> None:
    """Put adapters beside the weights of a model, in place, and freeze all of it.

    They are in the dtype that the layers compute in, and stay as they are where `add_lora` puts others beside them.

    Args:
        transformer: What they were trained on, quantised or not; without adapters. Its parameters may be shards.
        adapter: Of the folder.

    Raises:
        InputError: They are not of its layers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers = _layers(transformer, adapter)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        target_modules=sorted(layers),
        inference_mode=True,
    )
    # Without values at first: peft would draw some, from torch's global random state.
    inject_adapter_in_model(config, transformer, _FROZEN, low_cpu_mem_usage=True)
    for name, pair in adapter.pairs.items():
        layer: Any = transformer.get_submodule(name)
        weight = layers[name].weight
        dtype = getattr(layers[name], "compute_dtype", None) or weight.dtype
        for parts, value in zip((layer.lora_A, layer.lora_B), pair, strict=True):
            parts[_FROZEN].weight = nn.Parameter(value.to(weight.device, dtype), requires_grad=False)
    transformer.requires_grad_(False)


def _layers(transformer: nn.Module, adapter: Adapter) -> dict[str, Any]:
    """The linear layers that adapters are of."""
    layers = {}
    modules = dict(transformer.named_modules())
    for name, (a, b) in adapter.pairs.items():
        layer = modules.get(name)
        # That of the weight would be a shard's, or that of packed bytes.
        shape = [layer.out_features, layer.in_features] if isinstance(layer, nn.Linear) else None
        expected = [b.shape[0], a.shape[1]]
        if shape != expected:
            found = "there is no such linear layer" if shape is None else f"its weight is of shape {shape}"
            raise InputError(
                f"{adapter.path!r} has an adapter of {name}: in {type(transformer).__name__} {found}, expected "
                f"{expected}"
            )
        layers[name] = layer
    return layers
