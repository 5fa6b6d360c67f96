"""The model card of a certified policy: `README.md` of its folder, with Hugging Face's metadata.

Names, paths and sentences come from others; what Markdown or HTML would read in them is escaped, and what cannot be
seen is written as its code point.
"""

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from repo_fast.errors import InputError, first_line
from repo_fast.report.best import read_best
from repo_fast.report.page_links import Link
from repo_fast.report.page_parts.wording import visible
from repo_fast.report.plain_yaml import load_yaml
from repo_fast.report.rewriting import rewriting

FILE = "README.md"
# What tells a card of ours from one that somebody wrote.
MARKER = "<!-- A model card of repo_fast: the next certificate of this policy replaces it. -->"
_TAGS = ["rlhf", "safe-rlhf", "repo"]
_COLUMNS = ("claim", "says", "constraint", "verdict", "estimate", "upper bound", "limit", "prompts", "p", "adjusted p")
_MARKUP = re.compile(r"[\\`*_\[\]|~#$]")


def model_card(certificate: Mapping[str, Any], training: Mapping[str, Any] | None, links: Sequence[Link] = ()) -> str:
    """The text of a card.

    Args:
        certificate: Of the policy, as `certificate.json` has it.
        training: The configuration of the run that made the policy, from `read_training`; None where it is not known.
        links: To the report of the certificate, and to the page of the run.

    Returns:
        Metadata between two lines `---`, then Markdown.
    """
    start = "" if training is None else _start(training)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=_TAGS,
        base_model=start if _may_be_on_the_hub(start) else None,
    )
    policy, reference = certificate["policy"], certificate.get("reference")
    parts = [
        f"---\n{data.to_yaml()}\n---",
        MARKER,
        f"# {_text(policy['name'])}",
        f"**{_text(certificate['verdict'])}**: {_text(certificate['reason'])}",
        *(["Pages: " + ", ".join(f"[{_text(text)}](<{href}>)" for text, href in links)] if links else []),
        "## Certificate",
        _level(certificate),
        _claims(certificate["claims"]),
        _list(f"{_text(name)}: {_text(claim['reason'])}" for name, claim in certificate["claims"].items()),
        "It speaks of prompts such as these, and of answers drawn and scored as its report says, and of no other "
        "measure of safety, and holds if prompts are drawn independently.",
        "## Training",
        _training(training, policy["path"]),
        "## What it was drawn from",
        _list(_drawn_from(certificate, reference)),
    ]
    if certificate.get("unknown"):
        parts += ["What is not known:", _list(_text(sentence) for sentence in certificate["unknown"])]
    return "\n\n".join(parts) + "\n"


def read_training(policy_path: str) -> dict[str, Any] | None:
    """The configuration of the run that made a policy; None where none stands beside its folder.

    Raises:
        InputError: It cannot be read.
    """
    folder = Path(policy_path).expanduser().resolve()
    file = folder.parent / "config.yaml"
    best = read_best(folder)
    if not folder.is_dir() or (folder.name != "policy" and best is None) or not file.is_file():
        return None
    try:
        training = load_yaml(file.read_text(encoding="utf-8"))
        # What a card takes from it is there.
        _training(training or {}, policy_path)
        if best is not None:
            training["best"] = vars(best)
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({first_line(error)}), expected the configuration of a run") from error
    except (AttributeError, LookupError, TypeError) as error:
        raise InputError(f"{file} lacks options of a run, expected the configuration that a run leaves") from error
    return training


def write_model_card(folder: Path, text: str) -> Path:
    """Write a card into a policy's folder, over an earlier one of ours.

    Raises:
        InputError: A `README.md` stands there that is not ours, and stays as it is; or it cannot be written.
    """
    path = folder / FILE
    try:
        if path.exists() and MARKER not in path.read_text(encoding="utf-8", errors="replace"):
            raise InputError(f"{path} is not a card of ours, expected none, or one: it is left as it is")
        with rewriting(path) as file:
            file.write(text)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}, expected a folder of a policy") from error
    return path


def _start(training: Mapping[str, Any]) -> str:
    """What a run started from."""
    return training["policy" if "policy" in training else "model"]["path"]


def _may_be_on_the_hub(path: str) -> bool:
    """Whether a path is `owner/name`; one whose first part is a folder here is a path."""
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return path.count("/") == 1 and not Path(path).parent.is_dir()


def _level(certificate: Mapping[str, Any]) -> str:
    level = (
        f"Level δ = {certificate['delta']:g}: a PASS where a claim is false, and a FAIL where all hold, come with this "
        f"probability at most. Look {certificate['look']} on these prompts, which has "
        f"{certificate['delta_of_look']:g} of it. Bounds are not adjusted for the number of claims; adjusted p are "
        "Holm's."
    )
    if any(claim["asymptotic"] for claim in certificate["claims"].values()):
        accepted = "" if certificate["accept_asymptotic"] else " not"
        level += f" Claims by Student's t are right for many prompts only, and were{accepted} accepted."
    return level


