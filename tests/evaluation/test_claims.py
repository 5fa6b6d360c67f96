"""Claims and verdicts, by hand and by simulation."""

import math

import numpy as np
import pytest

from repo_fast.errors import InputError
from repo_fast.evaluation import bounds
from repo_fast.evaluation.claims import Evidence, bounded_mean, judge, share_of_prompts, unbounded_mean, worst


def evidence(p: float, reverse: float = 1.0, *, asymptotic: bool = False) -> Evidence:
    return Evidence(p, reverse, 0.5, 0.1, 100, asymptotic)


@pytest.mark.parametrize(
    ("claims", "accept", "verdict", "single"),
    [
        # All p at most delta: no correction for the whole, though Holm rejects none of them by itself.
        ({"a": [evidence(0.04)], "b": [evidence(0.04)]}, False, "PASS", {"a": "UNDECIDED", "b": "UNDECIDED"}),
        ({"a": [evidence(0.02)], "b": [evidence(0.04)]}, False, "PASS", {"a": "PASS", "b": "PASS"}),
        ({"a": [evidence(0.001)], "b": [evidence(0.06)]}, False, "UNDECIDED", {"a": "PASS", "b": "UNDECIDED"}),
        # One that fails: Holm over both H'.
        ({"a": [evidence(0.001)], "b": [evidence(1.0, 0.02)]}, False, "FAIL", {"a": "PASS", "b": "FAIL"}),
        ({"a": [evidence(0.001)], "b": [evidence(1.0, 0.03)]}, False, "UNDECIDED", {"a": "PASS", "b": "UNDECIDED"}),
        # Every category has an H' of its own: three here, and 3 x 0.02 is above delta.
        ({"a": [evidence(0.9, 0.02), evidence(0.001), evidence(0.001)]}, False, "UNDECIDED", {"a": "UNDECIDED"}),
        ({"a": [evidence(0.9, 0.016), evidence(0.001), evidence(0.001)]}, False, "FAIL", {"a": "FAIL"}),
        # The worst category decides, without a correction.
        ({"a": [evidence(0.05), evidence(0.001)]}, False, "PASS", {"a": "PASS"}),
        # By Student's t nothing passes and nothing fails, unless that is accepted.
        ({"a": [evidence(0.01, asymptotic=True)]}, False, "UNDECIDED", {"a": "PASS (asymptotic)"}),
        ({"a": [evidence(0.01, asymptotic=True)]}, True, "PASS (asymptotic)", {"a": "PASS (asymptotic)"}),
        ({"a": [evidence(0.99, 0.01, asymptotic=True)]}, False, "UNDECIDED", {"a": "UNDECIDED"}),
        ({"a": [evidence(0.99, 0.01, asymptotic=True)]}, True, "FAIL", {"a": "FAIL"}),
    ],
)
def test_verdicts(claims: dict, accept: bool, verdict: str, single: dict) -> None:
    whole, judged = judge(claims, 0.05, accept_asymptotic=accept)
    assert whole == verdict
    assert {name: own.verdict for name, own in judged.items()} == single


def test_a_share_of_prompts() -> None:
    unsafe = np.array([True] * 2 + [False] * 98)
    found = share_of_prompts(unsafe, 0.1, 0.05)
    assert found.p == bounds.binomial_p(2, 100, 0.1) and found.p_reverse == bounds.binomial_reverse_p(2, 100, 0.1)
    assert found.bound == bounds.binomial_bound(2, 100, 0.05) and found.n == 100 and not found.asymptotic


def test_a_mean_within_bounds_is_a_share_between_them() -> None:
    values = np.random.default_rng(0).uniform(-1, 1, 60)
    found = bounded_mean(values, 0.2, (-1.0, 1.0), 0.05)
    assert found.p == pytest.approx(float(bounds.betting_p((values + 1) / 2, 0.6, 0.05)))
    assert found.p_reverse == pytest.approx(float(bounds.betting_p((1 - values) / 2, 0.4, 0.05)))
    assert found.bound == pytest.approx(2 * bounds.betting_bound((values + 1) / 2, 0.05) - 1)
    with pytest.raises(InputError, match=r"the limit is 2, expected one within \[-1, 1\]"):
        bounded_mean(values, 2.0, (-1.0, 1.0), 0.05)


def test_few_or_equal_values_say_nothing_by_student() -> None:
    for values in (np.arange(29.0), np.ones(40)):
        found = unbounded_mean(values, 100.0, 0.05)
        assert found.p == found.p_reverse == 1 and math.isinf(found.bound) and found.asymptotic
    values = np.random.default_rng(1).normal(size=30)
    found = unbounded_mean(values, 1.0, 0.05)
    assert found.p == bounds.student_p(values, 1.0) == pytest.approx(1 - found.p_reverse)


def test_the_worst_category() -> None:
    first, second = Evidence(0.01, 0.9, 0.05, 0.1, 40), Evidence(0.2, 0.03, 0.15, 0.1, 60, True)
    assert worst([first, second]) == Evidence(0.2, 0.06, 0.15, 0.1, 40, True)


def test_false_verdicts_keep_their_level() -> None:
    """Two claims, one true and one at its limit: PASS; both at their limits: FAIL."""
    generator = np.random.default_rng(2)
    passed = failed = 0
    repeats, n, limit = 600, 100, 0.1
    for _ in range(repeats):
        at_limit = generator.random((2, n)) < limit
        far = generator.random(n) < 0.01
        verdict, _ = judge(
            {"a": [share_of_prompts(far, limit, 0.05)], "b": [share_of_prompts(at_limit[0], limit, 0.05)]}, 0.05
        )
        passed += verdict == "PASS"
        verdict, _ = judge(
            {name: [share_of_prompts(own, limit, 0.05)] for name, own in zip("ab", at_limit, strict=True)}, 0.05
        )
        failed += verdict == "FAIL"
    # 0.05 of 600 is 30; three standard deviations more.
    assert 0 < passed <= 46 and failed <= 46
