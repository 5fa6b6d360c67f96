"""A vocabulary that grows: by a pad token the tokenizer lacks, and up to a multiple that kernels like.

New rows of embedding and head are the mean of the old ones: a token that has never been seen is then, to the model, an
average one. (A new logit is the mean of the others, so its probability is at most 1 / V, unless logits are capped.)

transformers' `resize_token_embeddings` is not used: it draws its rows around the mean from every rank's own random
state, puts a plain linear layer in place of the `LossHead`, and takes shards for weights without rows once loading is
over. Here every rank makes the same whole weight of gathered ones, before DeepSpeed starts, which then shards it.
"""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from repo_fast.engine import whole_parameters
from repo_fast.errors import InputError


def fit_vocabulary(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, pad_token: str | None, multiple: int
) -> bool:
    """Give the tokenizer a pad token, and the model rows for it and up to a multiple. Before DeepSpeed starts.

    A model and a tokenizer that have all that already, such as ones saved after this, are left as they are. So are the
    settings of both where nothing is asked for. All ranks must call it.

    Args:
        model: A Hugging Face causal language model, or a trunk as `AutoModel` loads it; its parameters may be shards.
        tokenizer: Shared by all models of a run: the first call adds the token, the next ones find it.
        pad_token: Its pad token, where it has none; may be one of its tokens already. None for no pad token.
        multiple: Of the number of rows.

    Returns:
        Whether the model has got new rows.

    Raises:
        InputError: The multiple is less than 1, or the pad token empty.
    """
    if multiple < 1:
        raise InputError(f"the vocabulary's multiple is {multiple}, expected at least 1")
    if pad_token == "":
        raise InputError("the pad token is '', expected a token such as '<pad>'")
    config = model.config.get_text_config()
    rows = config.vocab_size
    if pad_token is not None:
        if tokenizer.pad_token is None:
            tokenizer.add_special_tokens({"pad_token": pad_token})
        rows = max(rows, tokenizer.pad_token_id + 1)
        if getattr(model, "generation_config", None) is not None:
            # Not in the model's configuration, with which ZeRO-3 could not build the embedding.
            model.generation_config.pad_token_id = tokenizer.pad_token_id
    rows = -(-rows // multiple) * multiple
    if rows == config.vocab_size:
        return False
    append_rows(model, rows)
    return True


def never_drawn(
    vocabulary: int, tokenizer: PreTrainedTokenizerBase, end_tokens: Iterable[int] = (), *, pad: bool = False
) -> list[int]:
    """The ids that a response must not contain: rows without a token, and the pad token unless it ends responses.

    Args:
        vocabulary: The model's number of rows.
        tokenizer: Its tokenizer.
        end_tokens: Ids that end a response.
        pad: Whether the pad token is among them, as where it was added and the model has never seen it.
    """
    drawn = set(tokenizer.get_vocab().values())
    if pad:
        drawn -= {tokenizer.pad_token_id} - set(end_tokens)
    return [token for token in range(vocabulary) if token not in drawn]


def append_rows(model: nn.Module, rows: int) -> None:
    """Give a model more rows, so many in all, each the mean of its own; as for `fit_vocabulary`."""
    model.config.get_text_config().vocab_size = rows
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    embedding.weight = _with_mean_rows(embedding.weight, rows)
    embedding.num_embeddings = rows
    if head is not None:
        head.weight = embedding.weight if tied else _with_mean_rows(head.weight, rows)
        if head.bias is not None:
            head.bias = _with_mean_rows(head.bias, rows)
        head.out_features = rows
    for module in (model, model.base_model):
        # A number that some architectures keep beside the configuration's.
        if hasattr(module, "vocab_size"):
            module.vocab_size = rows


@torch.no_grad()
def _with_mean_rows(weight: nn.Parameter, rows: int) -> nn.Parameter:
    with whole_parameters([weight]):
        mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
        longer = torch.cat([weight, mean.expand(rows - weight.shape[0], *weight.shape[1:])])
    return nn.Parameter(longer, requires_grad=weight.requires_grad)
