"""What every transformer trunk needs before it is trained or scored here, whatever head it carries."""

import contextlib
import copy
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import local_torch_dtype
from transformers.utils import logging as transformers_logging

from repo_fast.errors import InputError
from repo_fast.models.model_config import is_dropout, load_config
from repo_fast.models.on_paper import PASSED_OVER, built_at, first_attention
from repo_fast.models.quantization import (
    check_installed,
    check_plain,
    loading_quantized,
    settle_quantized,
    whole_loading,
)
from repo_fast.models.weight_files import Checkpoint

# An ImportError is of a package that a quantised model needs.
_CANNOT_LOAD = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError, pickle.UnpicklingError)
# What mixtures of experts multiply their inputs by while they train, by the name of the layer's attribute.
_ROUTER_NOISE = {"jitter_noise": 0.0, "input_jitter_noise": 0.0, "moe_jitter_eps": None}


def disable_dropout(module: nn.Module) -> None:
    """Switch dropout and routers' noise off: new and old probabilities, and values, must differ by the update alone.

    Some architectures hold dropout in modules, some in plain numbers of their layers, some read the configuration in
    their forward. What still draws random numbers is found by `settle_packing`.
    """
    for layer in module.modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd):
            layer.p = 0.0
        for holder in (layer, getattr(layer, "config", None)):
            for name, value in vars(holder).items() if holder is not None else ():
                if is_dropout(name, value):
                    setattr(holder, name, 0.0)
        for name, neutral in _ROUTER_NOISE.items():
            if hasattr(layer, name):
                setattr(layer, name, neutral)


