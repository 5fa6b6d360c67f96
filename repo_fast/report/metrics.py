"""The metrics of a run: always `metrics.jsonl`, and the loggers that the user chose.

The JSON-lines file is the truth, which plots, tests and later tools read (`jsonl.py` says how NaN is written). The
loggers are copies for people who look at many runs together, and are imported only when chosen. A resumed run writes
the steps after its checkpoint once more, with equal values, and each logger has its own way not to show them twice:
TensorBoard purges them, wandb drops steps it has seen, and trackio goes on under the same name (and keeps both).
"""

import importlib
import importlib.util
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from repo_fast.errors import InputError
from repo_fast.report.jsonl import Value, open_log, read_records, write_record

LOGGERS = ("tensorboard", "wandb", "trackio")
PROJECT = "repo_fast"


class MetricsLog:
    """Appends one record a step to `metrics.jsonl`, and sends it to the chosen loggers.

    The record of a step must be written before the checkpoint of that step, since a resume from this checkpoint does
    not write it again.

    Args:
        output_dir: The run's folder; made if missing.
        loggers: Some of `LOGGERS`.
        run_config: The resolved settings, for the loggers to show beside the curves.
        resume_step: None for a new run; else the step of the checkpoint that the run goes on from. Records after it are
            cut away.

    Raises:
        InputError: see `check_loggers` and `jsonl.open_log`.
    """

    def __init__(self, output_dir: Path, loggers: Sequence[str], run_config: dict, resume_step: int | None):
        check_loggers(loggers)
        output_dir.mkdir(parents=True, exist_ok=True)
        self._file = open_log(output_dir / "metrics.jsonl", resume_step)
        self._loggers: list[_TensorBoard | _HostedRun] = []
        for name in loggers:
            if name == "tensorboard":
                self._loggers.append(_TensorBoard(output_dir, run_config, resume_step))
            else:
                self._loggers.append(_HostedRun(name, output_dir, run_config, resume_step))

    def write(self, metrics: Mapping[str, Value]) -> None:
        """Writes the metrics of one step: plain Python values by name, with an integer `step` among them.

        Raises:
            TypeError, ValueError: see `jsonl.write_record`.
        """
        write_record(self._file, metrics)
        self.show(metrics)

    def show(self, metrics: Mapping[str, Value]) -> None:
        """Sends metrics that have a file of their own to the loggers alone."""
        for logger in self._loggers:
            logger.write(metrics)

    def close(self) -> None:
        """Closes the file and ends the loggers' runs; more than once does no harm."""
        self._file.close()
        while self._loggers:
            self._loggers.pop().close()


def check_loggers(loggers: Sequence[str]) -> None:
    """Checks that the chosen loggers are known and installed, without importing them.

    Raises:
        InputError: one is not; the message says what to install.
    """
    for name in loggers:
        if name not in LOGGERS:
            raise InputError(f"loggers: {name!r} is unknown; expected some of {', '.join(LOGGERS)}")
        spec = importlib.util.find_spec(name)
        # wandb leaves a folder called wandb wherever it runs, which Python takes for a package without an origin.
        if spec is None or spec.origin is None:
            raise InputError(f"loggers: {name!r} is not installed; pip install {name}, or leave it out")


def read_metrics(path: Path) -> list[dict[str, Value]]:
    """Reads a `metrics.jsonl`, one dictionary a step, NaN and infinities restored.

    Raises:
        InputError: the file is missing or has a malformed line.
    """
    return list(read_records(path))


def _numbers(metrics: Mapping[str, Value]) -> dict[str, float | int]:
    return {name: value for name, value in metrics.items() if name != "step" and isinstance(value, (int, float))}


class _TensorBoard:
    def __init__(self, output_dir: Path, run_config: dict, resume_step: int | None):
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=purge_step)
        self._writer.add_text("config", "```\n" + json.dumps(run_config, indent=2, default=str) + "\n```")

    def write(self, metrics: Mapping[str, Value]) -> None:
        for name, value in _numbers(metrics).items():
            self._writer.add_scalar(name, value, metrics["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _HostedRun:
    """A run of wandb or of trackio, which answers to the same calls. Its identity lives in the output folder."""

    def __init__(self, library: str, output_dir: Path, run_config: dict, resume_step: int | None):
        identity = output_dir / "run_id"
        if resume_step is None or not identity.exists():
            identity.write_text(uuid.uuid4().hex[:12] + "\n")
        run_id = identity.read_text().strip()
        settings = {
            "project": PROJECT,
            "name": f"{output_dir.resolve().name}-{run_id}",
            "config": run_config,
            "resume": "allow",
        }
        if library == "wandb":
            settings |= {"id": run_id, "dir": str(output_dir)}
        self._run = importlib.import_module(library).init(**settings)

    def write(self, metrics: Mapping[str, Value]) -> None:
        self._run.log(_numbers(metrics), step=metrics["step"])

    def close(self) -> None:
        self._run.finish()
