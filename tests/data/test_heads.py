"""What heads learn from severities and categories: labels and orders by hand, and rows that do not have them."""

import json
import re
from pathlib import Path

import pytest

from repo_fast.config import HeadConfig
from repo_fast.data import HeadTarget, load_preferences
from repo_fast.data.heads import Harm, check_both, is_unsafe, target_of
from repo_fast.errors import InputError
from tests.harms import BOMB, NONE, ROWS, THEFT, harm_row

HEADS = {"weapons": HeadConfig(("Physical Harm", BOMB), 2), "harm": HeadConfig()}


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("harm", "head", "unsafe"),
    [
        (Harm(True, 2, frozenset([BOMB])), HeadConfig((BOMB,)), True),
        (Harm(True, 2, frozenset([BOMB])), HeadConfig((BOMB,), 3), False),
        (Harm(True, 3, frozenset([BOMB])), HeadConfig((THEFT, BOMB), 3), True),
        (Harm(True, 3, frozenset([BOMB])), HeadConfig((THEFT,)), False),
        # Whatever is labelled unsafe, of no category that anybody asked for.
        (Harm(True, 1), HeadConfig(), True),
        (Harm(True, 1), HeadConfig(None, 2), False),
        (Harm(False, 0), HeadConfig(), False),
        # Harm whose severity is given as none is harm, but no severe one.
        (Harm(True, 0), HeadConfig(), True),
        (Harm(None, 0, frozenset([BOMB])), HeadConfig((BOMB,)), True),
        (Harm(True, 0), HeadConfig(None, 2), False),
        # What is called safe is of no head without categories; a category counts by itself.
        (Harm(False, 2, frozenset([BOMB])), HeadConfig(), False),
        (Harm(False, 2, frozenset([BOMB])), HeadConfig((BOMB,)), True),
    ],
)
def test_what_is_unsafe_for_a_head(harm: Harm, head: HeadConfig, unsafe: bool) -> None:
    assert is_unsafe(harm, head) == unsafe


@pytest.mark.parametrize(
    ("harm", "contradicts"),
    [
        (Harm(True, 0), True),
        (Harm(False, 1), True),
        (Harm(None, 0, frozenset([BOMB])), True),
        (Harm(False, 0, frozenset([BOMB])), True),
        (Harm(True, 1), False),
        (Harm(False, 0), False),
        (Harm(None, 0), False),
        (Harm(None, 2), False),
    ],
)
def test_labels_that_contradict_each_other(harm: Harm, contradicts: bool) -> None:
    assert harm.contradicts_itself == contradicts


@pytest.mark.parametrize(
    ("severities", "expected"),
    [
        # The labels differ: the unsafe one, against what the row prefers too.
        ((2, 0), HeadTarget((1.0, -1.0), 1.0)),
        ((0, 2), HeadTarget((-1.0, 1.0), -1.0)),
        # Both unsafe: by severity; where that is the same, the first, which is the less safe one of the row.
        ((3, 2), HeadTarget((1.0, 1.0), 1.0)),
        ((2, 3), HeadTarget((1.0, 1.0), -1.0)),
        ((2, 2), HeadTarget((1.0, 1.0), 1.0)),
        ((0, 0), HeadTarget((-1.0, -1.0), 0.0)),
        # Below the head's severity both are safe for it, however they differ.
        ((1, 0), HeadTarget((-1.0, -1.0), 0.0)),
        ((3,), HeadTarget((1.0,), 0.0)),
        ((1,), HeadTarget((-1.0,), 0.0)),
    ],
)
def test_how_a_head_orders(severities: tuple[int, ...], expected: HeadTarget) -> None:
    harms = [Harm(severity > 0, severity) for severity in severities]
    assert target_of(harms, HeadConfig(None, 2)) == expected


def test_rows_of_pku_safe_rlhf(tmp_path: Path) -> None:
    """The less safe response first, as for a cost model with one head."""
    source = write(tmp_path / "p.jsonl", *ROWS)
    preferences, notes = load_preferences(source, "cost", heads=HEADS)
    plain, _ = load_preferences(source, "cost")
    assert [preference.candidates for preference in preferences] == [own.candidates for own in plain]
    assert [preference.targets for preference in preferences] == [
        (HeadTarget((1.0, -1.0), 1.0), HeadTarget((1.0, -1.0), 1.0)),
        (HeadTarget((1.0, -1.0), 1.0), HeadTarget((1.0, -1.0), 1.0)),
        # First what is of another category, and more severe.
        (HeadTarget((-1.0, 1.0), -1.0), HeadTarget((1.0, 1.0), 1.0)),
        (HeadTarget((-1.0, -1.0), 0.0), HeadTarget((-1.0, -1.0), 0.0)),
        (HeadTarget((-1.0, -1.0), 0.0), HeadTarget((1.0, 1.0), 1.0)),
    ]
    assert notes == [
        f"{source}: 5 pairs",
        f"{source}: head weapons: 3 of 10 responses unsafe, 3 ordered pairs",
        f"{source}: head harm: 6 of 10 responses unsafe, 4 ordered pairs",
    ]
    assert all(not preference.targets for preference in plain)


