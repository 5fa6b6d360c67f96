"""The loop over rows that the linear ops run, whatever their backend: the products are PyTorch's, and what happens to a
chunk of logits between them is the backend's *row pass*. Of the [T, V] logits no more than one chunk exists:

    rows with a target are compacted, then taken a chunk at a time:
        logits = h·Wᵀ                        one product into one reused buffer [chunk, V]
        row_pass(logits, h, …)               statistics of each row; its logits overwritten by their gradient
        dh = dlogits·W,  dW += dlogitsᵀ·h    two more products, each only if it is asked for

Where the derivatives of the loss follow from the row itself (the fused policy loss), three products suffice;
`linear_log_probs` learns them in its backward and computes the logits again: four, but for those that its forward was
asked to keep (`logits_to_keep`). All ops and both directions use this loop and the same statistics, so a row gives the
same bits in each of them, in calls with the same rows: the libraries' products may differ with the number of rows.

Chunks on a GPU. Of several, dW is a float32 sum that each one after the first reads and writes, 8·V·D bytes, and that
is cast at the end, 6·V·D: at V = 32001, D = 4096 and 3 TB/s 0.35 and 0.26 ms beside 16.1 ms of products. A single chunk
has neither; its product is rounded once, as it is stored. It holds N rows of logits, 2·N·V bytes, where several hold R
and the sum, 2·R·V + 4·V·D: up to N = R + 2·D rows, 16384 at that size, it takes no more scratch memory. In all it takes
up to 2·V·D more, since its dW stands beside the logits, and the cast one only behind them. Where no dW is wanted no sum
would have taken what N rows of logits do: they are split as if, so that a row's bits are the same. No product can take
the cast or the incoming gradient's factor upon itself: cuBLAS wants the sum in the dtype of the result, and PyTorch
wants factors on the host, which would wait for the gradient. A factor of 1 costs nothing (`scale_in_place.py`).

Odd vocabularies on a GPU. A V that is no multiple of 16 bytes, as 32001 is, keeps libraries from their fast products,
however the rows are aligned: on an H200, 16384 rows took 43.2, 31.4 and 8.4 ms, where 5.4 each is possible. So the rows
of the weight beyond the last multiple of 128 bytes are copied, with zeros up to the pitch, and take products of their
own with logits of that width (0.04 to 0.05 ms); dW has rows for all of the pitch and is one product still. To pad the
whole weight takes as long at 16384 rows, longer for fewer, and its memory.

Precision. Row passes compute in float32. Sums over chunks are float32, or, where bfloat16 products come rounded anyway
(`_ProductSum`), 16 bits wide. In bfloat16 the product rounds the logits to 8 bits; row passes therefore replace the
target's logit by its own float32 dot product, *before* the maximum and the sum: mixing the two would make
log-probabilities positive. In float16 operands are widened to float32 a slab of the vocabulary at a time and the
logits' gradient stays float32: in float16 p/(V·T) would be 0, and PyTorch's float16 products on CPUs take seconds, as
its bfloat16 products do on CPUs that have AVX2 alone, where those are widened too. So no scaling by powers of two is
needed here; it is exact, and slow on a GPU. Products in float32 are as exact as `torch.set_float32_matmul_precision`
lets them be.
"""

from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from repo_fast.ops.loss import select, valid_rows
from repo_fast.ops.validation import IGNORED, check_range

