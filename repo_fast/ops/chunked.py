"""The linear ops in PyTorch, without ever holding the [T, V] logits: the `torch` backend.

Rows with a target are compacted first, then taken a chunk at a time:

    logits = h·Wᵀ                     one product into one reused buffer [chunk, V]
    for a block of the chunk's rows:  small enough to stay in the processor's cache through all of its passes
        softmax statistics -> log-probabilities, entropies -> d loss / d those -> logits overwritten by their gradient
    dh = dlogits·W,  dW += dlogitsᵀ·h  two more products

The derivative of a loss in log p and entropy H of a row, a and b, is all that the row's gradient needs:

    dz_j = a·[j = target] − p_j·(a + b·(log p_j + H))

Where the derivatives follow from the row itself (the fused policy loss), three products suffice; `linear_log_probs`
learns them in its backward and computes the logits again: four. All ops run the same `_sweep`, so one row gives the
same bits in each of them.

Precision. Statistics, gradients of the logits and sums over chunks are float32. In bfloat16 the product rounds the
logits to 8 bits; the target's logit is therefore replaced by its own float32 dot product, *before* the maximum and
the sum: mixing the two would make log-probabilities positive. In float16 operands are widened to float32 a slab of the
vocabulary at a time and the logits' gradient stays float32: in float16 p/(V·T) would be 0, and PyTorch's float16
products on CPUs take seconds. So no scaling by powers of two is needed here.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from repo_fast.ops.loss import (
    Objective,
    gather_tokens,
    select,
    token_loss,
    unsafe_fraction,
    valid_rows,
)
from repo_fast.ops.validation import IGNORED, check_range
from repo_fast.ops.violations import prompt_violations

# A CPU chunk must be tall enough to hide the pass over dW that each chunk costs; a GPU wants ~4096 rows to be busy.
CPU_CHUNK_ROWS = 512
CPU_CHUNK_ELEMENTS = 1 << 24
CPU_MIN_ROWS = 256
GPU_CHUNK_ROWS = 4096
GPU_CHUNK_ELEMENTS = 1 << 28
# float32 elements of a block, small enough for two such buffers to stay in the cache of a CPU: the passes over the rows
# take 54 ms instead of the 107 ms of one whole chunk (256 x 32001, one Zen 4 core). A GPU takes whole chunks.
CPU_BLOCK_ELEMENTS = 1 << 19
# With fewer columns, bfloat16 operands are widened as well: that costs little, and rounding errors do not average out.
BFLOAT16_MIN_VOCABULARY = 1024
# Elements of the weight that are widened at a time.
SLAB_ELEMENTS = 1 << 22

Slopes = tuple[Tensor, Tensor | None]  # d loss / d log-probability and, where it has one, d loss / d entropy, per row


class Sweep(NamedTuple):
    """Results of a pass over N valid rows. Gradients are for all T rows, float32 or as wide as the inputs; None if not
    asked for.
    """

    log_probs: Tensor
    entropy: Tensor | None
    grad_hidden: Tensor | None
    grad_weight: Tensor | None


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that the fused op keeps gradients in until the backward knows their scale: float16 would lose them."""
    return torch.float32 if dtype == torch.float16 else dtype


