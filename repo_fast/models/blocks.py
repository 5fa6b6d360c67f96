"""The linear layers in a transformer's blocks: what adapters are put into, and what is quantised."""

from collections.abc import Iterator

from torch import nn

from repo_fast.errors import InputError


def linear_layers(transformer: nn.Module) -> list[str]:
    """Names of the linear layers of a Hugging Face model's blocks, in its order; head and embeddings are none of them.

    One that has adapters is one as before; what was put into it is none.

    Args:
        transformer: May be on paper; its parameters may be shards.

    Raises:
        InputError: There are none.
    """
    modules = list(transformer.named_modules())
    blocks = next((f"{name}." for name, module in modules if isinstance(module, nn.ModuleList)), "")
    adapted = tuple(f"{name}." for name, module in modules if hasattr(module, "lora_A"))
    found = [
        name
        for name, module in modules
        if isinstance(module.get_base_layer() if hasattr(module, "lora_A") else module, nn.Linear)
        and not name.startswith(adapted)
        and blocks
        and name.startswith(blocks)
    ]
    if not found:
        raise InputError(f"{type(transformer).__name__} has no linear layers in its blocks, expected some to adapt")
    return found


def parameter_sizes(module: nn.Module) -> Iterator[tuple[int, bool]]:
    """How many numbers each parameter of a model stands for, and whether it is trained.

    A shard stands for the whole, and the bytes of a quantised weight for twice as many numbers.

    Args:
        module: Its parameters may be shards, quantised, or on paper.
    """
    seen = set()
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                packed = name == "weight" and hasattr(layer, "unpacked")
                size = layer.in_features * layer.out_features if packed else getattr(parameter, "ds_numel", None)
                yield parameter.numel() if size is None else int(size), parameter.requires_grad
