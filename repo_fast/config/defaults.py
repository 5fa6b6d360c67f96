"""The defaults of a job's options, without a job: some have none that could run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from repo_fast.config.command_line import as_plain
from repo_fast.config.score import ScoreConfig
from repo_fast.config.sections import JobConfig
from repo_fast.config.sft import SftConfig
from repo_fast.config.train import TrainConfig


def default_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of the job of `train`, `score` or `sft` whose resolved configuration this is, as plain values."""
    kind: type[JobConfig] = SftConfig
    if "algorithm" in options:
        kind = TrainConfig
    elif "kind" in options:
        kind = ScoreConfig
    defaults = {}
    for entry in dataclasses.fields(kind):
        if entry.default is not dataclasses.MISSING:
            defaults[entry.name] = as_plain(entry.default)
        elif entry.default_factory is not dataclasses.MISSING:
            defaults[entry.name] = as_plain(entry.default_factory())
    return defaults
