"""Fixtures of the ops' tests."""

import pytest

from repo_fast.ops import chunked, sweep


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
