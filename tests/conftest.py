"""Fixtures of the tests that run the main job."""

import os
from collections.abc import Iterator

import pytest
import torch

# Triton decides when a kernel is defined whether its interpreter runs it. Its own (gluon's are imported by the first
# launch) must be defined likewise; processes that tests start are not to inherit it.
os.environ["TRITON_INTERPRET"] = "1"
import triton.experimental.gluon  # noqa: E402, F401

import repo_fast.ops.triton  # noqa: E402, F401

del os.environ["TRITON_INTERPRET"]

from tests import scorers  # noqa: E402
from tests.interpreter import patch_the_language_once_a_launch  # noqa: E402
from tests.job_runs import Job  # noqa: E402

patch_the_language_once_a_launch()


def pytest_configure() -> None:
    # A spinning thread pool slows every other process of a test that starts several.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # As the processes that tests start: runs of one and of two threads differ in their last bits. Where the variable is
    # not set, accelerate, which TRL starts, chooses the number itself once there is a process group.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest first: as the last, one of two workers would wait for it.
    items.sort(key=lambda item: item.path.name != "test_default_run.py")


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The inputs of the main job, with one tiny random policy, made once."""
    return Job.make(tmp_path_factory.mktemp("job"))


@pytest.fixture(autouse=True)
def _leaves_the_number_of_threads() -> Iterator[None]:
    yield
    assert torch.get_num_threads() == 1


@pytest.fixture(autouse=True)
def _scorers_as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorers, "calls", 0)
    monkeypatch.setattr(scorers, "at_call", lambda call: None)
