"""Fixtures of the ops' tests."""

import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import HealthCheck, settings
from triton.runtime import interpreter

from repo_fast.ops import chunked, dispatch, sweep

# A backend is chosen once for all the examples of a test.
settings.register_profile("ops", suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("ops")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton's interpreter takes nine tenths of the time here: of a test's many cases under it half are marked slow.

    Which is drawn by name, so that it is the same half each time, and has every value of every parameter.
    """
    ours = [item for item in items if item.path.parent == Path(__file__).parent and "triton" in item.name]
    many = Counter(_test_of(item) for item in ours)
    for item in ours:
        if many[_test_of(item)] >= _MANY and zlib.crc32(item.nodeid.encode()) % 2:
            item.add_marker(pytest.mark.slow)


_MANY = 24


def _test_of(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


@pytest.fixture(params=["one chunk", "many chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with the shipped chunk size, which holds a small case whole, and with chunks of 8 rows."""
    if request.param == "many chunks":
        split_finely(monkeypatch)
    return request.param


def split_finely(monkeypatch: pytest.MonkeyPatch, rows: int = 8) -> None:
    monkeypatch.setattr(sweep, "CPU_MIN_ROWS", rows)
    monkeypatch.setattr(sweep, "CPU_CHUNK_ROWS", rows)
    monkeypatch.setattr(chunked, "CPU_BLOCK_ELEMENTS", 100)
    monkeypatch.setattr(sweep, "SLAB_ELEMENTS", 1000)


@pytest.fixture(params=["torch", "cpp", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on each backend: `auto` means this one. Triton runs in its interpreter."""
    if request.param == "cpp" and dispatch._CPP_MISSING is not None:
        pytest.skip(dispatch._CPP_MISSING)
    monkeypatch.setattr(dispatch, "_AUTO_ORDER", {"cpu": (request.param,)})
    if request.param == "triton":
        like_a_gpu(monkeypatch)
    return request.param


def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets Triton's interpreter compute as a GPU does where it does not by itself."""
    builder = interpreter.InterpreterBuilder
    monkeypatch.setattr(builder, "create_fp_trunc", _truncate_float)
    monkeypatch.setattr(builder, "create_fma", _multiply_add)
    # Of a number and NaN, the number.
    monkeypatch.setattr(builder, "create_maxnumf", lambda self, x, y: self.binary_op(x, y, np.fmax))
    monkeypatch.setattr(builder, "create_minnumf", lambda self, x, y: self.binary_op(x, y, np.fmin))


def _multiply_add(builder, x, y, z):
    """Rounded once; Triton's interpreter rounds the product as well."""
    wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return interpreter.TensorHandle(wide.astype(x.data.dtype), x.dtype.scalar)


_cast = interpreter.InterpreterBuilder.cast_impl


def _truncate_float(builder, source, to):
    """As on a GPU, bfloat16 is rounded to the nearest; Triton's interpreter cuts the low bits off."""
    if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, tl.bfloat16)
    return _cast(builder, source, to)
