"""Columns that are part of the dialogue: each is kept, chosen by the user, or an error that names line and column."""

import json
import logging

import pytest

from repo_fast.data import (
    Candidate,
    Columns,
    Demonstration,
    Dialogue,
    load_demonstrations,
    load_preferences,
    load_prompts,
)
from repo_fast.errors import InputError
from tests.job_runs import write_lines

ALPACA = {"instruction": "make tea", "input": "please", "output": "no"}
RENDERED = "Below is a task.\n\n### Instruction:\nmake tea\n\n### Input:\nplease\n\n### Response:\nno"


def chat(*turns, system=None, keys=("role", "content"), speakers=("user", "assistant")):
    said = [{keys[0]: speakers[i % 2], keys[1]: turn} for i, turn in enumerate(turns)]
    return [*([{keys[0]: "system", keys[1]: system}] if system is not None else []), *said]


def share_gpt(*turns, system=None):
    return chat(*turns, system=system, keys=("from", "value"), speakers=("human", "gpt"))


def read(tmp_path, load, *rows, fields=None, **options):
    path = write_lines(tmp_path / "rows.jsonl", rows)
    columns = Columns(fields)
    found = load(str(path), columns=columns, **options)
    columns.check_found([str(path)])
    return found


def refused(tmp_path, load, row, message, fields=None, **options):
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, load, row, fields=fields, **options)
    assert "\n" not in str(caught.value) and "rows.jsonl" in str(caught.value)


# Each row with the dialogue that is asked in it, and the answer where it has one.
DIALOGUES = [
    (
        {"instruction": "And July?", "output": "Hot.", "history": [["June?", "Mild."]], "system": "Be brief."},
        Dialogue(("June?", "Mild.", "And July?"), "Be brief."),
        "Hot.",
    ),
    (
        {"instruction": "v", "input": "w", "output": "b", "history": chat("u", "a"), "system_prompt": "s"},
        Dialogue(("u", "a", "v w"), "s"),
        "b",
    ),
    ({"prompt": "v", "response": "b", "history": [], "system": " "}, Dialogue(("v",)), "b"),
    ({"messages": chat("u", "a", "v", "b", system="s")}, Dialogue(("u", "a", "v"), "s"), "b"),
    ({"messages": chat("u", "a", "v", system="s"), "answer": "b"}, Dialogue(("u", "a", "v"), "s"), "b"),
    ({"conversations": share_gpt("u", "a", "v", "b", system="s")}, Dialogue(("u", "a", "v"), "s"), "b"),
    ({"conversation": share_gpt("u", "b"), "system": "s"}, Dialogue(("u",), "s"), "b"),
    ({"conversations": [{"from": "User", "value": "u"}, {"from": "Assistant", "value": "b"}]}, Dialogue(("u",)), "b"),
    ({"prompt": chat("u", "a", "v", system="s"), "completion": "b"}, Dialogue(("u", "a", "v"), "s"), "b"),
    # The system text twice, but the same.
    ({"system": "s", "messages": chat("u", "b", system="s")}, Dialogue(("u",), "s"), "b"),
    # Turns that the chat begins with anyway.
    ({"history": [["u", "a"]], "messages": chat("u", "a", "v", "b")}, Dialogue(("u", "a", "v")), "b"),
    ({"history": [["u", "a"]], "messages": chat("v", "b")}, Dialogue(("u", "a", "v")), "b"),
    # A developer's text is a system text, and parts that are all text are a text.
    (
        {
            "messages": [
                {"role": "developer", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "u"}, {"type": "text", "text": "!"}]},
                {"role": "assistant", "content": "b", "tool_calls": None},
            ]
        },
        Dialogue(("u!",), "s"),
        "b",
    ),
    # Dolly, OpenOrca, SQuAD as question, context and answer.
    (
        {"instruction": "Who?", "context": "It was Ann.", "response": "Ann", "category": "qa"},
        Dialogue(("Who? It was Ann.",)),
        "Ann",
    ),
    ({"id": "1", "system_prompt": "s", "question": "q", "response": "b"}, Dialogue(("q",), "s"), "b"),
    ({"question": "Who?", "context": "It was Ann.", "answer": "Ann"}, Dialogue(("Who? It was Ann.",)), "Ann"),
    # Alpaca's rendered text; columns that say the same.
    (ALPACA | {"text": RENDERED}, Dialogue(("make tea please",)), "no"),
    (ALPACA | {"prompt": "make tea\n\nplease", "response": "no"}, Dialogue(("make tea\n\nplease",)), "no"),
    ({"prompt": "u", "question": "", "response": "b", "output": None, "completion": " "}, Dialogue(("u",)), "b"),
    # Ultrafeedback.
    (
        {"prompt": "u", "chosen": chat("u", "b"), "rejected": chat("u", "c"), "messages": chat("u", "b"), "score": 1.0},
        Dialogue(("u",)),
        "b",
    ),
    # The prompt is the last thing said in the chat.
    ({"prompt": "v", "messages": chat("u", "a", "v", "b", system="s")}, Dialogue(("u", "a", "v"), "s"), "b"),
]


