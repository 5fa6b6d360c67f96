"""Every form a prompt or a demonstration comes in, and every way a file can be wrong."""

import gzip
import json
import logging
import re

import pytest

from repo_fast.data import Demonstration, Prompt, load_demonstrations, load_prompts
from repo_fast.errors import InputError


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(*turns):
    return [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]


def test_duplicates_go_and_ids_count_what_is_left(tmp_path, caplog):
    source = write(
        tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "b", "category": "c"}, {"prompt": "a"}, {"prompt": "d"}
    )
    with caplog.at_level(logging.INFO, logger="repo_fast"):
        prompts = load_prompts(source)
    assert prompts == [Prompt(0, "a"), Prompt(1, "b", "c"), Prompt(2, "d")]
    assert "3 prompts (1 duplicates dropped)" in caplog.text
    assert load_prompts(source, limit=2) == prompts[:2]


def test_a_category_is_text_or_a_number(tmp_path):
    rows = [{"prompt": str(value), "category": value} for value in ("tea", 3, ["tea"], {"tea": True}, None)]
    assert [prompt.category for prompt in load_prompts(write(tmp_path / "p.jsonl", *rows))] == ["tea", "3", *[None] * 3]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("bare", "bare"),
        ({"prompt": " kept as it is ", "response_0": "x", "is_response_0_safe": True}, " kept as it is "),
        ({"instruction": "translate", "input": "", "output": "o"}, "translate"),
        ({"instruction": "translate", "input": "hello", "output": "o"}, "translate hello"),
        ({"question": "why?", "text": None}, "why?"),
        ({"query": "q"}, "q"),
        ({"text": "t"}, "t"),
        ({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}, "u"),
        ({"prompt": [{"role": "user", "content": "u"}]}, "u"),
    ],
)
def test_known_fields(tmp_path, row, text):
    assert load_prompts(write(tmp_path / "p.jsonl", row))[0].text == text


