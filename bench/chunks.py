"""How the linear ops take their rows, changed for a measurement or a check: the one place that knows how."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from repo_fast.ops import sweep


@contextmanager
def chunks_of(rows: int) -> Iterator[None]:
    """While this is open, the linear ops take so many rows of logits at a time, on any device."""
    constants = {"GPU_CHUNK_ROWS": rows, "CPU_CHUNK_ROWS": rows, "CPU_MIN_ROWS": 1, "GPU_CHUNK_ELEMENTS": 1 << 31}
    with mock.patch.multiple(sweep, **constants):
        yield
