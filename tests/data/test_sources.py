"""Every kind of file and folder, and whatever a row can hold: read right, or one line that names the place."""

import gzip
import json
import subprocess
import sys

import numpy
import pyarrow
import pytest
from pyarrow import parquet

from repo_fast.data import Candidate, Demonstration, load_demonstrations, load_preferences, load_prompts
from repo_fast.errors import InputError

ROWS = [
    {"prompt": 'ü, "quoted"\nand on', "response": "None", "category": "NA"},
    {"prompt": "007", "response": "1e5", "category": None},
    {"prompt": "u\u2028v", "response": "True"},
]
SHOWN = [Demonstration(row["prompt"], row["response"]) for row in ROWS]
CSV = 'prompt,response,category\r\n"ü, ""quoted""\nand on",None,NA\r\n007,1e5,\r\n\r\n,,\r\nu\u2028v,True,\r\n'
MARK = "\ufeff"


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path, content):
    """A text, bytes, or rows for a parquet file; compressed where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(content), path, row_group_size=2)
        return str(path)
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return str(path)


CONTENTS = {"rows.jsonl": lines(ROWS), "rows.json": json.dumps(ROWS), "rows.csv": CSV, "rows.parquet": ROWS}


@pytest.mark.parametrize("mark", ["", MARK], ids=["plain", "with a byte-order mark"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "Rows.JSONL"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_the_same_rows_in_every_kind_of_file(tmp_path, name, suffix, mark):
    source = write(tmp_path / (name + suffix), mark + CONTENTS[name.lower()])
    assert load_demonstrations(source) == SHOWN
    assert [prompt.category for prompt in load_prompts(source)] == ["NA", None, None]


def test_the_same_rows_in_parquet(tmp_path):
    source = write(tmp_path / "a [b]*" / "rows.parquet", ROWS)
    assert load_demonstrations(source) == SHOWN
    assert [prompt.text for prompt in load_prompts(source, limit=2)] == [row["prompt"] for row in ROWS[:2]]


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_lines_of_text(tmp_path, suffix):
    """A byte-order mark is no text, at the start or where files were put together; other separators end no line."""
    content = f"{MARK}one\r\n\r\nzwei\u2028ü\x85 \n{MARK}three\n\u200b\n  \nfour\ufeff"
    if suffix == ".txt":
        with pytest.raises(InputError, match="rows.txt line 5: prompt is blank"):
            load_prompts(write(tmp_path / f"rows{suffix}", content))
    source = write(tmp_path / f"rows{suffix}", content.replace("\u200b\n", ""))
    assert [prompt.text for prompt in load_prompts(source)] == ["one", "zwei\u2028ü\x85 ", "three", "four\ufeff"]


def test_lines_of_json_that_were_put_together(tmp_path):
    source = write(tmp_path / "rows.jsonl", MARK + lines(ROWS[:1]) + MARK + lines(ROWS[1:]))
    assert load_demonstrations(source) == SHOWN


def test_nested_columns_of_parquet(tmp_path):
    chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": [{"role": "system", "content": "s"}, *chat]}, {"messages": chat}]
    source = write(tmp_path / "rows.parquet", rows)
    assert load_demonstrations(source) == [Demonstration("u", "a", "s"), Demonstration("u", "a")]
    source = write(tmp_path / "pairs.parquet", [{"history": [["t", "b"]], "prompt": "u", "response": "a"}])
    assert load_demonstrations(source) == [Demonstration(("t", "b", "u"), "a")]


def test_a_folder_is_its_files_in_the_order_of_their_names(tmp_path):
    folder = tmp_path / "data"
    write(folder / "b.parquet", ROWS[1:2])
    write(folder / "a.jsonl.gz", lines(ROWS[:1]))
    write(folder / "c.csv", "response,prompt\nTrue,u\u2028v\n")
    for other in ("README.md", ".cache", "_SUCCESS", "LICENSE"):
        write(folder / other, "no data")
    assert load_demonstrations(str(folder)) == SHOWN
    assert load_demonstrations(f"{folder}/", limit=2) == SHOWN[:2]
    with pytest.raises(InputError, match="c.csv line 3: response is blank|c.csv line 3: 1 cells, expected the 2"):
        write(folder / "c.csv", "response,prompt\nTrue,u\nalone\n")
        load_demonstrations(str(folder))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "data: a folder without data, expected files of the kinds .jsonl"),
        (["README.md"], "data: a folder without data"),
        (["a.jsonl", "b.tsv"], "b.tsv: unknown kind of file, expected .jsonl, .json, .txt, .csv"),
        (["a.arrow"], "a.arrow: unknown kind of file"),
        (["a.parquet.gz"], "a.parquet.gz: unknown kind of file"),
    ],
)
def test_folders_that_cannot_be_read(tmp_path, names, message):
    (tmp_path / "data").mkdir()
    for name in names:
        (tmp_path / "data" / name).write_text(lines(ROWS))
    with pytest.raises(InputError, match=message):
        load_prompts(str(tmp_path / "data"))


def test_a_folder_of_several_splits_is_read_by_its_split(tmp_path, monkeypatch):
    """Else the held-out rows would be trained on."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for folder, names in (("flat", ("train-0.csv", "test-0.csv")), ("deep", ("data/train.jsonl", "data/test.jsonl"))):
        for name, prompt in zip(names, ("None", "held out"), strict=True):
            write(tmp_path / folder / name, f"prompt\n{prompt}\n" if folder == "flat" else lines([{"prompt": prompt}]))
        for split, expected in (("train", "None"), ("test", "held out")):
            assert [prompt.text for prompt in load_prompts(str(tmp_path / folder), split=split)] == [expected]
    for name in ("train-1.csv", "training.csv"):
        write(tmp_path / "flat" / name, f"prompt\n{name}\n")
    assert [p.text for p in load_prompts(str(tmp_path / "flat"))] == ["None", "train-1.csv", "training.csv"]
    with pytest.raises(InputError, match="flat: no file of the split 'validation', found test, train$"):
        load_prompts(str(tmp_path / "flat"), split="validation")
    write(tmp_path / "flat" / "more.csv", "prompt\nmore\n")
    with pytest.raises(InputError, match="more.csv: of no split, in a folder with files of several"):
        load_prompts(str(tmp_path / "flat"))
    # One split by itself is what was named.
    for path in (tmp_path / "flat").glob("*r*.csv"):
        path.unlink()
    assert [prompt.text for prompt in load_prompts(str(tmp_path / "flat"))] == ["held out"]


