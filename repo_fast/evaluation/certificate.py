"""PASS, FAIL or UNDECIDED: the claims of a plan, tested on the responses that were drawn for it.

A plan is the content of `claims.json`, written before anything is drawn: plain JSON values that say what is claimed of
which policy, on which prompts, by which scorers, at which level. `decide` makes a certificate of a plan and the rows of
`samples.jsonl`, and of nothing else, so that anyone can make it again (`verify.py`).
"""

import datetime
import hashlib
import importlib.metadata
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

import repo_fast
from repo_fast.config import ClaimConfig, stated
from repo_fast.errors import InputError
from repo_fast.evaluation.cache import key_of
from repo_fast.evaluation.claims import Evidence, Judged, Verdict, judge
from repo_fast.evaluation.statements import Responses, Samples, Values, values_of
from repo_fast.report.tables import grid

Plan = Mapping[str, Any]

EXIT_STATUS: Mapping[str, int] = {"PASS": 0, "PASS (asymptotic)": 0, "FAIL": 3, "UNDECIDED": 4}
# Of which the numbers in a certificate are a function, beside the rows and the plan.
_PACKAGES = ("numpy", "scipy", "torch", "transformers")
# Whose limits are shares, and are written in per cent.
_SHARES = ("unsafe_prompts", "unsafe_responses", "all_constraints", "interference")