# A CPU chunk must be tall enough to hide the pass over dW that each chunk costs.
CPU_CHUNK_ROWS = 512
CPU_CHUNK_ELEMENTS = 1 << 24
CPU_MIN_ROWS = 256
# A GPU is busy with 4096 rows; twice as many halve the passes over dW, where V is small enough for that to matter.
GPU_CHUNK_ROWS = 8192
GPU_CHUNK_ELEMENTS = 1 << 29
# Of one chunk: offsets within it are of 32 bits.
MAX_CHUNK_ELEMENTS = (1 << 31) - 1
# Rows of logits start at multiples of this. V = 32001 would leave them unaligned for a GPU's vector loads and TMA; on a
# CPU its float32 product takes 1.4 times as long (one Zen 4 core).
ROW_ALIGNMENT_BYTES = 128
# With fewer columns, bfloat16 operands are widened as well: that costs little, and rounding errors do not average out.
BFLOAT16_MIN_VOCABULARY = 1024
# What a GPU loads at once, and what the sides of its fast products are multiples of.
VECTOR_BYTES = 16
# Elements of the weight, or of its gradient, that are worked on at a time.
SLAB_ELEMENTS = 1 << 22

RowPass = Callable[[Tensor, Tensor, int, int, Tensor], None]
"""`row_pass(logits, hidden, start, stop, out)` for valid rows start to stop, of which there are R: logits [R, V] with
unit stride along V, in `product_dtype`; hidden [R, D] in the same dtype. Writes the logits' gradient, if it is wanted,
to `out`: the logits themselves, or other memory like theirs. Logits that are kept stay what they are.
"""


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that the fused op keeps gradients in until the backward knows their scale: float16 would lose them."""
    return torch.float32 if dtype == torch.float16 else dtype


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether PyTorch has a library for bfloat16 products on this CPU. x86 CPUs with AVX2 alone have none."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of the operands of the products, and of the buffer of logits."""
    narrow = weight.dtype == torch.bfloat16 and weight.shape[0] >= BFLOAT16_MIN_VOCABULARY
    if weight.device.type == "cpu":
        narrow = narrow and cpu_multiplies_bfloat16()
    return torch.bfloat16 if narrow else torch.float32


