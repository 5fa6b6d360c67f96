"""Random and mutated input to the readers of data and to the configuration: nothing but `InputError` may come out.

Each trial is a process of its own with a share of the time, so that what crashes or hangs ends that trial alone. It
draws other examples each time; what fails is shown as the smallest example that still does.
"""

import contextlib
import copy
import io
import json
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from repo_fast.config import EvaluateConfig, HeadConfig, ScoreConfig, SftConfig, TrainConfig, known_keys, parse
from repo_fast.config.sections import COLUMN_ROLES
from repo_fast.data import (
    Columns,
    PromptTemplate,
    load_demonstrations,
    load_preferences,
    load_prompts,
    load_tokenizer,
)
from repo_fast.data.columns import NAMES
from repo_fast.errors import InputError, one_line
from repo_fast.evaluate import spelled_out
from tests.campaign.book import Trial
from tests.campaign.entry_points import end_of
from tests.campaign.wrong_data import FORMS, written
from tests.harms import ROWS
from tests.job_runs import DEMONSTRATIONS
from tests.supervised_runs import PAIRS
from tests.tiny import CHAT_TEMPLATE, word_tokenizer

SECONDS = 600.0
# None takes a second.
_LIMIT_OF_ONE = 60

# What an example came to: whether it was taken.
Attempt = Callable[[Any], bool]


def trials(seconds: float = SECONDS) -> Iterator[Trial]:
    """With so many seconds for all of them together."""
    for name, (_, share) in _TRIALS.items():
        yield Trial(name, lambda folder, name=name, share=share: _tried(name, seconds * share, folder))


def _tried(name: str, seconds: float, folder: Path) -> str:
    place = folder / "fuzzing"
    place.mkdir()
    ended = end_of(("tests.campaign.fuzzing", name, str(seconds)), place, limit=seconds + 600)
    said = f"exit status {ended.status}: {ended.out[-200:]} {ended.err[-1700:]}"
    assert not ended.late, f"hung: {said}"
    assert ended.status == 0, said
    assert "Traceback" not in ended.err + ended.out, said
    found = re.search(r"^(\d+) examples, (\d+) accepted, (\d+) refused$", ended.out, re.MULTILINE)
    assert found and int(found[2]) and int(found[3]), f"expected some of both: {said}"
    return found[0]


