"""The whole of Safe RLHF on the embedded world: supervised fine-tuning, reward model, cost model, RePO, judgement.

    python -m repo_fast.pipeline --output_dir outputs/pipeline
    python -m repo_fast.pipeline --sft.epochs 2 --repo.total_steps 20 --ranks 2

Each stage is an entry point of its own, on ranks as `repo_fast.launcher` starts them, with the configuration of its
name's `tiny` family, and writes a folder below the output folder. What comes after starts from what came before:

    sft/       repo_fast.sft     demonstrations         -> sft/policy
    reward/    repo_fast.score   preferences            -> reward/model   (trunk: sft/policy)
    cost/      repo_fast.score   preferences, labels    -> cost/model     (trunk: sft/policy)
    repo/      repo_fast.train   prompts                -> repo/policy    (rewards and costs by the two models)

The end is a table twice: before and after as the learned models see it, which is what was optimised, and as the
corpus's own rules see the same responses. Where the two disagree, the policy has learned what the models get wrong.

A stage whose result is there, made with the same configuration and from the same earlier stages, is skipped; one that
was stopped, by Ctrl-C or SIGTERM too, goes on. One made with another configuration is an error:
nothing is overwritten. Options of a stage are `--STAGE.option value`; `--until STAGE` ends after that one.
"""

import argparse
import json
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from repo_fast.config import RunConfig, ScoreConfig, SftConfig, TrainConfig, parse, to_dict
from repo_fast.errors import InputError, readable
from repo_fast.jobs.launch import OneLineParser, guarded
from repo_fast.launcher import run_ranks
from repo_fast.report.evaluations import judge_evaluation, read_evaluation
from repo_fast.report.rewriting import rewriting
from repo_fast.report.tables import before_after_table
from repo_fast.world import rules

# A stage may be gone on with under these, which change nothing that is computed.
_FREE = ("output_dir", "resume", "resume_changed_data", "stop_after", "checkpoint", "log", "timeout")
_RECORD = "pipeline.json"


@dataclass(frozen=True)
class Stage:
    """One run of an entry point.

    Attributes:
        name: Of its folder and of its options.
        module: The entry point.
        kind: Its configuration.
        result: What it makes, below its folder.
        options: Its options, beside the output folder and the user's.
        needs: The stages that it starts from.
    """

    name: str
    module: str
    kind: type[RunConfig]
    result: str
    options: dict[str, str]
    needs: tuple[str, ...] = ()


def stages(output_dir: Path) -> list[Stage]:
    """The stages of the `tiny` family, in order."""
    # Safe or not is learned sooner than which of two answers is better.
    fewer = {"kind": "cost", "epochs": "1", "data.limit": "8192"}
    policy = {"model.path": str(output_dir / "sft" / "policy")}
    learned = {
        "policy.path": str(output_dir / "sft" / "policy"),
        "reward.path": str(output_dir / "reward" / "model"),
        "cost.path": str(output_dir / "cost" / "model"),
        # As in the other stages: on two ranks, shards would cost twice the time.
        "engine.zero_stage": "1",
        # So short a first stage leaves some probability on wrong words everywhere, and learned scores are easier to
        # exploit than the rules that `tiny` is trained with.
        "rollout.temperature": "0.7",
        "algorithm.kl_coefficient": "0.1",
    }
    return [
        Stage("sft", "repo_fast.sft", SftConfig, "policy", {}),
        Stage("reward", "repo_fast.score", ScoreConfig, "model", {"kind": "reward"} | policy, ("sft",)),
        Stage("cost", "repo_fast.score", ScoreConfig, "model", fewer | policy, ("sft",)),
        Stage("repo", "repo_fast.train", TrainConfig, "policy", learned, ("sft", "reward", "cost")),
    ]


def command_line() -> OneLineParser:
    """The tool's own; what it does not know is a stage's."""
    parser = OneLineParser(
        prog="repo-fast pipeline",
        usage="%(prog)s [--output_dir FOLDER] [--ranks N] [--until STAGE] [--STAGE.OPTION VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("outputs/pipeline"),
        metavar="FOLDER",
        help="below it each stage has a folder (default: %(default)s)",
    )
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="ranks of each stage (default: %(default)s)")
    parser.add_argument("--until", metavar="STAGE", help="sft, reward, cost or repo: the last stage; else all are run")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    return guarded(lambda: run(list(sys.argv[1:] if arguments is None else arguments)))


def run(words: list[str]) -> int:
    """Run what is not done yet of the pipeline, and print what came of it.

    Returns:
        The exit status: that of the first stage that did not end well, else 0.

    Raises:
        InputError: An option that does not exist, or a stage of another configuration.
    """
    chosen, rest = command_line().parse_known_args(words)
    if chosen.ranks < 1:
        raise InputError(f"--ranks is {chosen.ranks}, expected at least 1")
    todo = stages(chosen.output_dir)
    names = [stage.name for stage in todo]
    if chosen.until not in (None, *names):
        raise InputError(f"--until is {chosen.until!r}, expected a stage: {', '.join(names)}")
    given = _options_by_stage(rest, names)
    # All command lines are parsed before the first stage starts.
    commands = {stage.name: _words(stage, chosen.output_dir, given[stage.name]) for stage in todo}
    parsed = {stage.name: parse(commands[stage.name], stage.kind) for stage in todo}
    reinforced = parsed["repo"]
    assert isinstance(reinforced, TrainConfig)
    if reinforced.data.eval_prompts is None:
        raise InputError("--repo.data.eval_prompts is null, expected prompts: the pipeline ends with their table")
    for stage in todo:
        status = _run_stage(stage, chosen, commands[stage.name], _kept(parsed[stage.name]))
        if status != 0:
            print(
                f"stage {stage.name} ended with exit status {status}; the same command goes on from there", flush=True
            )
            return status
        if stage.name == chosen.until:
            return 0
    print(judgement(chosen.output_dir / "repo", reinforced.algorithm.threshold))
    return 0