@pytest.mark.parametrize(("row", "asked", "answer"), DIALOGUES)
def test_prompts_and_demonstrations_have_the_whole_dialogue(tmp_path, row, asked, answer):
    (prompt,) = read(tmp_path, load_prompts, row)
    assert prompt.asked == asked and prompt.text == asked.text
    (shown,) = read(tmp_path, load_demonstrations, row)
    assert (shown.asked, shown.response) == (asked, answer)


def test_ultrachat_asks_its_prompt_and_shows_its_chat(tmp_path):
    row = {"prompt": "u", "prompt_id": "x", "messages": chat("u", "a", "v", "b", system="s")}
    (prompt,) = read(tmp_path, load_prompts, row)
    assert prompt.asked == Dialogue(("u",), "s")
    assert read(tmp_path, load_demonstrations, row) == [Demonstration(("u", "a", "v"), "b", "s")]


def test_prompts_that_differ_in_system_text_or_earlier_turns_are_different_prompts(tmp_path):
    rows = [{"prompt": "u"}, {"prompt": "u", "system": "s"}, {"prompt": "u", "history": [["t", "a"]]}, {"prompt": "u"}]
    prompts = read(tmp_path, load_prompts, *rows)
    assert [prompt.id for prompt in prompts] == [0, 1, 2]
    assert [prompt.dialogue for prompt in prompts] == [None, Dialogue(("u",), "s"), Dialogue(("t", "a", "u"))]


PAIR = Dialogue(("u", "a", "v"), "s")


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"system": "s", "prompt": "u", "chosen": "good", "rejected": "bad"}, Dialogue(("u",), "s")),
        ({"system": "s", "question": "u", "chosen": "good", "rejected": "bad"}, Dialogue(("u",), "s")),
        ({"system": "s", "history": [["u", "a"]], "prompt": "v", "chosen": "good", "rejected": "bad"}, PAIR),
        ({"prompt": chat("u", "a", "v", system="s"), "chosen": chat("", "good")[1:], "rejected": "bad"}, PAIR),
        ({"chosen": chat("u", "a", "v", "good", system="s"), "rejected": chat("u", "a", "v", "bad", system="s")}, PAIR),
        (
            {"system": "s", "chosen": "\n\nHuman: u\n\nAssistant: good", "rejected": chat("u", "bad")},
            Dialogue(("u",), "s"),
        ),
        # As LLaMA-Factory has them.
        (
            {
                "conversations": share_gpt("u", "a", "v", system="s"),
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
            },
            PAIR,
        ),
        ({"instruction": "u", "input": "w", "chosen": "good", "rejected": "bad"}, Dialogue(("u w",))),
        # hh-rlhf's notation behind the prompt, which it repeats.
        ({"prompt": "u", "chosen": "\n\nHuman: u\n\nAssistant: good", "rejected": "bad"}, Dialogue(("u",))),
        (
            {"prompt": "u", "messages": chat("u", "good"), "chosen": chat("u", "good"), "rejected": chat("u", "bad")},
            Dialogue(("u",)),
        ),
        (
            {"system": "s", "prompt": "u", "response_0": "good", "response_1": "bad", "better_response_id": 0},
            Dialogue(("u",), "s"),
        ),
    ],
)
def test_preferences_have_the_whole_dialogue(tmp_path, row, asked):
    (preference,), _ = read(tmp_path, load_preferences, row, kind="reward")
    good, bad = (Candidate(asked.turns, response, system=asked.system) for response in ("good", "bad"))
    assert preference.candidates == (good, bad) and good.asked == asked


