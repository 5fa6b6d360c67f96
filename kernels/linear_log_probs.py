"""Token log-probabilities and entropies of rows of logits, and the logits' gradient in their place: the row passes of
`linear_log_probs`, forward and backward. The products before and after them are the vendor library's.

Design. One program takes one row z [V] of a chunk, twice. First `row_statistics` makes one online pass, a tile at a
time: the running maximum, the sum of the other tokens' exponentials and their first moment. Then `write_gradient`
reads the row again and overwrites it:

    dz_j = a·[j = target] − p_j·(a + b·(log p_j + H)),    a = d loss/d log p, b = d loss/d H, both over temperature

Each element costs one read and one write of device memory: the second read is of a row that the same program has just
brought in, and finds it in L2, because few rows are in flight: at 16 warps and at most 64 registers a thread two rows
an SM (132·2·64 kB = 17 MB for V = 32001 in bfloat16, of the H100's 50 MB); wide rows get 32 warps and an SM of their
own.

Exactness.
- The sum leaves the target out. On a row that is sure of it, 1 − p and log p come from what the other tokens add, which
  would be lost beside the target's 1.
- In bfloat16 the product has rounded the logits to 8 bits. The target's is replaced by its own float32 dot product,
  *before* the maximum and the sum: with only one of the two replaced, log-probabilities could be positive.
- Everything is float32 in registers; a gradient is rounded once, when it is stored.

Loads are masked by the row's pitch, not by V: the pitch is a multiple of 128 bytes, so a thread loads 16 bytes at a
time. With rows of 32001 elements, or a mask that ends there, the compiler makes 2-byte loads (and spills 24 bytes a
thread). What lies between V and the pitch is never looked at, it may be NaN, and is zero after a gradient was written.

Tried and rejected, in the compiler's resource report (`python -m tests.kernels.compile_ahead`; sm_90, the fused
kernel); no device was at hand:
- a whole row of 32001 in registers, one tile of 32768: 128 registers and 80 bytes spilled with 16 warps, 40 to 184
  bytes with 32, and one row an SM either way; nothing for V = 128256. At 8192 it is 61 registers and two rows an SM;
- tiles of 16384: 119 registers, one row an SM.
And on paper:
- online maxima for each lane, with one reduction at the end: a second exponential for each element in the first pass;
- `tl.log(1 + x)` for the log-sum-exp: the rounding of 1 + x costs small x its digits; hence `log1p` below;
- the target's part in the sum: where p is near 1, the others' part in it would be lost.

Instructions bound it, not bytes: before comparisons with the target were made 32-bit and its column was left out by a
number instead of a mask, the machine code (sm_90, bfloat16) had 61 instructions a logit, statistics and gradient
together, 280 µs for 4096 x 32001 at perfect issue, where the bytes take 175 µs. Left for a device to decide:
exponentials of base 2 with the temperature folded in, one reduction for both sums, loads ahead of their use.

Not measured on a GPU yet.
"""

import torch
import triton
import triton.language as tl

