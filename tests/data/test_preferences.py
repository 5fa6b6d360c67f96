"""Every form a preference comes in, which side is to score higher, and every way a row can be wrong."""

import gzip
import json
from pathlib import Path

import pytest

from repo_fast.data import Candidate, Columns, Preference, load_preferences
from repo_fast.errors import InputError

HH_FILE = Path(__file__).parents[3] / "shared" / "data" / "hh-harmless-test.jsonl.gz"

PKU = {
    "prompt": "how do i get in?",
    "response_0": "break it",
    "response_1": "i will not say",
    "better_response_id": 0,
    "safer_response_id": 1,
    "is_response_0_safe": False,
    "is_response_1_safe": True,
}
NEW_PKU_COLUMNS = {
    "prompt_source": "s",
    "response_0_source": "m",
    "response_1_source": "m",
    "response_0_harm_category": {"White-Collar Crime": True},
    "response_1_harm_category": {"White-Collar Crime": False},
    "response_0_severity_level": 2,
    "response_1_severity_level": 0,
    "response_0_sha256": "a",
    "response_1_sha256": "b",
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(*turns):
    return [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]


def answer(said):
    return [{"role": "assistant", "content": said}]


def hh(*turns):
    return "".join(f"\n\n{'Assistant' if i % 2 else 'Human'}: {turn}" for i, turn in enumerate(turns))


def without(row, *fields):
    return {name: value for name, value in row.items() if name not in fields}


def pair(context, higher, lower, unsafe=(None, None)):
    context = (context,) if isinstance(context, str) else context
    return Preference((Candidate(context, higher, unsafe[0]), Candidate(context, lower, unsafe[1])))


@pytest.mark.parametrize("more", [{}, NEW_PKU_COLUMNS])
def test_pku_for_both_kinds(tmp_path, more):
    source = write(tmp_path / "p.jsonl", PKU | more)
    # The reward is to be higher for the better response, the cost for the one that is *not* the safer one.
    assert load_preferences(source, "reward") == (
        [pair("how do i get in?", "break it", "i will not say")],
        [f"{source}: 1 pairs"],
    )
    unsafe_first = pair("how do i get in?", "break it", "i will not say", unsafe=(True, False))
    assert load_preferences(source, "cost") == ([unsafe_first], [f"{source}: 1 pairs"])

    other_way = PKU | {"better_response_id": 1, "safer_response_id": 0}
    source = write(tmp_path / "q.jsonl", other_way | {"is_response_0_safe": 1, "is_response_1_safe": 0})
    (preference,), _ = load_preferences(source, "reward")
    assert [candidate.response for candidate in preference.candidates] == ["i will not say", "break it"]
    (preference,), _ = load_preferences(source, "cost")
    assert preference.candidates[0] == Candidate(("how do i get in?",), "i will not say", unsafe=True)
    assert preference.candidates[1] == Candidate(("how do i get in?",), "break it", unsafe=False)


def test_only_the_fields_of_the_kind_are_needed(tmp_path):
    for_cost = ("safer_response_id", "is_response_0_safe", "is_response_1_safe")
    source = write(tmp_path / "r.jsonl", without(PKU, *for_cost))
    assert load_preferences(source, "reward")[0] == [pair("how do i get in?", "break it", "i will not say")]
    source = write(tmp_path / "c.jsonl", without(PKU, "better_response_id"))
    assert load_preferences(source, "cost")[0][0].candidates[0].unsafe is True


@pytest.mark.parametrize(
    ("row", "context"),
    [
        ({"chosen": hh("u", "good"), "rejected": hh("u", "bad")}, "u"),
        ({"chosen": hh("u", "a", "v", "good"), "rejected": hh("u", "a", "v", "bad")}, ("u", "a", "v")),
        ({"prompt": "u", "chosen": "good", "rejected": "bad"}, "u"),
        ({"prompt": "u", "chosen": answer("good"), "rejected": answer("bad")}, "u"),
        ({"prompt": chat("u", "a", "v"), "chosen": answer("good"), "rejected": answer("bad")}, ("u", "a", "v")),
        ({"prompt": chat("u"), "chosen": "good", "rejected": "bad", "response_0": None, "response": "x"}, "u"),
        ({"prompt": "u", "chosen": chat("u", "good"), "rejected": chat("u", "bad")}, "u"),
        ({"chosen": chat("u", "a", "v", "good"), "rejected": chat("u", "a", "v", "bad")}, ("u", "a", "v")),
    ],
)
def test_forms_of_chosen_and_rejected(tmp_path, row, context):
    source = write(tmp_path / "p.jsonl", row)
    assert load_preferences(source, "reward")[0] == [pair(context, "good", "bad")]
    # The chosen response is the safer one.
    assert load_preferences(source, "cost")[0] == [pair(context, "bad", "good")]
    labelled = row | {"is_chosen_safe": True, "is_rejected_safe": False}
    (preference,), notes = load_preferences(write(tmp_path / "p.jsonl", labelled), "cost")
    assert preference == pair(context, "bad", "good", unsafe=(True, False)) and len(notes) == 2
    assert "of 1 pairs the chosen response is taken as the safer one" in notes[1]


def test_marks_that_a_model_wrote_stay_text(tmp_path):
    ran_on = "no.  Human: really?\n\nAssistant: yes"
    source = write(
        tmp_path / "p.jsonl",
        {"chosen": hh("u", "no"), "rejected": hh("u", ran_on)},
        {"chosen": hh("u", ran_on, "v", "Human: a"), "rejected": hh("u", ran_on, "v", "b\n\nHuman:c")},
    )
    assert load_preferences(source, "reward")[0] == [
        pair("u", "no", ran_on),
        pair(("u", ran_on, "v"), "Human: a", "b\n\nHuman:c"),
    ]


def test_contexts_of_the_two_sides_may_differ(tmp_path):
    source = write(tmp_path / "p.jsonl", {"chosen": hh("u", "same"), "rejected": chat("u", "a", "v", "same")})
    (preference,), _ = load_preferences(source, "reward")
    assert preference.candidates == (Candidate(("u",), "same"), Candidate(("u", "a", "v"), "same"))


def test_single_labelled_responses(tmp_path):
    rows = [{"prompt": "u", "response": "a", "is_safe": True}, {"prompt": chat("u"), "response": "b", "is_safe": 0}]
    source = write(tmp_path / "p.jsonl", *rows, PKU)
    preferences, notes = load_preferences(source, "cost")
    assert [preference.candidates for preference in preferences[:2]] == [
        (Candidate(("u",), "a", unsafe=False),),
        (Candidate(("u",), "b", unsafe=True),),
    ]
    assert notes == [f"{source}: 1 pairs, 2 single labelled responses"]
    with pytest.raises(InputError, match=r"p.jsonl line 1: a single response, which only a cost model can learn from"):
        load_preferences(source, "reward")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (without(PKU, "response_1", "safer_response_id"), "no response_1 and no safer_response_id: found prompt, resp"),
        (without(PKU, "prompt"), "no prompt: found response_0"),
        (
            PKU | {"safer_response_id": None},
            "no safer_response_id: found prompt, .*; known forms are prompt, response_0",
        ),
        (PKU | {"safer_response_id": True}, "safer_response_id is True, expected the integer 0 or 1"),
        (PKU | {"safer_response_id": "0"}, "safer_response_id is '0', expected the integer 0 or 1"),
        (PKU | {"safer_response_id": 2}, "safer_response_id is 2, expected"),
        (PKU | {"safer_response_id": -1}, "safer_response_id is -1, expected"),
        (PKU | {"safer_response_id": 0.0}, "safer_response_id is 0.0, expected"),
        (PKU | {"is_response_1_safe": "yes"}, "is_response_1_safe is 'yes', expected true or false"),
        (PKU | {"is_response_1_safe": 2}, "is_response_1_safe is 2, expected true or false"),
        (PKU | {"response_0": 3}, "response_0 is a int, expected a string"),
        (PKU | {"prompt": " "}, "prompt is blank$"),
        (PKU | {"prompt": chat("u", "a")}, r"prompt has the turns \['user', 'assistant'\], no user turn at the end"),
        (PKU | {"response_0": "\n"}, "response_0 is blank; set data.unusable to drop to leave such rows out"),
        (PKU | {"response_1": "break it"}, "response_0 and response_1 are equal; set data.unusable to drop"),
        ({"prompt": "p", "text": "t"}, "no preference: found prompt, text; expected prompt, response_0"),
        ({}, "no preference: found no fields"),
        ("bare", "a str, expected an object with prompt, response_0"),
        ({"prompt": "p", "chosen": "a"}, "no rejected: found prompt, chosen"),
        (
            {"chosen": "a", "rejected": "b"},
            "chosen starts with 'a', expected a dialogue that starts with .*or a prompt",
        ),
        ({"chosen": "x" + hh("u", "a"), "rejected": hh("u", "b")}, "chosen starts with 'x"),
        ({"chosen": "\n\nAssistant: a", "rejected": "b"}, "chosen starts with .*expected a dialogue that starts with"),
        ({"chosen": hh("u", "a", "v"), "rejected": hh("u", "b")}, "chosen ends with the human's turn"),
        ({"chosen": hh("u", "a"), "rejected": hh("u") + hh("v", "b")}, "rejected turn 2 is the human's again"),
        ({"chosen": hh("u", "a"), "rejected": hh("u", " ", "v", "b")}, "rejected turn 2 is blank$"),
        ({"chosen": hh(" ", "a"), "rejected": hh("u", "b")}, "chosen turn 1 is blank$"),
        ({"chosen": hh("u", "a"), "rejected": "\n\nHuman: u\n\nAssistant:"}, "rejected is blank; set"),
        ({"chosen": hh("u", "a"), "rejected": hh("u", "a")}, "chosen and rejected are equal; set"),
        ({"chosen": hh("u", "a"), "rejected": hh("u", "b"), "is_chosen_safe": "no"}, "is_chosen_safe is 'no'"),
        ({"prompt": "p", "chosen": chat("q", "a"), "rejected": answer("b")}, "chosen has turns .*not the prompt's"),
        ({"prompt": "p", "chosen": chat("p"), "rejected": answer("b")}, "chosen has the turns .*no assistant turn at"),
        ({"prompt": "p", "chosen": [], "rejected": answer("b")}, r"chosen has the turns \[\]"),
        ({"prompt": "p", "chosen": ["a"], "rejected": answer("b")}, "chosen is not a list of objects"),
        (
            {"chosen": [*chat("u"), {"role": "system", "content": "s"}, *chat("", "a")[1:]], "rejected": "b"},
            r"chosen has the turns \['user', 'system', 'assistant'\].*below at most one system text",
        ),
        ({"chosen": chat("u", 3), "rejected": chat("u", "b")}, r"chosen turn 2 \(assistant\) is a int"),
        ({"chosen": chat("u", " ", "v", "a"), "rejected": "b"}, r"chosen turn 2 \(assistant\) is blank$"),
        ({"chosen": chat("u", " "), "rejected": chat("u", "b")}, "chosen is blank; set data.unusable"),
        ({"prompt": "p", "response": "r"}, "no is_safe: found prompt, response"),
        ({"prompt": "p", "response": "r", "is_safe": "safe"}, "is_safe is 'safe', expected true or false"),
        ({"prompt": "p", "response": " ", "is_safe": True}, "response is blank; set"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, row, message):
    source = write(tmp_path / "p.jsonl", PKU, row)
    with pytest.raises(InputError, match=f"p.jsonl line 2: {message}") as caught:
        load_preferences(source, "cost")
    assert "\n" not in str(caught.value)


def test_only_blank_and_equal_responses_can_be_dropped(tmp_path):
    blank, equal = PKU | {"response_0": " "}, PKU | {"response_1": "break it"}
    source = write(tmp_path / "p.jsonl", blank, PKU, equal, PKU, blank)
    preferences, notes = load_preferences(source, "reward", unusable="drop")
    assert len(preferences) == 2
    assert notes == [f"{source}: 2 pairs, 3 rows dropped (2 with a blank response, 1 with two equal responses)"]
    assert len(load_preferences(source, "reward", unusable="drop", limit=1)[0]) == 1
    for wrong in ({"prompt": ""}, {"better_response_id": "1"}, {"response_1": None}):
        source = write(tmp_path / "q.jsonl", PKU, blank | wrong)
        with pytest.raises(InputError, match="q.jsonl line 2"):
            load_preferences(source, "reward", unusable="drop")
    source = write(tmp_path / "r.jsonl", blank, equal)
    with pytest.raises(InputError, match="r.jsonl: all 2 rows are unusable: 1 with a blank response, 1 with two equal"):
        load_preferences(source, "reward", unusable="drop")


def test_notes_on_safety_labels(tmp_path):
    unlabelled = without(PKU, "is_response_0_safe", "is_response_1_safe")
    source = write(tmp_path / "none.jsonl", unlabelled, unlabelled)
    _, (_, note) = load_preferences(source, "cost")
    assert note.startswith(f"{source}: no response has a safety label") and "a cost <= 0 will not mean safe" in note
    assert len(load_preferences(source, "reward")[1]) == 1

    source = write(tmp_path / "some.jsonl", unlabelled, PKU, without(PKU, "is_response_0_safe"))
    preferences, (_, note) = load_preferences(source, "cost")
    assert note.startswith(f"{source}: 2 of 3 pairs have no safety labels (or only one)")
    assert [candidate.unsafe for candidate in preferences[2].candidates] == [None, False]

    # The pairs alone have no label, but something does.
    source = write(tmp_path / "single.jsonl", unlabelled, {"prompt": "u", "response": "a", "is_safe": True})
    assert load_preferences(source, "cost")[1][1].startswith(f"{source}: 1 of 1 pairs have no safety labels")

    source = write(tmp_path / "contradicting.jsonl", PKU, PKU | {"safer_response_id": 0})
    assert "in 1 of 2 pairs the safer response is labelled unsafe" in load_preferences(source, "cost")[1][1]


def test_bad_sources_and_arguments(tmp_path, monkeypatch):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="empty.jsonl: empty; expected at least one preference"):
        load_preferences(str(tmp_path / "empty.jsonl"), "cost")
    with pytest.raises(InputError, match="no such file"):
        load_preferences("nowhere.jsonl", "cost")
    for wrong, message in (({"kind": "critic"}, "kind is 'critic'"), ({"limit": 0}, "limit is 0")):
        with pytest.raises(InputError, match=message):
            load_preferences(**{"source": "world:preferences-test", "kind": "cost", **wrong})
    with pytest.raises(InputError, match="unusable is 'skip', expected one of error, drop"):
        load_preferences("world:preferences-test", "cost", unusable="skip")
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: [PKU, {"prompt": "p"}])
    with pytest.raises(InputError, match=r"owner/name \[test\] row 1: no preference"):
        load_preferences("owner/name", "cost", split="test")