PKU = {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": 0}


def test_preferences_of_csv_have_numbers_and_truth_values(tmp_path):
    header = "prompt,response_0,response_1,better_response_id,safer_response_id,is_response_0_safe,is_response_1_safe\n"
    source = write(tmp_path / "rows.csv", header + "p,0,True,1,0,True,false\nq,x,y,0,1,,1\n")
    (one, two), _ = load_preferences(source, "reward")
    assert [c.response for c in one.candidates + two.candidates] == ["True", "0", "x", "y"]
    (one, two), _ = load_preferences(source, "cost")
    assert one.candidates == (Candidate(("p",), "True", unsafe=True), Candidate(("p",), "0", unsafe=False))
    assert [c.unsafe for c in two.candidates] == [None, False]
    for cell in ("true", "2", "one", "0.0"):
        source = write(tmp_path / "bad.csv", header + f"p,a,b,{cell},0,,\n")
        with pytest.raises(InputError, match="bad.csv line 2: better_response_id is .*, expected the integer 0 or 1"):
            load_preferences(source, "reward")


def test_whole_numbers_of_any_type_are_ids(tmp_path, monkeypatch):
    table = pyarrow.table({name: [value] for name, value in PKU.items()})
    for kind in (pyarrow.int8(), pyarrow.uint64()):
        place = table.schema.get_field_index("better_response_id")
        column = pyarrow.array([1], kind)
        parquet.write_table(table.set_column(place, "better_response_id", column), tmp_path / "rows.parquet")
        (pair,), _ = load_preferences(str(tmp_path / "rows.parquet"), "reward")
        assert pair.candidates[0].response == "b"
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [PKU | {"better_response_id": numpy.int64(1)}])
    (pair,), _ = load_preferences("owner/name", "reward")
    assert pair.candidates[0].response == "b"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ('"better_response_id": NaN', "better_response_id is nan, expected the integer 0 or 1"),
        ('"better_response_id": Infinity', "better_response_id is inf"),
        ('"better_response_id": 1e999', "better_response_id is inf"),
        (f'"better_response_id": 1{"0" * 30}', "better_response_id is 10{30}, expected"),
        (f'"better_response_id": 1{"0" * 5000}', "malformed JSON: Exceeds the limit"),
        ('"better_response_id": [1]', r"better_response_id is \[1\]"),
        ('"response_0": ["a"]', "response_0 is not a list of objects"),
        ('"response_0": NaN', "response_0 is a float, expected a string"),
        ('"response_0": {"a": 1}', "response_0 is not a list of objects"),
        ('"prompt": [["p"]]', "prompt is not a list of objects"),
        (f'"prompt": {"[" * 100_000}{"]" * 100_000}', "malformed JSON: nested too deeply"),
        ('"prompt": "p", "prompt": "q"', "malformed JSON: the key 'prompt' is there twice"),
        (r'"prompt": "\ud83d"', r"prompt has half a surrogate pair, '\\ud83d' at character 0, expected text"),
        (r'"response_1": "ab\udc00c"', r"response_1 has half a surrogate pair, '\\udc00' at character 2"),
        ('"prompt": "\\u200b\\ufeff \\u0000"', "prompt is blank"),
        ('"response_0": "\\u200b"', "response_0 is blank"),
        ('"prompt": null', "no prompt"),
        ('"prompt": true', "prompt is a bool"),
    ],
)
def test_what_a_row_of_json_can_hold(tmp_path, changes, message):
    """The row's own values come first, and the change may name one again where it is meant to."""
    name = changes.partition(":")[0].strip('"')
    rest = json.dumps({key: value for key, value in PKU.items() if key != name})[1:]
    for wrong in (f"{{{changes}, {rest}", f"  {{{rest[:-1]}, {changes}}}\r"):
        source = write(tmp_path / "rows.jsonl", f"{json.dumps(PKU)}\n\n{wrong}\n")
        with pytest.raises(InputError, match=f"rows.jsonl line 3: {message}") as caught:
            load_preferences(source, "reward")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [load_prompts, load_demonstrations])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (r'{"prompt": "\ud83d", "response": "a"}', "prompt has half a surrogate pair"),
        (r'{"instruction": "a", "input": "\ud83d", "response": "a"}', "input has half a surrogate pair"),
        (r'{"messages": [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "a"}]}', "turn 1"),
        (r'{"system": "\ud83d", "prompt": "u", "response": "a"}', "system has half"),
        (r'{"history": [["u", "\ud83d"]], "prompt": "u", "response": "a"}', "history entry 1 .assistant. has half"),
        ("null", "a NoneType, expected an object"),
        ("3", "a int, expected an object"),
        ("[]", "a list, expected an object"),
    ],
)
def test_rows_that_hold_no_text(tmp_path, load, row, message):
    for name, content, place in (
        ("rows.jsonl", f"{json.dumps(ROWS[0])}\n{row}\n", "line 2"),
        ("rows.json", f"[{json.dumps(ROWS[0])},\n{row}]", "item 1"),
    ):
        with pytest.raises(InputError, match=f"{name} {place}: .*{message}"):
            load(write(tmp_path / name, content))


