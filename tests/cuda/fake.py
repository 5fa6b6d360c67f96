"""CUDA tensors without a GPU: what runs on the host of a GPU runs, and every wait for the GPU is seen.

Under `FakeCuda` tensors on CUDA are those of torch's `FakeTensorMode`: they have a shape, a dtype and a device, and no
values. Tensors of the CPU are real; the two in one operation are an error, as on a GPU. What needs values of a GPU
would wait for it: that is recorded, and gets plausible ones (a copy to the CPU is full of zeros). Registered ops run
their implementation for the backend asked for, whose results must look like what the op is registered to return;
Triton's launches are held against the kernel's signature and go no further (`tests/kernels/compile_ahead.py` compiles
them).

A CPU build of torch knows no CUDA: slices of such tensors fail, and autograd aborts the process. So the process must
have loaded `absent_gpu.cpp`, which tells it of a device. `tests/test_cuda_paths.py` builds it and runs the tests of
this folder in such a process.

How far torch lets this go:

- *A CUDA build without a GPU* has its own hooks, which nothing can stand for: it goes through forwards, but a backward
  fails (`hasPrimaryContext`). There, what needs a graph is skipped.
- *No kernel of torch's own runs.* Whether a product with a float32 output exists for CUDA is not shown; and for `addmm`
  with `out_dtype` fake tensors have nothing that works (a decomposition that takes the dtype for beta), so that a check
  of shapes and dtypes stands for it.
- *transformers looks at positions only where tensors have values*: its `is_tracing` is true of fake ones. Under a mask
  of the row, and with FlashAttention 2, it waits once for each kind of mask on a real GPU, which is not seen here.
"""

import inspect
from contextlib import ExitStack, nullcontext
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from repo_fast.ops.dispatch import implementation
from repo_fast.ops.registration import FusedArguments, RectifiedArguments, StreamsArguments

CUDA = torch.device("cuda", 0)
needs_graph = pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build without a GPU has no backward")
Moved = TypeVar("Moved")
# What a launch is told beside the kernel's arguments.
_LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg")
# What a registered op hands its implementation as one.
_BUNDLES = {
    "rectified_policy_loss": RectifiedArguments,
    "rectified_policy_loss_streams": StreamsArguments,
    "fused_rectified_policy_loss_and_gradients": FusedArguments,
}


class FakeCuda(ExitStack):
    """While this is entered, tensors may be made on, or sent to, a GPU that is not there.

    Args:
        ignored: How many of the rows that are looked for are not found.

    Attributes:
        waits: What made the host wait, in order: the names of torch's operations.
        launches: The Triton kernels launched, in order.
    """

    def __init__(self, ignored: int = 0) -> None:
        super().__init__()
        self.ignored, self.fake = ignored, FakeTensorMode(allow_non_fake_inputs=True)
        self.waits: list[str] = []
        self.launches: list[str] = []

    def __enter__(self) -> "FakeCuda":
        # There is no device to make ready, or the current one.
        self.enter_context(patch("torch.cuda._lazy_init", lambda: None))
        self.enter_context(patch("torch.cuda.device", lambda device: nullcontext()))
        for kind in (JITFunction, InterpretedFunction):
            self.enter_context(patch.object(kind, "run", self._launcher()))
        # So that torch.tensor(…, device=CUDA) makes one on the CPU and sends it, in operations of their own.
        self.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        self.enter_context(_Operations(self))
        return self

    def on_cuda(self, value: Moved) -> Moved:
        """A fake of a tensor on CUDA; of the tensors in a tuple, a dataclass or a module, which is changed."""
        if isinstance(value, torch.Tensor):
            with self.fake:
                return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)
        if isinstance(value, tuple):
            return tuple(self.on_cuda(part) for part in value)
        if is_dataclass(value):
            return replace(value, **{field.name: self.on_cuda(getattr(value, field.name)) for field in fields(value)})
        if isinstance(value, nn.Module):
            for module in value.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = nn.Parameter(
                            self.on_cuda(parameter.detach()), parameter.requires_grad
                        )
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = self.on_cuda(buffer)
        return value

    def answer(self, name: str, tensor: torch.Tensor, count: int | None = None) -> Any:
        """What a value-dependent operation gives, after its wait."""
        self.waits.append(name)
        if name == "_local_scalar_dense":
            return 1.0 if tensor.is_floating_point() else False if tensor.dtype == torch.bool else 0
        assert tensor.dim() == 1
        shape = (max(0, tensor.numel() - self.ignored), 1) if count is None else (count,)
        with self.fake:
            return torch.empty(shape, dtype=torch.int64, device=CUDA)

    def _launcher(self) -> Any:
        launches = self.launches

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            own = {name: value for name, value in options.items() if name not in _LAUNCH_OPTIONS}
            bound = inspect.signature(kernel.fn).bind(*args, **own)
            sizes = grid(bound.arguments) if callable(grid) else grid
            assert all(isinstance(size, int) and size > 0 for size in sizes), (kernel.fn.__name__, sizes)
            for name, value in bound.arguments.items():
                assert not isinstance(value, torch.Tensor) or value.device == CUDA, (kernel.fn.__name__, name)
            launches.append(kernel.fn.__name__)

        return run


