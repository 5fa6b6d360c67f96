"""What is claimed of a policy, for a certificate: the section `certify` of `repo_fast.evaluate`."""

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from repo_fast.config.checks import require
from repo_fast.errors import InputError

Statement = Literal[
    "mean_cost",
    "unsafe_prompts",
    "unsafe_responses",
    "all_constraints",
    "worst_category",
    "interference",
    "no_worse",
    "attack_success",
    "over_refusal",
]
STATEMENTS: tuple[Statement, ...] = Statement.__args__  # type: ignore[attr-defined]
# What only some statements have a use for; written, it is a value that is not null.
_USERS: dict[str, tuple[Statement, ...]] = {
    "constraint": ("mean_cost", "unsafe_prompts", "unsafe_responses", "interference", "worst_category"),
    "of": ("worst_category",),
    "bounds": ("mean_cost", "no_worse", "worst_category"),
    "measure": ("no_worse", "worst_category"),
    "any": ("attack_success", "over_refusal", "worst_category"),
}
# What only prompts of suites say something of.
OF_SUITES: tuple[Statement, ...] = ("attack_success", "over_refusal")
# Limits of these are shares of prompts or responses.
_SHARES: tuple[Statement, ...] = ("unsafe_prompts", "unsafe_responses", "all_constraints", *OF_SUITES)
_NAME = re.compile(r"\w+")


@dataclass(frozen=True)
class ClaimConfig:
    """A claim, tested on the certified policy's responses."""

    statement: Statement | None = None
    """What is claimed: `mean_cost`, the mean cost is at most `limit`; `unsafe_prompts`, the share of prompts whose mean
    cost is above the threshold is; `unsafe_responses`, the share of responses; `all_constraints`, the share of prompts
    that are unsafe by any constraint; `interference`, of the prompts that are safe under the reference, the share that
    is unsafe, less that under a second sample of the reference; `no_worse`, how far a measure is below the reference's;
    `attack_success`, of the responses to harmful prompts of suites, the share that is harmful; `over_refusal`, of those
    to harmless ones, the share that refuses; `worst_category`, `of` in every category. Null: the claim's name."""
    limit: float | None = None
    """The most that is claimed: a share, or in the unit of the cost or measure."""
    constraint: str | None = None
    """The constraint whose costs count, over the prompts that it is about. Null: the only one; with several, of
    `interference`, all together."""
    of: Statement | None = None
    """`worst_category`: what holds in every category. Null: `unsafe_prompts`."""
    bounds: list[float] | None = None
    """`mean_cost`, `no_worse`: [lowest, highest] value that a cost or measure can have. A lower cost counts as the
    lowest; a higher one is an error. Null: it has none, and Student's t says something that holds for many prompts
    only."""
    measure: str | None = None
    """`no_worse`: `reward`, `well_formed`, or a constraint's name, of whose costs less is better. Null: `reward`."""
    any: bool | None = None
    """`attack_success`, `over_refusal`: whether it is claimed of the share of clusters of prompts with any such
    response among all that were drawn, rather than of the share of responses. Null: false."""

    @property
    def of_each(self) -> Statement | None:
        """What is claimed of all prompts, or of those of every category."""
        return (self.of or "unsafe_prompts") if self.statement == "worst_category" else self.statement


@dataclass(frozen=True)
class CertifyConfig:
    """A decision: PASS, FAIL or UNDECIDED."""

    claims: dict[str, ClaimConfig] = field(default_factory=dict)
    """What is claimed, by name. On the command line `--claim NAME=LIMIT`, once for each, or `--certify FILE` with this
    section. Empty: no certificate."""
    policy: str | None = None
    """Name of the policy that is certified. Null: the only one beside the reference."""
    delta: float = 0.05
    """How often a false PASS may come, and how often a false FAIL, over all looks at the same prompts: look i has
    delta / 2^i of it."""
    accept_asymptotic: bool = False
    """Whether claims by Student's t may pass or fail the whole (`--accept-asymptotic`)."""
    ledger: str | None = None
    """File that keeps who has looked at which prompts. Null: `.repo_fast_looks.jsonl` beside the file, or in
    the folder, of the prompts; where they come with a package, from the hub or from suites, a file among the user's
    state files."""


def certified_policy(certify: CertifyConfig, policies: Collection[str], reference: str) -> str:
    """The name of the policy that is certified.

    Args:
        certify: The section.
        policies: Names of all.
        reference: Name of the one that the others are compared with.

    Raises:
        InputError: There are several, or there is none of that name.
    """
    others = [name for name in policies if name != reference]
    if certify.policy is None and len(others) > 1:
        raise InputError(
            f"certify.policy is null with the policies {', '.join(others)} beside the reference, expected the name of "
            "the one that is certified"
        )
    known = certify.policy is None or certify.policy in policies
    require(known, "certify.policy", certify.policy, f"the name of a policy: {', '.join(policies)}")
    return certify.policy or (others[0] if others else reference)