def test_a_labelled_response_has_its_system_text(tmp_path):
    row = {"system": "s", "query": "u", "output": "a", "is_safe": False}
    (preference,), _ = read(tmp_path, load_preferences, row, kind="cost")
    assert preference.candidates == (Candidate(("u",), "a", unsafe=True, system="s"),)


BOTH = (load_prompts, load_demonstrations)


@pytest.mark.parametrize("load", BOTH)
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"history": [["u", ""]]}, r"line 1: history entry 1 \(assistant\) is blank"),
        ({"history": [["u", "a"], ["u"]]}, "line 1: history entry 2 is .* expected a pair"),
        ({"history": [["u", 3]]}, r"history entry 1 \(assistant\) is a int"),
        ({"history": "June? Mild."}, r"history is a str, expected a list of \[user, assistant\] pairs"),
        ({"history": chat("u", "a", "v")}, r"history has the turns .* no assistant turn at the end"),
        ({"system": ["s"]}, "system is a list, expected a string"),
        ({"system": "s", "system_prompt": "t"}, "system and system_prompt say different things, .*the system: choose"),
        (
            {"tools": [{"name": "search"}]},
            "tools is part of the dialogue and cannot be kept; --data.fields.tools ignore",
        ),
        ({"images": ["cat.png"]}, "images is part of the dialogue"),
        ({"role": "assistant"}, "role is 'assistant', expected rows of the user's"),
        ({"parent_id": "7"}, "parent_id is part of the dialogue"),
    ],
)
def test_what_cannot_be_part_of_a_dialogue(tmp_path, load, row, message):
    refused(tmp_path, load, {"prompt": "p", "response": "r"} | row, message)


def message(**changes):
    return [{"role": "user", "content": "u"} | changes, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("load", BOTH)
@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (message(role="tool"), r"messages turn 1 has the role 'tool', expected one of user, human"),
        (message(role=None), r"messages turn 1 has the role None"),
        (
            message(content=[{"type": "image_url", "image_url": "x"}]),
            r"turn 1 \(user\) has a part of the type 'image_url'",
        ),
        (message(content=["u"]), r"turn 1 \(user\) has a part of the type 'str'"),
        (message(content=None), r"messages turn 1 \(user\) is a NoneType, expected a string"),
        (message(tool_calls=[{"id": "1"}]), r"messages turn 1 \(user\) has tool_calls, expected text alone"),
        (message(reasoning_content="hm"), r"turn 1 \(user\) has reasoning_content"),
        (message()[1:] + message(), r"messages has the turns \['assistant', 'user', 'assistant'\]"),
        (message() + chat(system="s"), r"has the turns \['user', 'assistant', 'system'\]"),
        (chat(system="s") * 2 + message(), r"has the turns \['system', 'system', 'user', 'assistant'\]"),
        (chat(system="s"), r"has the turns \['system'\]"),
        ({"role": ["user"], "content": ["u"]}, r"messages turn 1 has the role \['user'\]"),
        ("user: u", "messages is not a list of objects"),
    ],
)
def test_what_cannot_be_a_turn(tmp_path, load, messages, expected):
    refused(tmp_path, load, {"messages": messages}, f"line 1: .*{expected}")


