"""Train a reward model or a cost model on preferences; convert and check score models.

    torchrun --nproc-per-node 2 -m repo_fast.score --kind cost --model.path FOLDER --data.train pairs.jsonl \\
        --data.eval held-out.jsonl --output_dir outputs/cost
    python -m repo_fast.score --convert FOLDER --to FOLDER --layout score [--kind cost]
    python -m repo_fast.score --check FOLDER --kind cost [--head NAME] --expect TEXT SCORE

The second writes a score model in another layout, bit for bit; the third loads one and compares the score of a text,
template included, with a known one. `--expect TEXT SCORE` may also be added to the other two: to training, for the
score model that is gone on with, and to conversion, for the result, which is kept only if it gives that score.

Options of training: `--help`; configurations, checks and exit status as in `repo_fast.train`.
"""

import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from repo_fast.config import LAYOUTS, ScoreConfig
from repo_fast.errors import InputError
from repo_fast.jobs.launch import OneLineParser, guarded, launch, quiet_libraries
from repo_fast.report.progress import printable

_NO_TRAINING = ("--convert", "--check")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if any(word.split("=")[0] in _NO_TRAINING for word in words):
        return guarded(lambda: _convert_or_check(words))

    def prepare(config: ScoreConfig) -> Callable:
        from repo_fast.jobs.score_training import ScoreTraining, read_inputs

        inputs = read_inputs(config)
        return lambda ranks: ScoreTraining(config, inputs, ranks).run()

    return guarded(lambda: launch(spelled_out(words), ScoreConfig, prepare))


def spelled_out(words: list[str]) -> list[str]:
    """The command line of a training, with `--expect TEXT SCORE` as the JSON that the configuration's option reads."""
    others, expect = _take_expectation(words)
    return [*others, *([] if expect is None else ["--expect", json.dumps(expect, ensure_ascii=False)])]


def _take_expectation(words: list[str]) -> tuple[list[str], tuple[str, float] | None]:
    """The command line without `--expect TEXT SCORE`, and these two; one that has another form stays where it is.

    Taken out by hand, because the parsers would read some negative numbers, and some texts, as something else.
    """
    start = words.index("--expect") if "--expect" in words else len(words)
    given = words[start + 1 : start + 3]
    if len(given) < 2 or given[1].startswith("--"):
        return words, None
    text, score = given
    try:
        known = float(score)
    except ValueError:
        known = math.nan
    if not math.isfinite(known):
        raise InputError(f"--expect has the score {score!r}, expected a number")
    return words[:start] + words[start + 3 :], (text, known)


def _convert_or_check(words: list[str]) -> int:
    parser = OneLineParser(
        prog="python -m repo_fast.score", description="Convert or check score models.", allow_abbrev=False
    )
    action = parser.add_mutually_exclusive_group(required=True)
    for typed, does in ScoreConfig.ALSO.items():
        name, _, value = typed.partition(" ")
        (action if name in _NO_TRAINING else parser).add_argument(name, metavar=value, help=does)
    parser.add_argument("--layout", choices=LAYOUTS, help="Layout to convert to; `score` by default.")
    parser.add_argument(
        "--kind", choices=("reward", "cost"), help="What the score means, where the model does not say."
    )
    parser.add_argument("--expect", nargs=2, metavar=("TEXT", "SCORE"), help="A whole text, and its known score.")
    words, expect = _take_expectation(words)
    chosen = parser.parse_args(words)
    if chosen.check is not None and chosen.layout is not None:
        raise InputError("--layout belongs to --convert, expected --check without it")
    if chosen.head is not None and chosen.check is None and expect is None:
        raise InputError(f"--head {chosen.head!r} belongs to --check and --expect, expected one of them")
    if (chosen.convert is None) != (chosen.to is None):
        raise InputError("--convert FOLDER and --to FOLDER belong together, expected both or neither")
    # After the command line is known to be good: these take seconds to import.
    from repo_fast.models.model_config import load_config
    from repo_fast.models.score_writing import convert_score_model
    from repo_fast.scoring.expectation import check_folder

    quiet_libraries()
    if chosen.check is not None:
        print(printable(check_folder(chosen.check, chosen.kind, expect, chosen.head)))
        return 0
    target, layout = Path(chosen.to), chosen.layout or "score"
    convert_score_model(chosen.convert, target, layout=layout, score_type=chosen.kind)
    if expect is not None:
        try:
            # One of the layouts cannot say what its score means.
            role = chosen.kind or getattr(load_config(chosen.convert), "score_type", None)
            print(printable(check_folder(chosen.to, role, expect, chosen.head)))
        except InputError:
            shutil.rmtree(target)
            raise
    print(printable(f"{chosen.to}: {chosen.convert} in the layout {layout}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
