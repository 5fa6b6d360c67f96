"""The policy: a Hugging Face causal language model whose head computes the losses.

The trainer never sees logits. It calls the policy with a packed batch and with what to do at the head, and the policy
runs its trunk, picks the hidden states that predict a response token, and lets its `LossHead` do the rest.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from repo_fast.errors import InputError
from repo_fast.models.attention import run_packed
from repo_fast.models.lora import merged_state, save_adapter
from repo_fast.models.loss_head import LossHead, Projection, logit_settings
from repo_fast.models.model_config import load_config, restored, set_aside
from repo_fast.models.trunk import disable_dropout, load_transformer
from repo_fast.packing.rows import PackedBatch

_log = logging.getLogger(__name__)


class Policy(nn.Module):
    """A causal language model under training, or its frozen reference.

    Args:
        model: A `...ForCausalLM` with a linear head, and after it nothing but a scale and a cap.
        aside: What was taken out of its configuration (`model_config.set_aside`), and is written back with it.
    """

    def __init__(self, model: nn.Module, aside: Mapping[str, Any] = MappingProxyType({})) -> None:
        super().__init__()
        self.model, self.aside = model, dict(aside)

    @classmethod
    def from_pretrained(
        cls, path: str, *, dtype: torch.dtype, attention: str | Sequence[str], quantize: str | None = None
    ) -> "Policy":
        """Load a Hugging Face folder; under ZeRO-3 loading, straight into shards.

        Args:
            path: Folder or hub name.
            dtype: Of weights and activations.
            attention: Name of a transformers attention implementation, or several: the first that can run.
            quantize: As for `load_transformer`.

        Raises:
            InputError: The folder cannot be read, lacks weights, is not a causal language model with a linear head, or
                has settings of its logits that cannot be.
        """
        config = load_config(path)
        model = load_transformer(
            AutoModelForCausalLM,
            path,
            "a causal language model",
            config=config,
            dtype=dtype,
            attention=attention,
            quantize=quantize,
        )
        head = check_head(path, model)
        head.__class__ = LossHead
        head.settings = logit_settings(path, config, type(model))
        disable_dropout(model)
        _make_valid(path, model.generation_config)
        return cls(model, set_aside(path))

    def forward(self, batch: PackedBatch, loss: Callable[[torch.Tensor, Projection, PackedBatch], Any] | None) -> Any:
        """Run a packed batch and let the head compute.

        Args:
            batch: The packed sequences.
            loss: Called inside the head as `loss(hidden, projection, batch)`, with hidden [T, D] the states that
                predict each of the batch's response tokens. None: what transformers makes of a batch of one sequence.

        Returns:
            What `loss` returns; without it logits [1, N, V].
        """
        if loss is None:
            return self.model(input_ids=batch.input_ids, use_cache=False).logits
        hidden = run_packed(self.model.base_model, batch.input_ids, batch.position_ids, batch.bounds)
        hidden = hidden[0, batch.predictors]
        return self.model.get_output_embeddings()(hidden, lambda h, projection: loss(h, projection, batch))


def check_head(path: str, model: nn.Module) -> nn.Module:
    """The head of a causal language model; `InputError` where it is not a linear layer.

    Args:
        path: Folder or hub name, for the message.
        model: May be on paper.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise InputError(f"{path!r} has the head {head}, expected a linear layer")
    return head


def _make_valid(path: str, settings: GenerationConfig) -> None:
    """Make generation settings such that transformers writes them: it reads what it then refuses to write.

    Published folders (Vicuna, Llama 2) have a temperature and no `do_sample`, which is what they mean by it. Other
    settings that it refuses have no effect as they stand, such as a temperature where nothing is drawn, and go.
    """
    changes = []
    if (invalid := _invalid(settings)) and settings.do_sample is None and settings.temperature != 0:
        before, settings.do_sample = settings.do_sample, True
        if _invalid(settings) != invalid:
            changes.append("do_sample is now true")
        else:
            settings.do_sample = before
    for name in _invalid(settings):
        changes.append(f"{name} ({getattr(settings, name)}) is left out")
        setattr(settings, name, getattr(GenerationConfig(), name))
    if changes:
        _log.info("%r has generation settings that could not be written: %s", path, ", ".join(changes))


def _invalid(settings: GenerationConfig) -> list[str]:
    """The settings that transformers would not write."""
    try:
        settings.validate(strict=True)
    except ValueError as error:
        return re.findall(r"^- `(\w+)`", str(error), re.MULTILINE)
    return []


def check_vocabulary(path: str, vocabulary: int, tokenizer) -> None:
    """Raise `InputError` where the tokenizer can produce a token that the model has no embedding for."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocabulary:
        raise InputError(
            f"the tokenizer of {path!r} has token id {highest}, expected ids below the vocabulary size {vocabulary}"
        )


def save_hugging_face(folder: Path, model: nn.Module, state: dict[str, torch.Tensor], tokenizer) -> None:
    """Write a folder that plain transformers loads: weights, configuration, generation settings, tokenizer.

    Args:
        folder: Written whole; it must not exist.
        model: The Hugging Face model, whose parameters may be shards.
        state: Its whole weights on the CPU, by name.
        tokenizer: Saved beside them.
    """
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def save_policy(
    folder: Path, policy: Policy, state: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase, base_path: str
) -> None:
    """Write a policy as a Hugging Face folder; adapters merged, and also by themselves in `adapter/`, as peft does.

    Args:
        folder: Written whole; it must not exist.
        policy: The policy, whose parameters may be shards.
        state: Its whole weights on the CPU, by name, as `Engine.whole_state` gives them, dequantised.
        tokenizer: Saved beside them.
        base_path: The model that adapters were put into.
    """
    merged = merged_state(policy, state)
    whole = {name.removeprefix("model."): value for name, value in merged.items()}
    aside = policy.aside
    if aside.get("pad_token_id") is None:
        # One that was added for the run.
        aside = aside | {"pad_token_id": policy.model.generation_config.pad_token_id}
    with restored(policy.model.config, aside):
        save_hugging_face(folder, policy.model, whole, tokenizer)
    if merged is not state:
        save_adapter(folder / "adapter", policy, state, base_path)