def test_other_forms(tmp_path: Path) -> None:
    """A pair in `chosen` and `rejected`, and a response by itself."""
    sides = {f"{side}_severity_level": level for side, level in (("chosen", 0), ("rejected", 2))}
    chosen = {"prompt": "how", "chosen": "no", "rejected": "so", "is_chosen_safe": True, "is_rejected_safe": False}
    single = {"prompt": "how", "response": "so", "is_safe": False, "severity_level": 1}
    source = write(tmp_path / "p.jsonl", chosen | sides, single)
    preferences, _ = load_preferences(source, "cost", heads={"harm": HeadConfig()})
    assert [preference.targets for preference in preferences] == [
        (HeadTarget((1.0, -1.0), 1.0),),
        (HeadTarget((1.0,), 0.0),),
    ]
    assert preferences[0].candidates[0].response == "so"


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    row = {name: value for name, value in ROWS[0].items() if not name.endswith("category")}
    assert load_preferences(write(tmp_path / "p.jsonl", row), "cost", heads={"harm": HeadConfig()})[0]
    row = {name: value for name, value in ROWS[0].items() if not name.startswith("is_response")}
    assert load_preferences(write(tmp_path / "q.jsonl", row), "cost", heads={"bombs": HeadConfig((BOMB,))})[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"response_0_severity_level": None},
            "no response_0_severity_level, which the heads ask for; expected a whole",
        ),
        ({"response_1_severity_level": 4}, "response_1_severity_level is 4, expected a whole number from 0 to 3"),
        ({"response_1_severity_level": True}, "response_1_severity_level is True, expected a whole number"),
        ({"response_1_severity_level": "2"}, "response_1_severity_level is '2', expected a whole number"),
        (
            {"response_0_harm_category": None},
            "no response_0_harm_category, .*; expected a mapping of PKU-SafeRLHF's 19",
        ),
        ({"response_0_harm_category": ["Violence"]}, r"response_0_harm_category is \['Violence'\], expected a mapping"),
        ({"response_0_harm_category": {BOMB: True}}, "response_0_harm_category does not say 'Physical Harm', which"),
        (
            {"response_0_harm_category": {BOMB: True, "Physical Harm": "no"}},
            r"response_0_harm_category\['Physical Harm'\] is 'no', expected true or false",
        ),
        ({"is_response_1_safe": None}, "no is_response_1_safe, which the heads ask for; expected true or false"),
        ({"is_response_1_safe": "no"}, "is_response_1_safe is 'no', expected true or false"),
    ],
)
def test_rows_that_do_not_say_it(tmp_path: Path, changes: dict, message: str) -> None:
    source = write(tmp_path / "p.jsonl", ROWS[0], ROWS[1] | changes)
    with pytest.raises(InputError, match=rf"^{re.escape(source)} line 2: {message}") as caught:
        load_preferences(source, "cost", heads=HEADS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROWS[3]], "heads.weapons: no response of p.jsonl is unsafe for it, expected some of both"),
        (
            [harm_row("how", ("bomb", "tea"), 1, ((3, [BOMB]), (2, [BOMB])))],
            "heads.weapons: no response of p.jsonl is safe for it, expected some of both",
        ),
        (
            [harm_row("how", ("bomb", "tea"), 1, ((3, [BOMB]), (1, [BOMB])))],
            "heads.harm: no response of p.jsonl is safe for it, expected some of both",
        ),
        ([harm_row("how", ("bomb", "tea"), 1, ((3, [BOMB]), NONE))], None),
    ],
)
def test_a_head_learns_from_both(tmp_path: Path, rows: list[dict], message: str | None) -> None:
    preferences, _ = load_preferences(write(tmp_path / "p.jsonl", *rows), "cost", heads=HEADS)
    targets = [preference.targets for preference in preferences]
    if message is None:
        check_both("p.jsonl", targets, HEADS)
        return
    with pytest.raises(InputError, match=rf"^{re.escape(message)}$"):
        check_both("p.jsonl", targets, HEADS)
