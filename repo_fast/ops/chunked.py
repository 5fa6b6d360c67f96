"""The linear ops in PyTorch: the `torch` backend. Its row pass takes a chunk of logits (see `sweep.py`) a block of rows
at a time, small enough to stay in a processor's cache through all of the passes over it:

    softmax statistics -> log-probabilities, entropies -> d loss / d those -> logits overwritten by their gradient

The derivative of a loss in log p and entropy H of a row, a and b, is all that the row's gradient needs:

    dz_j = a·[j = target] − p_j·(a + b·(log p_j + H))

over the temperature, and times 1 − tanh²(z_j / softcap) where there is a cap.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from repo_fast.ops.arguments import FusedArguments
from repo_fast.ops.loss import gather_tokens, select, token_loss, unsafe_fraction
from repo_fast.ops.sweep import find_rows, gradient_dtype, logits_to_keep, sweep
from repo_fast.ops.violations import given_or_computed, prompt_violations

# float32 elements of a block, small enough for two such buffers to stay in the cache of a CPU: the passes over the rows
# take 54 ms instead of the 107 ms of one whole chunk (256 x 32001, one Zen 4 core). A GPU is filled by more.
CPU_BLOCK_ELEMENTS = 1 << 19
GPU_BLOCK_ELEMENTS = 1 << 26
# Beside the largest logit a number whose exponential is 0, and so is the product of the two.
_NOTHING = -1e12

Slopes = tuple[Tensor, Tensor | None]  # d loss / d log-probability and, where it has one, d loss / d entropy, per row


class _Softmax(NamedTuple):
    """Softmax statistics of R rows of logits z [R, V], in float32. Sums leave the target out: on a row that is sure of
    it, 1 − p and log p come from what the other logits add, which would be lost beside the target's 1.
    """

    shifted: Tensor  # [R, V]: z − max, in the memory of z
    others: Tensor  # [R, V]: exp(z − max), 0 at the target, in scratch memory
    others_total: Tensor  # [R]
    total: Tensor  # [R]: with the target
    log_total: Tensor  # [R]
    log_probs: Tensor  # [R], of the target
    entropy: Tensor | None  # [R]


def _cap(z: Tensor, softcap: float, scale: float, want_steepness: bool) -> Tensor | None:
    """z = scale·softcap·tanh(z / softcap), in place; returns d/dz of softcap·tanh(z / softcap), if it is wanted."""
    z.mul_(1.0 / softcap)
    # 1 − tanh² would lose its digits near the cap.
    steepness = z.cosh().reciprocal_().square_() if want_steepness else None
    z.tanh_().mul_(scale * softcap)
    return steepness


def _softmax_statistics(z: Tensor, target: Tensor, scratch: Tensor, want_entropy: bool) -> _Softmax:
    """Works in place on z [R, V] and scratch [R, V]; target is [R, 1]."""
    z.sub_(z.amax(1, keepdim=True))
    target_z = z.gather(1, target).squeeze(1)
    target_exp = target_z.exp()
    others = torch.exp(z, out=scratch).scatter_(1, target, 0.0)
    others_total = others.sum(1)
    # The maximum's 1 is either target_exp or within others_total, so this is never below log 1.
    log_total = (others_total + (target_exp - 1)).log1p()
    total = others_total + target_exp
    entropy = None
    if want_entropy:
        # Logits that overflow to -infinity have the probability 0, and add 0.
        z.clamp_(min=_NOTHING)
        entropy = log_total - (torch.mul(others, z).sum(1) + target_exp * target_z.clamp(min=_NOTHING)) / total
    return _Softmax(z, others, others_total, total, log_total, target_z - log_total, entropy)


def _logit_gradient(row: _Softmax, target: Tensor, a: Tensor, b: Tensor | None) -> Tensor:
    """a·[j = target] − p_j·(a + b·(log p_j + H)) [R, V] in float32, in the memory of the exponentials."""
    at_target = a * row.others_total / row.total
    if b is None or row.entropy is None:
        gradient = row.others.mul_((-a / row.total).unsqueeze(1))
    else:
        at_target = at_target - b * row.log_probs.exp() * (row.log_probs.clamp(min=_NOTHING) + row.entropy)
        constant = (a + b * (row.entropy - row.log_total)) / row.total
        factors = row.shifted.mul_((-b / row.total).unsqueeze(1)).sub_(constant.unsqueeze(1))
        gradient = row.others.mul_(factors)
    return gradient.scatter_(1, target, at_target.unsqueeze(1))


class _Rows:
    """The row pass, and its results over N valid rows: `log_probs` and, if wanted, `entropy`, float32 [N].

    `slopes(start, stop, log_probs, entropy)`, if given, is called once for each block, in order, with the results of
    valid rows start to stop; the gradient of the block's logits is then written. `keep` says that the logits are
    wanted as they were.
    """

    def __init__(
        self,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        softcap: float | None,
        want_entropy: bool,
        slopes: Callable[[int, int, Tensor, Tensor | None], Slopes] | None = None,
        keep: bool = False,
    ) -> None:
        V = weight.shape[0]
        self.weight, self.slopes, self.keep = weight, slopes, keep
        self.scale, self.softcap = 1.0 / temperature, softcap
        self.block = max(1, (CPU_BLOCK_ELEMENTS if targets.is_cpu else GPU_BLOCK_ELEMENTS) // V)
        # On the CPU targets have been checked. Elsewhere NaN marks the rows whose target is out of range.
        self.poison = None
        if not targets.is_cpu:
            sound = (targets >= 0) & (targets < V)
            self.poison = torch.zeros_like(targets, dtype=torch.float32).masked_fill_(~sound, torch.nan)
            targets = torch.where(sound, targets, 0)
        self.targets = targets
        self.log_probs = torch.empty(targets.shape, dtype=torch.float32, device=targets.device)
        self.entropy = torch.empty_like(self.log_probs) if want_entropy else None

    def __call__(self, logits: Tensor, hidden: Tensor, start: int, stop: int, out: Tensor) -> None:
        exact = None
        block = min(self.block, stop - start)
        scratch = torch.empty(block, logits.shape[1], dtype=torch.float32, device=logits.device)
        # Works in the memory of the logits where they are float32 and nobody wants them afterwards. With a cap, bits
        # would depend on their layout: PyTorch's tanh is another one at the end of what it can take in vectors.
        kept = self.keep or out is not logits or self.softcap is not None
        wide = torch.empty_like(scratch) if kept or logits.dtype != torch.float32 else None
        if logits.dtype != torch.float32:
            own_rows = self.weight.index_select(0, self.targets[start:stop])
            exact = torch.mul(hidden.float(), own_rows.float()).sum(1)
        for first in range(start, stop, block):
            last = min(first + block, stop)
            own = slice(first - start, last - start)
            z = logits[own] if wide is None else wide[: last - first].copy_(logits[own])
            target = self.targets[first:last].unsqueeze(1)
            if exact is not None:
                z.scatter_(1, target, exact[own].unsqueeze(1))
            steepness = None
            if self.softcap is not None:
                steepness = _cap(z, self.softcap, self.scale, want_steepness=self.slopes is not None)
            elif self.scale != 1.0:
                z.mul_(self.scale)
            row = _softmax_statistics(z, target, scratch[: last - first], self.entropy is not None)
            if self.poison is not None:
                row.log_probs.add_(self.poison[first:last])
            self.log_probs[first:last] = row.log_probs
            if self.entropy is not None and row.entropy is not None:
                self.entropy[first:last] = row.entropy
            if self.slopes is not None:
                a, b = self.slopes(first, last, row.log_probs, row.entropy)
                gradient = _logit_gradient(row, target, a * self.scale, None if b is None else b * self.scale)
                out[own] = gradient if steepness is None else gradient.mul_(steepness)


def _expand(compact: Tensor, rows: Tensor | None, T: int) -> Tensor:
    """[N] values of the valid rows -> [T], 0 elsewhere."""
    return compact if rows is None else compact.new_zeros(T).index_copy_(0, rows, compact)


def _expand_entropy(row_pass: _Rows, rows: Tensor | None, T: int) -> Tensor:
    return row_pass.log_probs.new_empty(0) if row_pass.entropy is None else _expand(row_pass.entropy, rows, T)


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    return_entropy: bool,
    logits_budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Implements the registered op: (log_probs [T], entropy [T] or empty, kept logits), one product."""
    rows = find_rows("linear_log_probs", targets, weight.shape[0])
    row_pass = _Rows(weight, select(targets, rows), temperature, softcap, return_entropy, keep=logits_budget > 0)
    keep = logits_to_keep(hidden, weight, logits_budget)
    sweep(hidden, weight, rows, row_pass, keep=keep)
    T = targets.numel()
    return _expand(row_pass.log_probs, rows, T), _expand_entropy(row_pass, rows, T), keep


