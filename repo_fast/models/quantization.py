"""4-bit bases: frozen weights as NF4 (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314), by bitsandbytes.

Quantised are the linear layers in the blocks, which hold most of a model, and which adapters go into. The head stays as
it is, because the fused losses multiply by its weight; embeddings do, because a row of them is looked up, and because a
tied head is one; norms and biases are small, and a score head is one row or a few.

The scales of the blocks are not quantised in turn ("double quantisation"): of a 7B model that would save 0.3 GB, for
another rounding, and another product in every forward.

transformers quantises while it reads, a tensor at a time: the whole model never exists in full precision. Under ZeRO-3
each rank holds all of the 4-bit weights until its engine has split them.
"""

import contextlib
import importlib.util
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed as integration

from repo_fast.errors import InputError
from repo_fast.models.blocks import linear_layers, parameter_sizes

_log = logging.getLogger(__name__)

BLOCK = 64
"""Numbers of a weight that share a scale."""


def check_installed(path: str) -> None:
    """Raise `InputError` where bitsandbytes is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"quantize is nf4 for {path!r}, and bitsandbytes is not installed: expected pip install repo_fast[quantize]"
        )


def check_plain(path: str, config: PretrainedConfig, quantize: str | None) -> None:
    """Raise `InputError` where a folder's weights are quantised already, and are to be, or are by bitsandbytes.

    Its layers as they come from such a folder have what `Nf4Linear.take_over` takes from them.
    """
    if (already := getattr(config, "quantization_config", None)) is None:
        return
    method = already.get("quant_method") if isinstance(already, dict) else already.quant_method
    if quantize is not None or "bitsandbytes" in str(method):
        raise InputError(
            f"{path!r} is quantised already ({method}), expected plain weights, which quantize holds in 4 bits"
        )


def loading_quantized(on_paper: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is told, so that it quantises as it loads.

    Args:
        on_paper: The model, built without values.
        dtype: In which its layers compute.

    Raises:
        InputError: It has no linear layers in its blocks.
    """
    chosen = "|".join(map(re.escape, linear_layers(on_paper)))
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=False,
        # A pattern that all other layers match, to their end: newer versions ask for that.
        llm_int8_skip_modules=[f"(?!(?:{chosen})$).*"],
    )
    return {"quantization_config": settings}


@contextlib.contextmanager
def whole_loading() -> Iterator[None]:
    """While this is open, a model is loaded whole also where others are loaded into shards: its engine splits it."""
    before = integration._hf_deepspeed_config_weak_ref
    integration._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = before


def settle_quantized(path: str, model: PreTrainedModel) -> None:
    """Make a model that was just quantised one that trains, and is saved, as a plain one does.

    Args:
        path: Folder or hub name, for the line that says how much of it is quantised.
        model: As transformers loaded it.
    """
    from bitsandbytes.nn import Linear4bit

    from repo_fast.models.nf4 import Nf4Linear

    for layer in list(model.modules()):
        if isinstance(layer, Linear4bit):
            Nf4Linear.take_over(layer)
    # What is written of it is plain weights, so nothing may say otherwise; nor does peft need its layers of another
    # kind, whose output is copied.
    del model.hf_quantizer, model.config.quantization_config
    # Not every version of transformers leaves all of them.
    for mark in ("is_loaded_in_4bit", "is_4bit_serializable", "is_quantized", "quantization_method"):
        vars(model).pop(mark, None)
    everything = sum(size for size, _ in parameter_sizes(model))
    share = quantized_size(model) / everything
    _log.info("%s: %.1f %% of %s parameters in 4 bits (nf4)", path, 100 * share, f"{everything:,}")


def say_dequantized(folder: Path, model: nn.Module) -> None:
    """Log that what is written of a quantised model is numbers of its dtype again; nothing of another model."""
    if quantized_size(model):
        _log.info(
            "%s is written dequantised, with the adapters merged: the base that they were trained beside in 4 bits, in "
            "full size. adapter/ alone computes the same only beside that base",
            folder,
        )


def quantized_size(model: nn.Module) -> int:
    """How many numbers of a model are held in 4 bits."""
    return sum(layer.in_features * layer.out_features for layer in model.modules() if hasattr(layer, "unpacked"))