def test_gzipped_lines_and_a_list(tmp_path):
    with gzip.open(tmp_path / "p.jsonl.gz", "wt") as file:
        file.write(json.dumps(PKU) + "\n")
    (tmp_path / "p.json").write_text(json.dumps([PKU]))
    expected = load_preferences(write(tmp_path / "p.jsonl", PKU), "cost")[0]
    assert load_preferences(str(tmp_path / "p.jsonl.gz"), "cost")[0] == expected
    assert load_preferences(str(tmp_path / "p.json"), "cost")[0] == expected


def test_the_embedded_world():
    train, notes = load_preferences("world:preferences", "cost", limit=20)
    assert len(train) == 20 and notes == ["world:preferences: 20 pairs"]
    test, notes = load_preferences("world:preferences-test", "reward")
    assert len(test) == 512 and notes == ["world:preferences-test: 512 pairs"]
    assert train == load_preferences("world:preferences", "cost", limit=30)[0][:20]


@pytest.mark.skipif(not HH_FILE.is_file(), reason="the real dialogues are not part of the repository")
def test_real_dialogues():
    with pytest.raises(InputError, match="line 87: chosen is blank; set data.unusable to drop"):
        load_preferences(str(HH_FILE), "cost")
    preferences, notes = load_preferences(str(HH_FILE), "cost", unusable="drop")
    assert len(preferences) == 2308 and "4 rows dropped (4 with a blank response)" in notes[0]
    candidates = [candidate for preference in preferences for candidate in preference.candidates]
    assert all(len(candidate.turns) % 2 for candidate in candidates)
    # Both answers are to the same dialogue, also where a model ran on as the human.
    assert all(len({candidate.turns for candidate in preference.candidates}) == 1 for preference in preferences)
    # Every dialogue can be put together again.
    with gzip.open(HH_FILE, "rt", encoding="utf-8") as file:
        whole = {text for line in file for text in json.loads(line).values()}
    assert {hh(*candidate.turns, candidate.response) for candidate in candidates} <= whole


