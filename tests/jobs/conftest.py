"""One run of the main job, four steps with checkpoints of the second and the last, and copies of its folder."""

import shutil
from pathlib import Path

import pytest

from tests.job_runs import FOUR_STEPS, Job


@pytest.fixture(scope="session")
def whole(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed: `copied` is."""
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    assert job.here(output_dir, *FOUR_STEPS) == 0
    return output_dir


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))
