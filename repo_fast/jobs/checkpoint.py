"""Checkpoints of a run: found, written aside and renamed, pruned, and checked against the run that resumes.

A checkpoint is the folder `checkpoints/step-000010/` with a folder for each engine (`Engine.save`), `run.json` (step,
configuration, multiplier, data positions), a file of random states for each rank, and `manifest.json`, which knows all
of these. It is written as `step-000010.partial` and renamed when every rank is done: a folder without that ending is
complete, whenever the run was killed. Older ones go only after that. One that was damaged since is never read:
`--resume auto` goes on from the one before it, and calls it `step-000010.damaged`.
"""

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from repo_fast.checkpoints.files import FileSum, sum_of
from repo_fast.checkpoints.manifest import MANIFEST, Damaged, check_sizes, check_sums, damages, read_manifest, seal
from repo_fast.collectives import Ranks
from repo_fast.config import GuardConfig, RubricConfig, ScorerConfig
from repo_fast.errors import InputError, first_line, readable
from repo_fast.report.best import FOLDER as BEST
from repo_fast.report.folders import check_no_links, publish, put_back, remove
from repo_fast.report.jsonl import last_step
from repo_fast.report.page_links import PAGE
from repo_fast.report.plain_yaml import load_yaml

# What runs write whatever is there; `--output_dir .` may be the folder of the policy that it starts from.
_RESULTS = ("policy", "model")
_WRITTEN_OVER = (
    *(*_RESULTS, BEST, "checkpoints", "evaluations", "plots", "profile", "tensorboard", PAGE),
    *(f"{name}.jsonl" for name in ("metrics", "samples", "warnings", "evaluations")),
    *(f"eval_{name}.jsonl" for name in ("before", "after", "scores")),
)
_log = logging.getLogger(__name__)

