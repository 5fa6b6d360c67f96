"""LoRA: a frozen transformer with small trained matrices beside its linear layers, W + (alpha / rank) B A.

(Hu et al. 2021, https://arxiv.org/abs/2106.09685.) peft's layers are injected in place, without its wrapper: the module
keeps its class and its attributes, and all that is particular here reads or sets those layers. What follows from it:

- *The reference is the policy with its adapters off*: the frozen weights are the start's to the last bit, so no second
  copy is needed. `adapters_off` switches that way around a forward, in any ZeRO stage.
- *Two forms to save.* `merged_state` gives the weights of a model that never had adapters, `save_adapter` peft's
  folder, which is small and needs the base model beside it; `adapters.py` reads it again.

The adapters are made before DeepSpeed starts, also beside weights that are ZeRO-3 shards already: they are plain
parameters then, which DeepSpeed shards with the first rank's values. They have the dtype of the weights beside them,
because DeepSpeed trains one dtype; it keeps float32 masters.
"""

import contextlib
import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from repo_fast.errors import InputError
from repo_fast.models.blocks import linear_layers, parameter_sizes
from repo_fast.models.quantization import quantized_size

# peft's name for an adapter that is given none: its loaders look for this one.
_ADAPTER = "default"
# What of a layer makes its merged weight: W, A, B.
_MERGED = ("base_layer.weight", f"lora_A.{_ADAPTER}.weight", f"lora_B.{_ADAPTER}.weight")
ADAPTER_FILE = "adapter_model.safetensors"
# In the metadata of that file.
BASE_FINGERPRINT = "base_fingerprint"
"""`Checkpoint.fingerprint` of the base."""
BASE_QUANTIZE = "base_quantize"
"""How the base was quantised; not there where it was not."""


def add_lora(transformer: nn.Module, *, rank: int, alpha: float, targets: Sequence[str] = ()) -> None:
    """Freeze a transformer and put adapters into its linear layers, in place; before DeepSpeed starts.

    A starts as peft draws it, from torch's global random state, B at 0: at first nothing is changed. Frozen adapters
    that are there already (`adapters.put_adapter`) stay, and are added to.

    Args:
        transformer: The Hugging Face model, of a `Policy` or a `ScoreModel`; its parameters may be shards.
        rank: Of B A.
        alpha: The adapter's output is scaled by alpha / rank.
        targets: Names of linear layers inside a transformer block, such as `q_proj`; empty for all of them. Head and
            embeddings never get an adapter.

    Raises:
        InputError: A rank or alpha that is not positive, or a target that is no linear layer of a block.
    """
    # Here, so that a run without adapters does not load peft.
    from peft import LoraConfig, inject_adapter_in_model

    if rank < 1:
        raise InputError(f"the LoRA rank is {rank}, expected at least 1")
    if not alpha > 0:
        raise InputError(f"the LoRA alpha is {alpha}, expected more than 0")
    layers = linear_layers(transformer)
    inside = dict.fromkeys(map(_leaf, layers))
    for target in targets:
        if target not in inside:
            raise InputError(f"the LoRA target {target!r} is no linear layer, expected some of: {', '.join(inside)}")
    chosen = list(targets or inside)
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    outside = [name for name in linear if name not in layers and _leaf(name) in chosen]
    generates = transformer.can_generate() if hasattr(transformer, "can_generate") else False
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=chosen,
        exclude_modules=outside or None,
        task_type="CAUSAL_LM" if generates else None,
    )
    before = {layer: list(layer.active_adapters) for layer in transformer.modules() if hasattr(layer, "lora_A")}
    with warnings.catch_warnings():
        # It is meant that there are others.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, transformer, _ADAPTER)
    for layer, active in before.items():
        # peft has switched them over.
        layer._active_adapter = [*active, _ADAPTER]
    for _, layer in _lora_layers(transformer):
        # peft takes the dtype of a weight beside it, where that has one to compute in.
        if (dtype := getattr(layer.base_layer, "compute_dtype", None)) is not None:
            layer.lora_A.to(dtype)
            layer.lora_B.to(dtype)


def has_adapters(module: nn.Module) -> bool:
    """Whether `add_lora` was called on a transformer in it."""
    return next(_lora_layers(module), None) is not None


@contextlib.contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """While this is open, the module computes what it would without adapters: the base model's own bits.

    Only forwards without gradients belong here: a backward after it, with activation checkpointing, would compute
    them again with the adapters on.

    Args:
        module: Whatever holds the adapters: `Engine.module`, also while it is gathered; all ranks alike.
    """
    layers = [layer for _, layer in _lora_layers(module)]
    before = [layer._disable_adapters for layer in layers]
    # peft's `enable_adapters` would also take the gradients from the adapters, which DeepSpeed has arranged for.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def merged_state(module: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the model without adapters that computes what this one does with them.

    Args:
        module: The one that `state` is of.
        state: Its whole weights on the CPU, by name, as `Engine.whole_state` gives them; left as it is.

    Returns:
        What `merged_one_by_one` gives; `state` itself where there are no adapters, and on ranks where it is empty.
    """
    return dict(merged_one_by_one(module, state.items())) if state and has_adapters(module) else state


def merged_one_by_one(
    module: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same of weights that come one by one: a layer's is formed as soon as its A and B are there, in new memory.

    Args:
        module: The one that the weights are of; its own parameters may be shards.
        weights: Name and whole weight of each, as `Engine.weights_one_by_one` gives them. Of one layer at a time, base
            weight and adapter are held.

    Yields:
        W + (alpha / rank) B A under W's plain name and in its dtype, summed in float32 and rounded once, and all other
        weights as they are.
    """
    scalings = {f"{name}.": layer.scaling[_ADAPTER] for name, layer in _lora_layers(module)}
    if any(hasattr(layer, "lora_A") and [*layer.lora_A] != [_ADAPTER] for layer in module.modules()):
        raise ValueError(f"{type(module).__name__} has frozen adapters, which are not merged")
    held: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in weights:
        layer = next((prefix for prefix in _prefixes(name) if prefix in scalings), None)
        if layer is None:
            yield name, value
            continue
        parts = held.setdefault(layer, {})
        parts[name.removeprefix(layer)] = value
        if all(part in parts for part in _MERGED):
            del held[layer]
            weight, a, b = (parts[part] for part in _MERGED)
            parts[_MERGED[0]] = merged_weight(weight, a, b, scalings[layer])
            del weight, a, b
            yield from _base_parts(layer, parts)
    if held:
        raise ValueError(f"of {next(iter(held))[:-1]} and its adapter some weights are missing")