# A launch setting is (elements of a tile, warps).
ROW_TILE = 8192
ELEMENTS_PER_THREAD = 16
WIDE_ROW_BYTES = 128 * 1024


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, never negative, with a relative error of a few float32 roundings."""
    # 2·atanh(s), s = x/(2 + x) <= 1/5: the first term left out is s¹¹/11, 1e-9 of the sum.
    s = x / (2.0 + x)
    q = s * s
    series = 2.0 * s * (1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9)))))
    return tl.where(x < 0.5, series, tl.log(1.0 + x))


@triton.jit
def _others_tile(row, columns, pitch, V, target, scale):
    """Columns of a row as float32, over temperature; where there is no other token than the target, a number whose
    exponential is 0 beside any maximum, and stays so when it is multiplied with it."""
    z = tl.load(row + columns, mask=columns < pitch, other=0.0).to(tl.float32) * scale
    return tl.where((columns == target) | (columns >= V), -1e20, z)


@triton.jit
def open_row(
    logits, pitch, hidden, hidden_stride_t, hidden_stride_d, weight, weight_stride_v, weight_stride_d, targets, rows,
    start, V, D, EXACT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """This program's row: (token, pointer to its logits, target, whether that is in [0, V), target's logit).

    A target out of range is replaced by 0, so that nothing is read through it. Where EXACT, the target's logit is its
    own float32 dot product, else the one of the row.
    """
    index = tl.program_id(0).to(tl.int64)
    token = start + index
    if rows is not None:
        token = tl.load(rows + token)
    target = tl.load(targets + token)
    sound = (target >= 0) & (target < V)
    target = tl.where(sound, target, 0)
    row = logits + index * pitch
    if EXACT:
        products = tl.zeros([TILE], tl.float32)
        hidden_row = hidden + index * hidden_stride_t
        weight_row = weight + target * weight_stride_v
        for first in range(0, D, TILE):
            d = first + tl.arange(0, TILE).to(tl.int64)
            h = tl.load(hidden_row + d * hidden_stride_d, mask=d < D, other=0.0).to(tl.float32)
            w = tl.load(weight_row + d * weight_stride_d, mask=d < D, other=0.0).to(tl.float32)
            products += h * w
        target_logit = tl.sum(products)
    else:
        target_logit = tl.load(row + target).to(tl.float32)
    return token, row, target, sound, target_logit


@triton.jit
def row_statistics(row, pitch, V, target, target_logit, scale, TILE: tl.constexpr):
    """(maximum, others, total, log_total, log_prob, entropy) of a row, scalars.

    With e_j = exp(z_j/temperature − maximum): `others` is their sum without the target's, `total` with it, and
    log p_j = z_j/temperature − maximum − log_total.
    """
    scaled_target = target_logit * scale
    maximum = scaled_target
    others = 0.0
    moment = 0.0  # Σ e_j·(z_j − maximum) without the target's
    column = target.to(tl.int32)
    for start in range(0, pitch, TILE):
        z = _others_tile(row, start + tl.arange(0, TILE), pitch, V, column, scale)
        highest = tl.maximum(maximum, tl.max(z))
        shrink = tl.exp(maximum - highest)
        moment = shrink * (moment + (maximum - highest) * others)
        others = shrink * others
        maximum = highest
        shifted = z - maximum
        e = tl.exp(shifted)
        others += tl.sum(e)
        moment += tl.sum(e * shifted)
    # The compiler may fuse the product and the difference: where the target is the maximum, this need not be 0.
    shifted_target = scaled_target - maximum
    shifted_target = tl.where(shifted_target > 0.0, 0.0, shifted_target)
    target_e = tl.exp(shifted_target)
    # The maximum's 1 is either target_e or within others, so the argument is not negative.
    log_total = log1p(others + (target_e - 1.0))
    total = others + target_e
    entropy = log_total - (moment + target_e * shifted_target) / total
    return maximum, others, total, log_total, shifted_target - log_total, entropy


@triton.jit
def write_gradient(
    row, pitch, V, target, scale, maximum, others, total, log_total, log_prob, entropy, a, b,
    ENTROPY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Overwrites a row by the gradient that the module's docstring gives; without ENTROPY, b is not used."""
    slope = a * scale
    at_target = slope * others / total
    entropy_slope = b * scale
    if ENTROPY:
        at_target -= entropy_slope * tl.exp(log_prob) * (log_prob + entropy)
    inverse = 1.0 / total
    column = target.to(tl.int32)
    for start in range(0, pitch, TILE):
        columns = start + tl.arange(0, TILE)
        shifted = _others_tile(row, columns, pitch, V, column, scale) - maximum
        p = tl.exp(shifted) * inverse
        gradient = -p * slope
        if ENTROPY:
            gradient -= p * (entropy_slope * (shifted - log_total + entropy))
        gradient = tl.where(columns == column, at_target, gradient)
        tl.store(row + columns, gradient.to(row.dtype.element_ty), mask=columns < pitch)