def test_half_a_surrogate_pair_in_what_is_only_passed_on(tmp_path):
    source = write(tmp_path / "rows.jsonl", r'{"prompt": "u", "category": "\ud83d"}')
    with pytest.raises(InputError, match="line 1: category has half a surrogate pair"):
        load_prompts(source)


def test_text_with_odd_characters_is_kept(tmp_path):
    texts = [
        "a\0b",
        "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
        "\r\n x",
        "\u3000x",
        "x" * 200_000,
    ]
    assert [p.text for p in load_prompts(write(tmp_path / "rows.jsonl", lines({"prompt": t} for t in texts)))] == texts
    assert [p.text for p in load_prompts(write(tmp_path / "rows.parquet", [{"prompt": t} for t in texts]))] == texts
    content = "prompt\n" + "".join(f'"{text}"\n' for text in texts)
    assert [p.text for p in load_prompts(write(tmp_path / "rows.csv", content))] == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n', "line 2: cannot be read, expected UTF-8"),
        ("rows.txt.gz", b"caf\xe9\n", "line 1: cannot be read, expected UTF-8"),
        ("rows.txt", "utf-16".encode("utf-16"), "line 1: cannot be read, expected UTF-8"),
        ("rows.csv", b"prompt\na\nb\ncaf\xe9\n", "line 4: cannot be read, expected UTF-8"),
        ("rows.csv", "", "empty"),
        ("rows.csv", "prompt,response\n", "empty"),
        ("rows.csv", "prompt,response\na,b\nc\n", "line 3: 1 cells, expected the 2 of the header"),
        ("rows.csv", "prompt\n\n\na,b\n", "line 4: 2 cells, expected the 1 of the header"),
        ("rows.csv", 'prompt\n"a\nb\n', "line 3: malformed CSV: unexpected end of data"),
        ("rows.csv", 'prompt\n"a\nb"\n"c"d\n', "line 4: malformed CSV"),
        ("rows.csv", "prompt,prompt\na,b\n", "the header has a column twice: prompt, prompt"),
        ("rows.csv", 'prompt\n"a\nb"\n" "\n', "line 4: prompt is blank"),
        ("rows.csv", "ask;answer\na;b\n", "line 2: no prompt field: found ask;answer"),
        ("rows.parquet", [{"prompt": "a"}, {"prompt": None}], "row 1: no prompt field: found none"),
        ("rows.parquet", [{"prompt": b"a"}], "row 0: prompt is a bytes, expected a string"),
        ("rows.parquet", [{"prompt": 1.5}], "row 0: prompt is a float, expected a string"),
        (
            "rows.tsv",
            "prompt\na\n",
            "unknown kind of file, expected .jsonl, .json, .txt, .csv .also as .gz. or .parquet",
        ),
        ("rows.jsonl.zip", "x", "unknown kind of file"),
        ("rows", "x", "unknown kind of file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    source = write(tmp_path / name, content)
    with pytest.raises(InputError, match=f"{name}:? {message}|{name}: {message}") as caught:
        load_prompts(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"PAR1 not so PAR1"])