class _Operations(TorchDispatchMode):
    """What torch dispatches."""

    def __init__(self, owner: FakeCuda) -> None:
        super().__init__()
        self.owner = owner

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(_is_of_cuda(part) for part in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "repo_fast" and name != "fused_rectified_policy_loss":
            return self._implemented(func, name, *args)
        if name in ("nonzero", "_local_scalar_dense"):
            return self.owner.answer(name, args[0])
        if name == "bincount":
            assert len(args) == 3 and args[1] is None
            return self.owner.answer(name, args[0], args[2])
        if name == "index":
            indices = [self._found(index) for index in args[1]]
            args = (args[0], indices)
        if "index_put" in name and args[2].numel() > 1 and any(_is_mask(index) for index in args[1]):
            self.owner.waits.append("nonzero")
        if name == "addmm" and func._overloadname == "dtype_out":
            return _product(args, kwargs)
        if name == "copy_" and not isinstance(args[0], FakeTensor):
            self.owner.waits.append("copy to cpu")
            return args[0].zero_()
        if name == "copy_" and not isinstance(args[1], FakeTensor):
            return self._sent(args[0], *args[2:], **kwargs)
        if name == "_to_copy" and not isinstance(args[0], FakeTensor):
            return self._sent(self.owner.on_cuda(args[0].to(kwargs.get("dtype"))), **kwargs)
        with self.owner.fake:
            result = func(*args, **kwargs)
        if name == "_to_copy" and result.device.type == "cpu":
            self.owner.waits.append("copy to cpu")
            return torch.zeros(result.shape, dtype=result.dtype)
        return result

    def _found(self, index: torch.Tensor | None) -> torch.Tensor | None:
        """Of a mask the indices, which are looked for as `nonzero` does."""
        return self.owner.answer("nonzero", index).squeeze(1) if _is_mask(index) else index

    def _sent(self, result: torch.Tensor, non_blocking: bool = False, **options: Any) -> torch.Tensor:
        if not non_blocking:
            self.owner.waits.append("copy to cuda")
        return result

    def _implemented(self, func: Any, name: str, *args: Any) -> Any:
        """What an op's implementation returns, which must look like what the op is registered to return."""
        with self.owner.fake:
            shown = func(*args)
        *inputs, backend = args
        bundle = _BUNDLES.get(name)
        with self:
            result = implementation(name, backend)(*([bundle(*inputs)] if bundle else inputs))
        pairs = zip(*((part,) if isinstance(part, torch.Tensor) else part for part in (result, shown)), strict=True)
        for ours, theirs in pairs:
            assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device), (name, backend)
        return result


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool


def _is_of_cuda(part: Any) -> bool:
    return isinstance(part, FakeTensor) or (isinstance(part, torch.device) and part.type == "cuda")


def _product(args: Any, kwargs: Any) -> torch.Tensor:
    *summand, left, right, dtype = args
    out = kwargs["out"]
    assert dtype == out.dtype and left.device == right.device == out.device
    assert out.shape == (left.shape[0], right.shape[1]) and left.shape[1] == right.shape[0]
    assert all((part.shape, part.dtype, part.device) == (out.shape, dtype, out.device) for part in summand)
    return out