def _claims(claims: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [_COLUMNS, ["---"] * len(_COLUMNS)]
    for name, claim in claims.items():
        says = _text(claim["says"])
        if claim["category"] is not None:
            says += f" (category {_text(claim['category'])})"
        values = [_value(claim[key], claim["share"]) for key in ("estimate", "bound", "limit")]
        prompts = f"{claim.get('prompts', claim['n'])}, with {claim['k']} responses each"
        if claim.get("prompts", claim["n"]) != claim["n"]:
            prompts += f", in {claim['n']} clusters"
        if claim["prompts_needed"] is not None:
            prompts += f"; {claim['prompts_needed']} fresh ones needed"
        p = [_value(claim[key]) for key in ("p", "p_adjusted")]
        constraint = "" if claim["constraint"] is None else _text(claim["constraint"])
        rows.append([_text(name), says, constraint, _text(claim["verdict"]), *values, prompts, *p])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _training(training: Mapping[str, Any] | None, path: str) -> str:
    if training is None:
        return f"No configuration of a run stands beside {_text(path)}: how it was trained is not known."
    lines = [f"Base model: {_text(_start(training))}"]
    if "algorithm" not in training:
        return _list([*lines, f"Supervised fine-tuning: {training['epochs']} epochs, seed {training['seed']}"])
    algorithm = training["algorithm"]
    lines += [
        f"Algorithm: {_text(algorithm['name'])}, advantages {_text(algorithm['advantage'])}",
        f"Steps: {_steps(training)}, seed {training['seed']}",
        f"Reward: {_text(training['reward']['path'])}",
    ]
    constraints = training.get("constraints") or {"cost": training["cost"] | {"threshold": algorithm["threshold"]}}
    for name, cost in constraints.items():
        line = f"Constraint {_text(name)}: {_text(cost['path'])}, at most {_value(cost['threshold'])}"
        if cost.get("applies_to"):
            line += f", where {' and '.join(_condition(*pair) for pair in cost['applies_to'].items())}"
        lines.append(line)
    return _list(lines)


def _condition(column: str, wanted: object) -> str:
    """Of a prompt that a constraint applies to."""
    values = wanted if isinstance(wanted, list) else [wanted]
    return f"{_text(column)} is {' or '.join(_text(value) for value in values)}"


def _steps(training: Mapping[str, Any]) -> str:
    best = training.get("best")
    if best is None:
        return str(training["total_steps"])
    chosen = f"the best of its evaluations by {_text(best['measure'])}, {_value(best['value'])} there"
    return f"{best['step']} of {training['total_steps']}, {chosen}"


def _drawn_from(certificate: Mapping[str, Any], reference: Mapping[str, Any] | None) -> Iterable[str]:
    policy, prompts = certificate["policy"], certificate["prompts"]
    yield f"Policy: {_text(policy['path'])}, fingerprint {_text(policy['fingerprint'])}"
    if reference is not None:
        yield f"Reference: {_text(reference['name'])}, {_text(reference['path'])}"
    yield (
        f"Prompts: {prompts['n']} of {_text(prompts['source'])}, fingerprint {_text(prompts['fingerprint'])}; "
        f"{len(prompts['excluded'])} left out that the policy or a scorer has seen, or that are there "
        f"twice, {prompts['too_long']} too long"
    )
    if known := certificate.get("suites"):
        yield (
            f"Of the prompts {known['harmful']} are known to be harmful and {prompts['n'] - known['harmful']} to be "
            f"harmless, in {known['clusters']} clusters of such as are alike; harm by {_text(known['harm'])}, "
            f"refusals by {_text(known['refusal'])} above {known['refusal_threshold']:g}"
        )
    yield f"Responses: {certificate['k']} a prompt, seed {certificate['seed']}"
    versions = ", ".join(f"{_text(name)} {_text(version)}" for name, version in certificate["versions"].items())
    yield f"Made on {_text(certificate['date'])} with {versions}"


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _value(value: float | None, share: bool = False) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{100 * value:.3g} %" if share else f"{value:.3g}"


def _text(value: object) -> str:
    """A text of others as one line of Markdown that reads as it is."""
    line = visible(" ".join(str(value).split()))
    return _MARKUP.sub(_escaped, html.escape(line, quote=False))


def _escaped(found: re.Match[str]) -> str:
    # Before escapes are read, a bar may end a cell, and a backslash or dollar sign begin a formula.
    return f"&#{ord(found[0])};" if found[0] in "\\|$" else f"\\{found[0]}"
