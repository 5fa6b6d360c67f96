"""LoRA: a frozen transformer with small trained matrices beside its linear layers, W + (alpha / rank) B A.

(Hu et al. 2021, https://arxiv.org/abs/2106.09685.) peft's layers are injected in place, without its wrapper: the module
keeps its class and its attributes, and all that is particular here reads or sets those layers. What follows from it:

- *The reference is the policy with its adapters off*: the frozen weights are the start's to the last bit, so no second
  copy is needed. `adapters_off` switches that way around a forward, in any ZeRO stage.
- *Two forms to save.* `merged_state` gives the weights of a model that never had adapters, `save_adapter` peft's
  folder, which is small and needs the base model beside it.

The adapters are made before DeepSpeed starts, also beside weights that are ZeRO-3 shards already: they are plain
parameters then, which DeepSpeed shards with the first rank's values. They have the dtype of the weights beside them,
because DeepSpeed trains one dtype; it keeps float32 masters.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from repo_fast.errors import InputError
from repo_fast.models.blocks import linear_layers, parameter_sizes

# peft's name for an adapter that is given none: its loaders look for this one.
_ADAPTER = "default"
HEAD_FILE = "score_head.safetensors"


def add_lora(transformer: nn.Module, *, rank: int, alpha: float, targets: Sequence[str] = ()) -> None:
    """Freeze a transformer and put adapters into its linear layers, in place; before DeepSpeed starts.

    A starts as peft draws it, from torch's global random state, B at 0: at first nothing is changed.

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
    inject_adapter_in_model(config, transformer, _ADAPTER)
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
        W + (alpha / rank) B A under W's plain name and in its dtype, summed in float32 and rounded once, and all other
        weights as they are; `state` itself where there are no adapters, and on ranks where it is empty.
    """
    scalings = {f"{name}.": layer.scaling[_ADAPTER] for name, layer in _lora_layers(module)}
    if not scalings or not state:
        return state
    merged = {}
    for name, value in state.items():
        layer = next((prefix for prefix in _prefixes(name) if prefix in scalings), None)
        if layer is None:
            merged[name] = value
        elif name == f"{layer}base_layer.weight":
            a, b = (state[f"{layer}lora_{part}.{_ADAPTER}.weight"].float() for part in "AB")
            merged[f"{layer}weight"] = torch.addmm(value.float(), b, a, alpha=scalings[layer]).to(value.dtype)
        elif name.startswith(f"{layer}base_layer."):
            merged[layer + name.removeprefix(f"{layer}base_layer.")] = value
    return merged


def adapter_state(module: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapters' weights of `state` (see `merged_state`) under the names that peft's files have."""
    prefix, _ = _adapted(module)
    ending = f".{_ADAPTER}.weight"
    return {
        f"base_model.model.{name.removeprefix(prefix).removesuffix(ending)}.weight": value
        for name, value in state.items()
        if name.endswith((f".lora_A{ending}", f".lora_B{ending}"))
    }


def save_adapter(folder: Path, module: nn.Module, state: dict[str, torch.Tensor], base_path: str) -> None:
    """Write the adapters as peft does: `PeftModel.from_pretrained(base, folder)` computes what the module does.

    The base is what the adapters were put into: `AutoModelForCausalLM` of a policy's folder, `AutoModel` of a score
    model's. A score model's trained head is no part of peft's format, and is written beside, in
    `score_head.safetensors`, as `score_head.weight` (and `score_head.bias`). Rows that were added to a vocabulary are
    frozen and no part of the folder either: the tokens that the base lacks stay unknown to it. Adapters that were
    trained beside a quantised base compute the same only beside that.

    Args:
        folder: Made if need be. For the first rank to call.
        module: A `Policy` or `ScoreModel` with adapters.
        state: Its whole weights on the CPU, by name.
        base_path: Folder or hub name of the base model, noted in `adapter_config.json`.
    """
    prefix, transformer = _adapted(module)
    config = copy.copy(transformer.peft_config[_ADAPTER])
    config.base_model_name_or_path = base_path
    config.inference_mode = True
    # peft keeps a set, whose order would change from run to run.
    config.target_modules = sorted(config.target_modules)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    tensors = {name: value.contiguous() for name, value in adapter_state(module, state).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    head = {name: value.contiguous() for name, value in state.items() if not name.startswith(prefix)}
    if head:
        save_file(head, folder / HEAD_FILE, metadata={"format": "pt"})


def describe(module: nn.Module) -> str:
    """How much of a model is trained, on one line; its parameters may be shards."""
    sizes = list(parameter_sizes(module))
    everything, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    counts = f"{trained:,} of {everything:,} parameters trained ({100 * trained / everything:.1f} %)"
    layers = list(_lora_layers(module))
    return f"LoRA rank {layers[0][1].r[_ADAPTER]} on {len(layers)} layers: {counts}" if layers else counts


def _lora_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Adapted layers by name. They are told by what is used of them, so that a run without adapters needs no peft."""
    return ((name, layer) for name, layer in module.named_modules() if hasattr(layer, "lora_A"))


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
