"""Checkpoints of a run: found, written aside and renamed, pruned, and checked against the run that resumes.

A checkpoint is the folder `checkpoints/step-000010/` with one DeepSpeed folder an engine, `run.json` (step,
configuration, multiplier, data positions), and one file of random states a rank. It is written as
`step-000010.partial` and renamed when every rank is done: a folder without that ending is complete, whenever the run
was killed. Older ones go only after that.
"""

import json
import os
import random
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file

from repo_fast.config import GuardConfig, RubricConfig, ScorerConfig
from repo_fast.errors import InputError
from repo_fast.report.folders import publish

_COMPLETE = re.compile(r"step-(\d{6,})")
# May differ between a checkpoint and the run that goes on from it: they change nothing that is computed.
_FREE_KEYS = (
    *("output_dir", "resume", "resume_changed_data", "stop_after", "checkpoint", "log", "layout", "evaluate_every"),
    *("expect", "evaluation.every", "evaluation.stop_on", "evaluation.kl_bound", "engine.share_base"),
)
# So do these of any scorer: a run that stopped at its budget goes on with a larger one.
_FREE_OF_SCORERS = re.compile(
    r".+\.(expect|judge\.(url|api_key_variable|concurrency|retries|timeout|input_price|output_price|budget))"
)
# What runs did before there were these options; their checkpoints do not say. Before there was a date, they wrote any.
_ANY = object()
_BEFORE = {
    "date": _ANY,
    "data.fields": {},
    "data.train_on": "last",
    "algorithm.confidence": "z",
    "rollout.vllm.lora": "merged",
    "algorithm.importance_level": "token",
    "constraints": {},
    "heads": {},
    "evaluation.second_reward": asdict(ScorerConfig()),
    **{f"{name}.guard": asdict(GuardConfig()) for name in ("reward", "cost")},
    **{f"{name}.judge": asdict(RubricConfig()) for name in ("reward", "cost")},
}


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = output_dir / "checkpoints"
    found = [path for path in folder.glob("step-*") if _COMPLETE.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def find_resume(resume: str | None, output_dir: Path) -> Path | None:
    """The checkpoint folder that `--resume` means; None to start anew.

    Raises:
        InputError: A folder is named that is not a complete checkpoint.
    """
    if resume is None:
        return None
    if resume == "auto":
        found = checkpoints(output_dir)
        return found[-1] if found else None
    folder = Path(resume)
    if not (folder / "run.json").is_file() or not _COMPLETE.fullmatch(folder.resolve().name):
        raise InputError(
            f"--resume {resume!r} is not a complete checkpoint, expected `auto` or a folder checkpoints/step-NNNNNN"
        )
    return folder


def check_output_folder(resume: str | None, output_dir: Path) -> None:
    """Raise `InputError` where a new run would write over an old one."""
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir {str(output_dir)!r} is a file, expected a folder")
    used = (output_dir / "config.yaml").exists()
    if used and resume not in (None, "auto"):
        newest = checkpoints(output_dir)[-1:]
        if [path.resolve() for path in newest] != [Path(resume).resolve()]:
            raise InputError(
                f"--resume {resume!r} into --output_dir {str(output_dir)!r}, which holds another run or newer "
                "checkpoints, expected a new folder, or --resume auto"
            )
    if resume is None and used:
        raise InputError(
            f"--output_dir {str(output_dir)!r} holds a run already, expected a new folder, or --resume auto to go on"
        )


def read_run(folder: Path) -> dict:
    """The `run.json` of a checkpoint."""
    try:
        return json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{folder / 'run.json'} is not valid JSON: {error}") from error


def check_run(folder: Path, run: dict, config: dict, ranks: int) -> None:
    """Raise `InputError` where a checkpoint belongs to another configuration or number of ranks.

    Args:
        folder: For the message.
        run: Its `run.json`.
        config: The resuming run's configuration, as plain mappings.
        ranks: The resuming run's number of ranks.
    """
    if run["ranks"] != ranks:
        raise InputError(
            f"checkpoint {folder} was written by {run['ranks']} ranks, expected as many; this run has {ranks}"
        )
    for key, (theirs, ours) in _differences(run["config"], config).items():
        if key == "critics.shared_trunk" and theirs is False:
            # What null was then.
            theirs = None
        if theirs is None and key in _BEFORE:
            theirs = ours if _BEFORE[key] is _ANY else _BEFORE[key]
        free = {key, key.split(".")[0]} & {*_FREE_KEYS} or _FREE_OF_SCORERS.fullmatch(key)
        if theirs != ours and not free:
            raise InputError(
                f"checkpoint {folder} is of another configuration: {key} is {theirs!r} there and {ours!r} here"
            )
    # The same ones, but which output is whose goes by their order.
    before, now = (list(side.get("heads", {})) for side in (run["config"], config))
    if before != now:
        raise InputError(f"checkpoint {folder} is of another configuration: heads are {before} there and {now} here")


def check_model(folder: Path, run: dict, model: dict, path: str) -> None:
    """Raise `InputError` where a checkpoint is of another model than the one at `path`, which `describe_model` gave."""
    for key, (theirs, ours) in _differences(run["model"], model).items():
        raise InputError(f"checkpoint {folder} is of another model: {key} is {theirs} there, {ours} in {path!r}")


def _differences(theirs: dict, ours: dict, prefix: str = "") -> dict[str, tuple]:
    found = {}
    for key in theirs | ours:
        left, right = theirs.get(key), ours.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found |= _differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found[f"{prefix}{key}"] = (left, right)
    return found


def partial(folder: Path) -> Path:
    """Where a checkpoint is written until it is complete."""
    return folder.with_name(f"{folder.name}.partial")


def begin(folder: Path) -> None:
    """Make an empty place to write a checkpoint to. For one rank to call."""
    shutil.rmtree(partial(folder), ignore_errors=True)
    partial(folder).mkdir(parents=True)


def write_run(folder: Path, run: dict) -> None:
    """Write `run.json`. For one rank to call."""
    (folder / "run.json").write_text(json.dumps(run, indent=1), encoding="utf-8")


def complete(folder: Path) -> None:
    """Make a checkpoint that all ranks have written count. For one rank to call.

    Args:
        folder: Its final name.
    """
    for path in partial(folder).rglob("*"):
        if path.is_file():
            _to_disk(path)
    publish(partial(folder), folder)
    _to_disk(folder.parent)


def prune(output_dir: Path, keep: int, best: int | None = None) -> None:
    """Remove the oldest checkpoints of a run, and what killed runs left. For one rank to call.

    Args:
        output_dir: The run's folder.
        keep: How many stay; 0 keeps all.
        best: The step of one that stays in any case.
    """
    for old in checkpoints(output_dir)[:-keep] if keep else []:
        if old.name != f"step-{best or 0:06d}":
            # A removal that is killed half-way must not leave what looks complete.
            os.rename(old, partial(old))
    for unfinished in (output_dir / "checkpoints").glob("step-*.partial"):
        shutil.rmtree(unfinished)


def _to_disk(path: Path) -> None:
    """Without this a machine that loses power after the rename could keep the new name and not the new bytes."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class RandomState:
    """The states of torch (CPU and this rank's GPU), numpy and Python, which a user's scorer may draw from."""

    tensors: dict[str, torch.Tensor]
    words: dict[str, Any]

    @classmethod
    def now(cls) -> "RandomState":
        """As they are."""
        tensors = {"torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["cuda"] = torch.cuda.get_rng_state()
        kind, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
        tensors["numpy"] = torch.from_numpy(keys.astype(numpy.int64))
        words = {"numpy": [str(kind), int(position), int(has_gauss), float(gauss)], "python": random.getstate()}
        return cls(tensors, words)

    def restore(self) -> None:
        """Go on from it. Nothing that draws random numbers may come between this and the run."""
        torch.set_rng_state(self.tensors["torch"])
        if "cuda" in self.tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.tensors["cuda"])
        kind, position, has_gauss, gauss = self.words["numpy"]
        numpy.random.set_state((kind, self.tensors["numpy"].numpy().astype(numpy.uint32), position, has_gauss, gauss))
        version, state, gauss_next = self.words["python"]
        random.setstate((version, tuple(state), gauss_next))


def save_random_state(folder: Path, rank: int) -> None:
    """Write this rank's random state."""
    state = RandomState.now()
    metadata = {"state": json.dumps(state.words)}
    save_file(state.tensors, folder / f"random-rank{rank}.safetensors", metadata=metadata)


def load_random_state(folder: Path, rank: int) -> None:
    """Restore what `save_random_state` wrote."""
    from safetensors import safe_open

    path = folder / f"random-rank{rank}.safetensors"
    with safe_open(path, framework="pt") as file:
        words = json.loads(file.metadata()["state"])
    RandomState(load_file(path), words).restore()


def describe_model(module: torch.nn.Module) -> dict:
    """What identifies an architecture: the number of parameters, and a few names with shapes."""
    shapes = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}
    names = sorted(shapes)
    return {"parameters": len(names), "elements": sum(torch.Size(shapes[n]).numel() for n in names), "first": names[0]}
