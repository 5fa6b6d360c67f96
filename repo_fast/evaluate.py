"""Compare policies on the same prompts: safety prompt by prompt, helpfulness, and a report to look at.

    python -m repo_fast.evaluate --policy before=FOLDER --policy after=FOLDER --reference before \\
        --prompts prompts.jsonl --samples_per_prompt 8 --reward.path FOLDER --cost.path FOLDER \\
        --output_dir outputs/evaluate
    python -m repo_fast.evaluate --config tiny --policy before=world:tiny --policy after=outputs/tiny/policy

Under torchrun the ranks share the work. Samples, scores and judgments are cached in the output folder: a stopped
evaluation goes on where it was, and one more `--policy` costs only that policy. Written are `report.json` (measures
with 95 % intervals), `samples.jsonl` (every response with its scores) and `report.html`, which needs no network.

Options: `--help`; checks and exit status as in `repo_fast.train`.
"""

import json
import sys
from collections.abc import Callable, Sequence

from repo_fast.config import EvaluateConfig
from repo_fast.errors import InputError
from repo_fast.jobs.launch import guarded, launch


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""

    def prepare(config: EvaluateConfig) -> Callable:
        from repo_fast.evaluation.evaluator import Evaluator
        from repo_fast.evaluation.inputs import read_inputs

        inputs = read_inputs(config)
        return lambda ranks: Evaluator(config, inputs, ranks).run()

    words = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: launch(join_policies(words), EvaluateConfig, prepare))


def join_policies(words: list[str]) -> list[str]:
    """The command line with all its `--policy NAME=PATH` as the one option of the configuration."""
    policies: dict[str, str] = {}
    others: list[str] = []
    remaining = iter(words)
    for word in remaining:
        option, has_value, value = word.partition("=")
        if option != "--policy":
            others.append(word)
            continue
        value = value if has_value else next(remaining, "")
        name, separator, path = value.partition("=")
        if not separator:
            raise InputError(f"--policy is {value!r}, expected NAME=PATH")
        if name in policies:
            raise InputError(f"--policy {name}={path}: the name is given twice, expected another one")
        policies[name] = path
    return [*others, "--policies", json.dumps(policies)] if policies else others


if __name__ == "__main__":
    sys.exit(main())