def base_one_by_one(
    module: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same of the model that the adapters were put into: its own weights, under plain names."""
    layers = {f"{name}." for name, _ in _lora_layers(module)}
    for name, value in weights:
        layer = next((prefix for prefix in _prefixes(name) if prefix in layers), "")
        yield from _base_parts(layer, {name.removeprefix(layer): value}) if layer else [(name, value)]


def _base_parts(layer: str, parts: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Of an adapted layer's weights its base's, under the names that they have without adapters."""
    inside = "base_layer."
    return ((layer + part.removeprefix(inside), value) for part, value in parts.items() if part.startswith(inside))


@dataclass(frozen=True)
class AdapterShape:
    """What an adapter is made of, besides its weights.

    Attributes:
        rank: Of B A.
        alpha: The adapter's output is scaled by alpha / rank.
        targets: Names of the linear layers that have one, such as `q_proj`, in alphabetic order.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]


def adapter_shape(module: nn.Module) -> AdapterShape:
    """That of the adapters of a module, which has some."""
    config = _adapted(module)[1].peft_config[_ADAPTER]
    return AdapterShape(config.r, config.lora_alpha, tuple(sorted(config.target_modules)))


def of_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's A or B."""
    return name.endswith(tuple(f".{part}" for part in _MERGED[1:]))


def merged_weight(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """W + scaling B A, [out, in], summed in float32 and rounded once to W's dtype."""
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scaling).to(weight.dtype)


def adapter_state(module: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapters' weights of `state` (see `merged_state`) under the names that peft's files have."""
    prefix, _ = _adapted(module)
    return {
        f"base_model.model.{name.removeprefix(prefix).removesuffix(f'.{_ADAPTER}.weight')}.weight": value
        for name, value in state.items()
        if of_adapter(name)
    }


def named_from_anywhere(path: str) -> str:
    """A folder or hub name, such that it is found from other working directories too."""
    folder = Path(path).expanduser()
    return str(folder.absolute()) if folder.is_dir() else path


def save_adapter(
    folder: Path, module: nn.Module, state: dict[str, torch.Tensor], base_path: str, base_fingerprint: str | None = None
) -> None:
    """Write the adapters as peft does: `PeftModel.from_pretrained(base, folder)` computes what the module does.

    The base is what the adapters were put into: `AutoModelForCausalLM` of a policy's folder, `AutoModel` of a score
    model's, whose head and settings `save_score_model` writes beside. Rows that were added to a vocabulary are frozen
    and no part of the folder: the tokens that the base lacks stay unknown to peft. Adapters that were trained beside a
    quantised base compute the same only beside that; the metadata of `adapter_model.safetensors`, which cannot be
    parted from them, says so.

    Args:
        folder: Made if need be. For the first rank to call.
        module: A `Policy` or `ScoreModel` with adapters.
        state: Its whole weights on the CPU, by name.
        base_path: Folder or hub name of the base model, noted in `adapter_config.json`.
        base_fingerprint: Of its weights, noted there too; None: not noted.
    """
    _, transformer = _adapted(module)
    config = copy.copy(transformer.peft_config[_ADAPTER])
    config.base_model_name_or_path = named_from_anywhere(base_path)
    config.inference_mode = True
    # peft keeps a set, whose order would change from run to run.
    config.target_modules = sorted(config.target_modules)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    tensors = {name: value.contiguous() for name, value in adapter_state(module, state).items()}
    noted = {} if base_fingerprint is None else {BASE_FINGERPRINT: base_fingerprint}
    if quantized_size(module):
        noted[BASE_QUANTIZE] = "nf4"
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt", **noted})


def describe(module: nn.Module) -> str:
    """How much of a model is trained, on one line; its parameters may be shards."""
    sizes = list(parameter_sizes(module))
    everything, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    counts = f"{trained:,} of {everything:,} parameters trained ({100 * trained / everything:.1f} %)"
    layers = list(_lora_layers(module))
    return f"LoRA rank {layers[0][1].r[_ADAPTER]} on {len(layers)} layers: {counts}" if layers else counts


def _lora_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers that have an adapter of `add_lora`, by name. They are told by what is used of them, so that a run without
    adapters needs no peft."""
    return ((name, layer) for name, layer in module.named_modules() if _ADAPTER in getattr(layer, "lora_A", ()))


def _adapted(module: nn.Module) -> tuple[str, nn.Module]:
    """The transformer inside that `add_lora` was given, and what its parameters' names begin with."""
    for name, inner in module.named_modules():
        if hasattr(inner, "peft_config"):
            return (f"{name}." if name else ""), inner
    raise ValueError(f"{type(module).__name__} has no adapters")


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _prefixes(name: str) -> Iterator[str]:
    """`a.`, `a.b.`, ... of a dotted name."""
    for position, letter in enumerate(name):
        if letter == ".":
            yield name[: position + 1]
