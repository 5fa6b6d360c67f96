"""Data files that are not right, in every form and for every reader; and rows that cannot be used."""

import csv
import gzip
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from tests.campaign.given import EVALUATE, SCORE, SFT, TRAIN, Bad
from tests.harms import ROWS
from tests.job_runs import DEMONSTRATIONS, PROMPTS
from tests.supervised_runs import PAIRS

# Each reader, by what it reads: its command without the option, the option, and rows that are right.
_SHOWN = [{"prompt": prompt, "response": response} for prompt, response in DEMONSTRATIONS]
_ASKED = [{"prompt": text} for text in PROMPTS]
_READERS: dict[str, tuple[tuple[str, ...], str, list[dict[str, Any]]]] = {
    "prompts": (TRAIN, "--data.prompts", _ASKED),
    "demonstrations": (SFT, "--data.train", _SHOWN),
    "preferences": (SCORE, "--data.train", PAIRS),
    "held-out prompts": (TRAIN, "--data.eval_prompts", _ASKED),
    "evaluated prompts": (EVALUATE, "--prompts", _ASKED),
    "ptx": (TRAIN, "--data.ptx", _SHOWN),
    "held-out pairs": (SCORE, "--data.eval", PAIRS),
}
FORMS = (".jsonl", ".json", ".csv", ".txt", ".parquet", ".jsonl.gz", ".csv.gz")


