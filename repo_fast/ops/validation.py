"""Argument checks of the public ops: one clear error that names the op, the argument, what it was and what it must be.

What tensors look like (shape, dtype, device) and Python numbers are checked by the public wrappers; `torch.compile`
evaluates these checks while tracing. Values of tensors are checked by the implementations, before they compute
anything, and on the CPU only: looking at them on a GPU would wait for the device.
"""

import math

import torch
from torch import Tensor

MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IGNORED = -100


def check_tensor(
    op: str, name: str, value: object, dtypes: tuple[torch.dtype, ...], sizes: tuple[int | str, ...]
) -> None:
    """Checks type, dtype and shape. In `sizes`, a number must match, and a letter stands for any size."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {_shape(sizes)}, got {type(value).__name__}")
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be {expected}, got {str(value.dtype).removeprefix('torch.')}")
    good = value.dim() == len(sizes)
    if good:
        for size, want in zip(value.shape, sizes, strict=True):
            good = good and (isinstance(want, str) or size == want)
    if not good:
        raise ValueError(f"{op}: {name} must have shape {_shape(sizes)}, got {list(value.shape)}")


def _shape(sizes: tuple[int | str, ...]) -> str:
    return "[" + ", ".join(str(size) for size in sizes) + "]"


def check_device(op: str, name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{op}: {name} must be on {device} like the other tensors, got {value.device}")


def check_vectors(op: str, size: int, size_name: str, device: torch.device, **vectors: Tensor | None) -> None:
    """Checks that the given vectors (None: not given) are float32 of one size on one device."""
    for name, value in vectors.items():
        if value is not None:
            check_vector(op, name, value, size, size_name, device, torch.float32)


def check_vector(
    op: str, name: str, value: object, size: int, size_name: str, device: torch.device, dtype: torch.dtype
) -> None:
    check_tensor(op, name, value, (dtype,), (size_name,))
    assert isinstance(value, Tensor)
    if value.shape[0] != size:
        raise ValueError(f"{op}: {name} must have shape [{size_name}={size}], got {list(value.shape)}")
    check_device(op, name, value, device)


def check_linear(op: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Checks the operands of the vocabulary projection: hidden [T, D], weight [V, D], targets [T]."""
    check_tensor(op, "hidden", hidden, MODEL_DTYPES, ("T", "D"))
    check_tensor(op, "weight", weight, MODEL_DTYPES, ("V", "D"))
    if weight.dtype != hidden.dtype:
        raise TypeError(f"{op}: weight must have the dtype of hidden, {hidden.dtype}, got {weight.dtype}")
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"{op}: weight must have shape [V, D={hidden.shape[1]}], got {list(weight.shape)}")
    if weight.shape[0] == 0:
        raise ValueError(f"{op}: weight must have at least one row (V >= 1), got {list(weight.shape)}")
    check_device(op, "weight", weight, hidden.device)
    check_vector(op, "targets", targets, hidden.shape[0], "T", hidden.device, torch.int64)


def check_number(op: str, name: str, value: object, low: float, high: float = math.inf, open_low: bool = False) -> None:
    """Checks a finite Python number in [low, high], or (low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    # Comparisons only, which torch.compile can trace for numbers that change from call to call; NaN fails them.
    good = low < value <= high if open_low else low <= value <= high
    if not good or not abs(value) < math.inf:
        if low == -math.inf:
            expected = "finite"
        elif high == math.inf:
            expected = f"finite and {'>' if open_low else '>='} {low:g}"
        else:
            expected = f"in [{low:g}, {high:g}]"
        raise ValueError(f"{op}: {name} must be {expected}, got {value!r}")


# Logits further apart than so many temperatures are not told apart to 1 by float32.
MAX_CAP = 2.0**24
# What the products are divided by, within float32.
SMALLEST, LARGEST = 1e-38, 1e38


def logit_settings(op: str, temperature: object, logit_scale: object, softcap: object) -> tuple[float, float | None]:
    """Checks what becomes of the products h·Wᵀ; returns (temperature, softcap) of these, both over `logit_scale`."""
    check_number(op, "temperature", temperature, 0.0, open_low=True)
    check_number(op, "logit_scale", logit_scale, 0.0, open_low=True)
    assert isinstance(temperature, int | float) and isinstance(logit_scale, int | float)
    settings: tuple[float, float | None] = (temperature / logit_scale, None)
    if softcap is not None:
        check_number(op, "softcap", softcap, 0.0, open_low=True)
        assert isinstance(softcap, int | float)
        if softcap > MAX_CAP * temperature:
            raise ValueError(f"{op}: softcap must be at most 2**24 times temperature={temperature!r}, got {softcap!r}")
        settings = (settings[0], softcap / logit_scale)
    for name, own, scaled in zip(("temperature", "softcap"), (temperature, softcap), settings, strict=True):
        if scaled is not None and not SMALLEST <= scaled <= LARGEST:
            over = "" if logit_scale == 1 else f" over logit_scale={logit_scale!r}"
            raise ValueError(f"{op}: {name}{over} must be {SMALLEST} to {LARGEST}, got {own!r}")
    return settings


def check_bytes(op: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be a whole number of bytes, got {value!r}")
    if not 0 <= value < 1 << 63:
        raise ValueError(f"{op}: {name} must be a number of bytes in [0, 2**63), got {value!r}")


def check_choice(op: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {choices}, got {value!r}")


def check_flag(op: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {value!r}")


def check_clip(op: str, clip: object) -> None:
    if not isinstance(clip, tuple | list) or len(clip) != 2:
        raise TypeError(f"{op}: clip must be a pair (epsilon_low, epsilon_high), got {clip!r}")
    check_number(op, "clip[0]", clip[0], 0.0)
    check_number(op, "clip[1]", clip[1], 0.0)


def scalar(
    op: str, name: str, value: float | Tensor, device: torch.device, low: float, open_low: bool = False
) -> Tensor:
    """A number or 0-d tensor as a float32 0-d tensor on `device`. A tensor's value is never looked at."""
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.dtype.is_complex or value.dtype == torch.bool:
            raise TypeError(
                f"{op}: {name} must be a number or a real 0-d tensor, got {value.dtype} {list(value.shape)}"
            )
        return value.detach().to(device=device, dtype=torch.float32, non_blocking=True)
    check_number(op, name, value, low, open_low=open_low)
    return torch.full((), float(value), dtype=torch.float32, device=device)


def check_range(op: str, name: str, values: Tensor, low: int, high: int, high_name: str) -> None:
    """Checks that integers are in [low, high), on the CPU."""
    if values.is_cpu and values.numel() > 0:
        smallest, largest = values.aminmax()
        if smallest < low or largest >= high:
            wrong = int(smallest if smallest < low else largest)
            raise ValueError(f"{op}: {name} must be in [{low}, {high_name}={high}), got {wrong}")


def check_cu_seqlens(op: str, cu_seqlens: Tensor, T: int) -> None:
    """Checks the values of cumulative sequence lengths, on the CPU."""
    if cu_seqlens.is_cpu:
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0 or last != T or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(
                f"{op}: cu_seqlens must rise from 0 to T={T} without a step down, got {first} ... {last}: "
                f"{cu_seqlens[:8].tolist()}{'...' if cu_seqlens.numel() > 8 else ''}"
            )