def load_transformer(
    kind: type,
    path: str,
    what: str,
    *,
    dtype: torch.dtype,
    config: PretrainedConfig | None = None,
    attention: str | Sequence[str] | None = None,
    quantize: str | None = None,
) -> Any:
    """Load a Hugging Face model with all its weights; under ZeRO-3 loading, straight into shards, unless quantised.

    transformers only warns of a weight that it does not find, and draws a random one; of one that it has no place for,
    it says little more.

    Args:
        kind: The `AutoModel...` class.
        path: Folder or hub name.
        what: The kind of model, for messages.
        dtype: Of weights and activations.
        config: Its configuration; None: the folder's as it is.
        attention: Name of a transformers attention implementation, or several: the first that the architecture can
            run. None: what transformers takes.
        quantize: `nf4`: the linear layers of its blocks are quantised on the way (`models/quantization.py`). None: not.

    Raises:
        InputError: The folder cannot be read, or lacks a weight of the architecture, has one of another shape, or one
            of a module of the architecture that the configuration leaves out. It is to be quantised, and bitsandbytes
            is missing, or its weights are quantised already, or it has no linear layers in blocks.
    """
    settings = config or load_config(path)
    check_plain(path, settings, quantize)
    if quantize is not None:
        check_installed(path)
    options: dict[str, Any] = {} if config is None else {"config": config}
    passed_over: tuple[str, ...] = ()
    if attention is not None:
        names = (attention,) if isinstance(attention, str) else attention
        options["attn_implementation"], passed_over = first_attention(kind, path, settings, names)
    if type(settings) in kind._model_mapping:  # type: ignore[attr-defined]
        # Before loading, in which under ZeRO-3 the first rank alone would see what does not fit.
        on_paper = built_at(path, kind, settings, options.get("attn_implementation", "eager"))
        _check_files(path, what, on_paper)
        if quantize is not None:
            options |= loading_quantized(on_paper, dtype)
    verbosity = transformers_logging.get_verbosity()
    # Its own report of what is left over or missing is long; the latter is an error here.
    transformers_logging.set_verbosity_error()
    try:
        with whole_loading() if quantize is not None else contextlib.nullcontext():
            model, loading = kind.from_pretrained(  # type: ignore[attr-defined]
                path,
                dtype=dtype,
                output_loading_info=True,
                trust_remote_code=False,
                **options,
            )
    except _CANNOT_LOAD as error:
        # Without the advice that follows, which is about options that are not the user's here.
        reason = " ".join(str(error).split()).partition(". You may")[0]
        raise InputError(f"{path!r} cannot be loaded as {what}: {reason:.300}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(f"{path!r} holds an adapter beside its weights, expected a model that it is merged into")
    if missing := sorted(loading["missing_keys"]):
        raise InputError(f"{path!r} lacks {len(missing)} weights of its architecture, {missing[0]} for one")
    setattr(model, PASSED_OVER, passed_over)
    if quantize is not None:
        settle_quantized(path, model)
    elif is_deepspeed_zero3_enabled():
        _restore_buffers(model, dtype)
    return model


def _restore_buffers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give a model that was loaded into shards the buffers that it has otherwise, but for those that its files hold.

    While DeepSpeed makes shards, every floating-point tensor that a constructor makes comes out in the dtype of the
    weights: rotary frequencies rounded to bfloat16 are off by up to 0.2%, at position 1000 by more than a radian.
    """
    kind, config = type(model), model.config
    with no_init_weights():
        # A load computes them in torch's own dtype, in the memory that constructors make in that of the weights.
        with init_empty_weights(include_buffers=False):
            values = dict(kind(copy.deepcopy(config)).named_buffers())
        with torch.device("meta"), local_torch_dtype(dtype):
            shapes = kind(copy.deepcopy(config))
    held = model.state_dict().keys()
    for name, buffer in shapes.named_buffers():
        if name not in held:
            owner, _, leaf = name.rpartition(".")
            buffers = model.get_submodule(owner)._buffers
            buffers[leaf] = values[name].to(buffers[leaf].device, buffer.dtype)


def _check_files(path: str, what: str, model: nn.Module) -> None:
    """Raise `InputError` where the weights in the files are not those of a model, which is on paper.

    What its files lack is told by transformers, which knows what is tied and what it renames.
    """
    prefix = f"{model.base_model_prefix}."
    state = model.state_dict().items()
    expected = {name.removeprefix(prefix): tuple(tensor.shape) for name, tensor in state}
    found = {name.removeprefix(prefix): (name, *about) for name, about in Checkpoint(path).shapes().items()}
    whole = [
        found[short][0]
        for name, tensor in state
        if tensor.is_floating_point() and not found.get(short := name.removeprefix(prefix), (name, (), True))[2]
    ]
    if whole:
        raise InputError(
            f"{path!r} cannot be loaded as {what}: {len(whole)} weights are whole numbers, {whole[0]} for one, "
            "expected floating-point ones: quantised models are not read"
        )
    wrong = [name for name in sorted(found) if name in expected and found[name][1] != expected[name]]
    if wrong:
        name, shape, _ = found[wrong[0]]
        raise InputError(
            f"{path!r} cannot be loaded as {what}: {len(wrong)} weights have another shape than its configuration "
            f"says, {name} for one: {list(shape)}, expected {list(expected[wrong[0]])}"
        )
    modules = {name.removeprefix(prefix): module for name, module in model.named_modules()}
    left_out = [name for name in sorted(found) if name not in expected and _belongs(name, modules)]
    if left_out:
        raise InputError(
            f"{path!r} has {len(left_out)} weights that its configuration leaves out, {found[left_out[0]][0]} for one: "
            "expected those of this architecture"
        )


def _belongs(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a weight's name is of a module that there is, or of one more layer of a stack.

    Not so are the heads of other uses, what older releases kept beside the weights (masks, rotary tables), and what
    transformers renames.
    """
    path, _, tensor = name.rpartition(".")
    if tensor in ("weight", "bias") and path in modules and not next(modules[path].children(), None):
        return True
    parts = path.split(".")
    for i, part in enumerate(parts):
        stack = modules.get(".".join(parts[:i]))
        if part.isdigit() and isinstance(stack, nn.ModuleList) and int(part) >= len(stack):
            return True
    return False


def train_last_layers(transformer: nn.Module, layers: int) -> None:
    """Freeze all of a Hugging Face model but its last transformer layers and the final norm.

    Raises:
        InputError: The model has fewer layers.
    """
    path, blocks = next((p, module) for p, module in transformer.named_modules() if isinstance(module, nn.ModuleList))
    if layers > len(blocks):
        raise InputError(f"trainable_layers is {layers}, expected at most the model's {len(blocks)} layers")
    transformer.requires_grad_(False)
    for block in blocks[-layers:]:
        block.requires_grad_(True)
    # By its class: it is called norm, ln_f, final_layer_norm, norm_f, ... That of the embeddings stands before the
    # layers; one behind them is the final one, whatever its name.
    behind = False
    for name, module in transformer.get_submodule(path.rpartition(".")[0]).named_children():
        behind = behind or module is blocks
        if "norm" in type(module).__name__.lower() and (behind or "emb" not in name):
            module.requires_grad_(True)