def chunk_rows(device: torch.device, V: int) -> int:
    """Rows of logits that are held at a time. Depends on nothing else, so that all ops split rows alike."""
    if device.type == "cpu":
        return max(CPU_MIN_ROWS, min(CPU_CHUNK_ROWS, CPU_CHUNK_ELEMENTS // V))
    return max(1, min(GPU_CHUNK_ROWS, GPU_CHUNK_ELEMENTS // V))


def block_rows(device: torch.device, V: int) -> int:
    """Rows whose passes run back to back."""
    return max(1, CPU_BLOCK_ELEMENTS // V) if device.type == "cpu" else chunk_rows(device, V)


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of the operands of the products, and of the buffer of logits."""
    wide = weight.dtype != torch.bfloat16 or weight.shape[0] < BFLOAT16_MIN_VOCABULARY
    return torch.float32 if wide else torch.bfloat16


def _slabs(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The weight in the dtype of the products: itself, or widened slabs of its rows."""
    V, D = weight.shape
    if weight.dtype == product_dtype(weight):
        yield slice(0, V), weight
        return
    step = max(1, SLAB_ELEMENTS // max(D, 1))
    for start in range(0, V, step):
        part = slice(start, min(start + step, V))
        yield part, weight[part].float()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where `total` is float32 and the operands may be narrower."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:  # no product with a wider result on CPUs: each chunk's is rounded once, their sum is not
        total.add_(left @ right)


def _target_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.mul(hidden.float(), weight.index_select(0, targets).float()).sum(1)


def _valid_targets(op: str, targets: Tensor, V: int) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """(rows, their targets, what to add to their log-probabilities): NaN where a target is out of range on a GPU."""
    rows = valid_rows(targets != IGNORED)
    chosen = select(targets, rows)
    check_range(op, "targets that are not -100", chosen, 0, V, "V")
    if chosen.is_cpu:
        return rows, chosen, None
    sound = (chosen >= 0) & (chosen < V)
    poison = torch.zeros_like(chosen, dtype=torch.float32).masked_fill_(~sound, torch.nan)
    return rows, torch.where(sound, chosen, 0), poison


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
        entropy = log_total - (torch.mul(others, z).sum(1) + target_exp * target_z) / total
    return _Softmax(z, others, others_total, total, log_total, target_z - log_total, entropy)


def _logit_gradient(row: _Softmax, target: Tensor, a: Tensor, b: Tensor | None) -> Tensor:
    """a·[j = target] − p_j·(a + b·(log p_j + H)) [R, V] in float32, in the memory of the exponentials."""
    at_target = a * row.others_total / row.total
    if b is None or row.entropy is None:
        gradient = row.others.mul_((-a / row.total).unsqueeze(1))
    else:
        at_target = at_target - b * row.log_probs.exp() * (row.log_probs + row.entropy)
        constant = (a + b * (row.entropy - row.log_total)) / row.total
        factors = row.shifted.mul_((-b / row.total).unsqueeze(1)).sub_(constant.unsqueeze(1))
        gradient = row.others.mul_(factors)
    return gradient.scatter_(1, target, at_target.unsqueeze(1))


def _sweep(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    targets: Tensor,
    poison: Tensor | None,
    temperature: float,
    want_entropy: bool,
    slopes: Callable[[int, int, Tensor, Tensor | None], Slopes] | None = None,
    need_hidden: bool = False,
    need_weight: bool = False,
) -> Sweep:
    """One pass over the valid rows (None: all of `hidden` [T, D]); `targets` and `poison` are already compact, [N].

    `slopes(start, stop, log_probs, entropy)` is called once for each block, in order, with the results of valid rows
    start to stop; it is only called if a gradient is needed.
    """
    N, (V, D), device = targets.numel(), weight.shape, hidden.device
    scale = 1.0 / temperature
    dtype = product_dtype(weight)
    narrow = dtype == torch.bfloat16
    chunk = max(1, min(chunk_rows(device, V), N))
    block = min(block_rows(device, V), chunk)

    log_probs = torch.empty(N, dtype=torch.float32, device=device)
    entropy = torch.empty_like(log_probs) if want_entropy else None
    grad_hidden = grad_weight = None
    if need_hidden:
        new = torch.empty if rows is None else torch.zeros
        grad_hidden = new(hidden.shape, dtype=gradient_dtype(hidden.dtype), device=device)
    if need_weight:
        one_product = N <= chunk
        new = torch.empty if one_product and N > 0 else torch.zeros
        grad_weight = new((V, D), dtype=dtype if one_product else torch.float32, device=device)

    logits = torch.empty(chunk, V, dtype=dtype, device=device)
    wide = torch.empty(block, V, dtype=torch.float32, device=device) if narrow else None
    scratch = torch.empty(block, V, dtype=torch.float32, device=device)

    for start in range(0, N, chunk):
        stop = min(start + chunk, N)
        h = (hidden[start:stop] if rows is None else hidden.index_select(0, rows[start:stop])).to(dtype)
        z_chunk = logits[: stop - start]
        for part, w in _slabs(weight):
            torch.mm(h, w.t(), out=z_chunk[:, part])
        exact = _target_logits(h, weight, targets[start:stop]) if narrow else None

        for first in range(start, stop, block):
            last = min(first + block, stop)
            own = slice(first - start, last - start)
            z = z_chunk[own] if wide is None else wide[: last - first].copy_(z_chunk[own])
            target = targets[first:last].unsqueeze(1)
            if exact is not None:
                z.scatter_(1, target, exact[own].unsqueeze(1))
            if scale != 1.0:
                z.mul_(scale)
            row = _softmax_statistics(z, target, scratch[: last - first], want_entropy)
            if poison is not None:
                row.log_probs.add_(poison[first:last])
            log_probs[first:last] = row.log_probs
            if entropy is not None and row.entropy is not None:
                entropy[first:last] = row.entropy
            if slopes is not None and (need_hidden or need_weight):
                a, b = slopes(first, last, row.log_probs, row.entropy)
                z_chunk[own] = _logit_gradient(row, target, a * scale, None if b is None else b * scale)

        if grad_hidden is not None:
            _store_grad_hidden(grad_hidden, z_chunk, weight, start, stop, rows)
        if grad_weight is not None:
            if one_product:
                torch.mm(z_chunk.t(), h, out=grad_weight)
            else:
                _add_product(grad_weight, z_chunk.t(), h)

    return Sweep(log_probs, entropy, grad_hidden, grad_weight)


def _store_grad_hidden(
    grad_hidden: Tensor, dz: Tensor, weight: Tensor, start: int, stop: int, rows: Tensor | None
) -> None:
    """grad_hidden[valid rows start to stop] = dz @ weight."""
    own = slice(start, stop)
    direct = rows is None and grad_hidden.dtype == dz.dtype
    product = grad_hidden[own] if direct else dz.new_empty(stop - start, grad_hidden.shape[1])
    for part, w in _slabs(weight):
        if part.start == 0:
            torch.mm(dz[:, part], w, out=product)
        else:
            product.addmm_(dz[:, part], w)
    if rows is not None:
        grad_hidden.index_copy_(0, rows[own], product.to(grad_hidden.dtype))
    elif not direct:
        grad_hidden[own] = product


def _expand(compact: Tensor, rows: Tensor | None, T: int) -> Tensor:
    """[N] values of the valid rows -> [T], 0 elsewhere."""
    return compact if rows is None else compact.new_zeros(T).index_copy_(0, rows, compact)


def _or_empty(tensor: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor in `dtype`. Registered ops cannot return None: an output that was not asked for is empty."""
    return torch.empty(0, dtype=dtype, device=device) if tensor is None else tensor.to(dtype)


def linear_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, return_entropy: bool
) -> tuple[Tensor, Tensor]:
    """Implements the registered op: (log_probs [T], entropy [T] or empty), one product."""
    rows, chosen, poison = _valid_targets("linear_log_probs", targets, weight.shape[0])
    result = _sweep(hidden, weight, rows, chosen, poison, temperature, return_entropy)
    T = targets.numel()
    entropy = None if result.entropy is None else _expand(result.entropy, rows, T)
    return _expand(result.log_probs, rows, T), _or_empty(entropy, torch.float32, hidden.device)


def linear_log_probs_backward(
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Implements the registered op: (grad_hidden [T, D] or empty, grad_weight [V, D] or empty)."""
    rows, chosen, poison = _valid_targets("linear_log_probs", targets, weight.shape[0])
    a = select(grad_log_probs, rows)
    b = None if grad_entropy is None else select(grad_entropy, rows)

    def slopes(start: int, stop: int, log_probs: Tensor, entropy: Tensor | None) -> Slopes:
        return a[start:stop], None if b is None else b[start:stop]

    result = _sweep(hidden, weight, rows, chosen, poison, temperature, b is not None, slopes, need_hidden, need_weight)
    return (
        _or_empty(result.grad_hidden, hidden.dtype, hidden.device),
        _or_empty(result.grad_weight, hidden.dtype, hidden.device),
    )


def fused_rectified_policy_loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_log_probs: Tensor | None,
    reward_advantages: Tensor,
    cost_advantages: Tensor,
    sequence_ids: Tensor,
    costs: Tensor | None,
    prompt_ids: Tensor | None,
    multiplier: Tensor,
    scope: str,
    threshold: float,
    rectify: bool,
    surrogate: str,
    clip_low: float,
    clip_high: float,
    temperature: float,
    ref_log_probs: Tensor | None,
    kl_coefficient: float,
    entropy_coefficient: float,
    reduction: str,
    denominator: Tensor | None,
    violations: Tensor | None,
    importance_weights: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Implements the registered op.

    Returns:
        loss, log_probs [T], entropy [T], violations [S], clip_fraction, approx_kl, unsafe_fraction, and the gradients
        of the loss, or empty tensors: grad_hidden [T, D], grad_weight [V, D], both in `gradient_dtype`.
    """
    op = "fused_rectified_policy_loss"
    objective = Objective(rectify, surrogate, clip_low, clip_high, kl_coefficient, reduction, entropy_coefficient)
    rows, chosen, poison = _valid_targets(op, targets, weight.shape[0])
    if violations is not None:
        violations = violations.clone()  # an output of the op must not be one of its inputs
    elif costs is not None and prompt_ids is not None:
        violations = prompt_violations(costs, prompt_ids, scope, threshold)
    else:
        raise ValueError(f"{op}: give violations, or costs and prompt_ids")
    tokens = gather_tokens(
        op,
        rows,
        old_log_probs,
        reward_advantages,
        cost_advantages,
        sequence_ids,
        violations,
        multiplier,
        ref_log_probs,
        denominator,
        importance_weights,
        objective,
    )
    N, T = chosen.numel(), targets.numel()
    entropy_slopes = -entropy_coefficient * tokens.factors if entropy_coefficient > 0 else None

    def slopes(start: int, stop: int, log_probs: Tensor, entropy: Tensor | None) -> Slopes:
        part = tokens.part(start, stop)
        b = None if entropy_slopes is None else entropy_slopes[start:stop]
        return token_loss(log_probs, part, objective).slope * part.factors, b

    result = _sweep(hidden, weight, rows, chosen, poison, temperature, True, slopes, need_hidden, need_weight)
    assert result.entropy is not None
    terms = token_loss(result.log_probs, tokens, objective)
    per_token = terms.loss
    if entropy_coefficient > 0:
        per_token = per_token - entropy_coefficient * result.entropy
    kept = gradient_dtype(hidden.dtype)
    return (
        (per_token * tokens.factors).sum(),
        _expand(result.log_probs, rows, T),
        _expand(result.entropy, rows, T),
        violations,
        terms.clipped.sum() / max(N, 1),
        terms.divergence.sum() / max(N, 1),
        unsafe_fraction(violations),
        _or_empty(result.grad_hidden, kept, hidden.device),
        _or_empty(result.grad_weight, kept, hidden.device),
    )
