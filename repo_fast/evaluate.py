"""Compare policies on the same prompts: safety prompt by prompt, helpfulness, and a report to look at.

    python -m repo_fast.evaluate --policy before=FOLDER --policy after=FOLDER --reference before \\
        --prompts prompts.jsonl --samples_per_prompt 8 --reward.path FOLDER --cost.path FOLDER \\
        --output_dir outputs/evaluate
    python -m repo_fast.evaluate --config tiny --policy before=world:tiny --policy after=outputs/tiny/policy

With claims it ends in a decision, at a level that holds (`repo_fast.evaluation.claims`): exit status 0 for PASS, 3 for
FAIL, 4 for UNDECIDED, and `certificate.json`, which `--verify` makes again from what is beside it:

    python -m repo_fast.evaluate --config tiny --policy before=world:tiny --policy after=outputs/tiny/policy \\
        --prompts world:certify --claim unsafe_prompts=0.2 --claim interference=0.1 --output_dir outputs/certificate
    python -m repo_fast.evaluate --verify outputs/certificate/certificate.json

Instead of prompts, known sets of harmful and harmless ones (`repo_fast.evaluation.suites`), for attack success and
over-refusal:

    python -m repo_fast.evaluate --policy before=FOLDER --policy after=FOLDER --suite harmbench,xstest=prompts.csv \\
        --reward.path FOLDER --cost.path FOLDER --claim attack_success=0.1 --claim over_refusal=0.1

Under torchrun the ranks share the work. Samples, scores and judgments are cached in the output folder: a stopped
evaluation goes on where it was, and one more `--policy` costs only that policy. Written are `report.json` (measures
with 95 % intervals), `samples.jsonl` (every response with its scores) and `report.html`, which needs no network.

Options: `--help`; checks and exit status as in `repo_fast.train`.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from repo_fast.config import SUITES, CertifyConfig, EvaluateConfig, read_config_file
from repo_fast.errors import InputError
from repo_fast.jobs.launch import guarded, launch


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""

    def prepare(config: EvaluateConfig) -> Callable:
        from repo_fast.evaluation.evaluator import Evaluator
        from repo_fast.evaluation.inputs import read_inputs

        inputs = read_inputs(config)
        return lambda ranks: Evaluator(config, inputs, ranks).run()

    def run() -> int:
        words = list(sys.argv[1:] if arguments is None else arguments)
        if any(word.partition("=")[0] == "--verify" for word in words):
            return _verify(words)
        return launch(spelled_out(words), EvaluateConfig, prepare)

    return guarded(run)


def spelled_out(words: list[str]) -> list[str]:
    """The command line with its short forms as options of the configuration.

    `--policy NAME=PATH` and `--claim NAME=LIMIT` may come several times, and so may `--suite NAME[,NAME]`, of which
    each may be NAME=PATH; `--certify FILE` is the section of that name, and `--accept-asymptotic` an option of it.
    """
    suites: dict[str, str | None] = {}
    named: dict[str, dict[str, str]] = {"policy": {}, "claim": {}}
    others: list[str] = []
    remaining = iter(words)
    for word in remaining:
        option, has_value, value = word.partition("=")
        if option == "--accept-asymptotic":
            others += ["--certify.accept_asymptotic", value if has_value else "true"]
        elif option == "--certify":
            others += _section(value if has_value else next(remaining, ""))
        elif option == "--suite":
            _add_suites(suites, value if has_value else next(remaining, ""))
        elif option in ("--policy", "--claim"):
            kind, value = option[2:], value if has_value else next(remaining, "")
            name, separator, meant = value.partition("=")
            if not separator:
                raise InputError(f"{option} is {value!r}, expected NAME={'PATH' if kind == 'policy' else 'LIMIT'}")
            if name in named[kind]:
                raise InputError(f"{option} {name}={meant}: the name is given twice, expected another one")
            named[kind][name] = meant
        else:
            others.append(word)
    _check_once("--suite", bool(suites), "--suites.sources", others)
    _check_once("--policy", bool(named["policy"]), "--policies", others)
    for name, limit in named["claim"].items():
        _check_once(f"--claim {name}", True, f"--certify.claims.{name}.limit", others)
        others += [f"--certify.claims.{_claim_name(name)}.limit", _number(f"--claim {name}", limit)]
    if suites:
        others += ["--suites.sources", json.dumps(suites)]
    return [*others, "--policies", json.dumps(named["policy"])] if named["policy"] else others


def _check_once(short: str, given: bool, option: str, words: Sequence[str]) -> None:
    """Raise `InputError` where a short form and the option that it stands for are both given: one would be ignored."""
    if given and any(re.match(rf"{re.escape(option)}([.=]|$)", word) for word in words):
        raise InputError(f"{short} and {option} are both given, expected one of them: they say the same")


def _add_suites(suites: dict[str, str | None], given: str) -> None:
    for part in given.split(","):
        name, has_path, path = part.partition("=")
        if name not in SUITES:
            raise InputError(
                f"--suite {given!r} has the suite {name!r}, expected NAME or NAME=PATH, with commas between them, each "
                f"one of {', '.join(SUITES)}; a path with a comma goes into a file, as suites.sources.NAME"
            )
        if name in suites:
            raise InputError(f"--suite {part}: the suite is given twice, expected another one")
        suites[name] = path if has_path else None


def _claim_name(name: object) -> str:
    if not isinstance(name, str) or re.fullmatch(r"\w+", name) is None:
        raise InputError(f"the claim's name is {name!r}, expected letters, digits and _")
    return name


def _number(what: str, text: str) -> str:
    try:
        if math.isfinite(float(text)):
            return text
    except ValueError:
        pass
    raise InputError(f"{what} is {text!r}, expected a number")


def _section(path: str) -> list[str]:
    """The section `certify` in a file, as words of a command line."""
    if not Path(path).is_file():
        raise InputError(f"--certify {path!r} is no file, expected YAML with claims, as in the section certify")
    section = read_config_file(Path(path), CertifyConfig)
    claims = section.get("claims")
    if not isinstance(claims, dict) or not claims:
        raise InputError(f"{path}: claims is {claims!r}, expected a mapping with at least one claim")
    for name, claim in claims.items():
        if not claim:
            raise InputError(f"{path}: claims.{_claim_name(name)} is {claim!r}, expected a limit, as in {{limit: 0.1}}")
    words: list[str] = []

    def spell(options: dict, prefix: str) -> None:
        for key, value in options.items():
            if isinstance(value, dict):
                spell(value, f"{prefix}.{key}")
            else:
                # A date, say, is no JSON: as a text it is refused by name.
                words.extend([f"{prefix}.{key}", value if isinstance(value, str) else json.dumps(value, default=str)])

    spell(section, "--certify")
    return words


def _verify(words: list[str]) -> int:
    from repo_fast.evaluation.verify import verify

    option, has_value, path = words[0].partition("=")
    if option != "--verify" or len(words) != (1 if has_value else 2):
        raise InputError(
            f"the command line is {' '.join(words)!r}, expected --verify certificate.json and nothing else"
        )
    return verify(Path(path if has_value else words[1]))


if __name__ == "__main__":
    sys.exit(main())