def main() -> int:
    """In a process of its own: draw examples for a trial until its time is used up, and count what they came to."""
    name, seconds = sys.argv[1], float(sys.argv[2])
    strategy, attempt = _TRIALS[name][0]()
    counts: Counter[bool] = Counter()
    ends, failed = time.monotonic() + seconds, False

    @settings(
        max_examples=500,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(strategy)
    def draw(example: Any) -> None:
        nonlocal failed
        if time.monotonic() > ends and not failed:
            return
        try:
            counts[_outcome(attempt, example)] += 1
        except BaseException:
            # From here on it looks for a smaller one.
            failed = True
            raise

    signal.signal(signal.SIGALRM, _hung)
    while time.monotonic() < ends:
        draw()
    print(f"{counts.total()} examples, {counts[True]} accepted, {counts[False]} refused")
    return 0


def _hung(number: int, frame: Any) -> None:
    raise AssertionError(f"an example took {_LIMIT_OF_ONE} s")


def _outcome(attempt: Attempt, example: Any) -> bool:
    said = io.StringIO()
    signal.alarm(_LIMIT_OF_ONE)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return attempt(example)
    except InputError as error:
        line = one_line(error)
        assert line.strip() and len(line.splitlines()) == 1, f"not one line: {line!r:.500}"
        # As standard error writes it.
        line.encode("utf-8", "backslashreplace")
        return False
    finally:
        signal.alarm(0)
        assert "Traceback" not in said.getvalue(), said.getvalue()[-2000:]


# --------------------------------------------------------------------------------------------------------- values

_TEXTS = st.one_of(
    st.sampled_from(["tea", "yes", "", " ", "null", "true", "1", "-1", "1e999", "nan", "​", "\ufeff", "a\nb", "\x00"]),
    st.sampled_from(["\n\nHuman: tea\n\nAssistant: yes", "\n\nHuman: tea", "\n\nAssistant:", "{}", "[", "{{", "a: b"]),
    st.text(max_size=12),
    st.text(st.characters(categories=["Cs", "Cc", "Cf", "Zl", "Mn", "Lu"]), max_size=6),
)
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.integers(),
    st.floats(),
    st.sampled_from([10**400, -(2**63), 2**64, 1e308]),
    _TEXTS,
)
_MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "User", "human", "gpt", "tool", "", None, 3]),
        "content": st.one_of(_TEXTS, st.just([{"type": "text", "text": "tea"}]), _SCALARS),
    },
    optional={"weight": st.sampled_from([0, 1, None]), "tool_calls": st.sampled_from([[], None, [{}]]), "name": _TEXTS},
)
_CHATS = st.one_of(
    st.lists(_MESSAGE, max_size=4),
    st.lists(st.sampled_from(["tea", "yes", "no"]), max_size=5).map(
        lambda said: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    ),
    st.lists(st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system"]), "value": _TEXTS}), max_size=3),
    st.lists(st.tuples(_TEXTS, _TEXTS).map(list), max_size=3),
)
_JSON = st.recursive(
    st.one_of(_SCALARS, _CHATS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXTS, inner, max_size=3),
    max_leaves=6,
)
_COLUMNS = sorted(
    {name for names in NAMES.values() for name in names} | {name for row in (*ROWS, *PAIRS) for name in row}
)
_COLUMNS += ["input", "context", "role", "category", "tools", "images", "is_safe", "is_chosen_safe", "harm_category"]
_RIGHT: list[dict[str, Any]] = [
    *({"prompt": prompt, "response": response} for prompt, response in DEMONSTRATIONS[:2]),
    *PAIRS[:3],
    *ROWS[:2],
    {"prompt": "tea", "chosen": "yes", "rejected": "no", "category": "tea"},
    {"chosen": "\n\nHuman: tea\n\nAssistant: yes", "rejected": "\n\nHuman: tea\n\nAssistant: no"},
    {"instruction": "make", "input": "tea", "output": "yes", "history": [["how", "so"]], "system": "be kind"},
    {"messages": [{"role": "user", "content": "tea"}, {"role": "assistant", "content": "yes"}], "source": "here"},
    {"conversations": [{"from": "human", "value": "tea"}, {"from": "gpt", "value": "yes"}]},
    {"prompt": "tea", "response": "yes", "is_safe": True, "harm_category": {}, "severity_level": 0},
    {"question": "tea", "context": "bread", "answer": "yes"},
]
_EDIT = st.tuples(st.sampled_from(["set", "set", "remove", "rename"]), st.sampled_from(_COLUMNS) | _TEXTS, _JSON)


@st.composite
def _rows(draw: st.DrawFn) -> list[Any]:
    """Rows that are right, and of most examples one that was edited."""
    first = draw(st.sampled_from(_RIGHT))
    rows: list[Any] = [copy.deepcopy(first) for _ in range(draw(st.integers(1, 3)))]
    for action, name, value in draw(st.lists(_EDIT, max_size=3)):
        row = rows[-1]
        # Of the row's own columns as often as of others.
        name = draw(st.sampled_from([*row, name])) if draw(st.booleans()) else name
        if action == "set":
            row[name] = value
        elif row:
            kept = row.pop(name if name in row else next(iter(row)))
            if action == "rename":
                row[name] = kept
    if draw(st.integers(0, 9)) == 0:
        rows.append(draw(_JSON))
    return rows


_CUT = st.tuples(
    st.sampled_from(["flip", "cut", "remove", "insert", "repeat", "end"]),
    st.floats(0, 1),
    st.integers(1, 40),
    st.one_of(
        st.binary(max_size=8), st.sampled_from([b"\xef\xbb\xbf", b"\x00", b'"', b"\n", b",", b"\r", b"{", b"\xff"])
    ),
)


@st.composite
def _mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes that were damaged in a few places."""
    for action, share, length, new in draw(st.lists(_CUT, max_size=4)):
        at = int(share * len(content))
        if action == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ (1 << length % 8)]) + content[at + 1 :]
        elif action == "cut":
            content = content[:at]
        elif action == "remove":
            content = content[:at] + content[at + length :]
        elif action == "insert":
            content = content[:at] + new + content[at:]
        elif action == "repeat":
            content = content[:at] + content[at : at + length] * 3 + content[at + length :]
        else:
            content += new
    return content


# -------------------------------------------------------------------------------------------------------- readers

_HEADS = {"weapons": HeadConfig(categories=("Violence",), severity=2), "harm": HeadConfig()}
_READERS: dict[str, Callable[[str, Columns | None], object]] = {
    "prompts": lambda source, columns: load_prompts(source, columns=columns, keep=("category",)),
    "demonstrations": lambda source, columns: load_demonstrations(source, columns=columns),
    "pairs of a reward model": lambda source, columns: load_preferences(source, "reward", columns=columns),
    "pairs of a cost model": lambda source, columns: load_preferences(
        source, "cost", unusable="drop", columns=columns, limit=2
    ),
    "pairs of heads": lambda source, columns: load_preferences(source, "cost", columns=columns, heads=_HEADS),
}
_ROLES = st.one_of(
    st.none(),
    st.dictionaries(st.sampled_from(_COLUMNS), st.sampled_from(COLUMN_ROLES), max_size=2),
    st.dictionaries(_TEXTS, st.sampled_from(COLUMN_ROLES) | _TEXTS, max_size=2),
)


def _read(reader: str, form: str, content: bytes, roles: Mapping[str, str] | None) -> bool:
    path = Path(f"rows{form}")
    path.write_bytes(content)
    columns = None if roles is None else Columns(roles)
    _READERS[reader](str(path), columns)
    if columns is not None:
        columns.check_found([str(path)])
    return True


def _of_rows() -> tuple[st.SearchStrategy, Attempt]:
    def attempt(example: tuple[str, str, list[Any], Mapping[str, str] | None]) -> bool:
        reader, form, rows, roles = example
        tables = [row if isinstance(row, dict) else {"prompt": row} for row in rows]
        try:
            content = written(form, tables if form in (".csv", ".csv.gz", ".parquet", ".txt") else rows)
        except (pyarrow.ArrowException, OverflowError, UnicodeError, KeyError, TypeError, ValueError):
            # Rows that this form has no place for.
            content = written(".jsonl", rows)
            form = ".jsonl"
        return _read(reader, form, content, roles)

    return st.tuples(st.sampled_from(list(_READERS)), st.sampled_from(FORMS), _rows(), _ROLES), attempt


def _of_bytes(forms: Sequence[str]) -> Callable[[], tuple[st.SearchStrategy, Attempt]]:
    def made() -> tuple[st.SearchStrategy, Attempt]:
        @st.composite
        def files(draw: st.DrawFn) -> tuple[str, str, bytes]:
            reader, form = draw(st.sampled_from(list(_READERS))), draw(st.sampled_from(forms))
            if draw(st.integers(0, 19)) == 0:
                return reader, form, draw(st.binary(max_size=200))
            # A line of text is a prompt, and a table of no columns is none.
            fitting = {".txt": lambda row: "prompt" in row, ".parquet": lambda row: {} not in row.values()}
            first = draw(st.sampled_from([*filter(fitting.get(form), _RIGHT)]))
            return reader, form, draw(_mutated(written(form, [first] * draw(st.integers(1, 3)))))

        return files(), lambda example: _read(*example, None)

    return made


# ------------------------------------------------------------------------------------------------------ tokenizers


def _of_tokenizers() -> tuple[st.SearchStrategy, Attempt]:
    """A tokenizer's folder: values changed in its JSON files, bytes of them damaged, and chat templates."""
    folder = Path("tokenizer")
    word_tokenizer().save_pretrained(folder)
    names = sorted(path.name for path in folder.iterdir())
    right = {name: (folder / name).read_bytes() for name in names}
    pieces = [*re.findall(r"\{%.*?%\}|\{\{.*?\}\}|[^{}]+", CHAT_TEMPLATE), "{{ strftime_now('%d') }}", "{% if x %}"]
    pieces += [
        "{{ raise_exception('no') }}",
        "{{ messages }}",
        "{% endif %}",
        "{{ 1 / 0 }}",
        "{{ messages[9].content }}",
    ]
    templates = st.one_of(
        st.lists(st.sampled_from(pieces), max_size=6).map("".join).map(str.encode), _mutated(CHAT_TEMPLATE.encode())
    )

    @st.composite
    def files(draw: st.DrawFn) -> dict[str, bytes]:
        name = draw(st.sampled_from(names))
        if name.endswith(".jinja"):
            return {name: draw(templates)}
        if draw(st.booleans()):
            return {name: draw(_mutated(right[name]))}
        content = json.loads(right[name])
        for _ in range(draw(st.integers(1, 2))):
            place = content
            while True:
                key = draw(st.sampled_from(list(place)))
                if not isinstance(place[key], dict) or not place[key] or draw(st.integers(0, 2)) == 0:
                    break
                place = place[key]
            place[key] = draw(_JSON)
        return {name: json.dumps(content).encode()}

    def attempt(example: dict[str, bytes]) -> bool:
        for name, content in {**right, **example}.items():
            (folder / name).write_bytes(content)
        tokenizer = load_tokenizer(str(folder))
        template = PromptTemplate(tokenizer, "auto", "2026-11-29")
        template.encode_prompt("how do i make tea")
        template.check_finished()
        template.encode_response("yes you can")
        return True

    return files(), attempt


# -------------------------------------------------------------------------------------------------- configurations

_JOBS = {"train": TrainConfig, "sft": SftConfig, "score": ScoreConfig, "evaluate": EvaluateConfig}
_BASE = {"evaluate": ["--policy", "before=policy", "--reward.path", "m:reward", "--cost.path", "m:cost"]}
_SAID = [
    "1",
    "0",
    "0.5",
    "-1",
    "true",
    "null",
    "auto",
    "[]",
    "{}",
    "[0.9, 0.95]",
    "repo",
    "grpo",
    "m:f",
    ".inf",
    "1e-4",
]
_SAID += ["{a: 1}", "[1", "'", '"', "!!set {a}", "&a [*a]", "2026-11-29", "~", "world:train", "cost", "[kl]", "-", "--"]


def _parsed(words: list[str], job: str) -> bool:
    try:
        parse(spelled_out(words) if job == "evaluate" else words, _JOBS[job])
    except SystemExit as error:
        asked = any(word in ("--help", "-h", "--print_config") for word in words)
        assert asked and not error.code, f"exit status {error.code}"
    return True


def _of_words() -> tuple[st.SearchStrategy, Attempt]:
    @st.composite
    def lines(draw: st.DrawFn) -> tuple[str, list[str]]:
        job = draw(st.sampled_from(list(_JOBS)))
        words = list(_BASE.get(job, []))
        known = st.sampled_from(known_keys(_JOBS[job]))
        tables = st.sampled_from(["constraints.a.path", "constraints.a.pid.kp", "data.fields.a", "heads.a.severity"])
        names = st.one_of(known, known, known, tables, known.map(lambda name: name[:-1]), _TEXTS)
        values = st.one_of(st.sampled_from(_SAID), _TEXTS, _SCALARS.map(str))
        short = [
            "--policy",
            "--claim",
            "--suite",
            "--certify",
            "--accept-asymptotic",
            "--config",
            "--print_config",
            "-h",
        ]
        for _ in range(draw(st.integers(0, 3))):
            name, value = draw(names), draw(values)
            kind = draw(st.integers(0, 11))
            if kind < 6:
                words += [f"--{name}", value]
            elif kind < 9:
                words.append(f"--{name}={value}")
            else:
                words += [draw(st.sampled_from(short) | _TEXTS), *([value] if kind > 9 else [])]
        # No word of a command line has a zero byte, or half of a pair.
        return job, [word.replace("\x00", "").encode("utf-8", "ignore").decode() for word in words]

    return lines(), lambda example: _parsed(example[1], example[0])


def _of_yaml() -> tuple[st.SearchStrategy, Attempt]:
    tokens = [
        "- ",
        ": ",
        "\n",
        "  ",
        "&a ",
        "*a",
        "? ",
        "{",
        "}",
        "[",
        "]",
        ", ",
        "|\n",
        ">\n",
        "!!set ",
        "<<: ",
        "---\n",
    ]
    tokens += [
        "#",
        "'",
        '"',
        "\t",
        "engine",
        "seed",
        "constraints",
        "a",
        "1",
        "null",
        "dtype",
        "!!binary ",
        "~",
        "=",
        "%",
    ]

    @st.composite
    def texts(draw: st.DrawFn) -> tuple[str, bytes]:
        job = draw(st.sampled_from(list(_JOBS)))
        kind = draw(st.integers(0, 9))
        if kind == 0:
            return job, "".join(draw(st.lists(st.sampled_from(tokens) | _TEXTS, max_size=15))).encode(
                "utf-8", "replace"
            )
        content: dict[Any, Any] = {}
        for _ in range(draw(st.integers(0, 3))):
            place: dict[Any, Any] = content
            *sections, option = draw(st.sampled_from(known_keys(_JOBS[job]))).split(".")
            for section in sections:
                if not isinstance(place.setdefault(section, {}), dict):
                    place[section] = {}
                place = place[section]
            said = st.sampled_from(_SAID).map(_loaded)
            place[option] = draw(st.one_of(said, said, _JSON))
        if draw(st.integers(0, 5)) == 0:
            content[draw(_SCALARS)] = draw(_JSON)
        text = yaml.safe_dump(content, allow_unicode=True).encode("utf-8", "replace")
        return job, draw(_mutated(text)) if kind < 4 else text

    def attempt(example: tuple[str, bytes]) -> bool:
        job, text = example
        Path("wrong.yaml").write_bytes(text)
        return _parsed([*_BASE.get(job, []), "--config", "wrong.yaml"], job)

    return texts(), attempt


def _loaded(text: str) -> Any:
    with contextlib.suppress(yaml.YAMLError):
        return yaml.safe_load(text)
    return text


# By name, each with its share of the time: to parse a configuration takes longest.
_TRIALS: dict[str, tuple[Callable[[], tuple[st.SearchStrategy, Attempt]], float]] = {
    "rows of edited columns, in every form": (_of_rows, 0.15),
    "damaged bytes of .jsonl, .json, .csv and .txt": (_of_bytes([".jsonl", ".json", ".csv", ".txt"]), 0.1),
    "damaged bytes of .parquet and .gz": (_of_bytes([".parquet", ".jsonl.gz", ".csv.gz"]), 0.1),
    "tokenizers and chat templates": (_of_tokenizers, 0.15),
    "words of command lines": (_of_words, 0.25),
    "YAML texts": (_of_yaml, 0.25),
}