def linear_log_probs_backward(
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    kept: Tensor,
    temperature: float,
    softcap: float | None,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Implements the registered op: (grad_hidden [T, D] or empty, grad_weight [V, D] or empty)."""
    rows = find_rows("linear_log_probs", targets, weight.shape[0])
    a = select(grad_log_probs, rows)
    b = None if grad_entropy is None else select(grad_entropy, rows)

    def slopes(start: int, stop: int, log_probs: Tensor, entropy: Tensor | None) -> Slopes:
        return a[start:stop], None if b is None else b[start:stop]

    row_pass = _Rows(weight, select(targets, rows), temperature, softcap, b is not None, slopes)
    grad_hidden, grad_weight = sweep(hidden, weight, rows, row_pass, need_hidden, need_weight, kept=kept)
    return grad_hidden.to(hidden.dtype), grad_weight.to(hidden.dtype)


def fused_rectified_policy_loss_and_gradients(a: FusedArguments) -> tuple[Tensor, ...]:
    """Implements the registered op, whose results it returns."""
    op = "fused_rectified_policy_loss"
    rows = find_rows(op, a.targets, a.weight.shape[0])
    violations = given_or_computed(a, prompt_violations)
    tokens = gather_tokens(op, rows, a, violations)
    entropy_slopes = -a.entropy_coefficient * tokens.factors if a.entropy_coefficient > 0 else None

    def slopes(start: int, stop: int, log_probs: Tensor, entropy: Tensor | None) -> Slopes:
        part = tokens.part(start, stop)
        b = None if entropy_slopes is None else entropy_slopes[start:stop]
        return token_loss(log_probs, part, a).slope * part.factors, b

    chosen = select(a.targets, rows)
    wanted = slopes if a.need_hidden or a.need_weight else None
    row_pass = _Rows(a.weight, chosen, a.temperature, a.softcap, a.entropy, wanted)
    grad_hidden, grad_weight = sweep(a.hidden, a.weight, rows, row_pass, a.need_hidden, a.need_weight)
    terms = token_loss(row_pass.log_probs, tokens, a)
    per_token = terms.loss
    if a.entropy_coefficient > 0:
        assert row_pass.entropy is not None
        per_token = per_token - a.entropy_coefficient * row_pass.entropy
    N, T, kept = chosen.numel(), a.targets.numel(), gradient_dtype(a.hidden.dtype)
    return (
        (per_token * tokens.factors).sum(),
        _expand(row_pass.log_probs, rows, T),
        _expand_entropy(row_pass, rows, T),
        violations,
        terms.clipped.sum() / max(N, 1),
        terms.divergence.sum() / max(N, 1),
        unsafe_fraction(violations),
        grad_hidden.to(kept),
        grad_weight.to(kept),
    )
