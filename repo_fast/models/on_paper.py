"""What is found out about an architecture before a weight is loaded: it is built, and run, without values."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.auto_factory import _get_model_class

from repo_fast.errors import InputError, first_line
from repo_fast.models.attention import PACKED, IgnoredBySdpa, flash_attention_takes, run_packed
from repo_fast.models.model_config import load_config

# Distances that are tables although there is no module of positions, by model type: the setting of their length.
_ALIBI_TABLES = {"mpt": "max_seq_len"}

PASSED_OVER = "attention_passed_over"
"""The attribute of a loaded model that says which attentions it could not be built with."""


def first_attention(
    kind: type, path: str, config: PretrainedConfig, candidates: Sequence[str]
) -> tuple[str, tuple[str, ...]]:
    """The first of some attentions that an architecture can be run with, on paper.

    Args:
        kind: The `AutoModel...` class.
        path: For messages.
        config: Of the architecture.
        candidates: Names of transformers attention implementations.

    Returns:
        Its name, and for each that was passed over the reason.

    Raises:
        InputError: None of them.
    """
    if type(config) not in kind._model_mapping:  # type: ignore[attr-defined]
        # Loading says so.
        return candidates[0], ()
    reasons: list[str] = []
    for name in candidates:
        # The models of a run are often of one configuration, and a large one takes seconds.
        key = (kind, type(config), config.to_json_string(use_diff=False), name)
        if key not in _tried:
            _tried[key] = _fault_on_paper(kind, config, name)
        if (fault := _tried[key]) is None:
            return name, tuple(reasons)
        reasons.append(f"{said(name)}: {fault}")
    raise InputError(f"{path!r} cannot be built with any attention that was asked for: {'; '.join(reasons)}")


_tried: dict[tuple, str | None] = {}


def _fault_on_paper(kind: type, config: PretrainedConfig, attention: str) -> str | None:
    try:
        _try_on_paper(kind, config, attention)
    except Exception as error:  # the constructors' errors share no type
        return _short(error, attention)
    return None


def built(kind: type, config: PretrainedConfig, attention: str = "eager") -> PreTrainedModel:
    """A model on torch's `meta` device, in bfloat16: it has shapes and no values.

    Args:
        kind: The `AutoModel...` class.
        config: Of the architecture; left as it is.
        attention: Name of a transformers attention implementation.

    Raises:
        Exception: The architecture cannot be built with it; the constructors' errors share no type.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = attention
    # Not `from_config`, which makes shards under ZeRO-3.
    architecture = _get_model_class(config, kind._model_mapping)  # type: ignore[attr-defined]
    with torch.device("meta"), no_init_weights():
        return architecture(config).to(torch.bfloat16).eval()


def built_at(path: str, kind: type, config: PretrainedConfig, attention: str = "eager") -> PreTrainedModel:
    """As `built`, of a folder or hub name.

    Raises:
        InputError: It cannot be built as its configuration says.
    """
    try:
        return built(kind, config, attention)
    except Exception as error:  # the constructors' errors share no type
        raise InputError(
            f"{path!r} cannot be built as its config.json says: {type(error).__name__}: {first_line(error)}"
        ) from error


@torch.no_grad()
def _try_on_paper(kind: type, config: PretrainedConfig, attention: str) -> None:
    """Build a model, and run it too, to see whether its layers take part in `PACKED`, and what they ask that SDPA or
    FlashAttention would leave out.
    """
    model = built(kind, config, attention)
    if attention == PACKED:
        _run_packed_on_paper(model)
    elif attention != "eager":
        try:
            _run_packed_on_paper(built(kind, config, PACKED))
        except IgnoredBySdpa as error:
            if attention == "flash_attention_2" and flash_attention_takes(error.asked):
                return
            raise
        except Exception:  # what else keeps layers from being packed says nothing of others
            return


def _run_packed_on_paper(model: PreTrainedModel) -> None:
    if not model._can_set_attn_implementation():
        raise ValueError(f"{type(model).__name__} has an attention of its own")
    trunk = model.base_model

    def on_meta(input_ids: torch.Tensor, position_ids: torch.Tensor, **options: Any) -> Any:
        options |= {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": options["attention_mask"]}
        inputs = ("input_ids", "position_ids", "attention_mask")
        return trunk(**{name: value.to("meta") if name in inputs else value for name, value in options.items()})

    on_meta.config = trunk.config  # type: ignore[attr-defined]
    try:
        run_packed(on_meta, torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[0, 1, 0]]))  # type: ignore[arg-type]
    except InputError:
        raise
    except Exception as error:  # whatever comes of a mask that is none
        # What depends on values (the choice of experts) cannot be run on paper. Attention comes before it.
        if "meta" not in str(error).lower():
            raise ValueError(f"the layers of {type(model).__name__} take no part in it") from error


def position_limit(model: nn.Module) -> int | None:
    """The longest sequence that a model has positions for (tokens); None where it counts on without end.

    Rotary positions go on beyond what a model was trained on. A table that is read beyond its end is an error, on a GPU
    one that ends the process's use of it.

    Args:
        model: A Hugging Face model; its parameters may be shards, or on `meta`.
    """
    limits = []
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("pos" in leaf or leaf == "wpe"):
            # Rows before the first position: OPT's two, and what stands for padding in RoBERTa.
            before = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
            limits.append(module.num_embeddings - before)
    limits += [
        buffer.shape[0]
        for name, buffer in model.named_buffers()
        if "pos" in name.rpartition(".")[2] and buffer.dim() == 2 and buffer.shape[0] > 1
    ]
    config = model.config
    if config.model_type in _ALIBI_TABLES:
        limits.append(getattr(config, _ALIBI_TABLES[config.model_type]))
    return min(limits, default=None)


def check_positions(path: str, longest: int, what: str) -> None:
    """Raise `InputError` where a model has no positions for its longest sequence.

    Args:
        path: Folder or hub name; only its configuration is read.
        longest: Tokens.
        what: The model and what the sequence is, for the message.
    """
    limit = position_limit(built_at(path, AutoModel, load_config(path)))
    if limit is not None and longest > limit:
        raise InputError(f"{what}: up to {longest} tokens, expected at most the {limit} positions that {path!r} has")


def _short(error: Exception, attention: str) -> str:
    """An error without the advice that comes with it."""
    if attention in error.args or "does not support" in str(error):
        return "the architecture has no such attention"
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return first_line(error).partition(", expected")[0].partition(". ")[0]


def said(attention: str) -> str:
    """An attention as the options call it."""
    return "packed" if attention == PACKED else attention
