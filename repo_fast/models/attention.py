"""Attention in packed rows: several sequences one after the other, which must not see each other.

transformers keeps them apart by a mask of the whole row, so that the work grows with the row's length squared, however
short its sequences are. `PACKED` gives each sequence its own attention: torch's variable-length FlashAttention on CUDA
in half precision, elsewhere SDPA sequence by sequence, neither with a mask. Forward and backward on one Zen 4 core in
float32, 8 heads of 32, sequences of 17 to 319 tokens: 3.5 times as fast as with the mask in a row of 1,118 tokens, 14
times in one of 4,030.

Responses to one prompt can share it: positions that start anew at p, above 0, belong to a sequence that goes on from
the first p tokens of the last sequence that began at 0. The prompt is then computed once.

It is registered with transformers, whose layers call it. Forwards that are not packed, such as generation with its
cache and its padding, go to transformers' own SDPA with its masks.

On CUDA a forward does not wait for the device: what the host must know of a row, the row's `Bounds` say. With any other
attention transformers itself looks at the positions, once for each kind of mask and forward.
"""

import functools
import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available

from repo_fast.errors import InputError
from repo_fast.packing.bounds import Bounds

PACKED = "repo_fast_packed"
"""The name that transformers knows it by."""
PADDED = "padded"
"""Each sequence a row of its own: for trunks that cannot keep the sequences of one row apart."""
MASKED = ("sdpa", "eager")
"""What attends under a mask of the row."""

# transformers hands a mask of four dimensions on as it is, rather than to build one of the whole row.
_NO_MASK_SIZE = (1, 1, 1, 1)
# What some architectures' layers ask of attention beyond scaling and a window. transformers' SDPA takes the first two
# without a word, and leaves them out.
_IGNORED_BY_SDPA = ("softcap", "s_aux")
_UNSUPPORTED = (*_IGNORED_BY_SDPA, "position_bias")


class IgnoredBySdpa(InputError):
    """A layer asks of attention what transformers' SDPA would silently leave out.

    Attributes:
        asked: What.
    """

    def __init__(self, layer: str, asked: str) -> None:
        super().__init__(
            f"{layer} needs {asked}, which packed attention and SDPA lack, expected attention 'eager' for this "
            "architecture"
        )
        self.asked = asked


