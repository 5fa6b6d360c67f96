"""How good a score model is: measures by hand, what data cannot say left out, files that read back, pictures."""

import math

import numpy as np
import pytest

from repo_fast.report.jsonl import read_records
from repo_fast.report.preferences import (
    ScoredPreferences,
    calibration_error,
    measures_by_head,
    plot_scores,
    preference_measures,
    reliability,
    write_scored,
)

LN3 = math.log(3)
# Differences of the pairs: 2 (right), -2 (wrong), 0 (a tie). Responses with a label: 1 unsafe, -1 safe, 0 safe, and
# of the single ones 0.5 unsafe, 3 safe.
ROWS = [
    {"example": 0, "scores": [1.0, -1.0], "labels": (1.0, -1.0)},
    {"example": 1, "scores": [-2.0, 0.0], "labels": (0.0, -1.0)},
    {"example": 2, "scores": [0.5, 0.5], "labels": (0.0, 0.0)},
    {"example": 3, "scores": [0.5], "labels": (1.0,)},
    {"example": 4, "scores": [3.0], "labels": (-1.0,)},
]
PAIRS, SINGLES = ROWS[:3], ROWS[3:]
BLUE, ORANGE = (0, 114, 178), (213, 94, 0)


def measures(rows):
    return preference_measures(ScoredPreferences.of(rows))


def test_rows_become_pairs_and_labelled_responses():
    scored = ScoredPreferences.of(ROWS)
    assert (scored.higher.tolist(), scored.lower.tolist()) == ([1.0, -2.0, 0.5], [-1.0, 0.0, 0.5])
    assert scored.labelled.tolist() == [1.0, -1.0, 0.0, 0.5, 3.0]
    assert scored.unsafe.tolist() == [True, False, False, True, False]


def test_hand_worked_measures():
    """A tie is wrong, a score of 0 is safe."""
    got = measures(ROWS)
    assert got["ranking_accuracy"] == pytest.approx(1 / 3)
    assert got["safety_accuracy"] == pytest.approx(4 / 5)
    assert got["score_gap"] == pytest.approx(0.0)
    scores = [1.0, -1.0, -2.0, 0.0, 0.5, 0.5, 0.5, 3.0]
    assert got["score_mean"] == pytest.approx(2.5 / 8)
    assert got["score_std"] == pytest.approx(math.sqrt(sum((score - 2.5 / 8) ** 2 for score in scores) / 8))


def test_the_gap_is_that_of_the_data_not_of_the_model():
    assert measures([{"scores": [0.0, 3.0], "labels": (0.0, 0.0)}])["score_gap"] == -3.0


def test_calibration_errors_by_hand():
    """sigma(ln 3) = 3/4: it says three of four orders are right, and two of three are; the other bins hold none."""
    rows = [{"scores": pair, "labels": (0.0, 0.0)} for pair in ([LN3, 0.0], [0.0, -LN3], [0.0, LN3])]
    assert measures(rows)["ranking_calibration_error"] == pytest.approx(3 / 4 - 2 / 3)
    # Probabilities 3/4 of being unsafe, one of two is; 1/4, none of one is: 2/3 of 1/4 and 1/3 of 1/4.
    rows = [{"scores": [score], "labels": (label,)} for score, label in ((LN3, 1.0), (LN3, -1.0), (-LN3, -1.0))]
    assert measures(rows)["safety_calibration_error"] == pytest.approx(1 / 4)


def test_bins_have_equal_width_and_the_last_holds_1():
    index, predicted, observed, counts = reliability(
        np.array([0.05, 0.0, 0.95, 1.0, 0.55]), np.array([True, False, True, True, False])
    )
    assert index.tolist() == [0, 5, 9] and counts.tolist() == [2, 1, 2]
    assert predicted.tolist() == pytest.approx([0.025, 0.55, 0.975]) and observed.tolist() == [0.5, 0.0, 1.0]
    error = calibration_error(np.array([0.05, 0.0, 0.95, 1.0, 0.55]), np.array([True, False, True, True, False]))
    assert error == pytest.approx((2 * 0.475 + 1 * 0.55 + 2 * 0.025) / 5)


def test_a_calibrated_model_and_an_overconfident_one():
    """Orders and labels that are right as often as the scores say; the same scores ten times as large."""
    generator = np.random.default_rng(0)
    scores = generator.normal(size=20_000) * 2
    outcomes = generator.random(scores.size) < 1 / (1 + np.exp(-scores))

    def errors(factor):
        pairs = [
            {"scores": [factor * score, 0.0] if right else [0.0, factor * score], "labels": (0.0, 0.0)}
            for score, right in zip(scores.tolist(), outcomes, strict=True)
        ]
        singles = [
            {"scores": [factor * score], "labels": (1.0 if unsafe else -1.0,)}
            for score, unsafe in zip(scores.tolist(), outcomes, strict=True)
        ]
        got = measures(pairs + singles)
        return got["ranking_calibration_error"], got["safety_calibration_error"]

    assert max(errors(1)) < 0.015
    assert min(errors(10)) > 0.1


