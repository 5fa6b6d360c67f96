"""What a rank owns of a trained model's state, in DeepSpeed's own tensors: found, and read as views.

Under ZeRO the optimizer's state is split over the ranks: each has a range of every parameter's elements, of the weight
in float32 (the master, of which what computes is a cast) and of AdamW's two moments. DeepSpeed has functions that give
and take whole tensors; those for moments fail in ZeRO 1 and 2 where there are several parameter groups, and those that
take leave the computing weights as they were. So its own bookkeeping is read here; `tests/engine/test_state.py`
compares what is found with what its functions give, and fails when a release keeps its books otherwise.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")

# Of a frozen weight at once: their sums take 8 bytes each.
_SUMMED_AT_ONCE = 2**22
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Fragment:
    """A rank's part of a parameter.

    Attributes:
        name: Of the parameter.
        shape: Of the whole.
        start: Which element of the whole, flat, is the first.
        views: float32 [n] by `WEIGHT` and `MOMENTS`: to be read, or written to.
    """

    name: str
    shape: list[int]
    start: int
    views: dict[str, torch.Tensor]

    @property
    def count(self) -> int:
        return self.views[WEIGHT].numel()


def fragments(optimizer: Any, module: nn.Module) -> Iterator[Fragment]:
    """This rank's parts of the trained parameters; of one it may have none.

    Args:
        optimizer: DeepSpeed's, around AdamW.
        module: The model.
    """
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            group, offset, most = optimizer.grad_position[optimizer.get_param_id(parameter)]
            flat = optimizer.fp32_partitioned_groups_flat[group]
            start = most * optimizer._get_param_partition_rank(parameter)
            # The last rank's is filled up.
            count = max(0, min(most, parameter.ds_numel - start))
            shape = list(parameter.ds_shape)
        else:
            here = parameter._hp_mapping
            if here is None:
                continue
            flat = optimizer.param_groups[here.param_group_index]["params"][0]
            offset, count = here.hp_fragment_address.start, here.hp_fragment_address.numel
            start, shape = here.lp_fragment_address.start, list(parameter.shape)
        if count:
            state = optimizer.optimizer.state[flat]
            owned = {WEIGHT: flat.detach(), **{moment: state[moment] for moment in MOMENTS}}
            yield Fragment(name, shape, start, {key: value.narrow(0, offset, count) for key, value in owned.items()})


def adam_steps(optimizer: Any) -> list[torch.Tensor]:
    """AdamW's counts of steps, of which it keeps one for each flat tensor; to be read, or written to.

    Before the first step AdamW has neither these nor moments: what its first step would make is made.
    """
    steps = []
    for flat in _flat_masters(optimizer):
        state = optimizer.optimizer.state[flat]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(flat, memory_format=torch.preserve_format).detach()
        steps.append(state["step"])
    return steps


def before_masters_change(optimizer: Any) -> None:
    """To be called before `Fragment`s of a new engine are written to."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.checkpoint_event_prologue()


def after_masters_changed(optimizer: Any) -> None:
    """Make what computes a cast of the masters again. All ranks must call it."""
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.update_lp_params()
        return
    computing = optimizer.fp16_partitioned_groups_flat
    for master, cast in zip(optimizer.fp32_partitioned_groups_flat, computing, strict=True):
        cast.data.copy_(master.data)
    optimizer.checkpoint_event_epilogue()


def _flat_masters(optimizer: Any) -> list[torch.Tensor]:
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return list(optimizer.fp32_partitioned_groups_flat)
    return [group["params"][0] for group in optimizer.param_groups]


def frozen_sums(module: nn.Module, rank: int, *, rounded: bool = False) -> dict[str, int]:
    """Of each frozen parameter a sum over its bits and their places, of which this rank's part is given.

    Modulo 2^64 the parts of all ranks add up to the same number, however the parameter is split among them; what is
    whole on every rank is the first rank's.

    Args:
        module: The model.
        rank: This process's.
        rounded: Whether to bfloat16 first: the same then in any dtype that a model is loaded in.
    """
    found = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            continue
        shard = getattr(parameter, "ds_tensor", None)
        if shard is None:
            values, start = parameter.detach().reshape(-1), 0
            values = values if rank == 0 else values[:0]
        else:
            values, start = shard.detach().reshape(-1), shard.numel() * rank
            values = values[: max(0, parameter.ds_numel - start)]
        found[name] = sum_of_bits(values, start, rounded=rounded)
    return found


def sum_of_bits(values: torch.Tensor, start: int, *, rounded: bool = False) -> int:
    """Each value's bits, as a number, times an odd number that grows with its place, modulo 2^64.

    Args:
        values: [n]
        start: The first one's place.
        rounded: Whether to bfloat16 first, where they are no whole numbers.
    """
    total = 0
    for some in values.split(_SUMMED_AT_ONCE):
        cast = some.bfloat16() if rounded and some.is_floating_point() else some
        part = cast.view(_BITS[cast.element_size()])
        places = torch.arange(start, start + part.numel(), device=part.device)
        total += int((part.long() * (2 * places + 1)).sum())
        start += part.numel()
    return total % 2**64


def digest(sums: dict[str, int], others: dict[str, torch.Tensor]) -> str:
    """One word for frozen weights: of their sums, and of what else belongs to them, as it is."""
    word = hashlib.sha256()
    for name in sorted(sums):
        word.update(f"{name} {sums[name]}\n".encode())
    for name in sorted(others):
        word.update(f"{name} ".encode())
        word.update(others[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return word.hexdigest()
