"""What the pieces of the loss head cost on a GPU, each by itself.

    python -m bench.gpu.first_contact.probe OUT.jsonl

    attention   torch's variable-length attention beside each sequence alone, in float32
    products    those of the head, for rows of V logits, rows that are padded, and a weight that is padded: time and
                names of the kernels; the sum of the weight's gradient in the products' dtype and in float32
    rows        the row passes of repo_fast.kernels.linear_log_probs, with entropies and without
    op          the whole op by the rows of a chunk and the dtype of that sum: time, errors, scratch memory; what host
                and device do when in one call, which tells how long the device waits, and for what

A line of JSON a measurement, in OUT.jsonl and on the screen, as soon as it is made: what is cut off leaves what it had.
A measurement that fails says so in its line. Times are medians in milliseconds, taken with the device busy.
Without a GPU everything runs in tiny sizes on the CPU, as a test of the probe itself.
"""

import argparse
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.loss_head.cases import make_case
from bench.loss_head.check import truth
from bench.loss_head.chunks import chunks_of, rounded_sums
from bench.loss_head.peers import PEERS, PRODUCTS
from bench.measuring.machine import device_name
from bench.measuring.measure import Task, median_ms, peak_scratch, synchronize

TRIALS = 7
OURS = PEERS["repo_fast"]
NAME_LENGTH = 70
TIMELINE_EVENTS = 120
# Between rows of logits, in bytes.
ALIGNMENT_BYTES = 128


class Piece(NamedTuple):
    """A measurement: what it is, of what, and a function that makes it."""

    name: str
    facts: dict[str, Any]
    measure: Callable[[], dict[str, Any]]


class Sizes(NamedTuple):
    """What is measured.

    Attributes:
        heads: (V, R), vocabulary and rows of logits.
        ops: (T, V, share of the tokens that is ignored).
        D: Hidden size.
        chunks: Rows of a chunk.
    """

    heads: tuple[tuple[int, int], ...]
    ops: tuple[tuple[int, int, float], ...]
    D: int
    chunks: tuple[int, ...]


FULL = Sizes(
    heads=((32001, 4096), (32001, 8192), (32001, 16384), (128256, 4096)),
    ops=((16384, 32001, 0.0), (16384, 32001, 0.5), (16384, 128256, 0.0)),
    D=4096,
    chunks=(2048, 4096, 8192, 16384),
)
TINY = Sizes(heads=((301, 64),), ops=((64, 301, 0.5),), D=32, chunks=(16,))


def relative_error(value: Tensor, true: Tensor) -> float:
    return ((value.float() - true.float()).norm() / true.float().norm()).item()


# ------------------------------------------------------------------------------------------------- attention


def attention(device: torch.device, dtype: torch.dtype) -> Iterator[Piece]:
    """Variable-length attention as the trainer calls it: causal, heads that groups share."""
    for groups in (1, 2):
        yield Piece("varlen_attn", {"groups": groups}, partial(varlen_errors, groups, device, dtype))


