"""How the linear ops take their rows and add up the weight's gradient, changed for a measurement or a check: the one
place that knows how.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from repo_fast.ops import sweep


@contextmanager
def chunks_of(rows: int) -> Iterator[None]:
    """While this is open, the linear ops take so many rows of logits at a time, on any device."""

    def chunk_rows(device: torch.device, dtype: torch.dtype, N: int, V: int, D: int) -> int:
        return max(1, min(rows, N))

    with mock.patch.object(sweep, "chunk_rows", chunk_rows):
        yield


class _NarrowSum:
    """In place of `sweep._ProductSum`: each product is added in float32 and the sum rounded to the products' dtype."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, *unused: Any) -> None:
        self.total = torch.empty(shape, dtype=dtype, device=device)
        self.first = True

    def add(self, left: torch.Tensor, right: torch.Tensor) -> None:
        if self.first:
            torch.mm(left, right, out=self.total)
        else:
            self.total.addmm_(left, right)
        self.first = False


@contextmanager
def rounded_sums() -> Iterator[None]:
    """While this is open, the weight's gradient is rounded to the products' dtype after each chunk."""
    with mock.patch.object(sweep, "_ProductSum", _NarrowSum):
        yield