def written(form: str, rows: Sequence[dict[str, Any]]) -> bytes:
    """A file of rows in a form."""
    if form == ".parquet":
        file = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
        return file.getvalue()
    if form.startswith(".csv"):
        table = io.StringIO()
        writer = csv.DictWriter(table, list(dict.fromkeys(name for row in rows for name in row)), quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
        text = table.getvalue()
    elif form == ".json":
        text = json.dumps(rows)
    elif form == ".txt":
        text = "".join(f"{row['prompt']}\n" for row in rows)
    else:
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
    return gzip.compress(text.encode(), mtime=0) if form.endswith(".gz") else text.encode()


def _truncated(content: bytes) -> bytes:
    # In the middle of a row: where a line ends nothing could be seen.
    return content[: len(content) * 2 // 3].rstrip(b'}\n"')[:-1]


def _recoded(content: bytes) -> bytes:
    return content.decode().replace("tea", "café").encode("utf-16")


def _with_latin_1(content: bytes) -> bytes:
    return content.decode().replace("tea", "café").encode("latin-1")


# What is wrong, for which forms, with what is then said behind the file's name.
_DAMAGES: tuple[tuple[str, Callable[[bytes], bytes], Sequence[str], str], ...] = (
    ("is empty", lambda content: b"", FORMS, ".*(empty|no demonstrations|cannot be read)"),
    ("is cut off", _truncated, [form for form in FORMS if form != ".txt"], ".*(malformed|cannot be read)"),
    ("is in UTF-16", _recoded, (".jsonl", ".json", ".csv", ".txt"), ".*expected UTF-8"),
    ("is in Latin-1", _with_latin_1, (".jsonl", ".json", ".csv", ".txt"), ".*expected UTF-8"),
    ("is a picture", lambda content: b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(64), FORMS, ".*cannot be read"),
)


def bad() -> Iterator[Bad]:
    yield from _damaged_files()
    yield from _files_that_cannot_be()
    yield from _rows()


def _damaged_files() -> Iterator[Bad]:
    readers = itertools.cycle(_READERS)
    for what, damage, forms, says in _DAMAGES:
        for form in forms:
            reader = next(name for name in readers if form != ".txt" or "prompts" in name)
            words, option, rows = _READERS[reader]
            content, path = damage(written(form, rows)), f"bad{form}"
            yield Bad(f"{reader}: a {form} that {what}", (*words, option, path), path + says, _write(path, content))
    rows = [{"text_of_it": "tea"}, {"text_of_it": "bread"}]
    for form, reader in zip((".jsonl", ".json", ".csv", ".parquet", ".csv.gz"), _READERS, strict=False):
        words, option, _ = _READERS[reader]
        says = rf"bad{form} (line|item|row) \d.*found text_of_it"
        name = f"{reader}: a {form} of other columns"
        yield Bad(name, (*words, option, f"bad{form}"), says, _write(f"bad{form}", written(form, rows)))


def _write(path: str, content: bytes) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    return change


def _files_that_cannot_be() -> Iterator[Bad]:
    for reader, (words, option, _) in _READERS.items():
        yield Bad(f"{reader}: no such file", (*words, option, "nowhere.jsonl"), r"nowhere\.jsonl: no such file")
    right = written(".jsonl", _ASKED)
    cases: list[tuple[str, str, Callable[[Path], object], str]] = [
        ("an empty folder", "rows", lambda f: (f / "rows").mkdir(), "rows: a folder without data"),
        ("a folder called as a file", "a.jsonl", lambda f: (f / "a.jsonl").mkdir(), r"a\.jsonl: a folder without data"),
        ("of an unknown kind", "prompts.xlsx", _write("prompts.xlsx", b"PK"), r"prompts\.xlsx: .*(kind|no such file)"),
        ("a folder with another file", "rows", _write("rows/a.docx", b"PK"), r"rows/a\.docx: unknown kind"),
        ("a pipe", "pipe.jsonl", lambda f: os.mkfifo(f / "pipe.jsonl"), r"pipe\.jsonl: no such file"),
        ("a device", "/dev/null", lambda f: None, "/dev/null: "),
        ("a link to nothing", "l.jsonl", lambda f: (f / "l.jsonl").symlink_to("gone.jsonl"), r"l\.jsonl: no such file"),
        ("a link to itself", "l.jsonl", lambda f: (f / "l.jsonl").symlink_to("l.jsonl"), r"l\.jsonl: no such file"),
        ("a name that is too long", "./" + "x" * 300 + ".jsonl", lambda f: None, "xxx: no such file"),
        ("the home of nobody", "~no-such-user/p.jsonl", lambda f: None, r"~no-such-user/p\.jsonl: no such file"),
        ("a name of the world that is none", "world:tests", lambda f: None, "world:tests: no such part"),
        ("a name of no dataset", "nobody-at-all/nothing", lambda f: None, "nobody-at-all/nothing: neither a local"),
        ("gzip that is none", "bad.jsonl.gz", _write("bad.jsonl.gz", right), r"bad\.jsonl\.gz: cannot be read"),
        ("plain that is gzip", "b.jsonl", _write("b.jsonl", written(".jsonl.gz", _ASKED)), r"b\.jsonl line 1: .*UTF-8"),
        ("parquet that is JSON", "bad.parquet", _write("bad.parquet", right), r"bad\.parquet: cannot be read"),
        ("zeros", "zeros.jsonl", _write("zeros.jsonl", bytes(4096)), r"zeros\.jsonl line 1: malformed JSON"),
        ("blank lines", "blank.txt", _write("blank.txt", b"\n \n\n"), r"blank\.txt: empty"),
        ("a Git LFS pointer", "lfs.parquet", _write("lfs.parquet", _POINTER), r"lfs\.parquet: cannot be read"),
        (
            "an HTML page",
            "page.jsonl",
            _write("page.jsonl", b"<!DOCTYPE html>\n<p>404</p>\n"),
            r"page\.jsonl line 1: mal",
        ),
        (
            "a line of 20 MB",
            "huge.jsonl",
            _write("huge.jsonl", b'{"prompt": "' + b"tea " * 5_000_000),
            r"huge\.jsonl line 1",
        ),
        (
            "100,000 brackets",
            "deep.jsonl",
            _write("deep.jsonl", b"[" * 100_000),
            r"deep\.jsonl line 1: .*nested too deep",
        ),
        ("a CSV of a header alone", "h.csv", _write("h.csv", b"prompt\n"), r"h\.csv: empty"),
        ("a CSV with semicolons", "s.csv", _write("s.csv", b"id;prompt\n1;tea\n"), r"s\.csv line 2: no prompt field"),
        ("a CSV with a cell too many", "c.csv", _write("c.csv", b"prompt\ntea,bread\n"), r"c\.csv line 2: 2 cells"),
        (
            "a CSV with a column twice",
            "t.csv",
            _write("t.csv", b"prompt,prompt\na,b\n"),
            r"t\.csv: .*column twice: prompt",
        ),
        (
            "a CSV with a quotation mark",
            "q.csv",
            _write("q.csv", b'prompt\n"tea\nbread\n'),
            r"q\.csv line \d: malformed",
        ),
        (
            "JSON that is an object",
            "o.json",
            _write("o.json", b'{"data": [{"prompt": "tea"}]}'),
            r"o\.json: holds a JSON dict",
        ),
        ("JSON lines called JSON", "l.json", _write("l.json", right), r"l\.json line 2: malformed JSON"),
        ("JSON called JSON lines", "j.jsonl", _write("j.jsonl", b"[\n" + right), r"j\.jsonl line 1"),
    ]
    for what, path, change, says in cases:
        yield Bad(f"prompts: {what}: {path[:40]}", (*TRAIN, "--data.prompts", path), says, change)

    def close(folder: Path) -> None:
        (folder / "prompts.jsonl").chmod(0o000)

    yield Bad("prompts: no right to read them", TRAIN, r"prompts\.jsonl: .*[Pp]ermission", close, as_nobody=True)

    def close_folder(folder: Path) -> None:
        _write("rows/prompts.jsonl", right)(folder)
        (folder / "rows").chmod(0o000)

    words = (*TRAIN, "--data.prompts", "rows")
    yield Bad("prompts: no right to list the folder", words, r"rows: .*[Pp]ermission", close_folder, as_nobody=True)
    split = _write("rows/train.jsonl", right), _write("rows/dev.jsonl", right)
    words = (*TRAIN, "--data.prompts", "rows", "--data.prompts_split", "test")
    name = "prompts: a folder of other splits"
    yield Bad(name, words, r"rows: no file of the split 'test', found dev, train", lambda f: [s(f) for s in split])
    words = (*TRAIN, "--data.fields.question", "prompt")
    yield Bad("prompts: a column that is not there", words, r"data\.fields\.question is 'prompt', and no row of")
    words = (*TRAIN, "--data.fields.prompt", "query")
    yield Bad("prompts: a role that there is not", words, r"data\.fields\.prompt is 'query', expected one of prompt")


_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


def _rows() -> Iterator[Bad]:
    """One row after one that is right."""
    say = {"role": "user", "content": "tea"}
    answer = {"role": "assistant", "content": "yes"}
    prompts: list[tuple[Any, str]] = [
        ({"prompt": None}, "no prompt field"),
        ({"prompt": 7}, "prompt is a int, expected a string"),
        ({"prompt": float("nan")}, "prompt is a float, expected a string"),
        ({"prompt": ""}, "prompt is blank"),
        ({"prompt": "​"}, "prompt is blank"),
        ({"prompt": "\ud800"}, "half a surrogate pair"),
        ({"prompt": True}, "prompt is a bool"),
        ({"prompt": ["tea"]}, "prompt is not a list of objects with role and content"),
        ({"prompt": {"text": "tea"}}, "prompt is not a list of objects"),
        ([["tea"]], "a list, expected an object"),
        (7, "a int, expected an object"),
        (None, "a NoneType, expected an object"),
        ({}, "no prompt field: found none"),
        ({"prompt": "tea", "question": "bread"}, "say different things"),
        ({"messages": []}, "messages"),
        ({"messages": [say, say]}, r"messages has the turns \['user', 'user'\]"),
        ({"messages": [answer]}, r"messages has the turns \['assistant'\]"),
        ({"messages": [{"role": "system", "content": "tea"}]}, r"messages has the turns \['system'\]"),
        ({"messages": [{"role": "narrator", "content": "tea"}]}, "the role 'narrator', expected one of user"),
        ({"messages": [{"role": "user"}]}, "messages is not a list of objects with role and content"),
        ({"messages": [{"role": "user", "content": None}]}, "is a NoneType, expected a string"),
        ({"messages": [{"role": None, "content": "tea"}]}, "the role None"),
        ({"messages": [say, {**answer, "tool_calls": [{"id": 1}]}, say]}, "has tool_calls, expected text alone"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of the type 'image_url'"),
        ({"messages": "tea"}, "messages is not a list of objects"),
        ({"conversations": [{"from": "human", "value": 3}]}, "is a int, expected a string"),
        ({"prompt": "tea", "history": "bread"}, "history is a str, expected a list"),
        ({"prompt": "tea", "history": [["bread"]]}, "history entry 1 is .*expected a pair"),
        ({"prompt": "tea", "images": ["a.png"]}, "images is part of the dialogue and cannot be kept"),
        ({"prompt": "tea", "system": 3}, "system is a int, expected a string"),
        ({"history": [["tea", "yes"]]}, "history without a prompt"),
    ]
    for reader, option, cases in (
        (TRAIN, "--data.prompts", prompts),
        (SFT, "--data.train", _demonstrations()),
        (SCORE, "--data.train", _preferences()),
    ):
        job = reader[0].removeprefix("repo_fast.")
        first = next(rows for words, known, rows in _READERS.values() if (words, known) == (reader, option))[0]
        for row, says in cases:
            content = "".join(json.dumps(each) + "\n" for each in (first, row)).encode()
            shown = json.dumps(row)
            shown = shown if len(shown) < 90 else f"{shown[:60]}…{shown[-28:]}"
            says = r"bad\.jsonl line 2: .*" + says
            yield Bad(f"{job} row: {shown}", (*reader, option, "bad.jsonl"), says, _write("bad.jsonl", content))
    yield from _of_heads()
    for kind, row, says in (
        ("reward", {"prompt": "tea", "response": "yes", "is_safe": True}, "only a cost model can learn from"),
        ("reward", {"prompt": "tea", "response_0": "a", "response_1": "b"}, "no better_response_id"),
    ):
        change = _write("bad.jsonl", json.dumps(row).encode())
        words = (*SCORE, "--kind", kind, "--data.train", "bad.jsonl")
        yield Bad(f"score --kind {kind} row: {json.dumps(row)}", words, rf"bad\.jsonl line 1: .*{says}", change)


def _demonstrations() -> list[tuple[Any, str]]:
    return [
        ({"prompt": "tea"}, "no response field"),
        ({"response": "tea"}, "no prompt field"),
        ("tea", "a str, expected an object with a response"),
        ({"prompt": "tea", "response": 3}, "response is a int, expected a string"),
        ({"prompt": "tea", "response": "\udfff"}, "half a surrogate pair"),
        ({"prompt": "tea", "response": "yes", "output": "no"}, "say different things"),
        ({"messages": [{"role": "user", "content": "tea"}]}, "no assistant turn at the end"),
        ({"prompt": "tea", "response": [{"role": "user", "content": "yes"}]}, "expected one of the assistant"),
        ({"prompt": "tea", "response": "yes", "tools": [{"name": "kettle"}]}, "tools is part of the dialogue"),
    ]


def _preferences() -> list[tuple[Any, str]]:
    pair = {"prompt": "tea", "response_0": "yes", "response_1": "no", "safer_response_id": 0}
    return [
        ({"prompt": "tea"}, "no preference: found prompt"),
        ({**pair, "safer_response_id": 2}, "safer_response_id is 2, expected the integer 0 or 1"),
        ({**pair, "safer_response_id": True}, "safer_response_id is True"),
        ({**pair, "safer_response_id": "0"}, "safer_response_id is '0'"),
        ({**pair, "safer_response_id": None}, "no safer_response_id"),
        ({**pair, "response_1": "yes"}, "set data.unusable to drop"),
        ({**pair, "response_1": ""}, "set data.unusable to drop"),
        ({**pair, "response_1": None}, "no response_1"),
        ({**pair, "is_response_0_safe": "yes"}, "is_response_0_safe is 'yes', expected true or false"),
        ({**pair, "is_response_0_safe": float("nan")}, "is_response_0_safe is nan"),
        ({"prompt": "tea", "chosen": "yes"}, "no rejected"),
        ({"chosen": "yes", "rejected": "no"}, "chosen"),
        ({"prompt": "tea", "response": "yes"}, "no is_safe"),
        ({"prompt": "tea", "response": "yes", "is_safe": 0.5}, "is_safe is 0.5"),
        ({"chosen": "\n\nHuman: tea", "rejected": "\n\nHuman: tea\n\nAssistant: no"}, "chosen"),
        ({"prompt": "tea", "chosen": {"role": "user"}, "rejected": "no"}, "chosen is not a list"),
    ]


def _of_heads() -> Iterator[Bad]:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"response_0_severity_level": 4}, "response_0_severity_level is 4, expected a whole number from 0 to 3"),
        ({"response_0_severity_level": None}, "no response_0_severity_level"),
        ({"response_1_harm_category": "Violence"}, "response_1_harm_category is 'Violence', expected a mapping"),
        ({"response_1_harm_category": {}}, "response_1_harm_category"),
    ]
    for cells, says in cases:
        rows = [*ROWS, {**ROWS[0], **cells}]
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        words = (*SCORE, "--heads.weapons.categories", '["Violence"]', "--data.train", "bad.jsonl")
        says = rf"bad\.jsonl line {len(rows)}: .*{says}"
        yield Bad(f"score with heads: {json.dumps(cells)}", words, says, _write("bad.jsonl", content))