CONTRADICTIONS = [
    (
        ALPACA | {"prompt": "### Instruction: make tea ### Input: please ### Output: no"},
        "prompt and instruction say different things, and either may be the prompt: choose with "
        "--data.fields.prompt prompt or --data.fields.instruction prompt",
        {"instruction": "prompt"},
        Demonstration("make tea please", "no"),
    ),
    (
        {"instruction": "one", "prompt": "two", "output": "no"},
        "prompt and instruction say different things",
        {"prompt": "prompt"},
        Demonstration("two", "no"),
    ),
    (
        {"prompt": "u", "output": "a", "response": "b"},
        "response and output say different things, and either may be the response: choose with "
        "--data.fields.response response or --data.fields.output response",
        {"output": "response"},
        Demonstration("u", "a"),
    ),
    (
        {"messages": chat("u", "a"), "response": "b"},
        "messages and response say different things, .*--data.fields.response response or .*response ignore$",
        {"response": "ignore"},
        Demonstration("u", "a"),
    ),
    (
        {"messages": chat("u", "a"), "response": "b"},
        "messages and response say different things",
        {"response": "response"},
        Demonstration("u", "b"),
    ),
    (
        {"prompt": "other", "messages": chat("u", "a")},
        "messages and prompt say different things",
        {"prompt": "ignore"},
        Demonstration("u", "a"),
    ),
    (
        ALPACA | {"text": "another text"},
        "instruction and text say different things",
        {"text": "ignore"},
        Demonstration("make tea please", "no"),
    ),
    (
        {"system": "s", "messages": chat("u", "a", system="t")},
        "the system texts of system and messages differ, expected one: choose with --data.fields.system system or",
        {"system": "system"},
        Demonstration("u", "a", "s"),
    ),
    (
        {"prompt": "u", "input": "w", "output": "a"},
        "input beside prompt: it looks like part of the prompt, .*--data.fields.input ignore leaves it out",
        {"input": "ignore"},
        Demonstration("u", "a"),
    ),
    (
        {"prompt": "Make tea. ### Output: no", "output": "no"},
        "prompt ends with output, the answer to it: choose another column .*--data.fields.prompt prompt",
        {"prompt": "prompt"},
        Demonstration("Make tea. ### Output: no", "no"),
    ),
    # Names that nothing knows.
    (
        {"ask": "u", "say": "a", "who": "s", "past": [["t", "b"]]},
        "no response field: found ask, say, who, past; expected one of response, .*or --data.fields.COLUMN response",
        {"ask": "prompt", "say": "response", "who": "system", "past": "history"},
        Demonstration(("t", "b", "u"), "a", "s"),
    ),
    (
        {"dialog": share_gpt("u", "a", "v", "b")},
        "no response field",
        {"dialog": "prompt"},
        Demonstration(("u", "a", "v"), "b"),
    ),
    (
        {"prompt": "u", "chosen": "a", "rejected": "b"},
        "no response field",
        {"chosen": "response"},
        Demonstration("u", "a"),
    ),
    ({"prompt": "u", "output": "a", "tools": ["x"]}, "tools is part of", {"tools": "ignore"}, Demonstration("u", "a")),
]


@pytest.mark.parametrize(("row", "message", "fields", "shown"), CONTRADICTIONS)
def test_columns_that_contradict_each_other_are_chosen_from(tmp_path, row, message, fields, shown):
    refused(tmp_path, load_demonstrations, row, f"line 1: {message}")
    assert read(tmp_path, load_demonstrations, row, fields=fields) == [shown]


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("USER: u ASSISTANT: no", "no"),
        ("[INST] u [/INST] no </s>", "no"),
        ("<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n", "no"),
        ("u\n\n**Answer**: no.", "no."),
    ],
)
def test_an_answer_in_the_prompt_is_found(tmp_path, prompt, answer):
    for load in BOTH:
        refused(tmp_path, load, {"prompt": prompt, "response": answer}, "line 1: prompt ends with response, the answer")
    row = {"prompt": prompt, "chosen": answer, "rejected": "other"}
    refused(tmp_path, load_preferences, row, "line 1: prompt ends with chosen, the answer", kind="reward")


@pytest.mark.parametrize(
    "prompt", ["Say after me: no", "Is it yes or no", "Write: Output: yes, then: no", "Give me the answer: no"]
)
def test_a_prompt_may_end_with_the_words_of_its_answer(tmp_path, prompt):
    assert read(tmp_path, load_demonstrations, {"prompt": prompt, "response": "no"}) == [Demonstration(prompt, "no")]


def test_preferences_by_chosen_columns(tmp_path):
    row = {"ask": "u", "win": "good", "lose": "bad", "who": "s"}
    refused(tmp_path, load_preferences, row, "line 1: no preference: found ask, win, lose, who", kind="reward")
    fields = {"ask": "prompt", "win": "chosen", "lose": "rejected", "who": "system"}
    (preference,), _ = read(tmp_path, load_preferences, row, fields=fields, kind="reward")
    assert preference.candidates == (Candidate(("u",), "good", system="s"), Candidate(("u",), "bad", system="s"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "u", "question": "w", "chosen": "a", "rejected": "b"},
            "prompt and question say different things, .*--data.fields.prompt prompt or --data.fields.question prompt",
        ),
        (
            {"messages": chat("u", "c"), "chosen": "a", "rejected": "b"},
            "messages goes on .*another answer than chosen and",
        ),
        ({"history": [["u", "a"]], "chosen": chat("v", "a"), "rejected": chat("v", "b")}, "history without a prompt"),
        (
            {"prompt": "u", "chosen": chat("u", "a", system="s"), "rejected": "b", "system": "t"},
            "the system texts of system and chosen differ",
        ),
        (
            {"prompt": "u", "chosen": "a", "rejected": [{"role": "tool", "content": "b"}]},
            "rejected turn 1 has the role",
        ),
    ],
)
def test_preferences_that_contradict_themselves(tmp_path, row, message):
    refused(tmp_path, load_preferences, row, f"line 1: {message}", kind="reward")


