"""Whether a certificate follows from the files beside it: `python -m repo_fast.evaluate --verify certificate.json`.

Nothing is drawn or scored. The files have to be those that the certificate is of, and the certificate made again from
them has to be the same. It finds accidents, not forgery: whoever can write the files can write all of them.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from repo_fast.errors import InputError, at, first_line
from repo_fast.evaluation.certificate import EXIT_STATUS, certificate_table, decide, made_with, prompts_fingerprint
from repo_fast.evaluation.plan import CLAIMS_FILE, FILES, SAMPLES_FILE, digest, identity, read_json
from repo_fast.report.progress import printable

# Other versions of SciPy may round differently.
_TOLERANCE = 1e-9
_WORDS = ("says", "reason", "prompts_needed")


def verify(path: Path) -> int:
    """Make a certificate again from the files beside it, compare, and print it.

    Args:
        path: `certificate.json`, with `claims.json` and `samples.jsonl` beside it.

    Returns:
        The exit status of its verdict: 0 PASS, 3 FAIL, 4 UNDECIDED.

    Raises:
        InputError: A file is missing or not the one that it is of, or it does not follow from them.
    """
    certificate, folder = read_json(path), path.parent
    plan = read_json(folder / CLAIMS_FILE)
    try:
        rows = list(_rows(folder / SAMPLES_FILE))
        _check_plan(plan, folder / CLAIMS_FILE)
        # What is wrong in the content says more than that a file is another one.
        with at(str(folder / SAMPLES_FILE)):
            again = decide(plan, rows)
            _compare_prompts(plan, rows)
        same_program = certificate["versions"] == made_with()["versions"]
        for name in sorted(certificate.keys() - again.keys() - {"date", "versions", "files"}):
            raise InputError(f"{path}: {name} is {certificate[name]!r:.80}, made again there is none")
        _compare(certificate, again, path, exact=same_program)
        for name in FILES:
            known, found = certificate["files"][name], digest(folder / name)
            if found != known:
                raise InputError(
                    f"{folder / name} has the SHA-256 {found[:12]}…, expected {str(known)[:12]}…: it is not the file "
                    f"that {path.name} is of"
                )
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError, OSError) as error:
        raise InputError(
            f"{path} or a file beside it is not as repo_fast.evaluate wrote it: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    print(printable(certificate_table(certificate)))
    print(printable(f"verified: {path} follows from {CLAIMS_FILE} and {SAMPLES_FILE}"))
    return EXIT_STATUS[certificate["verdict"]]


def _check_plan(plan: dict[str, Any], path: Path) -> None:
    """Raise `InputError` where claims are not as they were when the look was counted."""
    key = identity(plan)
    if key != plan["key"] or plan["delta_of_look"] != plan["delta"] / 2 ** plan["look"]:
        raise InputError(
            f"{path} was changed after it was written: its content has the key {key}, expected {plan['key']}, and the "
            f"level of look {plan['look']} is {plan['delta_of_look']:g} of {plan['delta']:g}"
        )


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise InputError(f"{path} line {number}: not JSON ({error}), expected a response") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}), expected a certificate's responses") from error


def _compare_prompts(plan: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    name = plan["policy"]["name"]
    asked = {row["prompt_id"]: row for row in rows if row["policy"] == name}
    if prompts_fingerprint(asked.values()) != plan["prompts"]["fingerprint"]:
        raise InputError(
            f"the {len(asked)} prompts of {SAMPLES_FILE} are not the {plan['prompts']['n']} of {CLAIMS_FILE}: an id, a "
            "text, a category or a cluster differs"
        )


def _compare(ours: Any, again: Any, path: Path, key: str = "", *, exact: bool) -> None:
    """Raise `InputError` for the first value that is not as it is made again.

    What other versions of this program may word otherwise is left out where it is not `exact`.
    """
    if isinstance(again, dict) and isinstance(ours, dict):
        for name in again:
            inner = f"{key}.{name}" if key else name
            if name not in ours:
                raise InputError(f"{path}: {inner} is missing, made again it is {again[name]!r:.80}")
            if exact or name not in _WORDS:
                _compare(ours[name], again[name], path, inner, exact=exact)
        if key and (more := [name for name in ours if name not in again]):
            raise InputError(f"{path}: {key}.{more[0]} is {ours[more[0]]!r:.80}, made again there is none")
        return
    is_number = isinstance(again, float) and isinstance(ours, int | float) and not isinstance(ours, bool)
    same = math.isclose(ours, again, rel_tol=0, abs_tol=_TOLERANCE) if is_number else ours == again
    if not same:
        raise InputError(f"{path}: {key} is {ours!r:.80}, made again from the responses it is {again!r:.80}")
