"""The date of a run, for chat templates that write the current one: fixed at the start, and kept in the configuration.

Else a resumed run, or a policy that joins an evaluation a day later, would be asked with other prompts. What else a run
takes over from one of before stands here too.
"""

import dataclasses
import datetime
import logging
from pathlib import Path
from typing import TypeVar

from repo_fast.config import EvaluateConfig, JobConfig, RunConfig
from repo_fast.errors import InputError, first_line, readable
from repo_fast.jobs import checkpoint
from repo_fast.report.plain_yaml import load_yaml

Config = TypeVar("Config", bound=JobConfig)

log = logging.getLogger(__name__)


def with_date(config: Config) -> Config:
    """The configuration with its date: the one given, that of what it goes on from, or today's.

    Raises:
        InputError: What it goes on from cannot be read.
    """
    if config.date is not None:
        return config
    return dataclasses.replace(config, date=_earlier(config) or datetime.date.today().isoformat())


def as_it_ran(config: Config) -> Config:
    """The configuration with chats learned as by the run of the checkpoint, where that had no choice yet."""
    data = getattr(config, "data", None)
    learns = getattr(data, "train_on", "last") == "all" and getattr(data, "ptx", "sft") is not None
    if not isinstance(config, RunConfig) or not learns:
        return config
    folder = checkpoint.find_resume(config.resume, Path(config.output_dir))
    if folder is None or "train_on" in checkpoint.read_run(folder)["config"]["data"]:
        return config
    log.warning("checkpoint %s is from before data.train_on: chats' last answers are learned, as they were", folder)
    return dataclasses.replace(config, data=dataclasses.replace(data, train_on="last"))


def _earlier(config: JobConfig) -> str | None:
    """The date of the checkpoint, or of the evaluation in the same folder, that a job goes on from."""
    output_dir = Path(config.output_dir)
    with readable(output_dir):
        return _date_in(config, output_dir)


def _date_in(config: JobConfig, output_dir: Path) -> str | None:
    if isinstance(config, RunConfig) and (folder := checkpoint.find_resume(config.resume, output_dir)) is not None:
        date = checkpoint.read_run(folder)["config"].get("date")
        if date is None:
            log.warning(
                "checkpoint %s is from before dates were kept: a chat template that writes one has today's", folder
            )
        return date
    if isinstance(config, EvaluateConfig) and (output_dir / config.FILE).is_file():
        try:
            earlier = load_yaml((output_dir / config.FILE).read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{output_dir / config.FILE} is not valid YAML: {first_line(error)}") from error
        return earlier.get("date") if isinstance(earlier, dict) else None
    return None