def chunk_rows(device: torch.device, dtype: torch.dtype, N: int, V: int, D: int) -> int:
    """Rows of logits that are held at a time, of N. Depends on nothing else, so that all ops split rows alike.

    Args:
        device: Where they are.
        dtype: Of the products.
        N, V, D: Valid rows, vocabulary, hidden size.
    """
    if device.type == "cpu":
        return max(1, min(N, max(CPU_MIN_ROWS, min(CPU_CHUNK_ROWS, CPU_CHUNK_ELEMENTS // V))))
    rows = min(GPU_CHUNK_ROWS, max(1, GPU_CHUNK_ELEMENTS // V))
    rows -= rows % 256 if rows > 256 else 0
    # One chunk needs no sum: its logits may take as much scratch memory as that would.
    sum_bytes = 0 if dtype == torch.float32 else 4 if torch.version.hip is None else 2
    limit = min(rows + sum_bytes * D // dtype.itemsize, MAX_CHUNK_ELEMENTS // row_pitch(V, dtype))
    return max(1, N if N <= limit else min(N, rows))


def row_pitch(V: int, dtype: torch.dtype) -> int:
    """From one row of logits to the next, in elements."""
    alignment = ROW_ALIGNMENT_BYTES // dtype.itemsize
    return -(-V // alignment) * alignment


def product_columns(device: torch.device, dtype: torch.dtype, V: int) -> int:
    """Columns of logits that the products take: V, or all of the pitch where a GPU has no fast product for V."""
    odd = device.type != "cpu" and V * dtype.itemsize % VECTOR_BYTES != 0
    return row_pitch(V, dtype) if odd else V


def logits_to_keep(hidden: Tensor, weight: Tensor, budget: int) -> Tensor:
    """New memory [R, V] for the logits that a forward keeps for its backward: of all T rows, or of as many whole chunks
    as `budget` bytes hold. How many rows have a target is not known here: those that have one come first.
    """
    T, (V, D), dtype = hidden.shape[0], weight.shape, product_dtype(weight)
    pitch = row_pitch(V, dtype)
    rows = budget // (pitch * dtype.itemsize)
    rows = T if T <= rows else rows - rows % chunk_rows(hidden.device, dtype, T, V, D)
    return hidden.new_empty(rows, pitch, dtype=dtype)[:, :V]


def add_product(high: Tensor, low: Tensor, product: Tensor) -> None:
    """high + low += product, all in bfloat16: a sum of 16 bits, of which `high` is the rounded value."""
    total = high.float().add_(low.float().add_(product))
    high.copy_(total)
    low.copy_(total.sub_(high))


def find_rows(op: str, targets: Tensor, V: int) -> Tensor | None:
    """Indices of the rows that are not ignored, None if all. Reads their number back to the host, the one time.

    Raises:
        ValueError: a target of theirs is outside [0, V). Not looked at on a GPU.
    """
    rows = valid_rows(targets != IGNORED)
    if targets.is_cpu:
        check_range(op, "targets that are not -100", select(targets, rows), 0, V, "V")
    return rows


def sweep(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    row_pass: RowPass,
    need_hidden: bool = False,
    need_weight: bool = False,
    add_product: Callable[[Tensor, Tensor, Tensor], None] = add_product,
    keep: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Takes the valid rows of `hidden` [T, D] (None: all) past `weight` [V, D], a chunk at a time.

    Args:
        hidden, weight: float32, bfloat16 or float16, of one dtype.
        rows: As from `find_rows`, int64 [N].
        row_pass: What happens to each chunk.
        need_hidden, need_weight: Which gradients are wanted.
        add_product: What does the same as the function of this name.
        keep: As from `logits_to_keep`: is given the logits of the chunks that it has room for, then zeros.
        kept: What a sweep over the same rows was given as `keep`: those logits are not computed again.

    Returns:
        (grad_hidden [T, D], grad_weight [V, D]), or empty where not needed. Both are in `gradient_dtype`, or in float32
        where rounding must wait.
    """
    (V, D), device = weight.shape, hidden.device
    N = hidden.shape[0] if rows is None else rows.numel()
    dtype = product_dtype(weight)
    chunk = chunk_rows(device, dtype, N, V, D)
    columns = product_columns(device, dtype, V)

    grad_hidden = torch.empty(0, dtype=gradient_dtype(hidden.dtype), device=device)
    if need_hidden:
        new = torch.empty if rows is None else torch.zeros
        grad_hidden = new(hidden.shape, dtype=grad_hidden.dtype, device=device)
    sum_weight = _ProductSum((columns, D), dtype, device, N > chunk, add_product) if need_weight else None

    filled = 0
    held = chunk if keep is None or keep.shape[0] < N else 0
    logits = torch.empty(held, row_pitch(V, dtype), dtype=dtype, device=device)[:, :V]
    for start in range(0, N, chunk):
        stop = min(start + chunk, N)
        h = (hidden[start:stop] if rows is None else hidden.index_select(0, rows[start:stop])).to(dtype)
        z = dz = logits[: stop - start]
        if kept is not None and stop <= kept.shape[0]:
            z = kept[start:stop]
        else:
            if keep is not None and stop <= keep.shape[0]:
                z = dz = keep[start:stop]
                filled = stop
            # The device has waited for the host, which knows N only now: of the products the large one comes first.
            for part, w in _slabs(weight):
                torch.mm(h, w.t(), out=_columns(z, columns)[:, part])
        row_pass(z, h, start, stop, dz)
        if columns > V and (need_hidden or need_weight):
            dz = _columns(dz, columns)
            dz[:, V:].zero_()
        if need_hidden:
            _store_grad_hidden(grad_hidden, dz, weight, start, stop, rows)
        if sum_weight is not None:
            sum_weight.add(dz.t(), h)
    if keep is not None:
        keep[filled:].zero_()
    if sum_weight is None:
        return grad_hidden, torch.empty(0, dtype=gradient_dtype(weight.dtype), device=device)
    return grad_hidden, (sum_weight.total if N > 0 else sum_weight.total.zero_())[:V]


class _ProductSum:
    """total = the sum over chunks of dzᵀ·h, of the given shape.

    One product needs no sum, and is rounded once. Sums have 16 bits at least: CUDA adds to float32 within the product.
    On CPUs and ROCm bfloat16 products come rounded: they are made a slab of V at a time, which stays in a CPU's cache,
    and added to a pair of bfloat16 numbers, total and low.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        several: bool,
        add_product: Callable[[Tensor, Tensor, Tensor], None],
    ) -> None:
        self.first = True
        self.low = None
        rounded = several and dtype != torch.float32
        if rounded and (device.type == "cpu" or torch.version.hip is not None):
            self.low = torch.empty(shape, dtype=dtype, device=device)
            self.slab = max(1, SLAB_ELEMENTS // max(shape[1], 1))
            self.product = torch.empty(min(self.slab, shape[0]), shape[1], dtype=dtype, device=device)
            self.add_product = add_product
        elif rounded:
            dtype = torch.float32
        self.total = torch.empty(shape, dtype=dtype, device=device)

    def add(self, left: Tensor, right: Tensor) -> None:
        """total += left @ right."""
        total, first, self.first = self.total, self.first, False
        if self.low is not None:
            self._add_to_pair(self.low, left, right, first)
        elif left.dtype == total.dtype:
            torch.mm(left, right, out=total) if first else total.addmm_(left, right)
        elif first:
            torch.mm(left, right, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, left, right, out_dtype=total.dtype, out=total)

    def _add_to_pair(self, low: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
        if first:
            torch.mm(left, right, out=self.total)
            low.zero_()
            return
        for start in range(0, low.shape[0], self.slab):
            part = slice(start, min(start + self.slab, low.shape[0]))
            product = torch.mm(left[part], right, out=self.product[: part.stop - start])
            self.add_product(self.total[part], low[part], product)


def _columns(logits: Tensor, columns: int) -> Tensor:
    """The first columns of rows of logits, of which V are seen and the others lie between V and the pitch."""
    return logits.as_strided((logits.shape[0], columns), logits.stride())


def _slabs(weight: Tensor, backwards: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """The weight as the products take it, in parts: columns of logits, and their rows of the weight in `product_dtype`,
    zeros beyond V. The rows are the weight's own memory but for those that are widened or padded.
    """
    (V, D), dtype = weight.shape, product_dtype(weight)
    columns, alignment = product_columns(weight.device, dtype, V), ROW_ALIGNMENT_BYTES // dtype.itemsize
    step = V
    if weight.dtype != dtype:
        step = max(1, SLAB_ELEMENTS // max(D, 1))
        step -= step % alignment if step > alignment else 0
    elif columns > V:
        step = V - V % alignment or V
    starts = range(0, V, step)
    for start in reversed(starts) if backwards else starts:
        stop = min(start + step, V)
        rows = weight[start:stop].to(dtype)
        if stop == V < columns:
            stop, rows = columns, F.pad(rows, (0, 0, 0, columns - V))
        yield slice(start, stop), rows


def _store_grad_hidden(
    grad_hidden: Tensor, dz: Tensor, weight: Tensor, start: int, stop: int, rows: Tensor | None
) -> None:
    """grad_hidden[valid rows start to stop] = dz @ weight."""
    own = slice(start, stop)
    direct = rows is None and grad_hidden.dtype == dz.dtype
    product = grad_hidden[own] if direct else dz.new_empty(stop - start, grad_hidden.shape[1])
    # Of an odd vocabulary the small part comes first: in effect the sum is then rounded once.
    for i, (part, w) in enumerate(_slabs(weight, backwards=True)):
        if i == 0:
            torch.mm(dz[:, part], w, out=product)
        else:
            product.addmm_(dz[:, part], w)
    if rows is not None:
        grad_hidden.index_copy_(0, rows[own], product.to(grad_hidden.dtype))
    elif not direct:
        grad_hidden[own] = product