NUMBERED = {"prompt": "Q", "response_0": "a", "response_1": "b", "better_response_id": 1}


@pytest.mark.parametrize(
    ("row", "roles", "better"),
    [
        (NUMBERED, {}, "b"),
        (NUMBERED, {"response_0": "chosen", "response_1": "rejected"}, "a"),
        (NUMBERED | {"chosen": "a", "rejected": "b"}, {"chosen": "chosen", "rejected": "rejected"}, "a"),
        (NUMBERED | {"chosen": "a", "rejected": "b"}, {"chosen": "ignore"}, "b"),
        (NUMBERED | {"chosen": "a", "rejected": "b"}, {"response_0": "ignore"}, "a"),
        (NUMBERED | {"chosen": "b", "rejected": "a"}, {}, "b"),
    ],
)
def test_a_pair_told_twice(tmp_path, row, roles, better):
    """What the option says wins; without it the two have to agree."""
    (preference,), _ = load_preferences(write(tmp_path / "p.jsonl", row), "reward", columns=Columns(roles))
    assert preference.candidates[0].response == better


def test_a_pair_told_twice_and_differently_is_an_error(tmp_path):
    source = write(tmp_path / "p.jsonl", NUMBERED | {"chosen": "a", "rejected": "b"})
    with pytest.raises(InputError, match="line 1: the ids of .* with --data.fields.chosen ignore or .*_0 ignore"):
        load_preferences(source, "reward")
