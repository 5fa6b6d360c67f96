"""The policy: a Hugging Face causal language model whose head computes the losses.

The trainer never sees logits. It calls the policy with a packed batch and with what to do at the head, and the policy
runs its trunk, picks the hidden states that predict a response token, and lets its `LossHead` do the rest.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from repo_fast.errors import InputError, first_line
from repo_fast.experience import PackedBatch
from repo_fast.models.attention import run_packed
from repo_fast.models.lora import merged_state, save_adapter
from repo_fast.models.loss_head import LossHead
from repo_fast.models.trunk import disable_dropout, load_config

# Settings by which a model changes its logits after the head. The loss head would leave them out.
_LOGIT_SETTINGS = {
    "final_logit_softcapping": None,
    "logit_scale": 1,
    "logits_scaling": 1,
    "lm_head_multiplier": 1,
    "output_multiplier": 1,
}


class Policy(nn.Module):
    """A causal language model under training, or its frozen reference.

    Args:
        model: A `...ForCausalLM` with a linear head without bias and nothing after it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @classmethod
    def from_pretrained(cls, path: str, *, dtype: torch.dtype, attention: str) -> "Policy":
        """Load a Hugging Face folder; under ZeRO-3 loading, straight into shards.

        Args:
            path: Folder or hub name.
            dtype: Of weights and activations.
            attention: Name of a transformers attention implementation.

        Raises:
            InputError: The folder cannot be read, is not a causal language model, or changes its logits after the head.
        """
        config = load_config(path)
        for name, neutral in _LOGIT_SETTINGS.items():
            value = getattr(config, name, neutral)
            if value is not None and value != neutral:
                raise InputError(
                    f"{path!r} has {name} = {value}, expected {neutral}: the loss head computes plain softmax logits"
                )
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path, config=config, dtype=dtype, attn_implementation=attention
            )
        except (OSError, ValueError) as error:
            raise InputError(f"{path!r} cannot be loaded as a causal language model: {first_line(error)}") from error
        head = model.get_output_embeddings()
        if type(head) is not nn.Linear or head.bias is not None:
            raise InputError(f"{path!r} has the head {head}, expected a linear layer without bias")
        head.__class__ = LossHead
        disable_dropout(model)
        return cls(model)

    def forward(self, batch: PackedBatch, loss: Callable[[torch.Tensor, torch.Tensor, PackedBatch], Any]) -> Any:
        """Run a packed batch and let the head compute.

        Args:
            batch: The packed sequences.
            loss: Called inside the head as `loss(hidden, weight, batch)`, with hidden [T, D] the states that predict
                each of the batch's response tokens, and weight [V, D].

        Returns:
            What `loss` returns.
        """
        hidden = run_packed(self.model.base_model, batch.input_ids, batch.position_ids)[0, batch.predictors]
        return self.model.get_output_embeddings()(hidden, lambda h, w: loss(h, w, batch))


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
        state: Its whole weights on the CPU, by name, as `Engine.whole_state` gives them.
        tokenizer: Saved beside them.
        base_path: The model that adapters were put into.
    """
    merged = merged_state(policy, state)
    whole = {name.removeprefix("model."): value for name, value in merged.items()}
    save_hugging_face(folder, policy.model, whole, tokenizer)
    if merged is not state:
        save_adapter(folder / "adapter", policy, state, base_path)
