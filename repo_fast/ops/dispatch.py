"""Which backend runs an op: the table of implementations, what can run here, and the choice behind `backend="auto"`.

Every op is registered once (`registration.py`), whatever its backends; the registered op looks its implementation up
here, so a new backend is a new row of `_MODULES` and the code it names. Implementations are imported when
first used: importing `repo_fast.ops` needs neither Triton nor the C++ extension.
"""

import importlib
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

BACKENDS = ("triton", "cpp", "torch")

# (public op, backend) -> the module that has it: there, a function with the name and the signature, without `backend`,
# of each registered op that belongs to the public one, which are itself and those with the suffixes below.
_MODULES = {
    ("linear_log_probs", "torch"): "repo_fast.ops.chunked",
    ("fused_rectified_policy_loss", "torch"): "repo_fast.ops.chunked",
    ("rectified_policy_loss", "torch"): "repo_fast.ops.loss",
    ("prompt_violations", "torch"): "repo_fast.ops.violations",
    ("generalized_advantages", "torch"): "repo_fast.ops.advantages",
    ("generalized_advantages", "cpp"): "repo_fast.ops.cpp",
}
_SUFFIXES = ("_backward", "_and_gradients")

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


def available_backends(op: str | None = None) -> list[str]:
    """Lists the backends that can run on this machine.

    Args:
        op: Name of a public op, such as `"linear_log_probs"`. Without it: the backends that can run at least one op.

    Returns:
        Names that `backend=` accepts besides `"auto"`, the preferred one first.

    Raises:
        ValueError: `op` is not the name of a public op.
    """
    ops = {name for name, _ in _MODULES}
    if op is not None and op not in ops:
        raise ValueError(f"available_backends: op must be one of {sorted(ops)}, got {op!r}")
    chosen = ops if op is None else {op}
    return [backend for backend in BACKENDS if any(_why_not(name, backend) is None for name in chosen)]


def _why_not(op: str, backend: str) -> str | None:
    """The reason why `backend` cannot run `op` on this machine, with what to do about it; None if it can."""
    if (op, backend) not in _MODULES:
        have = [name for name in BACKENDS if (op, name) in _MODULES]
        return f"this version of repo_fast has no {backend} implementation of {op}: use backend='auto' or one of {have}"
    if backend == "cpp":
        return _CPP_MISSING
    return None


def resolve(op: str, backend: str, device: torch.device) -> str:
    """Turns the `backend` argument of a public op into the name of the backend that runs.

    Raises:
        ValueError: `backend` is not a known name, or cannot run `op` on `device`; the message says why and what to do.
    """
    if backend == "auto":
        for name in _AUTO_ORDER.get(device.type, ("torch",)):
            if _why_not(op, name) is None:
                return name
        return "torch"
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
    reason = _why_not(op, backend)
    if reason is not None:
        raise ValueError(f"{op}: backend={backend!r} cannot run here: {reason}")
    if backend == "cpp" and device.type != "cpu":
        raise ValueError(f"{op}: backend='cpp' needs CPU tensors, got tensors on {device}: use backend='auto'")
    return backend


@cache
def implementation(registered_op: str, backend: str) -> Callable[..., Any]:
    """The function that implements a registered op on `backend`."""
    public_op = registered_op
    for suffix in _SUFFIXES:
        public_op = public_op.removesuffix(suffix)
    if (public_op, backend) not in _MODULES:
        raise ValueError(f"torch.ops.repo_fast.{registered_op}: no implementation for backend {backend!r}")
    return getattr(importlib.import_module(_MODULES[public_op, backend]), registered_op)
