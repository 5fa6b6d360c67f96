"""Importance weights in a run of the main job: where the sampler is the policy, nothing is cut."""

from pathlib import Path

import pytest

from tests.job_runs import Job, metrics

BOUNDS = ("--algorithm.importance_mask [0.999,1.001]", "--algorithm.importance_cap 1.0005")


def test_every_weight_of_hf_rollouts_is_1_but_for_rounding(job: Job, tmp_path: Path) -> None:
    options = ("--algorithm.importance_level sequence", *BOUNDS, "--algorithm.advantage rloo", "--total_steps 2")
    assert job.here(tmp_path / "run", *options) == 0
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["importance_capped_share"] == row["importance_masked_share"] == 0
        assert row["importance_mean"] == pytest.approx(1, abs=1e-4)
        assert row["importance_effective_share"] == pytest.approx(1, abs=1e-6)