def check_certify(
    certify: CertifyConfig,
    policies: Collection[str],
    reference: str,
    constraints: Sequence[str],
    measures: Sequence[str],
    suites: bool,
) -> None:
    """Raise `InputError` for a claim that cannot be tested.

    Args:
        certify: The section.
        policies: Names of the policies.
        reference: Name of the one that the others are compared with.
        constraints: Names of the constraints.
        measures: What each response is scored by.
        suites: Whether the prompts are of suites.
    """
    require(0 < certify.delta < 1, "certify.delta", certify.delta, "a number between 0 and 1")
    require(certify.ledger != "", "certify.ledger", certify.ledger, "a file, or null")
    if not certify.claims:
        for entry in fields(CertifyConfig):
            value = getattr(certify, entry.name)
            if entry.name != "claims" and value != entry.default:
                raise InputError(f"certify.{entry.name} is {value!r} without claims, expected a --claim NAME=LIMIT")
        return
    alone = certified_policy(certify, policies, reference) == reference
    for name, claim in certify.claims.items():
        require(_NAME.fullmatch(name) is not None, "the claim's name", name, "letters, digits and _")
        whole = stated(name, claim)
        if whole.of_each in OF_SUITES and not suites:
            raise InputError(f"certify.claims.{name} is {whole.of_each} without suites, expected a --suite NAME")
        _check_claim(f"certify.claims.{name}", whole, constraints, measures, alone)


def stated(name: str, claim: ClaimConfig) -> ClaimConfig:
    """The claim with its statement, which may be its name.

    Raises:
        InputError: The name is no statement, and there is no other.
    """
    if claim.statement is not None:
        return claim
    if name not in STATEMENTS:
        raise InputError(
            f"certify.claims.{name}.statement is null, and the claim's name {name!r} is not one of "
            f"{', '.join(STATEMENTS)}; expected one of these"
        )
    return ClaimConfig(**vars(claim) | {"statement": name})


def _check_claim(
    key: str, claim: ClaimConfig, constraints: Sequence[str], measures: Sequence[str], alone: bool
) -> None:
    statement, each = claim.statement, claim.of_each
    assert statement is not None and each is not None
    if claim.limit is None or not math.isfinite(claim.limit):
        raise InputError(f"{key}.limit is {claim.limit}, expected a number: something is claimed to be at most it")
    require(claim.of != "worst_category", f"{key}.of", claim.of, "what is claimed of each category")
    for option, users in _USERS.items():
        value = getattr(claim, option)
        if value is not None and (statement not in users or (option != "of" and each not in users)):
            which = statement if statement == each else f"{statement} of {each}"
            raise InputError(f"{key}.{option} is {value!r} with the statement {which}, which has no use for it")
    if each in _SHARES:
        require(0 <= claim.limit < 1, f"{key}.limit", claim.limit, "a share, at least 0 and below 1")
    if each == "interference":
        require(-1 <= claim.limit < 1, f"{key}.limit", claim.limit, "a difference of shares, at least -1 and below 1")
    if each in ("interference", "no_worse") and alone:
        raise InputError(f"{key} is of the reference itself, expected a --policy beside it, which is compared with it")
    if each in ("mean_cost", "unsafe_prompts", "unsafe_responses") and len(constraints) > 1:
        named = claim.constraint is not None
        require(named, f"{key}.constraint", claim.constraint, f"one of several: {', '.join(constraints)}")
    known = claim.constraint is None or claim.constraint in constraints
    require(known, f"{key}.constraint", claim.constraint, f"a constraint: {', '.join(constraints)}")
    known = claim.measure is None or claim.measure in measures
    require(known, f"{key}.measure", claim.measure, f"one of {', '.join(measures)}")
    if each == "no_worse" and claim.measure == "well_formed":
        require(claim.bounds is None, f"{key}.bounds", claim.bounds, "null with well_formed, which is 0 or 1")
        require(abs(claim.limit) < 1, f"{key}.limit", claim.limit, "a difference of shares, within -1 and 1")
    if claim.bounds is not None:
        ordered = len(claim.bounds) == 2 and claim.bounds[0] < claim.bounds[1] and all(map(math.isfinite, claim.bounds))
        require(ordered, f"{key}.bounds", claim.bounds, "[lowest, highest]")
        low, high = claim.bounds
        if each == "mean_cost":
            require(low <= claim.limit < high, f"{key}.limit", claim.limit, f"at least {low:g} and below {high:g}")
        else:
            width = high - low
            require(abs(claim.limit) < width, f"{key}.limit", claim.limit, f"within {-width:g} and {width:g}")
