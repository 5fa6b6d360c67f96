"""Several cost streams in the arguments of the public ops: their shapes, one setting for all or one each, and the one
stream that the registered ops then take (`loss.py` says why K are two).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repo_fast.ops import registration
from repo_fast.ops.validation import check_device, check_flag, check_number, check_tensor, check_vector, scalar

# Which of them are rectified travels to the Triton kernel as the bits of a 32-bit number.
MAX_STREAMS = 31


def stream_count(
    op: str, T: int, device: torch.device, cost_advantages: object, name: str, by_response: object
) -> int | None:
    """Checks cost advantages and costs or violations: K of [K, T] and [K, S], or None of [T] and [S]."""
    both = [value for value in (cost_advantages, by_response) if isinstance(value, Tensor)]
    several = any(value.dim() == 2 for value in both)
    if {value.dim() for value in both} == {1, 2}:
        shapes = f"{list(both[0].shape)} and {list(both[1].shape)}"
        raise ValueError(f"{op}: cost_advantages and {name} must be [T] and [S], or [K, T] and [K, S], got {shapes}")
    check_tensor(op, name, by_response, (torch.float32,), ("K", "S") if several else ("S",))
    assert isinstance(by_response, Tensor)
    check_device(op, name, by_response, device)
    if not several:
        check_vector(op, "cost_advantages", cost_advantages, T, "T", device, torch.float32)
        return None
    check_tensor(op, "cost_advantages", cost_advantages, (torch.float32,), ("K", T))
    assert isinstance(cost_advantages, Tensor)
    check_device(op, "cost_advantages", cost_advantages, device)
    K = cost_advantages.shape[0]
    if by_response.shape[0] != K:
        raise ValueError(f"{op}: {name} must have shape [K={K}, S] like cost_advantages, got {list(by_response.shape)}")
    return check_count(op, "cost_advantages", K)


def check_count(op: str, name: str, K: int) -> int:
    if not 1 <= K <= MAX_STREAMS:
        raise ValueError(f"{op}: {name} must have 1 to {MAX_STREAMS} streams, got {K}")
    return K


def for_each(op: str, name: str, value: Any, K: int | None, check: Callable[[str, str, Any], None]) -> list[Any]:
    """One value a stream, of one for all or of K of them; a single stream (None) has one."""
    if isinstance(value, list | tuple):
        if len(value) != K:
            expected = "one value, not a list, for costs [S]" if K is None else f"one value or K={K} of them"
            raise ValueError(f"{op}: {name} must be {expected}, got {len(value)}")
        for k, one in enumerate(value):
            check(op, f"{name}[{k}]", one)
        return list(value)
    check(op, name, value)
    return [value] * (K or 1)


def check_rectify(op: str, rectify: Any, K: int | None) -> list[bool]:
    return for_each(op, "rectify", rectify, K, check_flag)


def multipliers(op: str, value: Any, K: int, device: torch.device) -> Tensor:
    """λ as float32 [K] of a number, K numbers, a 0-d or a [K] tensor; a tensor is never looked at."""
    if isinstance(value, list | tuple):
        numbers = for_each(op, "multiplier", value, K, lambda op, name, one: check_number(op, name, one, 0.0))
        # Not from the host's memory, which a GPU would be waited for.
        return torch.stack([torch.full((), float(number), device=device) for number in numbers])
    if isinstance(value, Tensor) and value.dim() > 0:
        if value.shape != (K,) or value.dtype.is_complex or value.dtype == torch.bool:
            raise TypeError(
                f"{op}: multiplier must be a number, K={K} of them, or a real tensor [] or [K={K}], got {value.dtype} "
                f"{list(value.shape)}"
            )
        return value.detach().to(device=device, dtype=torch.float32, non_blocking=True)
    return scalar(op, "multiplier", value, device, 0.0).expand(K)


class OneStream(NamedTuple):
    """What the registered ops take of one stream, or in place of several."""

    reward_advantages: Tensor
    cost_advantages: Tensor
    violations: Tensor | None
    multiplier: Tensor
    rectify: bool


def as_one(
    op: str,
    K: int | None,
    reward_advantages: Tensor,
    cost_advantages: Tensor,
    sequence_ids: Tensor,
    violations: Tensor | None,
    multiplier: Any,
    rectify: Sequence[bool],
    surrogate: str,
    backend: str,
) -> OneStream:
    """The streams of [K, T] and [K, S] as one. One alone, [T] and [S] or of K = 1, is itself, to the bit."""
    device = reward_advantages.device
    if K is None:
        (multiplier,) = for_each(op, "multiplier", multiplier, None, lambda *_: None)
        lagrangian = scalar(op, "multiplier", multiplier, device, 0.0)
        return OneStream(reward_advantages, cost_advantages, violations, lagrangian, rectify[0])
    assert violations is not None
    lagrangians = multipliers(op, multiplier, K, device)
    if K == 1:
        return OneStream(reward_advantages, cost_advantages[0], violations[0], lagrangians[0], rectify[0])
    reward, cost = registration.rectified_policy_loss_streams(
        reward_advantages.detach(),
        cost_advantages.detach(),
        sequence_ids,
        violations.detach(),
        lagrangians,
        list(rectify),
        surrogate == "mixed",
        backend,
    )
    # With weights of a half each, everywhere.
    return OneStream(reward, cost, torch.zeros_like(violations[0]), torch.ones_like(lagrangians[0]), False)