# Endings of what is no checkpoint any more: one that was found damaged, and one of before that was converted.
DAMAGED, CONVERTED = ".damaged", ".deepspeed"
_COMPLETE = re.compile(r"step-(\d{6,})")
# May differ between a checkpoint and the run that goes on from it: they change nothing that is computed.
_FREE_KEYS = (
    *("output_dir", "resume", "resume_changed_data", "stop_after", "checkpoint", "log", "layout", "evaluate_every"),
    *("expect", "evaluation.every", "evaluation.stop_on", "evaluation.kl_bound", "engine.share_base"),
    *(f"engine.{name}" for name in ("zero_stage", "offload_optimizer", "offload_parameters", "offload_frozen")),
    "engine.parameter_persistence_threshold",
    # What is computed differs by its rounding, which is said where the state is read.
    "engine.dtype",
    "timeout",
)
# So do these of any scorer: a run that stopped at its budget goes on with a larger one, a host may ask another judge.
FREE_OF_SCORERS = re.compile(
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
    """The complete checkpoints of a run, oldest first. Raises `InputError` where the folder cannot be read."""
    return sorted((path for path in _beside_checkpoints(output_dir) if _COMPLETE.fullmatch(path.name)), key=step_of)


def _beside_checkpoints(output_dir: Path) -> list[Path]:
    """All that lies where checkpoints are; nothing where there is no such folder."""
    folder = output_dir / "checkpoints"
    with readable(folder):
        # A glob would find nothing in a folder that may not be read, and the run begin anew.
        return [folder / name for name in os.listdir(folder)] if folder.exists() else []


def is_checkpoint(folder: Path) -> bool:
    """Whether it is a folder whose name says that it is complete."""
    return folder.is_dir() and _COMPLETE.fullmatch(_name(folder)) is not None


def is_deepspeeds(folder: Path) -> bool:
    """Whether DeepSpeed wrote it, as it did before checkpoints had a manifest."""
    return not (folder / MANIFEST).exists() and any(folder.glob("*/state/*.pt"))


def _name(folder: Path) -> str:
    """Its own; of a path that does not say, or of a link to one, the folder's."""
    return folder.name if _COMPLETE.fullmatch(folder.name) else folder.resolve().name


def step_of(folder: Path) -> int:
    """The step of a complete one, or of a link to one."""
    return int(_name(folder).removeprefix("step-"))


def find_resume(resume: str | None, output_dir: Path) -> Path | None:
    """The checkpoint folder that `--resume` means; None to start anew.

    With `auto` it is the newest whose files are all there and whose `run.json` is what was written. `first_sound` reads
    the others too, on all ranks together.

    Raises:
        InputError: A folder is named that is not a complete checkpoint, or is damaged; or all are.
    """
    if resume is None:
        return None
    if resume == "auto":
        problems: list[tuple[Path, Damaged]] = []
        for folder in reversed(checkpoints(output_dir)):
            try:
                _look_at(folder)
                return folder
            except Damaged as error:
                problems.append((folder, error))
        if problems:
            raise _all_are_damaged(*problems[0])
        return None
    folder = Path(resume)
    if not is_checkpoint(folder):
        raise InputError(
            f"--resume {resume!r} is not a complete checkpoint, expected `auto` or a folder checkpoints/step-NNNNNN"
        )
    try:
        _look_at(folder)
    except Damaged as error:
        raise _named_is_damaged(folder, error) from error
    return folder


def _look_at(folder: Path) -> None:
    """Raise `Damaged` for what can be seen at once; `InputError` for a checkpoint of before there was a manifest."""
    if is_deepspeeds(folder):
        raise InputError(
            f"checkpoint {folder} is DeepSpeed's, as repo_fast wrote them before, expected one of its own: "
            f"python -m repo_fast.checkpoint {folder} --convert makes it one"
        )
    files = read_manifest(folder)
    check_sizes(folder, files)
    check_sums(folder, files, ["run.json"])


def _named_is_damaged(folder: Path, error: Damaged) -> InputError:
    return InputError(f"checkpoint {folder} is damaged, expected another: {error}")


def _all_are_damaged(folder: Path, error: Damaged) -> InputError:
    return InputError(f"--resume 'auto' finds damaged checkpoints alone, expected one that is not: {folder}: {error}")


def first_sound(folder: Path, resume: str | None, output_dir: Path, ranks: Ranks) -> Path:
    """The checkpoint that `find_resume` found, or one before it, all of whose files are what was written.

    The ranks share the reading, of what the first finds. Those that are damaged get another name. All ranks must call
    it.

    Args:
        folder: From `find_resume`.
        resume: As it was given to that.
        output_dir: As well.
        ranks: This process among all.

    Raises:
        InputError: It was named, and is damaged; or all are; or a newer one could not be read before, and can be now.
    """
    with ranks.together("looking for checkpoints"):
        goes_back = resume == "auto" and ranks.is_first
        older = [path for path in checkpoints(output_dir) if step_of(path) < step_of(folder)] if goes_back else []
    older = ranks.gather_list(older)
    problems: dict[Path, Damaged] = {}
    for found in (folder, *reversed(older)):
        problem = _first_damage(found, ranks)
        if problem is None:
            break
        problems[found] = problem
    else:
        if resume != "auto":
            raise _named_is_damaged(folder, problems[folder])
        raise _all_are_damaged(folder, problems[folder])
    with ranks.together("setting damaged checkpoints aside"):
        if ranks.is_first and resume == "auto":
            for damaged in [path for path in checkpoints(output_dir) if step_of(path) > step_of(found)]:
                problem = problems.get(damaged) or next(iter(damages(damaged, ["run.json"])), None)
                if problem is None:
                    raise InputError(f"checkpoint {damaged} could not be read before, and can be now: try it once more")
                aside = damaged.with_name(f"{damaged.name}{DAMAGED}")
                remove(aside)
                os.rename(damaged, aside)
                said = "checkpoint %s is damaged (%s): it is called %s from now on, and the run goes on from step %d"
                _log.warning(said, damaged, problem, aside.name, step_of(found))
    return found


def _first_damage(folder: Path, ranks: Ranks) -> Damaged | None:
    """What the first of the ranks found that found something."""
    mine: list[tuple[str, str]] = []
    with ranks.together("reading a checkpoint's sums"):
        try:
            files = read_manifest(folder)
            check_sizes(folder, files)
            check_sums(folder, files, ranks.share(sorted(files)))
        except Damaged as error:
            mine.append((error.file, error.problem))
    everyone = ranks.gather_list(mine)
    return Damaged(*everyone[0]) if everyone else None


def check_ranks_agree(found: Path | None, ranks: Ranks) -> None:
    """Raise `InputError` where not all ranks found the same checkpoint: each would go on from its own.

    Args:
        found: By this rank; None where it found none.
        ranks: This process among all, which must all call it.
    """
    with ranks.together("looking at a checkpoint"):
        mine = "none" if found is None else f"{found.name} (sha256 {_sum_of_manifest(found)})"
    everyone = ranks.gather_list([mine])
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise InputError(
                f"the ranks do not find the same checkpoint: rank 0 finds {everyone[0]}, rank {rank} {theirs}; "
                "expected one folder that all hosts see"
            )


def _sum_of_manifest(folder: Path) -> str:
    try:
        return sum_of(folder / MANIFEST).sha256[:12]
    except OSError as error:
        # That it is damaged is found, and said, by all together.
        return f"unknown: {error.strerror}"


def check_output_folder(resume: str | None, output_dir: Path) -> None:
    """Raise `InputError` where a run would write over another, over what is no run's, or over its own results, whose
    checkpoints are gone."""
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir {str(output_dir)!r} is a file, expected a folder")
    check_no_links(output_dir, ["evaluations", "plots", "profile", "tensorboard"], ["checkpoints"])
    used = (output_dir / "config.yaml").exists()
    written = checkpoints(output_dir)
    if (used or written) and resume not in (None, "auto"):
        if [path.resolve() for path in written[-1:]] != [Path(resume).resolve()]:
            raise InputError(
                f"--resume {resume!r} into --output_dir {str(output_dir)!r}, which holds another run or newer "
                "checkpoints, expected a new folder, or --resume auto"
            )
    is_run = used or (resume is not None and bool(written))
    others = [name for name in _WRITTEN_OVER if not is_run and (output_dir / name).exists()]
    if others:
        raise InputError(
            f"--output_dir {str(output_dir)!r} holds {others[0]!r} and no run, which would write over it, expected a "
            "new folder"
        )
    # It takes seconds to import, which only jobs have.
    from repo_fast.jobs.training_prompts import FILE, is_about_its_folder

    if not is_run and is_about_its_folder(output_dir):
        raise InputError(
            f"--output_dir {str(output_dir)!r} holds {FILE!r}, which says what the model in that folder was trained "
            "on, and which the run would write over, expected a new folder"
        )
    if resume is None and used:
        raise InputError(
            f"--output_dir {str(output_dir)!r} holds a run already, expected a new folder, or --resume auto to go on"
        )
    if resume == "auto" and not written:
        _check_that_none_is_gone(output_dir)


def _check_that_none_is_gone(output_dir: Path) -> None:
    """Raise `InputError` where a folder without checkpoints had some: to begin anew would cost what is left."""
    beside = sorted(_beside_checkpoints(output_dir))
    half_converted = [path for path in beside if path.suffix == CONVERTED]
    if half_converted:
        raise InputError(
            f"checkpoint {half_converted[-1]} is DeepSpeed's, and its conversion was not finished, expected one of "
            f"repo_fast's own: python -m repo_fast.checkpoint {output_dir} --convert makes it one"
        )
    results = [str(output_dir / name) for name in _RESULTS if (output_dir / name).exists()]
    signs = [*results, *(str(path) for path in beside if path.suffix == DAMAGED)]
    log, first = output_dir / "metrics.jsonl", _steps_before_the_first(output_dir)
    last = last_step(log)
    if first and last > first:
        signs.append(f"{log}, up to step {last}")
    if signs:
        raise InputError(
            f"--resume 'auto' finds no checkpoint in {str(output_dir / 'checkpoints')!r}, where there was one: there "
            f"is {signs[0]}; expected the checkpoint, or a new folder for a run that begins anew"
        )
    if last:
        _log.warning(
            "%s: stopped in or after step %d, before its first checkpoint: the run begins anew, and its log too",
            log,
            last,
        )


def _steps_before_the_first(output_dir: Path) -> int | None:
    """How many the run in a folder logs at most before it has a checkpoint, as it was started; None where it says none,
    or cannot be read."""
    try:
        settings = load_yaml((output_dir / "config.yaml").read_text(encoding="utf-8"))["checkpoint"]
        # Written in the background, the first is there before the second begins.
        return int(settings["every"]) * (2 if settings.get("background") else 1)
    except (OSError, ValueError, LookupError, TypeError):
        return None


def read_run(folder: Path) -> dict:
    """The `run.json` of a checkpoint.

    Raises:
        InputError: It is not of a run.
        OSError: It is not there.
    """
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{folder / 'run.json'} is not valid JSON: {first_line(error)}") from error
    for key, kind in (("step", int), ("ranks", int), ("config", dict), ("model", dict), ("state", dict)):
        if not isinstance(run, dict) or not isinstance(run.get(key), kind):
            raise InputError(f"{folder / 'run.json'} is of no run: {key!r} is not there, or of another type")
    return run


def check_run(folder: Path, run: dict, config: dict) -> None:
    """Raise `InputError` where a checkpoint belongs to another configuration.

    Args:
        folder: For the message.
        run: Its `run.json`.
        config: The resuming run's configuration, as plain mappings.
    """
    for key, (theirs, ours) in differences(run["config"], config).items():
        if key == "critics.shared_trunk" and theirs is False:
            # What null was then.
            theirs = None
        if theirs is None and key in _BEFORE:
            theirs = ours if _BEFORE[key] is _ANY else _BEFORE[key]
        free = {key, key.split(".")[0]} & {*_FREE_KEYS} or FREE_OF_SCORERS.fullmatch(key)
        if theirs != ours and not free:
            raise InputError(
                f"checkpoint {folder} is of another configuration: {key} is {theirs!r} there and {ours!r} here, "
                "expected the same; another begins in a new folder, from this one's policy/ if need be"
            )
    # The same ones, but which output is whose goes by their order.
    before, now = (list(side.get("heads", {})) for side in (run["config"], config))
    if before != now:
        raise InputError(f"checkpoint {folder} is of another configuration: heads are {before} there and {now} here")


def check_model(folder: Path, run: dict, model: dict, path: str) -> None:
    """Raise `InputError` where a checkpoint is of another model than the one at `path`, which `describe_model` gave."""
    for key, (theirs, ours) in differences(run["model"], model).items():
        raise InputError(f"checkpoint {folder} is of another model: {key} is {theirs} there, {ours} in {path!r}")


def differences(theirs: dict, ours: dict, prefix: str = "") -> dict[str, tuple]:
    """What is not the same in two nested mappings, both values by the keys to it, with dots between them."""
    found = {}
    for key in theirs | ours:
        left, right = theirs.get(key), ours.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found |= differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found[f"{prefix}{key}"] = (left, right)
    return found


def partial(folder: Path) -> Path:
    """Where a checkpoint is written until it is complete."""
    return folder.with_name(f"{folder.name}.partial")


def begin(folder: Path) -> None:
    """Make an empty place to write a checkpoint to. For one rank to call."""
    remove(partial(folder))
    partial(folder).mkdir(parents=True)


def complete(folder: Path, sums: Mapping[str, FileSum]) -> None:
    """Make a checkpoint that all ranks have written count. For one rank to call.

    Args:
        folder: Its final name.
        sums: Of all its files, by their paths in it.
    """
    seal(partial(folder), sums)
    publish(partial(folder), folder)


def remove_unfinished(output_dir: Path) -> None:
    """Remove what killed runs left, and let results have their names. For one rank to call, before there is one of this
    run."""
    for name in (*_RESULTS, BEST):
        put_back(output_dir / name)
    for unfinished in (output_dir / "checkpoints").glob("step-*.partial"):
        remove(unfinished)


def prune(output_dir: Path, keep: int, best: int | None = None) -> None:
    """Remove the oldest checkpoints of a run. For one rank to call.

    Args:
        output_dir: The run's folder.
        keep: How many stay; 0 keeps all.
        best: The step of one that stays in any case.
    """
    for old in checkpoints(output_dir)[:-keep] if keep else []:
        if old.name != f"step-{best or 0:06d}":
            # A removal that is killed half-way must not leave what looks complete.
            os.rename(old, partial(old))
            remove(partial(old))


def describe_model(module: torch.nn.Module) -> dict:
    """What identifies an architecture: the number of parameters, and a few names with shapes."""
    shapes = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}
    names = sorted(shapes)
    return {"parameters": len(names), "elements": sum(torch.Size(shapes[n]).numel() for n in names), "first": names[0]}
