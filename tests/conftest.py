"""Fixtures of the tests that run the main job."""

import os

import pytest
import torch

from tests import scorers
from tests.jobs import Job


def pytest_configure() -> None:
    # A spinning thread pool slows every other process of a test that starts several.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # As the processes that tests start: runs of one and of two threads differ in their last bits.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The inputs of the main job, with one tiny random policy, made once."""
    return Job.make(tmp_path_factory.mktemp("job"))


@pytest.fixture(autouse=True)
def _scorers_as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorers, "calls", 0)
    monkeypatch.setattr(scorers, "at_call", lambda call: None)