def judgement(folder: Path, threshold: float) -> str:
    """Before and after, by the learned models and by the corpus's rules: the text that ends the pipeline."""
    learned = {name: read_evaluation(folder / f"eval_{name}.jsonl")[0] for name in ("before", "before_again", "after")}
    ruled = {
        name: judge_evaluation(folder / f"eval_{name}.jsonl", rules.reward, rules.cost, rules.well_formed)
        for name in learned
    }
    tables = {
        "learned": before_after_table(learned["before"], learned["after"], threshold, learned["before_again"]),
        "rules": before_after_table(ruled["before"], ruled["after"], threshold, ruled["before_again"]),
    }
    for name, table in tables.items():
        (folder / f"before_after_{name}.txt").write_text(table + "\n", encoding="utf-8")
    return (
        f"\nHeld-out prompts, as the learned reward and cost model see the responses:\n{tables['learned']}\n\n"
        f"The same responses, as the corpus's own rules see them:\n{tables['rules']}"
    )


def _options_by_stage(words: list[str], names: list[str]) -> dict[str, list[str]]:
    given: dict[str, list[str]] = {name: [] for name in names}
    current = None
    for word in words:
        if word.startswith("--"):
            current, _, option = word.removeprefix("--").partition(".")
            if current not in given or not option:
                expected = ", ".join(f"--{name}.option" for name in names)
                raise InputError(f"unknown option {word!r}, expected --output_dir, --ranks, --until or {expected}")
            if option.partition("=")[0] == "output_dir":
                raise InputError(
                    f"{word!r} is the pipeline's to choose, expected --output_dir, below which stages write"
                )
            given[current].append(f"--{option}")
        elif current is None:
            raise InputError(f"unexpected word {word!r}, expected an option")
        else:
            given[current].append(word)
    return given


def _words(stage: Stage, output_dir: Path, given: list[str]) -> list[str]:
    options = {"output_dir": str(output_dir / stage.name)} | stage.options
    return [word for key, value in options.items() for word in (f"--{key}", value)] + given


def _kept(config: RunConfig) -> dict:
    return {key: value for key, value in to_dict(config).items() if key not in _FREE}


def _run_stage(stage: Stage, chosen: argparse.Namespace, words: list[str], config: dict) -> int:
    """Skip, go on with, or start a stage; returns its exit status."""
    folder = chosen.output_dir / stage.name
    inputs = {name: _read_record(chosen.output_dir / name)["id"] for name in stage.needs}
    record = {"config": config, "inputs": inputs, "ranks": chosen.ranks}
    before = _read_record(folder)
    if before:
        _check_unchanged(stage, folder, before, record)
    if before.get("complete") and (folder / stage.result).is_dir():
        print(f"stage {stage.name}: complete in {folder}, skipped", flush=True)
        return 0
    print(f"stage {stage.name}: {'going on' if before else 'started'} in {folder}", flush=True)
    record["id"] = before.get("id", uuid.uuid4().hex)
    _write_record(folder, record)
    resume = [] if "--resume" in words else ["--resume", "auto"]
    # A model of the embedded world is too small for a second thread to pay.
    status = run_ranks(stage.module, [*words, *resume], chosen.ranks, threads=1)
    if status == 0 and (folder / stage.result).is_dir():
        _write_record(folder, record | {"complete": True})
    elif status == 0:
        # Stopped by `stop_after`: nothing after it can start.
        print(f"stage {stage.name}: not complete yet")
        return 1
    return status


def _check_unchanged(stage: Stage, folder: Path, before: dict, record: dict) -> None:
    for key, ours in record["config"].items():
        theirs = before["config"].get(key)
        if json.dumps(theirs, sort_keys=True) != json.dumps(ours, sort_keys=True):
            raise InputError(
                f"stage {stage.name} in {folder} has {key} {theirs!r}, this command has {ours!r}; expected the same, "
                "another --output_dir, or that folder removed"
            )
    if not before.get("complete") and before["ranks"] != record["ranks"]:
        raise InputError(
            f"stage {stage.name} in {folder} was started on {before['ranks']} ranks, expected --ranks {before['ranks']}"
        )
    for name, ours in record["inputs"].items():
        if before["inputs"].get(name) != ours:
            raise InputError(
                f"stage {stage.name} in {folder} was made from another {name}, which is gone; expected that folder "
                "removed, or another --output_dir"
            )


def _read_record(folder: Path) -> dict:
    path = folder / _RECORD
    expected = "expected the record of a stage, or no file"
    try:
        with readable(path):
            record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}), {expected}") from error
    known = {"config": dict, "inputs": dict, "ranks": int, "id": str}
    if not isinstance(record, dict) or any(not isinstance(record.get(key), known[key]) for key in known if record):
        raise InputError(f"{path} is not as the pipeline wrote it, {expected}")
    return record


def _write_record(folder: Path, record: dict) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with rewriting(folder / _RECORD) as file:
            json.dump(record, file, indent=1)
    except OSError as error:
        raise InputError(
            f"--output_dir {str(folder.parent)!r} cannot be written: {error.strerror}, expected a folder"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
