"""List, verify, export and convert the checkpoints of a run.

    python -m repo_fast.checkpoint outputs/tiny
    python -m repo_fast.checkpoint outputs/tiny --verify
    python -m repo_fast.checkpoint outputs/tiny --export 50 outputs/policy-50
    python -m repo_fast.checkpoint outputs/tiny --convert

The first lists them; the second reads every file and compares it with the manifest; the third writes the policy of a
step of `repo_fast.train` or `repo_fast.sft` as a Hugging Face folder, as the end of the run does; the fourth makes
those of before, which were DeepSpeed's pickles, ones that runs go on from, and keeps the old ones. None of them needs
DeepSpeed, a GPU, or as many ranks as wrote them. Exit status: 0; 2 for input that cannot be used, said in one line; 3
where a checkpoint is damaged, with the names of its files.
"""

import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

from repo_fast.errors import InputError, readable
from repo_fast.jobs.launch import OneLineParser, guarded, quiet_libraries
from repo_fast.report.progress import printable

DAMAGED = 3
# By the ending of its name, what a folder beside checkpoints is.
_INCOMPLETE = {".partial": "was not completed", ".damaged": "was set aside", ".deepspeed": "was converted"}


def command_line() -> OneLineParser:
    parser = OneLineParser(prog="repo-fast checkpoint", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", help="a run's output_dir, or one of its checkpoints")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--verify", action="store_true", help="read every file; exit status 3 where one is damaged")
    what.add_argument(
        "--export", nargs=2, metavar=("STEP", "FOLDER"), help="write the policy of a step as a Hugging Face folder"
    )
    what.add_argument("--convert", action="store_true", help="write checkpoints of before, which are DeepSpeed's, anew")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""

    def run() -> int:
        chosen = command_line().parse_args(sys.argv[1:] if arguments is None else list(arguments))
        with readable(Path(chosen.folder)):
            found = _find(Path(chosen.folder))
        if chosen.convert:
            return _convert(found)
        if chosen.export is None:
            return _list(found, whole=chosen.verify)
        return _export(found, *chosen.export)

    return guarded(run)


def _find(folder: Path) -> list[Path]:
    """What lies where checkpoints are written, complete or not, oldest first; or the one that is meant."""
    for place in (folder / "checkpoints", folder):
        if found := [path for path in place.glob("step-*") if path.is_dir()]:
            return sorted(found, key=lambda path: (len(path.stem), path.name))
    if folder.is_dir() and folder.resolve().name.startswith("step-"):
        return [folder]
    raise InputError(f"{str(folder)!r} has no checkpoints, expected the output_dir of a run, or one of its checkpoints")


def _list(found: list[Path], *, whole: bool) -> int:
    """Say of each what it is; returns the exit status."""
    from repo_fast.checkpoints.manifest import Damaged, damages, read_manifest
    from repo_fast.jobs.checkpoint import is_checkpoint, is_deepspeeds, read_run
    from repo_fast.report.tables import grid

    rows, status = [], 0
    for folder in found:
        ranks, size, notes, problems = "", "", ["sound" if whole else "all files are there"], []
        try:
            if not is_checkpoint(folder):
                notes = [_INCOMPLETE.get(folder.suffix, "no checkpoint")]
            elif is_deepspeeds(folder):
                notes = ["DeepSpeed's, of before: --convert"]
            elif problems := damages(folder, None if whole else ["run.json"]):
                notes = [f"damaged: {problem}" for problem in problems]
            else:
                ranks = str(read_run(folder)["ranks"])
                size = f"{sum(file.bytes for file in read_manifest(folder).values()) / 1e9:.3g}"
            changed = folder.stat().st_mtime
        except (OSError, Damaged):
            if folder.exists():
                raise
            # The run, which goes on meanwhile, keeps the newest.
            continue
        status = DAMAGED if problems else status
        written = datetime.datetime.fromtimestamp(changed).isoformat(" ", "seconds")
        rows += [[folder.name, written, ranks, size, note] for note in notes]
    print(printable(grid(["checkpoint", "written", "ranks", "GB", "" if whole else "--verify reads them"], rows)))
    return status


def _convert(found: list[Path]) -> int:
    from repo_fast.checkpoints.files import writing
    from repo_fast.jobs.conversion import convert, to_convert

    wanted = [(folder, final) for folder in found if (final := to_convert(folder)) is not None]
    if not wanted:
        raise InputError(
            f"--convert finds no checkpoint that DeepSpeed wrote in {str(found[0].parent)!r}, expected one"
        )
    for folder, final in wanted:
        with writing(f"checkpoint {final}"):
            before = convert(folder, final)
        print(printable(f"{final}: converted, of {before.name}"))
    return 0


def _export(found: list[Path], step: str, target: str) -> int:
    from repo_fast.checkpoints.manifest import damages
    from repo_fast.jobs.checkpoint import is_checkpoint, is_deepspeeds, step_of

    steps = {str(step_of(path)): path for path in found if is_checkpoint(path)}
    if step not in steps:
        raise InputError(f"--export {step!r} is no step that has a checkpoint, expected one of {', '.join(steps)}")
    folder = steps[step]
    if is_deepspeeds(folder):
        raise InputError(f"checkpoint {folder} is DeepSpeed's, as repo_fast wrote them before, expected one of its own")
    problems = damages(folder)
    if not folder.exists():
        raise _gone(folder)
    if problems:
        for problem in problems:
            print(printable(f"error: checkpoint {folder} is damaged: {problem}"), file=sys.stderr)
        return DAMAGED
    from repo_fast.jobs.policy_export import export_policy

    quiet_libraries()
    try:
        export_policy(folder, Path(target))
    except FileNotFoundError as error:
        if folder.exists():
            raise
        raise _gone(folder) from error
    print(printable(f"{target}: the policy of step {step}"))
    return 0


def _gone(folder: Path) -> InputError:
    return InputError(
        f"checkpoint {folder} is gone: its run, which goes on, keeps the newest; expected one that is there"
    )


if __name__ == "__main__":
    sys.exit(main())
