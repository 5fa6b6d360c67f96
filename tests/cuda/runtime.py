"""What DeepSpeed asks of CUDA's runtime and of other ranks, for a GPU that is not there and a run of one rank."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import nn

_PROPERTIES = SimpleNamespace(major=9, minor=0, total_memory=80 << 30)
_RUNTIME: dict[str, Any] = {
    "is_available": lambda: True,
    "is_bf16_supported": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_properties": lambda device=None: _PROPERTIES,
    "stream": lambda stream: nullcontext(),
    # Everything has already happened on the one stream.
    **{name: MagicMock() for name in ("Stream", "Event", "current_stream", "default_stream")},
    **{name: lambda *args: None for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats")},
    **{f"{kind}memory_{what}": lambda device=None: 0 for kind in ("", "max_") for what in ("allocated", "reserved")},
    **{f"nvtx.range_{name}": lambda *args: None for name in ("push", "pop")},
}
_COLLECTIVES = (
    "broadcast",
    "all_reduce",
    "reduce",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "barrier",
)


@contextmanager
def runtime() -> Iterator[None]:
    """While this is open, torch.cuda answers as on a machine with one GPU, and collectives are those of one rank."""
    import deepspeed

    with ExitStack() as patches:
        for name, value in _RUNTIME.items():
            patches.enter_context(patch(f"torch.cuda.{name}", value))
        for name in _COLLECTIVES:
            for module in (deepspeed.comm, deepspeed.comm.comm):
                patches.enter_context(patch.object(module, name, MagicMock()))
        # These compare a list with what comes back from the GPU.
        utils = deepspeed.runtime.zero.utils
        patches.enter_context(patch.object(utils, "assert_lst_len_same_as_other_ranks", lambda numbers: None))
        patches.enter_context(patch.object(utils, "get_lst_from_rank0", lambda numbers: numbers))
        # What is moved is there already; there are no pages to pin, and no stream to record.
        patches.enter_context(patch.object(nn.Module, "to", lambda module, *args: module))
        patches.enter_context(patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor))
        patches.enter_context(patch.object(torch.Tensor, "record_stream", lambda tensor, stream: None))
        yield