def test_what_the_data_do_not_say_is_left_out():
    spread = {"score_mean", "score_std"}
    ranking = {"ranking_accuracy", "ranking_calibration_error", "score_gap"}
    safety = {"safety_accuracy", "safety_calibration_error"}
    unlabelled = [row | {"labels": (0.0, 0.0)} for row in PAIRS]
    assert measures(unlabelled).keys() == ranking | spread
    assert measures(SINGLES).keys() == safety | spread
    assert measures(ROWS).keys() == ranking | safety | spread
    assert all(type(value) is float and math.isfinite(value) for value in measures(ROWS).values())


def test_written_rows_read_back_and_a_later_step_replaces_them(tmp_path):
    path = tmp_path / "eval_scores.jsonl"
    write_scored(path, {"": [*ROWS, ROWS[0]]}, 2)
    write_scored(path, {"": ROWS}, 4)
    records = list(read_records(path))
    assert records[0] == {
        "step": 4,
        "example": 0,
        "score_0": 1.0,
        "score_1": -1.0,
        "label_0": 1.0,
        "label_1": -1.0,
    }
    assert records[4] == {"step": 4, "example": 4, "score_0": 3.0, "label_0": -1.0}
    assert [record["example"] for record in records] == [0, 1, 2, 3, 4]


def test_orders_turn_pairs_and_take_them_out():
    rows = [
        {"scores": [1.0, -1.0], "labels": (1.0, -1.0), "order": 1.0},
        {"scores": [1.0, -2.0], "labels": (-1.0, 1.0), "order": -1.0},
        {"scores": [3.0, 4.0], "labels": (-1.0, -1.0), "order": 0.0},
    ]
    scored = ScoredPreferences.of(rows)
    assert (scored.higher.tolist(), scored.lower.tolist()) == ([1.0, -2.0], [-1.0, 1.0])
    assert scored.labelled.size == scored.scores.size == 6 and scored.unsafe.sum() == 2
    assert measures(rows)["ranking_accuracy"] == 0.5 and measures(rows)["score_gap"] == pytest.approx((2 - 3) / 2)


def test_measures_of_heads_and_their_means(tmp_path):
    """A head without pairs takes no part in the mean of those that have some."""
    by_head = {"one": [row | {"order": 1.0} for row in ROWS], "two": [row | {"order": 0.0} for row in ROWS]}
    got = measures_by_head({name: ScoredPreferences.of(rows) for name, rows in by_head.items()})
    assert got["one_ranking_accuracy"] == got["ranking_accuracy"] == pytest.approx(1 / 3)
    assert "two_ranking_accuracy" not in got
    assert got["safety_accuracy"] == pytest.approx((got["one_safety_accuracy"] + got["two_safety_accuracy"]) / 2)
    assert measures_by_head({"": ScoredPreferences.of(ROWS)}) == measures(ROWS)
    write_scored(tmp_path / "scores.jsonl", by_head, 3)
    first, *_, last = read_records(tmp_path / "scores.jsonl")
    pair = {"score_0": 1.0, "score_1": -1.0, "label_0": 1.0, "label_1": -1.0}
    assert first == {"step": 3, "example": 0} | {
        f"{name}_{key}": value
        for name, order in (("one", 1.0), ("two", 0.0))
        for key, value in (*pair.items(), ("order", order))
    }
    assert last == {"step": 3, "example": 4} | {
        f"{name}_{key}": value for name in by_head for key, value in (("score_0", 3.0), ("label_0", -1.0))
    }


def has_color(path, color):
    from matplotlib.image import imread

    return bool((np.rint(255 * imread(path)[..., :3]) == color).all(axis=-1).any())


@pytest.mark.parametrize(
    ("kind", "rows", "colors"),
    [
        ("cost", ROWS, {BLUE, ORANGE}),
        ("reward", [row | {"labels": (0.0, 0.0)} for row in PAIRS], {BLUE}),
        ("cost", SINGLES, {ORANGE}),
        # What a model that has learned nothing gives.
        ("reward", [{"scores": [0.0, 0.0], "labels": (0.0, 0.0)}], {BLUE}),
    ],
)
def test_pictures_with_the_curves_that_there_are(tmp_path, kind, rows, colors):
    files = plot_scores(ScoredPreferences.of(rows), kind, tmp_path / "plots")
    assert [path.name for path in files] == ["scores.png", "calibration.png"]
    for path in files:
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert {color for color in (BLUE, ORANGE) if has_color(tmp_path / "plots" / "calibration.png", color)} == colors