@triton.jit(do_not_specialize=["start"])
def _log_probs_kernel(
    logits, pitch, hidden, hidden_stride_t, hidden_stride_d, weight, weight_stride_v, weight_stride_d, targets, rows,
    start, V, D, scale, log_probs, entropies,
    EXACT: tl.constexpr, TILE: tl.constexpr, D_TILE: tl.constexpr,
):  # fmt: skip
    token, row, target, sound, own = open_row(
        logits, pitch, hidden, hidden_stride_t, hidden_stride_d, weight, weight_stride_v, weight_stride_d, targets,
        rows, start, V, D, EXACT, D_TILE,
    )  # fmt: skip
    maximum, others, total, log_total, log_prob, entropy = row_statistics(row, pitch, V, target, own, scale, TILE)
    tl.store(log_probs + token, tl.where(sound, log_prob, float("nan")))
    if entropies is not None:
        tl.store(entropies + token, entropy)


@triton.jit(do_not_specialize=["start"])
def _gradient_kernel(
    logits, pitch, hidden, hidden_stride_t, hidden_stride_d, weight, weight_stride_v, weight_stride_d, targets, rows,
    start, V, D, scale, grad_log_probs, grad_entropies,
    EXACT: tl.constexpr, TILE: tl.constexpr, D_TILE: tl.constexpr,
):  # fmt: skip
    token, row, target, sound, own = open_row(
        logits, pitch, hidden, hidden_stride_t, hidden_stride_d, weight, weight_stride_v, weight_stride_d, targets,
        rows, start, V, D, EXACT, D_TILE,
    )  # fmt: skip
    maximum, others, total, log_total, log_prob, entropy = row_statistics(row, pitch, V, target, own, scale, TILE)
    a = tl.where(sound, tl.load(grad_log_probs + token), float("nan"))
    b = 0.0
    if grad_entropies is not None:
        b = tl.load(grad_entropies + token)
    write_gradient(
        row, pitch, V, target, scale, maximum, others, total, log_total, log_prob, entropy, a, b,
        grad_entropies is not None, TILE,
    )  # fmt: skip


def row_arguments(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    rows: torch.Tensor | None,
    start: int,
    temperature: float,
) -> tuple[tuple, dict[str, int]]:
    """The first arguments of every kernel that takes one row a program, and its tiles and warps.

    Args:
        logits: [R, V] float32 or bfloat16, with unit stride along V. Between V and the pitch, its rows' stride, is
            memory that belongs to it.
        hidden: [R, D], the rows' hidden states.
        weight: [V, D].
        targets: [T] int64.
        rows: [N] int64, the tokens that have a row; None: all T.
        start: Which of the N rows is row 0 of `logits`.
        temperature: Divides the logits.
    """
    V, D = weight.shape
    pitch = logits.stride(0)
    width = triton.next_power_of_2(pitch)
    # 32 warps of an AMD GPU are more threads than a program may have.
    wide = width * logits.element_size() > WIDE_ROW_BYTES and torch.version.hip is None
    tile = min(width, 2 * ROW_TILE if wide else ROW_TILE)
    settings = {
        "EXACT": logits.dtype == torch.bfloat16,
        "TILE": tile,
        "D_TILE": min(triton.next_power_of_2(D), 2048),
        "num_warps": max(1, tile // (32 * ELEMENTS_PER_THREAD)),
    }
    tensors = logits, pitch, hidden, *hidden.stride(), weight, *weight.stride(), targets, rows
    return (*tensors, start, V, D, 1.0 / temperature), settings


def log_prob_rows(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    rows: torch.Tensor | None,
    start: int,
    temperature: float,
    log_probs: torch.Tensor,
    entropies: torch.Tensor | None,
) -> None:
    """Writes a chunk's log-probabilities and entropies (nats) to its tokens' places in float32 [T].

    Args: as `row_arguments`. A target out of range gives NaN.
    """
    arguments, settings = row_arguments(logits, hidden, weight, targets, rows, start, temperature)
    _log_probs_kernel[(logits.shape[0],)](*arguments, log_probs, entropies, **settings)


def gradient_rows(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    rows: torch.Tensor | None,
    start: int,
    temperature: float,
    grad_log_probs: torch.Tensor,
    grad_entropies: torch.Tensor | None,
) -> None:
    """Overwrites a chunk of logits by their gradient, from those of log-probabilities and entropies, float32 [T].

    Args: as `row_arguments`.
    """
    arguments, settings = row_arguments(logits, hidden, weight, targets, rows, start, temperature)
    _gradient_kernel[(logits.shape[0],)](*arguments, grad_log_probs, grad_entropies, **settings)