def varlen_errors(groups: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Returns `arguments`, the names that this torch's takes, and relative errors of its `output` and `gradients`."""
    from torch.nn.attention.varlen import varlen_attn

    lengths, heads, size = (5, 130, 1, 300), 4, 64
    g = torch.Generator(device).manual_seed(0)

    def draw(count: int) -> Tensor:
        return torch.randn(sum(lengths), count, size, generator=g, device=device).to(dtype).requires_grad_()

    leaves = draw(heads), draw(heads // groups), draw(heads // groups)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    arguments = list(inspect.signature(varlen_attn).parameters)
    grouped = {"enable_gqa": groups > 1} if "enable_gqa" in arguments else {}
    longest = max(lengths)
    output = varlen_attn(
        *leaves, cu_seqlens, cu_seqlens, longest, longest, scale=size**-0.5, window_size=(-1, 0), **grouped
    )
    up = torch.randn(output.shape, generator=g, device=device)
    gradients = torch.autograd.grad(output, leaves, up.to(dtype))
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    repeated = wide[0], *(leaf.repeat_interleave(groups, 1) for leaf in wide[1:])
    alone = [
        F.scaled_dot_product_attention(*(part.transpose(0, 1) for part in parts), is_causal=True).transpose(0, 1)
        for parts in zip(*(part.split(lengths) for part in repeated), strict=True)
    ]
    true = torch.cat(alone)
    true_gradients = torch.autograd.grad(true, wide, up)
    return {
        "arguments": arguments,
        "output": relative_error(output.detach(), true.detach()),
        "gradients": [relative_error(*pair) for pair in zip(gradients, true_gradients, strict=True)],
    }


# --------------------------------------------------------------------------------------------- products and rows


def head(V: int, R: int, D: int, device: torch.device, dtype: torch.dtype) -> Iterator[Piece]:
    """The products of R rows, and the row passes over their logits."""
    facts = {"V": V, "R": R}
    pitch = V + -V % (ALIGNMENT_BYTES // dtype.itemsize)
    g = torch.Generator(device).manual_seed(0)
    weight = (torch.randn(V, D, generator=g, device=device) / D**0.5).to(dtype)
    hidden = torch.randn(R, D, generator=g, device=device).to(dtype)
    padded_weight = F.pad(weight, (0, 0, 0, pitch - V))
    buffer = torch.mm(hidden, padded_weight.t())
    logits = buffer[:, :V]

    def product(name: str, run: Callable[[], Any]) -> Piece:
        return Piece(name, facts, partial(product_speed, run, 2 * R * D * V, device))

    def time_of(name: str, run: Callable[[], Any]) -> Piece:
        return Piece(name, facts, lambda: {"ms": median_ms(Task(run), device, TRIALS)})

    alignments = {
        "V and pitch V": (weight, logits.contiguous()),
        "pitch padded": (weight, logits),  # as in the op
        "V and pitch padded": (padded_weight, buffer),
    }
    for name, (w, z) in alignments.items():
        yield product(f"logits, {name}", partial(torch.mm, hidden, w.t(), out=z))
        yield product(f"dh, {name}", partial(torch.mm, z, w, out=torch.empty_like(hidden)))
        yield product(f"dW, {name}", partial(torch.mm, z.t(), hidden, out=torch.empty_like(w)))
    narrow, wide = torch.zeros_like(weight), torch.zeros(V, D, device=device)
    into_wide = {} if dtype == torch.float32 else {"out_dtype": torch.float32}
    yield product("dW +=", partial(narrow.addmm_, logits.t(), hidden))
    yield product("dW in float32", partial(torch.mm, logits.t(), hidden, out=wide, **into_wide))
    yield product("dW += in float32", partial(torch.addmm, wide, logits.t(), hidden, out=wide, **into_wide))
    yield time_of("cast of dW", partial(narrow.copy_, wide))
    yield time_of("padding W", partial(padded_weight[:V].copy_, weight))
    torch.mm(hidden, padded_weight.t(), out=buffer)
    yield from row_passes(hidden, weight, buffer, facts)


def product_speed(run: Callable[[], Any], flop: int, device: torch.device) -> dict[str, Any]:
    ms = median_ms(Task(run), device, TRIALS)
    return {"ms": ms, "tflops": 1e-9 * flop / ms, "kernels": kernel_names(run, device)}


def kernel_names(run: Callable[[], Any], device: torch.device) -> list[str]:
    """Of what runs on the device; on a CPU, of PyTorch's operators."""
    on_cpu = device.type == "cpu"
    with profile(activities=[ProfilerActivity.CPU if on_cpu else ProfilerActivity.CUDA]) as profiler:
        run()
        synchronize(device)
    events = [event for event in profiler.events() if (event.device_type == DeviceType.CPU) == on_cpu]
    return sorted({event.name[:NAME_LENGTH] for event in events})


def row_passes(hidden: Tensor, weight: Tensor, buffer: Tensor, facts: dict[str, Any]) -> Iterator[Piece]:
    """Over the logits in the first V columns of `buffer`, which is given anew to each run: a gradient overwrites it."""
    from repo_fast.kernels.linear_log_probs import gradient_rows, log_prob_rows

    V, R, device = weight.shape[0], hidden.shape[0], hidden.device
    kept, logits = buffer.clone(), buffer[:, :V]
    g = torch.Generator(device).manual_seed(1)
    targets = torch.randint(V, (R,), generator=g, device=device)
    log_probs, entropies, *up = torch.randn(4, R, generator=g, device=device) / R
    chunk = logits, hidden, weight, targets, None, 0, 1.0, None
    passes = {
        "log-probs": (1, partial(log_prob_rows, *chunk, log_probs, None)),
        "log-probs and entropies": (1, partial(log_prob_rows, *chunk, log_probs, entropies)),
        "gradient": (2, partial(gradient_rows, *chunk, up[0], None)),
        "gradient of entropies as well": (2, partial(gradient_rows, *chunk, *up)),
    }

    def speed(moves: int, run: Callable[[], None]) -> dict[str, Any]:
        ms = median_ms(Task(lambda copied: run(), lambda: (buffer.copy_(kept),)), device, TRIALS)
        return {"ms": ms, "gb_s": 1e-6 * moves * logits.numel() * logits.element_size() / ms}

    for name, (moves, run) in passes.items():
        yield Piece(f"rows, {name}", facts, partial(speed, moves, run))


# ------------------------------------------------------------------------------------------------- the whole op


def op(
    T: int, V: int, ignored: float, D: int, chunks: Sequence[int], device: torch.device, dtype: torch.dtype
) -> Iterator[Piece]:
    """The policy loss, forward and backward, and the log-probabilities, beside their bare products."""
    case = make_case(T, D, V, dtype, device, ignored=ignored)
    facts = {"T": T, "V": V, "ignored": ignored}
    for computation in ("policy_loss", "log_probs"):
        floor = PRODUCTS.task(computation, case)
        floor_ms = median_ms(floor, device, TRIALS)
        yield Piece(f"floor of {computation}", facts, lambda ms=floor_ms: {"ms": ms})
        yield Piece(f"timeline of {computation}", facts, partial(timeline, OURS.task(computation, case), device))

        def speed(
            *settings: Callable[[], AbstractContextManager], computation: str = computation, floor_ms: float = floor_ms
        ) -> dict[str, Any]:
            task = OURS.task(computation, case)
            with ExitStack() as stack:
                for setting in settings:
                    stack.enter_context(setting())
                results = task.run()
                pairs = zip(
                    [results] if isinstance(results, Tensor) else results,
                    truth(computation, case, OURS.objective),
                    strict=True,
                )
                errors = [relative_error(value, true) for value, true in pairs]
                del results
                ms = median_ms(task, device, TRIALS)
                return {"ms": ms, "share": floor_ms / ms, "errors": errors, "scratch_mib": peak_scratch(task, device)}

        yield Piece(f"op, {computation}", {**facts, "chunk": "as shipped", "sum": "as shipped"}, speed)
        for rows in chunks:
            chunk = partial(chunks_of, rows)
            yield Piece(f"op, {computation}", {**facts, "chunk": rows, "sum": "as shipped"}, partial(speed, chunk))
            if computation == "policy_loss":
                yield Piece(
                    f"op, {computation}",
                    {**facts, "chunk": rows, "sum": "rounded"},
                    partial(speed, chunk, rounded_sums),
                )


def timeline(task: Task, device: torch.device) -> dict[str, Any]:
    """Returns `events` of one call in their order: `on` host or device, `name`, `start` and `us`, since the first one.

    Of the host only the driver's calls on a GPU, PyTorch's operators without one.
    """
    task.run(*task.setup())
    arguments = task.setup()
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        task.run(*arguments)
        synchronize(device)
    driver = "cu" if device.type == "cuda" else "aten::"
    events = [
        event
        for event in profiler.events()
        if event.device_type != DeviceType.CPU or event.name.lower().startswith(driver)
    ]
    events.sort(key=lambda event: event.time_range.start)
    begin = events[0].time_range.start
    return {
        "events": [
            {
                "on": "host" if event.device_type == DeviceType.CPU else "device",
                "name": event.name[:NAME_LENGTH],
                "start": event.time_range.start - begin,
                "us": event.time_range.elapsed_us(),
            }
            for event in events[:TIMELINE_EVENTS]
        ]
    }


# ------------------------------------------------------------------------------------------------------ running


def parts(device: torch.device) -> Iterator[tuple[str, Iterator[Piece]]]:
    """By name: what is measured with the same tensors. The cheapest first."""
    sizes, dtype = (TINY, torch.float32) if device.type == "cpu" else (FULL, torch.bfloat16)
    if device.type == "cuda":
        yield "attention", attention(device, dtype)
    for V, R in sizes.heads:
        yield f"head of {V}, {R} rows", head(V, R, sizes.D, device, dtype)
    for T, V, ignored in sizes.ops:
        yield f"op of {V}, {T} tokens", op(T, V, ignored, sizes.D, sizes.chunks, device, dtype)


def measure(name: str, pieces: Iterator[Piece], say: Callable[[dict[str, Any]], None]) -> None:
    """Makes the measurements of a part one by one, and says each: its name and facts, and what it found or an `error`.

    Raises:
        torch.AcceleratorError: The device failed, so that the process cannot use it any more.
    """
    piece = None
    while True:
        try:
            # The inputs may not fit, which ends the part; a measurement may fail, and the next goes on.
            piece = None
            piece = next(pieces, None)
            if piece is None:
                return
            say({"name": piece.name, **piece.facts, **piece.measure()})
        except Exception as error:
            told = {"name": name} if piece is None else {"name": piece.name, **piece.facts}
            say({**told, "error": "".join(traceback.format_exception_only(error)).strip()})
            if isinstance(error, torch.AcceleratorError):
                raise


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("out", type=Path, help="file for the lines; what is there is kept")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with options.out.open("a") as lines:

        def say(row: dict[str, Any]) -> None:
            for stream in (lines, sys.stdout):
                print(json.dumps(rounded(row)), file=stream, flush=True)

        say({"name": "machine", "torch": torch.__version__, "device": device_name(device)})
        for name, pieces in parts(device):
            measure(name, pieces, say)
            if device.type == "cuda":
                torch.cuda.empty_cache()


def rounded(value: Any) -> Any:
    """Numbers to four digits, in rows, lists and by themselves."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