def attention_candidates(choice: str, device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """What transformers calls the attentions that a choice allows, the fastest first.

    Args:
        choice: `auto`, `packed`, `padded`, or a name of transformers'. `auto` is FlashAttention 2 where it can run,
            `packed` where it can, SDPA with a mask, and eager attention. `padded` rows are attended to by either of the
            last two.
        device, dtype: Of the activations.

    Raises:
        InputError: The choice cannot run here.
    """
    half_on_cuda = device.type == "cuda" and dtype != torch.float32
    flash = half_on_cuda and is_flash_attn_2_available()
    packed = device.type == "cpu" or (half_on_cuda and _varlen_can_run())
    if choice == "flash_attention_2" and not flash:
        raise InputError(
            f"policy.attention is 'flash_attention_2' on device {device.type} in {dtype}, expected 'sdpa' or 'auto': "
            "it needs a CUDA device, bfloat16, and the flash-attn package (pip install flash-attn)"
        )
    if choice == "packed" and not packed:
        raise InputError(
            f"policy.attention is 'packed' on device {device.type} in {dtype}, expected 'sdpa' or 'auto': on CUDA it "
            "needs bfloat16 and a torch with torch.nn.attention.varlen"
        )
    if choice == "auto":
        return ("flash_attention_2",) * flash + (PACKED,) * packed + MASKED
    return {"packed": (PACKED,), PADDED: MASKED}.get(choice, (choice,))


def flash_attention_takes(option: str) -> bool:
    """Whether the flash-attn package has an option; without it transformers leaves out what a layer asks."""
    from flash_attn import flash_attn_varlen_func

    return option in inspect.signature(flash_attn_varlen_func).parameters


@functools.cache
def _varlen_options() -> frozenset[str]:
    """The arguments of this torch's variable-length attention; none without it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def _varlen_can_run() -> bool:
    """Whether this torch has variable-length attention with all that is needed of it."""
    return {"scale", "window_size"} <= _varlen_options()


def run_packed(
    trunk: nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor, bounds: Bounds | None = None
) -> torch.Tensor:
    """Run a transformers trunk on a packed row.

    Args:
        trunk: Without a head; `config._attn_implementation` names its attention.
        input_ids: int64 [1, N].
        position_ids: int64 [1, N], from 0 in each sequence; or, under `PACKED`, from p where a sequence goes on from
            the first p tokens of the last one that began at 0.
        bounds: Those of `position_ids`. None: they are found here, for which the host waits for a GPU.

    Returns:
        The last hidden states [1, N, D].

    Raises:
        ValueError: The bounds are of another row, or a sequence goes on from another under an attention that cannot
            share.
    """
    if bounds is None:
        bounds = Bounds.of(position_ids)
    else:
        bounds.check(position_ids)
    bounds = bounds.to(position_ids.device)
    implementation = trunk.config._attn_implementation
    padded = getattr(trunk, PADDED, False)
    if bounds.key_index is not None and (padded or implementation != PACKED):
        raise ValueError(
            f"position_ids restart above 0 with attention {PADDED if padded else implementation!r}, expected 'packed': "
            "no other shares a prompt"
        )
    if padded:
        return _run_padded(trunk, input_ids[0], position_ids[0], bounds)
    # Without a cache and without a mask, transformers keeps sequences apart by their restarting positions.
    options: dict[str, Any] = {"attention_mask": None, "use_cache": False}
    if implementation in (PACKED, "flash_attention_2"):
        options |= {"cu_seq_lens_q": bounds.own, "cu_seq_lens_k": bounds.seen}
        options |= {"max_length_q": bounds.longest, "max_length_k": bounds.longest}
    if implementation == PACKED:
        options["key_index"] = bounds.key_index
        options["attention_mask"] = torch.zeros(_NO_MASK_SIZE, device=input_ids.device)
    return trunk(input_ids=input_ids, position_ids=position_ids, **options).last_hidden_state


def _run_padded(trunk: nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor, bounds: Bounds) -> torch.Tensor:
    """`run_packed` with a row a sequence, in one call: ranks must make as many, however their sequences are.

    Padding stands behind the sequences, where what is causal does not see it: no mask is needed.
    """
    indices = torch.arange(bounds.sequences, device=position_ids.device)
    rows = indices.repeat_interleave(bounds.own.diff(), output_size=bounds.tokens)
    padded = input_ids.new_zeros(bounds.sequences, bounds.longest)
    padded[rows, position_ids] = input_ids
    return trunk(input_ids=padded, use_cache=False).last_hidden_state[rows, position_ids][None]


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    key_index: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence of a packed row, as transformers calls it.

    Args:
        module: The attention layer.
        query: [1, H, N, d].
        key, value: [1, H', N, d], of heads that groups of H / H' query heads share.
        attention_mask: Of a forward that is not packed; else the sign that there is none.
        scaling: Of the scores; None is 1/√d.
        dropout: Must be 0 in a packed row.
        cu_seq_lens_q: int32 [S + 1], where the sequences start and end; None in a forward that is not packed.
        cu_seq_lens_k: int32 [S + 1], the same for the keys that they see, shared ones first.
        max_length_q: Keys of the sequence that sees most.
        key_index: int64 [M], the places in the row of these keys; None: each sequence sees its own.
        sliding_window: A token sees so many, itself included; None: all before it.

    Returns:
        [1, N, H, d], and None in place of attention weights.

    Raises:
        InputError: The architecture asks for what is not supported.
    """
    if asked := [name for name in _UNSUPPORTED if kwargs.get(name) is not None]:
        layer = type(module).__name__
        if asked[0] in _IGNORED_BY_SDPA:
            raise IgnoredBySdpa(layer, asked[0])
        raise InputError(
            f"{layer} needs {asked[0]}, which packed attention lacks, expected attention 'sdpa' or 'eager' for this "
            "architecture"
        )
    if cu_seq_lens_q is None or max_length_q is None:
        if attention_mask is not None and attention_mask.shape == _NO_MASK_SIZE and query.shape[2] > 1:
            raise InputError(
                f"{type(module).__name__} does not take part in packed attention, expected attention 'sdpa' or 'eager' "
                "for this architecture"
            )
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    if dropout > 0:
        raise InputError(f"{type(module).__name__} has dropout {dropout} in its attention, expected 0 in a packed row")
    assert cu_seq_lens_k is not None
    if key_index is not None:
        key, value = key.index_select(2, key_index), value.index_select(2, key_index)
    bounds = (cu_seq_lens_q, cu_seq_lens_k)
    window = None if sliding_window is None or sliding_window >= max_length_q else sliding_window
    if query.is_cuda:
        return _varlen(query, key, value, scaling, bounds, max_length_q, window), None
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    return _one_by_one(query, key, value, scaling, bounds, window), None


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    bounds: tuple[torch.Tensor, torch.Tensor],
    longest: int,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11's has no such argument, and takes grouped heads as they come.
    grouped = {"enable_gqa": query.shape[1] != key.shape[1]} if "enable_gqa" in _varlen_options() else {}
    out = varlen_attn(
        *(part[0].transpose(0, 1) for part in (query, key, value)),
        *bounds,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    return out[None]


def _one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    bounds: tuple[torch.Tensor, torch.Tensor],
    window: int | None,
) -> torch.Tensor:
    outputs = []
    own, seen = (part.diff().tolist() for part in bounds)
    sequences = zip(query.split(own, dim=2), key.split(seen, dim=2), value.split(seen, dim=2), strict=True)
    for queries, keys, values in sequences:
        count, shared = queries.shape[2], keys.shape[2] - queries.shape[2]
        mask = None
        if shared or (window is not None and window < count):
            # Of the keys a token sees those before it, and all that are shared.
            ones = torch.ones(count, count + shared, dtype=torch.bool, device=query.device)
            mask = ones.tril(shared) if window is None else ones.tril(shared) & ones.triu(shared + 1 - window)
        outputs.append(
            scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=scaling)
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
