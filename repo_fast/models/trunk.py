"""What every transformer trunk needs before it is trained or scored here, whatever head it carries."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from repo_fast.errors import InputError, first_line


def load_config(path: str) -> PretrainedConfig:
    """A model folder's configuration, without its pad token: under ZeRO-3 an embedding with one cannot be built.

    Raises:
        InputError: There is no readable model configuration at `path`.
    """
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path!r} is not a Hugging Face model folder or hub name: {first_line(error)}") from error
    config.pad_token_id = None
    return config


def disable_dropout(module: nn.Module) -> None:
    """Switch dropout off in every layer: new and old probabilities, and values, must differ by the update alone."""
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        if isinstance(getattr(layer, "attention_dropout", None), float):
            layer.attention_dropout = 0.0  # type: ignore[assignment]


def train_last_layers(transformer: nn.Module, layers: int) -> None:
    """Freeze all of a Hugging Face model but its last transformer layers and the final norm.

    Raises:
        InputError: The model has fewer layers.
    """
    blocks = next(module for module in transformer.modules() if isinstance(module, nn.ModuleList))
    if layers > len(blocks):
        raise InputError(f"trainable_layers is {layers}, expected at most the model's {len(blocks)} layers")
    transformer.requires_grad_(False)
    for block in blocks[-layers:]:
        block.requires_grad_(True)
    for name, module in transformer.base_model.named_children():
        if "norm" in name:
            module.requires_grad_(True)


@torch.no_grad()
def check_packing(run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], name: str, device: torch.device) -> None:
    """Make sure that what is computed of a sequence does not depend on what is packed before it.

    transformers keeps packed sequences apart by their restarting positions, but only in trunks that attend by
    position, not in ALiBi or recurrent ones. Runs the model twice, on every rank alike.

    Args:
        run: Maps input_ids and position_ids, int64 [1, 6] each, to a float at the last position.
        name: For the message.
        device: Where the inputs go.

    Raises:
        InputError: It depends on the company.
    """
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1]], device=device)
    first, second = (
        float(run(torch.tensor([[*company, 1, 2]], device=device), position_ids))
        for company in ([0, 1, 2, 3], [3, 3, 3, 3])
    )
    # The rows differ in the company alone: an untouched value keeps its bits, up to the kernel's order of summation.
    if abs(first - second) > 1e-3 * max(1.0, abs(first)):
        raise InputError(
            f"{name} cannot be run packed: its architecture lets sequences of one row see each other "
            f"(a value moved from {first:.4g} to {second:.4g})"
        )