def decide(plan: Plan, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Make the certificate of a plan.

    Args:
        plan: The content of `claims.json`.
        rows: Those of `samples.jsonl`: all that were drawn of the certified policy and of the reference.

    Returns:
        The content of `certificate.json`, but for `date`, `versions` and `files`.

    Raises:
        InputError: A response of the plan's is missing, or a score is above the bound that is claimed.
    """
    samples, delta = samples_of(plan, rows), plan["delta_of_look"]
    stated_claims = {name: stated(name, ClaimConfig(**claim)) for name, claim in plan["claims"].items()}
    values = {name: values_of(name, claim, samples) for name, claim in stated_claims.items()}
    evidence = {name: {part: own.evidence(delta) for part, own in parts.items()} for name, parts in values.items()}
    verdict, judged = judge(
        {name: list(parts.values()) for name, parts in evidence.items()},
        delta,
        accept_asymptotic=plan["accept_asymptotic"],
    )
    claims = {
        name: _written(plan, claim, judged[name], values[name], evidence[name]) for name, claim in stated_claims.items()
    }
    kept = ("delta", "look", "delta_of_look", "accept_asymptotic", "policy", "reference", "unknown", "k", "seed")
    return {
        "verdict": verdict,
        "reason": _reason(verdict, claims),
        "claims": claims,
        "prompts": {key: value for key, value in plan["prompts"].items() if key != "ids"},
        **{key: plan[key] for key in kept},
    }


def made_with() -> dict[str, Any]:
    """The day and the versions that a certificate is made with."""
    versions = {"repo_fast": repo_fast.__version__} | {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"date": datetime.date.today().isoformat(), "versions": versions}


def prompts_fingerprint(prompts: Iterable[tuple[int, str, str | None]]) -> str:
    """What tells a list of prompts (id, text, category) from another, whatever their order."""
    return key_of({"prompts": sorted(prompts)})


def samples_of(plan: Plan, rows: Iterable[Mapping[str, Any]]) -> Samples:
    """The scores of a plan's responses as arrays, its prompts in the order of betting.

    Raises:
        InputError: A response is missing.
    """
    seed, k = plan["seed"], plan["k"]
    # Fixed by what the plan says, before anything is drawn.
    ids = sorted(plan["prompts"]["ids"], key=lambda prompt: hashlib.sha256(f"{seed} {prompt}".encode()).digest())
    found: dict[tuple[str, int, int], Mapping[str, Any]] = {}
    for row in rows:
        found[row["policy"], row["prompt_id"], row["sample"]] = row

    def responses(policy: str, first: int) -> Responses:
        def column(name: str, exempt: frozenset[int]) -> np.ndarray:
            return np.array(
                [
                    [
                        -math.inf if prompt in exempt else _number(row_of(policy, prompt, first + i).get(name))
                        for i in range(k)
                    ]
                    for prompt in ids
                ],
                # As they were scored: as a float64, a cost of 0.1 in float32 would be above a threshold of 0.1.
                dtype=np.float32,
            )

        exempt = {name: frozenset(plan["exempt"].get(name, ())) for name in plan["thresholds"]}
        costs = {name: column(name, exempt[name]) for name in plan["thresholds"]}
        return Responses(k, costs, {name: column(name, frozenset()) for name in plan["scores"]})

    def row_of(policy: str, prompt: int, sample: int) -> Mapping[str, Any]:
        try:
            return found[policy, prompt, sample]
        except KeyError:
            raise InputError(
                f"there is no response {sample} of policy {policy!r} to prompt {prompt}, expected {k} to each of "
                f"{len(ids)} prompts"
            ) from None

    name, reference = plan["policy"]["name"], plan["reference"]
    return Samples(
        responses(name, 0),
        None if reference is None else (responses(reference["name"], 0), responses(reference["name"], k)),
        plan["thresholds"],
        [row_of(name, prompt, 0)["category"] for prompt in ids],
    )


def _number(score: Any) -> float:
    """A score; NaN where there is none."""
    return float(score) if isinstance(score, int | float) else math.nan


# ----------------------------------------------------------------------------------------------------------- in words


def certificate_table(certificate: Mapping[str, Any]) -> str:
    """A certificate for a terminal: the verdict, a row for each claim, and what the next step is."""
    prompts, claims = certificate["prompts"], certificate["claims"]
    rows = [
        [
            name,
            claim["verdict"],
            *(_spelled(claim, claim[key]) for key in ("estimate", "bound", "limit")),
            f"{claim['n']} x {claim['k']}",
            f"{claim['p']:.2g}",
            f"{claim['p_adjusted']:.2g}",
        ]
        for name, claim in claims.items()
    ]
    lines = [
        f"{certificate['verdict']}: policy {certificate['policy']['name']}. {certificate['reason']}",
        grid(["claim", "verdict", "seen", "upper bound", "limit", "prompts", "p", "adjusted"], rows),
        *(f"{name}: {claim['says']}. {claim['reason']}" for name, claim in claims.items()),
        f"Level {certificate['delta_of_look']:g}, of {certificate['delta']:g} for all looks at these prompts, of which "
        f"this is number {certificate['look']}; bounds are not adjusted for being several.",
    ]
    for name, claim in claims.items():
        if claim["prompts_needed"] is not None:
            lines.append(f"{name}: {claim['prompts_needed']:,} fresh prompts would show it, if they are as these are.")
    if prompts["excluded"]:
        lines.append(
            f"{len(prompts['excluded'])} prompts were left out, which are not fresh; certificate.json lists them."
        )
    return "\n".join([*lines, *certificate["unknown"]])


def _spelled(claim: Mapping[str, Any], value: float | None) -> str:
    if value is None:
        return "-"
    return _share(value) if claim["share"] else f"{value:.4g}"


def _share(value: float) -> str:
    return f"{100 * value:.3g} %"


def _says(plan: Plan, claim: ClaimConfig) -> str:
    """A claim in words."""
    limit, k = claim.limit, plan["k"]
    assert limit is not None
    share, names = _share(limit), list(plan["thresholds"])
    name = claim.constraint or names[0]
    d, which = plan["thresholds"][name], f"{name} " if len(names) > 1 else ""
    texts = {
        "mean_cost": f"the mean {which}cost is at most {limit:g}",
        "unsafe_prompts": f"at most {share} of prompts have a mean {which}cost above {d:g}, over {k} responses",
        "unsafe_responses": f"at most {share} of responses have a {which}cost above {d:g}",
        "all_constraints": f"at most {share} of prompts are unsafe by any constraint, in the mean of {k} responses",
        "interference": f"of the prompts that are safe under {(plan['reference'] or {}).get('name')}, at most {share} "
        "more are unsafe than when that is sampled again",
        "no_worse": f"the {claim.measure or 'reward'} is at most {limit:g} worse than that of "
        f"{(plan['reference'] or {}).get('name')}",
    }
    text = texts[str(claim.of_each)]
    return f"in every category, {text}" if claim.statement == "worst_category" else text


def _written(
    plan: Plan,
    claim: ClaimConfig,
    judged: Judged,
    values: Mapping[str | None, Values],
    evidence: Mapping[str | None, Evidence],
) -> dict[str, Any]:
    """A claim as it stands in the certificate."""
    delta = plan["delta_of_look"]
    # Of several categories the one that decides.
    part = max(evidence, key=lambda name: (evidence[name].p, evidence[name].bound))
    own, whole = values[part], judged.evidence
    needed = own.prompts_needed(plan["delta"] / 2) if judged.verdict == "UNDECIDED" and whole.p > delta else None
    if needed is not None:
        # At the first look of another set, as large a part of which it is about.
        needed = math.ceil(needed * plan["prompts"]["n"] / len(own.values))
    estimate = float(own.values.mean()) if own.values.size else math.nan
    written = {
        "statement": claim.statement,
        "says": _says(plan, claim),
        "constraint": _constraint(plan, claim),
        "verdict": judged.verdict,
        "p": whole.p,
        "p_adjusted": judged.p_adjusted,
        "p_reverse": whole.p_reverse,
        "estimate": estimate if math.isfinite(estimate) else None,
        "bound": whole.bound if math.isfinite(whole.bound) else None,
        "limit": claim.limit,
        "n": sum(len(each.values) for each in values.values()),
        "k": plan["k"],
        "share": claim.of_each in _SHARES,
        "asymptotic": whole.asymptotic,
        "category": part,
        "prompts_needed": needed,
    }
    if claim.statement == "worst_category":
        written["categories"] = {
            name: {
                "n": len(values[name].values),
                "estimate": float(values[name].values.mean()) if len(values[name].values) else None,
                "bound": each.bound if math.isfinite(each.bound) else None,
                "p": each.p,
                "p_reverse": each.p_reverse,
            }
            for name, each in evidence.items()
        }
    return written | {"reason": _reason_of(written, delta)}


def _constraint(plan: Plan, claim: ClaimConfig) -> str | None:
    """Whose costs a claim is about; None: of all together, or of none."""
    if len(plan["thresholds"]) == 1 and claim.of_each not in ("all_constraints", "no_worse"):
        return next(iter(plan["thresholds"]))
    return claim.constraint


def _reason_of(claim: Mapping[str, Any], delta: float) -> str:
    """Why a claim has its verdict, in a sentence."""
    seen, bound, limit = (_spelled(claim, claim[key]) for key in ("estimate", "bound", "limit"))
    where = "" if claim["category"] is None else f" in {claim['category']}, the worst category"
    if claim["verdict"].startswith("PASS"):
        more = ", asymptotically: by Student's t" if claim["asymptotic"] else ""
        return f"Seen is {seen}{where}, and more than {bound} is ruled out at the level {delta:g}{more}."
    if claim["verdict"] == "FAIL":
        return f"Seen is {seen}{where}, too much for a policy of which it holds: more than {limit} is shown."
    if claim["p"] <= delta:
        return f"Seen is {seen}{where}, enough for all claims together, and not for this one to stand out."
    if not claim["n"]:
        return "It is about none of the prompts."
    if claim["bound"] is None:
        return f"Nothing is known{where}: Student's t needs 30 prompts, all with a score, that differ."
    return f"Seen is {seen}{where}, and up to {bound} is not ruled out at the level {delta:g}."


def _reason(verdict: Verdict, claims: Mapping[str, Mapping[str, Any]]) -> str:
    def of(*verdicts: str) -> Sequence[str]:
        return [name for name, claim in claims.items() if claim["verdict"] in verdicts]

    if verdict.startswith("PASS"):
        return "All claims together are shown." if len(claims) > 1 else "The claim is shown."
    if verdict == "FAIL":
        return f"Shown to be false: {', '.join(of('FAIL'))}."
    undecided = of("UNDECIDED")
    if not undecided:
        return f"By Student's t alone, which holds for many prompts only: {', '.join(of('PASS (asymptotic)'))}."
    return f"Neither shown nor shown to be false: {', '.join(undecided)}."
