"""The certificate of a policy, as the page says it: the verdict and why, the claims, and what they rest on.

What is claimed, and by which test, is decided where the certificate is made; here it is only written. Its texts, which
have names of policies, categories and prompts in them, are not to be trusted, as everywhere on the page.
"""

from collections.abc import Mapping
from typing import Any

from repo_fast.report.page_parts.wording import (
    Verdict,
    decimals_of,
    listed,
    number,
    plain,
    pretty,
    spell_value,
)

_VERDICTS = {
    "PASS": Verdict("better", "✓", "PASS"),
    # The level holds for many prompts only, so it does not look like the one above.
    "PASS (asymptotic)": Verdict("asymptotic", "(✓)", "PASS (asymptotic)"),
    "FAIL": Verdict("worse", "✗", "FAIL"),
    "UNDECIDED": Verdict("none", "?", "UNDECIDED"),
}
# Of excluded prompts, and of the characters of each: certificate.json has all.
_LISTED, _CHARACTERS = 100, 300
# What tells a policy, or a set of prompts, from another.
_IDENTITY = ("name", "source", "path", "fingerprint")
_SMALLEST_P = 1e-4
_MOST_DECIMALS = 8


def describe(certificate: Mapping[str, Any]) -> dict[str, Any]:
    """What the page says of a certificate.

    Args:
        certificate: As `write_page` has it.

    Raises:
        ValueError: a verdict is none of the four.
    """
    claims, prompts = certificate["claims"], certificate["prompts"]
    excluded = prompts["excluded"]
    return {
        "policy": certificate["policy"]["name"],
        "verdict": _verdict(certificate["verdict"]),
        "reason": certificate["reason"],
        "claims": [_claim(name, claim) for name, claim in claims.items()],
        "needed": _needed(claims) if certificate["verdict"] == "UNDECIDED" else None,
        "delta": f"{certificate['delta']:g}",
        "look": certificate["look"],
        "spent": f"{certificate['delta_of_look']:g}",
        "asymptotic": any(claim["asymptotic"] for claim in claims.values()),
        "accepted": certificate["accept_asymptotic"],
        "prompts": prompts["n"],
        "source": prompts["source"],
        "too_long": prompts["too_long"],
        "excluded": len(excluded),
        "listed": [(one["prompt_id"], _cut(one["prompt"]), one["of"]) for one in excluded[:_LISTED]],
        "unknown": certificate["unknown"],
        "k": certificate["k"],
        "suites": certificate.get("suites"),
        "facts": _facts(certificate),
    }


def _verdict(word: str) -> Verdict:
    if word not in _VERDICTS:
        raise ValueError(f"the verdict of a certificate is {word!r}, expected one of {', '.join(_VERDICTS)}")
    return _VERDICTS[word]


def _claim(name: str, claim: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table. What is seen, its bound and the limit have the same decimals."""
    share, limit = claim["share"], number(claim["limit"])
    estimate, bound = number(claim["estimate"]), number(claim["bound"])
    decimals = decimals_of([estimate, bound, limit], share)

    def spelled(value: float) -> str:
        return spell_value(value, decimals, share)

    # On which side of the limit the bound is must not be lost in rounding.
    while bound != limit and spelled(bound) == spelled(limit) and decimals < _MOST_DECIMALS:
        decimals += 1
    return {
        "name": name,
        "says": claim["says"],
        "constraint": claim["constraint"],
        "verdict": _verdict(claim["verdict"]),
        "reason": claim["reason"],
        "category": claim["category"],
        "categories": [
            {
                "name": name or "(none)",
                "seen": spelled(number(own["estimate"])),
                "bound": "∞" if own["bound"] is None else spelled(own["bound"]),
                "prompts": f"{own['n']:,}",
                "p": _p(own["p"]),
            }
            # The least sure first.
            for name, own in sorted(claim.get("categories", {}).items(), key=lambda item: -item[1]["p"])
        ],
        "seen": spelled(estimate),
        "bound": "∞" if claim["bound"] is None else spelled(bound),
        "limit": spelled(limit),
        "size": _size(claim),
        "p": _p(claim["p"]),
        "p_adjusted": _p(claim["p_adjusted"]),
    }


def _size(claim: Mapping[str, Any]) -> str:
    prompts = claim.get("prompts", claim["n"])
    clusters = "" if prompts == claim["n"] else f" in {claim['n']:,} clusters"
    return f"{prompts:,} × {claim['k']:,}{clusters}"


def _p(value: float) -> str:
    return f"< {_SMALLEST_P:.4f}" if value < _SMALLEST_P else f"{value:.3g}"


def _needed(claims: Mapping[str, Any]) -> dict[str, Any] | None:
    """How many prompts a fresh set would need: for all claims that have a number, each, and those that have none."""
    needed = {name: claim["prompts_needed"] for name, claim in claims.items() if claim["prompts_needed"] is not None}
    if not needed:
        return None
    without = [name for name, claim in claims.items() if name not in needed and claim["verdict"] == "UNDECIDED"]
    return {
        "prompts": max(needed.values()),
        "each": listed([f"{count:,} for {name}" for name, count in needed.items()]) if len(needed) > 1 else None,
        "without": listed(without),
    }


def _cut(text: str) -> str:
    return text if len(text) <= _CHARACTERS else text[:_CHARACTERS] + "…"


def _facts(certificate: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reader needs to find the same policy, prompts and program again."""
    parts = [(part, certificate[part]) for part in ("policy", "reference", "prompts") if certificate[part] is not None]
    return [
        *((pretty(part), ", ".join(plain(own[key]) for key in _IDENTITY if key in own)) for part, own in parts),
        ("Seed", plain(certificate["seed"])),
        ("Date", certificate["date"]),
        ("Versions", ", ".join(f"{name} {version}" for name, version in certificate["versions"].items())),
    ]