def test_what_is_no_parquet(tmp_path, content):
    (tmp_path / "rows.parquet").write_bytes(content)
    with pytest.raises(InputError, match="rows.parquet: cannot be read: "):
        load_prompts(str(tmp_path / "rows.parquet"))


def test_a_parquet_file_without_rows(tmp_path):
    parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), tmp_path / "rows.parquet")
    with pytest.raises(InputError, match="rows.parquet: empty"):
        load_prompts(str(tmp_path / "rows.parquet"))


@pytest.mark.parametrize("name", ["no/where/rows.parquet", "rows.csv.gz", "rows.PARQUET", "~nobody-here/rows.csv"])
def test_a_file_that_is_not_there_is_looked_up_nowhere(name, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match=f"{name}: no such file"):
        load_prompts(name)


def test_libraries_for_tables_are_imported_only_for_tables(tmp_path):
    source = write(tmp_path / "rows.jsonl", lines(ROWS))
    code = (
        "import sys; from repo_fast.data.columns import Table\n"
        f"rows = list(Table({source!r}, 'train', None)); assert len(rows) == 3\n"
        "assert not {'datasets', 'pyarrow', 'pandas'} & sys.modules.keys(), 'imported'\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_what_was_compressed_and_is_neither_whole_nor_utf_8(tmp_path):
    path = tmp_path / "prompts.jsonl.gz"
    content = bytearray(gzip.compress(b'{"prompt": "t\xe9a"}\n'))
    # Of the sum at its end.
    content[-6] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"prompts\.jsonl\.gz.*: cannot be read"):
        load_prompts(str(path))
