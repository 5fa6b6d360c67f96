"""Comparisons of policies, as `report.json` has them."""

import numpy as np
import pytest

from repo_fast.report.comparison import Judgments, compare
from repo_fast.report.measures import Evaluation


@pytest.mark.parametrize(
    ("score", "reference", "interval"),
    [
        (1.0, 0.5, (0.025 ** (1 / 12), 1.0)),
        # Ties all through: not so of all prompts, maybe, but by how much is not known.
        (0.5, 0.5, (None, None)),
        # A rating, of whatever range.
        (1.0, None, (None, None)),
    ],
)
def test_judgments_that_are_all_alike(score: float, reference: float | None, interval: tuple) -> None:
    ids = np.arange(12)
    same = Evaluation(ids, np.ones(12), np.zeros(12))
    measure = "judge_rating" if reference is None else "judge_win_rate"
    judged = {"new": Judgments(measure, ids, np.full(12, score), reference)}
    if reference is None:
        judged["start"] = Judgments(measure, ids, np.full(12, score))
    report = compare({"start": same, "new": same}, same, "start", judgments=judged, resamples=50)
    found = report["policies"]["new"][measure]
    assert (found["value"], found["low"], found["high"]) == pytest.approx((score, *interval))
    change = report["differences"]["new"][measure]
    assert (change["value"], change["low"], change["high"]) == (score - (reference or 1.0), None, None)
