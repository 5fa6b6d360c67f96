"""Which backend runs an op: the table of implementations, what can run here, and the choice behind `backend="auto"`.

Every op is registered once (`registration.py`), whatever its backends; the registered op looks its implementation up
here, so a new backend is a new row of `_MODULES` and the code it names. Implementations are imported when first used:
importing `repo_fast.ops` needs neither Triton nor the C++ extension.
"""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

BACKENDS = ("triton", "cpp", "torch")

# Public op -> the module that implements it on the torch backend. Those of the other backends are one module each. In
# it is a function with the name and the signature, without `backend`, of each registered op that belongs to the public
# one, which are itself and those with the suffixes below.
_TORCH_MODULES = {
    "fused_rectified_policy_loss": "repo_fast.ops.chunked",
    "generalized_advantages": "repo_fast.ops.advantages",
    "linear_log_probs": "repo_fast.ops.chunked",
    "prompt_violations": "repo_fast.ops.violations",
    "rectified_policy_loss": "repo_fast.ops.loss",
}
_MODULES = {"triton": "repo_fast.ops.triton", "cpp": "repo_fast.ops.cpp"}
_SUFFIXES = ("_backward", "_and_gradients", "_streams")

_AUTO_ORDER = {"cpu": ("cpp", "torch"), "cuda": ("triton", "torch")}  # ROCm devices are also called "cuda"


def why_missing(error: object) -> str:
    """What to say about a C++ extension that cannot be imported."""
    root = Path(__file__).resolve().parents[2]
    if (root / "csrc").is_dir():
        where, advice = f"the source tree {root}", "run `pip install -e .` there"
    else:
        where, advice = f"the installed package {root / 'repo_fast'}", "reinstall repo_fast from source"
    return f"repo_fast is imported from {where}, which has no C++ extension ({error}): {advice}, with a C++ compiler"


_CPP_MISSING: str | None = None
try:
    importlib.import_module("repo_fast._C")
except ImportError as error:
    _CPP_MISSING = why_missing(error)
    warnings.warn(f"{_CPP_MISSING}; until then backend='auto' uses torch on the CPU", stacklevel=2)


_TRITON_MISSING = None
if importlib.util.find_spec("triton") is None:
    _TRITON_MISSING = "Triton is not installed: run `pip install triton` (Linux)"
# Triton's interpreter runs kernels on CPU tensors: right, and a thousand times slower.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def available_backends(op: str | None = None) -> list[str]:
    """Lists the backends that can run on this machine.

    Args:
        op: Name of a public op, such as `"linear_log_probs"`. Every backend has every op: it is only checked.

    Returns:
        Names that `backend=` accepts besides `"auto"`, the preferred one first.

    Raises:
        ValueError: `op` is not the name of a public op.
    """
    if op is not None and op not in _TORCH_MODULES:
        raise ValueError(f"available_backends: op must be one of {list(_TORCH_MODULES)}, got {op!r}")
    on_gpu = torch.cuda.is_available() or INTERPRETED
    return [name for name in BACKENDS if _why_not(name) is None and (name != "triton" or on_gpu)]


def _why_not(backend: str) -> str | None:
    """The reason why `backend` is not installed, with what to do about it; None if it is."""
    return {"cpp": _CPP_MISSING, "triton": _TRITON_MISSING}.get(backend)


def resolve(op: str, backend: str, device: torch.device) -> str:
    """Turns the `backend` argument of a public op into the name of the backend that runs.

    Raises:
        ValueError: `backend` is not a known name, or cannot run `op` on `device`; the message says why and what to do.
    """
    if backend == "auto":
        for name in _AUTO_ORDER.get(device.type, ("torch",)):
            if _why_not(name) is None:
                return name
        return "torch"
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
    reason = _why_not(backend)
    if reason is not None:
        raise ValueError(f"{op}: backend={backend!r} cannot run here: {reason}")
    needed = {"cpp": ("cpu",), "triton": ("cuda", "cpu") if INTERPRETED else ("cuda",)}.get(backend)
    if needed is not None and device.type not in needed:
        kind = "CPU tensors" if backend == "cpp" else "tensors on a CUDA or ROCm GPU"
        raise ValueError(f"{op}: backend={backend!r} needs {kind}, got tensors on {device}: use backend='auto'")
    return backend


@cache
def implementation(registered_op: str, backend: str) -> Callable[..., Any]:
    """The function that implements a registered op on `backend`."""
    public_op = registered_op
    for suffix in _SUFFIXES:
        public_op = public_op.removesuffix(suffix)
    if backend not in BACKENDS:
        raise ValueError(f"torch.ops.repo_fast.{registered_op}: backend must be one of {BACKENDS}, got {backend!r}")
    module = _MODULES.get(backend) or _TORCH_MODULES[public_op]
    return getattr(importlib.import_module(module), registered_op)
