"""The defaults of a job's options, told by its resolved configuration."""

import pytest

from repo_fast.config import JobConfig, ScoreConfig, SftConfig, TrainConfig, default_options, parse, to_dict


@pytest.mark.parametrize("kind", [TrainConfig, ScoreConfig, SftConfig])
def test_a_configuration_says_of_which_job_it_is(kind: type[JobConfig]) -> None:
    resolved = to_dict(parse([], kind))
    defaults = default_options(resolved)
    assert defaults.keys() == resolved.keys() and defaults != resolved
    if kind is TrainConfig:
        # By itself it has no reward, and could not run.
        assert defaults["reward"]["path"] == "" and defaults["rollout"].keys() == resolved["rollout"].keys()
    else:
        assert defaults == to_dict(kind())