def test_a_role_that_is_unknown_and_a_column_that_is_absent(tmp_path):
    with pytest.raises(InputError, match="data.fields.a is 'promt', expected one of prompt, response, chosen"):
        Columns({"a": "promt"})
    row = {"prompt": "u", "response": "a"}
    for role in ("prompt", "history", "ignore"):
        message = f"data.fields.promt is '{role}', and no row of .*rows.jsonl has a column 'promt'"
        refused(tmp_path, load_demonstrations, row, message, fields={"promt": role})
    # One of several sources has it, and of a column that is null nothing is asked.
    columns = Columns({"ask": "prompt", "note": "ignore"})
    load_prompts(str(write_lines(tmp_path / "a.jsonl", [{"ask": "u", "prompt": "w"}])), columns=columns)
    load_prompts(str(write_lines(tmp_path / "b.jsonl", [{"prompt": "u", "note": None}])), columns=columns)
    columns.check_found(["a", "b"])


def test_two_columns_of_one_role(tmp_path):
    fields = {"a": "prompt", "b": "prompt"}
    assert [p.text for p in read(tmp_path, load_prompts, {"a": "u"}, {"b": "v"}, fields=fields)] == ["u", "v"]
    message = "a and b say different things, .*--data.fields.a ignore or --data.fields.b ignore"
    refused(tmp_path, load_prompts, {"a": "u", "b": "v"}, message, fields=fields)


@pytest.mark.parametrize("kind", ["prompts", "demonstrations", "preferences"])
def test_columns_that_nothing_was_read_from_are_named_once(tmp_path, caplog, kind):
    row = {"prompt": "u", "response": "b", "note": "x", "label\ud83d": 1, "category": "c"}
    if kind == "preferences":
        row |= {"chosen": chat("u", "a"), "rejected": "b"}
    else:
        row |= {"messages": [message | {"id": 7} for message in chat("u", "b")]}
    rows = [json.loads(json.dumps(row)) for _ in range(3)]
    load = {"prompts": load_prompts, "demonstrations": load_demonstrations, "preferences": load_preferences}[kind]
    with caplog.at_level(logging.INFO, logger="repo_fast"):
        read(tmp_path, load, *rows, **({"kind": "reward"} if kind == "preferences" else {}))
    (said,) = [record.getMessage() for record in caplog.records if "not used" in record.getMessage()]
    expected = {
        "prompts": r"response, note, label\ud83d, messages.id",
        "demonstrations": r"note, label\ud83d, category, messages.id",
        "preferences": r"response, note, label\ud83d, category",
    }[kind]
    assert said == f"{tmp_path / 'rows.jsonl'}: columns not used: {expected}"
    said.encode()


def test_a_source_that_is_read_whole_says_nothing(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="repo_fast"):
        read(tmp_path, load_demonstrations, ALPACA)
    assert "not used" not in caplog.text


@pytest.mark.parametrize("history", ["chat_history", "conversation_history"])
def test_other_names_of_history_and_system(tmp_path, history):
    row = {"instruction": "u", "output": "a", history: [["June?", "Mild."]], "system_message": "s"}
    expected = Demonstration(("June?", "Mild.", "u"), "a", "s")
    assert read(tmp_path, load_demonstrations, row) == [expected]


def test_a_turn_that_is_not_to_be_learned_is_an_error(tmp_path):
    turns = chat("u", "a", "v", "b")
    turns[1]["weight"] = 0
    refused(
        tmp_path, load_demonstrations, {"messages": turns}, "line 1: messages turn 2 .* has weight 0, expected none"
    )


def test_what_stands_beside_the_files_of_a_data_set_is_no_data(tmp_path):
    for name in ("dataset_info.json", "dataset_infos.json", "README.md"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "train.jsonl").write_text('{"prompt": "u"}')
    assert [prompt.text for prompt in load_prompts(str(tmp_path))] == ["u"]
