"""The report's sentence about each policy: safety first, helpfulness, and interference beside its floor."""

import re

import pytest

from bench.trainer.evaluation_page import make_evaluation
from tests.report.test_page import Page, page_of

BETTER, WORSE, NONE = (-0.3, -0.4, -0.2), (0.3, 0.2, 0.4), (0.01, -0.1, 0.1)
# Of a measure where more is better.
MORE, LESS = WORSE, BETTER


def entry(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


def evaluated(violation=BETTER, reward=NONE, interference=NONE):
    """Two policies with these numbers, and no responses; None: a change that is not known."""
    report, _ = make_evaluation(prompts=6, policies=2, samples=2, categories=0, resamples=2)
    report["policies"] = {
        "before": {
            "strict_violation": entry(0.5714, 0.4, 0.7),
            "mean_reward": entry(2.5, 2.0, 3.0),
            "interference_rate": entry(0.163, 0.06, 0.28),
        },
        "repo": {
            "strict_violation": entry(0.0421, 0.01, 0.1),
            "mean_reward": entry(2.51, 2.1, 3.1),
            "interference_rate": entry(0.07, 0.0, 0.15),
        },
    }
    changes = {"strict_violation": violation, "mean_reward": reward, "interference_rate": interference}
    report["differences"] = {"repo": {key: entry(*change or [None]) for key, change in changes.items()}}
    return report


def said(page: Page) -> list[str]:
    """The sentence about each policy, spaces as a browser shows them."""
    text = page.text.split(" Summary ", 1)[1].split("Strict violation is how far", 1)[0]
    text = re.sub(r" (?=[;:,.)])", "", text).replace("( ", "(").strip()
    return re.split(r" (?=repo: )", text)


def test_the_sentence_says_safety_first_then_helpfulness_then_interference_beside_its_floor(tmp_path):
    before, after = said(page_of(tmp_path, evaluated(), []))
    assert before == (
        "before is the reference. Strict violation 0.571 [0.400, 0.700]; reward 2.50 [2.00, 3.00]; interference (safe "
        "prompts turned unsafe) 16.3\u202f% [6.0, 28.0] by a second sample of itself: the floor."
    )
    assert after == (
        "repo: safer, no difference in helpfulness shown. Strict violation 0.571 → 0.042 (−0.300 [−0.400, −0.200], "
        "▼ better); reward 2.50 → 2.51 (+0.010 [−0.100, +0.100], ≈ no difference shown); interference (safe prompts "
        "turned unsafe) 7.0\u202f% against 16.3\u202f% by a second sample of before itself, the floor "
        "(+1.0\u202fpoints [−10.0, +10.0], ≈ no difference shown)."
    )


@pytest.mark.parametrize(
    ("changes", "lead"),
    [
        ((WORSE, MORE), "less safe, more helpful"),
        ((NONE, LESS), "no difference in safety shown, less helpful"),
        ((None, None), "change in safety undefined, change in helpfulness undefined"),
        ((BETTER, MORE, BETTER), "safer, more helpful"),
        (
            (BETTER, MORE, WORSE),
            "safer, more helpful, but it turned more safe prompts unsafe than sampling alone does",
        ),
    ],
)
def test_the_lead_says_what_became_of_safety_and_helpfulness(changes, lead, tmp_path):
    _, after = said(page_of(tmp_path, evaluated(*changes), []))
    assert after.startswith(f"repo: {lead}. Strict violation")


def test_what_is_undefined_is_no_number_and_has_no_verdict(tmp_path):
    report = evaluated(violation=(-0.3,))
    del report["policies"]["repo"]["mean_reward"], report["differences"]["repo"]["mean_reward"]
    _, after = said(page_of(tmp_path, report, []))
    assert "Strict violation 0.571 → 0.042 (−0.300 no interval); reward 2.50 → undefined (undefined);" in after
    assert after.startswith("repo: change in safety undefined, change in helpfulness undefined.")


def test_constraints_that_go_different_ways_are_named_one_by_one(tmp_path):
    report = evaluated(reward=MORE)
    changes = {"harm": BETTER, "refusal": WORSE, "insults": BETTER, "spam": NONE, "lies": None}
    report["settings"]["threshold"] = dict.fromkeys(changes, 0.0)
    for name, change in changes.items():
        for policy in report["policies"].values():
            policy[f"{name}_strict_violation"] = policy["strict_violation"]
        report["differences"]["repo"][f"{name}_strict_violation"] = entry(*change or [None])
    before, after = said(page_of(tmp_path, report, []))
    assert after.startswith(
        "repo: less violation of harm and insults, more violation of refusal, no difference shown in the violation of "
        "spam, undefined change in the violation of lies, more helpful. harm: strict violation 0.571 → 0.042 ("
    )
    assert "; refusal: strict violation 0.571 → 0.042 (+0.300 [+0.200, +0.400], ▲ worse); insults: " in after
    assert "reference. harm: strict violation 0.571 [0.400, 0.700]; refusal: strict violation" in before
