"""Whether the ops compute the right thing on a machine: each public op once against `reference.py` in float64.

A look, not a proof: one small case in float32, values and gradients, on each backend that can run. The tests have the
rest.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repo_fast import ops
from repo_fast.ops import reference
from repo_fast.ops.dispatch import resolve

LIMIT = 1e-5
"""The largest difference that rounding explains, relative to the largest value of a result or gradient."""


@dataclass(frozen=True)
class OpCheck:
    """One op on one backend.

    Attributes:
        op, backend: Their names.
        difference: The largest one of any value or gradient, relative as `LIMIT` is; infinite where the op failed.
        error: What it failed with; empty where it did not.
    """

    op: str
    backend: str
    difference: float
    error: str = ""

    @property
    def agrees(self) -> bool:
        """Not where the difference is NaN."""
        return self.difference <= LIMIT


def check_ops(device: torch.device) -> Iterator[OpCheck]:
    """Run every public op on every backend that can run it on a device."""
    case = _case()
    for op, (leaves, call) in _CALLS.items():
        truth = _results(getattr(reference, op), call, {name: _wide(value) for name, value in case.items()}, leaves)
        for backend in ops.available_backends(op):
            try:
                resolve(op, backend, device)
            except ValueError:
                continue
            yield _check(op, backend, {name: value.to(device) for name, value in case.items()}, truth)


def _check(op: str, backend: str, case: dict[str, Tensor], truth: list[Tensor]) -> OpCheck:
    leaves, call = _CALLS[op]

    def ours(*arguments: Tensor, **options: Any) -> Any:
        # The reference has entropies always.
        more = {"return_entropy": True} if op == "linear_log_probs" else {}
        return getattr(ops, op)(*arguments, **options, **more, backend=backend)

    try:
        results = _results(ours, call, case, leaves)
    except Exception as error:
        return OpCheck(op, backend, torch.inf, f"{type(error).__name__}: {error}")
    pairs = zip(results, truth, strict=True)
    return OpCheck(op, backend, max(_difference(value.cpu().double(), right) for value, right in pairs))


def _difference(value: Tensor, right: Tensor) -> float:
    difference = ((value - right).abs().max() / right.abs().max()).item()
    # Of several numbers `max` would pass over a NaN.
    return difference if difference == difference else torch.inf


def _wide(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _results(
    op: Callable[..., Any], call: Callable[..., Any], case: dict[str, Tensor], leaves: Sequence[str]
) -> list[Tensor]:
    """What an op returns, and the gradients of the sum of that to its leaves."""
    own = {name: value.clone().requires_grad_(name in leaves) for name, value in case.items()}
    out = call(op, own)
    if isinstance(out, ops.PolicyLoss):
        out = out[: 4 if out.entropy is not None else 1]
    out = (out,) if isinstance(out, Tensor) else tuple(out)
    if leaves:
        # Of a policy loss the loss alone carries a gradient.
        (out[0] if out[0].dim() == 0 else sum(value.sum() for value in out)).backward()
    return [value.detach() for value in out] + [own[name].grad for name in leaves]


def _case() -> dict[str, Tensor]:
    """Packed tokens of six responses to three prompts, with targets to leave out and an odd vocabulary."""
    T, D, V, S = 48, 32, 101, 6
    g = torch.Generator().manual_seed(0)
    case = {
        "hidden": torch.randn(T, D, generator=g),
        "weight": torch.randn(V, D, generator=g) / D**0.5,
        "targets": torch.randint(0, V, (T,), generator=g).masked_fill(torch.rand(T, generator=g) < 0.2, -100),
        # Of one sign on average: of terms that cancel, rounding would be all that is left of a loss.
        "reward_advantages": torch.randn(T, generator=g) + 1,
        "cost_advantages": torch.randn(T, generator=g),
        "sequence_ids": torch.arange(S).repeat_interleave(T // S),
        "cu_seqlens": torch.arange(0, T + 1, T // S, dtype=torch.int32),
        "costs": torch.randn(S, generator=g),
        "prompt_ids": torch.arange(S) // 2,
    }
    wide = [_wide(case[name]) for name in ("hidden", "weight", "targets")]
    log_probs = reference.linear_log_probs(*wide)[0]
    # Far from where clipping begins, so that rounding does not decide on which side of it a token is.
    shift = torch.tensor([-0.6, -0.05, 0.05, 0.6]).repeat(T // 4)
    violations = reference.prompt_violations(case["costs"], case["prompt_ids"])
    return case | {
        "log_probs": log_probs.float(),
        "old_log_probs": (log_probs - shift).float(),
        "violations": violations,
    }


_HEAD = ("hidden", "weight", "targets")
_TOKENS = ("old_log_probs", "reward_advantages", "cost_advantages", "sequence_ids")


def _given(*names: str, **options: Any) -> Callable[[Callable[..., Any], dict[str, Tensor]], Any]:
    return lambda op, case: op(*(case[name] for name in names), **options)


# Public op -> what gradients flow to, and how it is called.
_CALLS: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "linear_log_probs": (("hidden", "weight"), _given(*_HEAD)),
    "prompt_violations": ((), _given("costs", "prompt_ids")),
    "generalized_advantages": ((), _given("reward_advantages", "cost_advantages", "cu_seqlens")),
    "rectified_policy_loss": (("log_probs",), _given("log_probs", *_TOKENS, "violations", multiplier=1.5)),
    "fused_rectified_policy_loss": (
        ("hidden", "weight"),
        _given(*_HEAD, *_TOKENS, "costs", "prompt_ids", multiplier=1.5),
    ),
}