def test_the_same_rows_in_every_kind_of_file(tmp_path):
    rows = [{"prompt": "one"}, {"prompt": "zwei ü"}]
    lines = "".join(json.dumps(row) + "\n\n" for row in rows)
    (tmp_path / "p.jsonl").write_text(lines)
    (tmp_path / "p.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "p.txt").write_text("one\n\nzwei ü\r\n", encoding="utf-8")
    with gzip.open(tmp_path / "p.jsonl.gz", "wt") as file:
        file.write(lines)
    for name in ("p.jsonl", "p.json", "p.txt", "p.jsonl.gz"):
        assert [prompt.text for prompt in load_prompts(str(tmp_path / name))] == ["one", "zwei ü"], name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", "", "empty"),
        ("p.jsonl", "\n\n", "empty"),
        ("p.json", "", "empty"),
        ("p.json", "[]", "empty"),
        ("p.txt", " \n", "empty"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "p.jsonl line 2: malformed JSON"),
        ("p.json", '[{"prompt": "a"},\n\n{"prompt": ]', "p.json line 3: malformed JSON"),
        ("p.json", '{"prompt": "a"}', "holds a JSON dict, expected a list"),
        (
            "p.jsonl",
            '{"promt": "a", "x": 1}',
            "line 1: no prompt field: found promt, x; expected one of prompt, instruction",
        ),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": 3}', "line 3: prompt is a int, expected a string"),
        ("p.jsonl", '{"prompt": " "}', "line 1: prompt is blank"),
        ("p.jsonl", "[1]", "line 1: a list, expected an object"),
        ("p.jsonl", '{"messages": "hi"}', "line 1: messages is not a list"),
        ("p.jsonl", json.dumps({"prompt": chat("u", "a")}), "prompt has the turns .* no user turn at the end"),
        ("p.tsv", "prompt\na", "unknown kind of file"),
        ("p.jsonl.gz", "not gzip", "cannot be read"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as caught:
        load_prompts(str(tmp_path / name))
    assert re.search(message, str(caught.value)) and name in str(caught.value)


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(InputError, match="cannot be read"):
        load_prompts(str(tmp_path / "p.txt"))


@pytest.mark.parametrize("source", ["nowhere.jsonl", "./nowhere", "/no/where", "a/b/c", "data/prompts.json"])
def test_what_looks_like_a_path_is_never_looked_up_elsewhere(source, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="no such file"):
        load_prompts(source)


def test_a_dataset_name(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or [{"prompt": "a"}]
    )
    assert load_prompts("owner/name", split="test") == [Prompt(0, "a")]
    assert asked == [(("owner/name",), {"split": "test"})]


def test_a_dataset_that_cannot_be_loaded(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(InputError, match="owner/name.*no network$"):
        load_prompts("owner/name")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "i", "input": "j", "output": "o"}, Demonstration("i j", "o")),
        ({"prompt": "p", "response": "r"}, Demonstration("p", "r")),
        ({"prompt": "p", "completion": "c"}, Demonstration("p", "c")),
        ({"question": "q", "answer": "a"}, Demonstration("q", "a")),
        (
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
            Demonstration("u", "a"),
        ),
        ({"messages": chat("u", "a", "v", "b")}, Demonstration(("u", "a", "v"), "b")),
        # As in ultrachat_200k, where the prompt is only the first turn.
        ({"prompt": "u", "messages": chat("u", "a", "v", "b")}, Demonstration(("u", "a", "v"), "b")),
        ({"messages": chat("u"), "response": "a"}, Demonstration("u", "a")),
        # As TRL's conversational sets.
        ({"prompt": chat("u"), "completion": chat("u", "a")[1:]}, Demonstration("u", "a", given=1)),
        (
            {"prompt": chat("u", "a", "v"), "completion": chat("", "b")[1:]},
            Demonstration(("u", "a", "v"), "b", given=3),
        ),
        ({"prompt": chat("u", "a", "v"), "response": "b"}, Demonstration(("u", "a", "v"), "b", given=3)),
        ({"prompt": "u", "response": chat("u", "a")[1:]}, Demonstration("u", "a")),
    ],
)
def test_demonstrations(tmp_path, row, expected):
    blank = {"prompt": "p", "response": " "}
    assert load_demonstrations(write(tmp_path / "d.jsonl", blank, row, row)) == [expected, expected]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p"}, "no response field: found prompt"),
        ("bare", "expected an object with a response field"),
        ({"prompt": "p", "output": 3}, "output is a int"),
        ({"messages": [{"role": "user", "content": "u"}]}, "no assistant turn"),
        ({"prompt": "p", "output": ""}, "no demonstrations"),
        ({"messages": chat("u", " ")}, "no demonstrations"),
        ({"messages": chat("u", "a", "v")}, r"\['user', 'assistant', 'user'\], no assistant turn at the end"),
        ({"messages": chat("", "u", "a")[1:]}, r"\['assistant', 'user'\].*in turn, the user first"),
        ({"messages": chat("u", " ", "v", "a")}, r"messages turn 2 \(assistant\) is blank"),
        ({"messages": chat(" ", "a")}, r"messages turn 1 \(user\) is blank"),
        ({"messages": chat("u", 3)}, r"messages turn 2 \(assistant\) is a int"),
        ({"messages": []}, r"messages has the turns \[\]"),
        ({"prompt": chat("u", "a"), "completion": "b"}, "prompt has the turns .* no user turn at the end"),
        ({"prompt": "p", "completion": chat("u", "a")}, "completion has the turns .*, expected one of the assistant"),
        ({"prompt": "p", "completion": ["a"]}, "completion is not a list of objects"),
    ],
)
def test_bad_demonstrations(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        load_demonstrations(write(tmp_path / "d.jsonl", row))


def test_the_embedded_world():
    train, test = load_prompts("world:train"), load_prompts("world:test")
    assert len(train) >= 200 and len(test) >= 64
    assert not {p.text for p in train} & {p.text for p in test}
    assert all(p.category for p in train + test)
    demonstrations = load_demonstrations("world:demonstrations", limit=5)
    assert len(demonstrations) == 5 and not {d.prompt for d in demonstrations} & {p.text for p in test}
    assert len(load_demonstrations("world:demonstrations")) == 4096
    held_out = load_demonstrations("world:demonstrations-test")
    assert len(held_out) == 256
    assert not {d.prompt for d in held_out} & {p.text for p in load_prompts("world:preferences")}
    with pytest.raises(InputError, match="world:training.*expected one of world:train"):
        load_prompts("world:training")
