"""What the columns of a row are: the prompt, what came before it, the system text, the response.

Public data names them in many ways, and often has one thing twice. Columns of one role have to agree: where two of them
might be the prompt and say different things, the user has to choose (`data.fields`), since either choice trains on
something, and only one of them on what was meant. A column that looks like part of the dialogue and has no place is an
error; any other that is not used is named once in the log.
"""

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from repo_fast.config.sections import COLUMN_ROLES
from repo_fast.data.cells import Chat, is_empty, read_chat, read_history, same, string, text
from repo_fast.data.dialogue import Dialogue
from repo_fast.data.sources import read_rows
from repo_fast.errors import InputError

log = logging.getLogger(__name__)

# What public data calls them, the more telling name first.
NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "instruction", "messages", "conversations", "conversation", "question", "query", "text"),
    "response": ("response", "completion", "output", "answer"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "history": ("history", "chat_history", "conversation_history"),
    "system": ("system", "system_prompt", "system_message"),
}
_CHATS = ("messages", "conversations", "conversation")
# What belongs to a task and is put behind it: alpaca's `input`, dolly's `context`.
_TASKS, _MATERIAL = ("instruction", "question", "query"), ("input", "context")
# What a dialogue may also be made of, and texts cannot hold.
_NO_PLACE = ("tools", "functions", "documents", "images", "image", "videos", "video", "audios", "audio", "parent_id")
_ANSWERS = (*NAMES["response"], "chosen", "response_0", "response_1")
# In front of an answer that a rendered prompt ends with: at the start of a line, behind a sign, or with a capital.
_WORDS = "output|response|answer|assistant|completion|gpt|/inst"
_MARK = (
    rf"(?:(?:^|[#<>\[|*]) *(?i:{_WORDS})|\b(?:{_WORDS.title()}|{_WORDS.upper()}))"
    r"[^\w.!?]*[:\]>\n*]\s*"
)


class Columns:
    """The roles that a section's option gives to columns, for all sources of that section.

    Args:
        roles: Of columns, by name, one of `COLUMN_ROLES` each. It holds in sources that have such a column.
        option: The option's name, for messages.

    Raises:
        InputError: A role is unknown.
    """

    def __init__(self, roles: Mapping[str, str] | None = None, option: str = "data.fields") -> None:
        self.roles, self.option = dict(roles or {}), option
        for column, role in self.roles.items():
            if role not in COLUMN_ROLES:
                raise InputError(f"{option}.{column} is {role!r}, expected one of {', '.join(COLUMN_ROLES)}")
        self._missing = set(self.roles)

    def found(self, names: Collection[str]) -> None:
        """Tell of the columns that a row has."""
        self._missing.difference_update(names)

    def check_found(self, sources: Sequence[str | None]) -> None:
        """Raise InputError where none of the sources, all of them read, had a column that has got a role."""
        for column in self.roles:
            if column in self._missing:
                where = ", ".join(source for source in sources if source is not None)
                raise InputError(
                    f"{self.option}.{column} is {self.roles[column]!r}, and no row of {where} has a column {column!r}"
                )

    def choice(self, column: str, role: str) -> str:
        """How to say that a column has a role."""
        return f"--{self.option}.{column} {role}"


class Row:
    """A row of a source by its columns; null ones, and those to be ignored, are not there.

    Attributes:
        cells: Values by column.
        place: Of the row, for errors.
        columns: What the user says of columns.
        seen: The columns of the source, and keys of its messages, whether used or not; shared by its rows.
        used: Those that something was read from; shared too.
    """

    def __init__(
        self, cells: Mapping[str, Any], place: str, columns: Columns, seen: dict[str, None], used: set[str]
    ) -> None:
        self.cells = {
            name: value for name, value in cells.items() if value is not None and columns.roles.get(name) != "ignore"
        }
        self.place, self.columns, self.seen, self.used = place, columns, seen, used
        seen.update(dict.fromkeys(self.cells))

    def of(self, role: str) -> list[str]:
        """The columns that may have a role: those that were given it, else those of its known names; empty ones only
        where there is no other."""
        roles = self.columns.roles
        given = [name for name in self.cells if roles.get(name) == role] if roles else []
        found = given or [name for name in NAMES[role] if name in self.cells and name not in roles]
        return [name for name in found if not is_empty(self.cells[name])] or found[:1] if len(found) > 1 else found

    def get(self, column: str) -> Any:
        """A column's value, None without it; it counts as used."""
        self.used.add(column)
        return self.cells.get(column)

    def see(self, key: str) -> None:
        """Note a key of a message that nothing is read from."""
        self.seen[key] = None

    def names(self) -> str:
        """The names of the columns, for errors."""
        return ", ".join(self.cells)

    def differ(self, names: Sequence[str], role: str) -> NoReturn:
        """Raise the InputError of columns that contradict each other."""
        listed = self.of(role)
        given = [name for name in names if self.columns.roles.get(name) == role]
        # A chat may have the response too: as the prompt, a text beside it would be left without.
        is_beside_chat = role == "prompt" and any(isinstance(self.cells[name], list | dict) for name in names)
        if len(given) > 1 or is_beside_chat:
            choices = [self.columns.choice(name, "ignore") for name in given if not is_beside_chat]
            choices += [self.columns.choice(name, "ignore") for name in names if is_beside_chat]
        else:
            choices = [self.columns.choice(name, role) for name in names if name in listed]
            # A chat has more than its last turn: it is not to be chosen as a whole.
            choices += [self.columns.choice(listed[0], "ignore")] * (len(choices) == 1)
        raise InputError(
            f"{self.place}: {' and '.join(names)} say different things, and either may be the {role}: choose with "
            + " or ".join(choices)
        )

    def system(self) -> str | None:
        """The text of the system columns; None where there is none, or a blank one."""
        names = self.of("system")
        texts = [string(self.get(name), name, self.place) for name in names]
        if any(not same(said, texts[0]) for said in texts):
            self.differ(names, "system")
        return texts[0] if texts and not is_empty(texts[0]) else None

    def history(self) -> tuple[Chat, str]:
        """The turns before the prompt, and the name of their column."""
        names = self.of("history")
        chats = [read_history(self.get(name), name, self.place, self.see) for name in names]
        if any(chat != chats[0] for chat in chats):
            self.differ(names, "history")
        return (chats[0], names[0]) if chats else (Chat(()), "history")

    def missing(self, role: str) -> NoReturn:
        """Raise the InputError of a row without a column for a role."""
        given = [name for name, named in self.columns.roles.items() if named == role]
        expected = ", ".join([*given, *NAMES[role]])
        raise InputError(
            f"{self.place}: no {role} field: found {self.names() or 'none'}; expected one of {expected}, or "
            f"{self.columns.choice('COLUMN', role)}"
        )


class Table:
    """The rows of a source.

    Args:
        source, split, generate, labels: See `read_rows`.
        columns: What the user says of columns.
    """

    def __init__(
        self,
        source: str,
        split: str,
        columns: Columns | None,
        *,
        generate: int | None = None,
        labels: Collection[str] = (),
    ) -> None:
        self.source, self.columns = source, columns or Columns()
        self._rows = read_rows(source, split, generate=generate, labels=labels)
        self._seen: dict[str, None] = {}
        self._used: set[str] = set()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Each row with its place: a `Row`, or what else it is."""
        for place, cells in self._rows:
            if not isinstance(cells, Mapping):
                yield place, cells
                continue
            self.columns.found(cells.keys())
            yield place, Row(cells, place, self.columns, self._seen, self._used)

    def say_unused(self) -> None:
        """Log the columns that nothing was read from."""
        unused = [name for name in self._seen if name not in self._used]
        if unused:
            names = ", ".join(unused).encode("utf-8", "backslashreplace").decode()
            log.info("%s: columns not used: %s", self.source, names)


@dataclass(frozen=True)
class Conversation:
    """What a row says up to the response.

    Attributes:
        asked: What is to be answered.
        turns: The whole dialogue, the user's first: where it goes on behind `asked`, the same turns and more.
        given: How many of the turns belong to what the row calls its prompt: answers among them are no responses.
        column: Where the turns come from.
    """

    asked: Dialogue
    turns: tuple[str, ...]
    given: int
    column: str


@dataclass(frozen=True)
class _Candidate:
    column: str
    chat: Chat
    # The texts as they stand in the row's columns.
    parts: tuple[str, ...]
    is_chat: bool


def read_conversation(row: Row) -> Conversation | None:
    """The prompt of a row, with system text and history; None where no column may be the prompt.

    Raises:
        InputError: Columns contradict each other, or say what cannot be represented.
    """
    _check_no_place(row)
    candidates = [_candidate(row, column) for column in row.of("prompt")]
    before, before_column = row.history()
    if not candidates:
        if before.turns:
            raise InputError(f"{row.place}: {before_column} without a prompt, expected what follows it")
        return None
    whole, asked = _agreed(row, candidates)
    if not whole.is_chat:
        _check_unanswered(row, whole)
    system = one_system(row, [(before_column, before.system), *((one.column, one.chat.system) for one in candidates)])
    turns = whole.chat.turns
    if not starts_with(turns, before.turns):
        turns, asked = before.turns + turns, asked + len(before.turns)
    is_prompt = whole.column == "prompt" or row.columns.roles.get(whole.column) == "prompt"
    given = len(turns) if whole.is_chat and is_prompt and len(turns) % 2 else 0
    return Conversation(Dialogue(turns[:asked], system), turns, given, whole.column)


def starts_with(turns: Sequence[str], first: Sequence[str]) -> bool:
    """Whether a dialogue begins with these turns, but for white space."""
    return len(first) <= len(turns) and all(map(same, first, turns))


def one_system(row: Row, others: Sequence[tuple[str, str | None]]) -> str | None:
    """The system text of a row: that of its system columns, or of the chats in these other columns.

    Raises:
        InputError: They differ, and the option does not say that the column's is the one.
    """
    names = row.of("system")
    own = [(name, said) for name, said in zip(names, [row.system()], strict=False) if said is not None]
    if own and names[0] in row.columns.roles:
        return own[0][1]
    texts = own + [(name, said) for name, said in others if said is not None]
    for name, said in texts:
        if not same(said, texts[0][1]):
            how = [f"choose with {row.columns.choice(name, 'system')}" for name, _ in own]
            raise InputError(
                f"{row.place}: the system texts of {texts[0][0]} and {name} differ, expected one"
                + "".join(f": {choice} or {row.columns.choice(names[0], 'ignore')}" for choice in how)
            )
    return texts[0][1] if texts else None


def _check_no_place(row: Row) -> None:
    for name in _NO_PLACE:
        if name in row.cells and name not in row.columns.roles and not is_empty(row.cells[name]):
            raise InputError(
                f"{row.place}: {name} is part of the dialogue and cannot be kept; {row.columns.choice(name, 'ignore')} "
                "leaves it out"
            )
    role = row.cells.get("role")
    if isinstance(role, str) and "role" not in row.columns.roles:
        row.used.add("role")
        if role.lower() not in ("user", "human", "prompter"):
            raise InputError(
                f"{row.place}: role is {role[:40]!r}, expected rows of the user's: no dialogue is put together from "
                f"rows; {row.columns.choice('role', 'ignore')} takes the row for a prompt"
            )


def _candidate(row: Row, column: str) -> _Candidate:
    value, place, named = row.get(column), row.place, column in row.columns.roles
    if isinstance(value, list | dict) or column in _CHATS:
        _material(row, column)
        last = "user" if column == "prompt" and not named else None
        chat = read_chat(value, column, place, last=last, unused=row.see)
        return _Candidate(column, chat, chat.turns, True)
    # Safe RLHF joins alpaca's two fields with one space, and its models were trained on that.
    parts = (text(value, column, place), *(text(row.get(name), name, place) for name in _material(row, column)))
    return _Candidate(column, Chat((" ".join(parts),)), parts, False)


def _material(row: Row, column: str) -> list[str]:
    """The columns that are put behind this one."""
    names = [
        name
        for name in _MATERIAL
        if name in row.cells and name not in row.columns.roles and not is_empty(row.cells[name])
    ]
    if column in _TASKS:
        return names
    if names and not any(name in row.cells for name in _TASKS):
        raise InputError(
            f"{row.place}: {names[0]} beside {column}: it looks like part of the prompt, and where it belongs is not "
            f"known; {row.columns.choice(names[0], 'ignore')} leaves it out"
        )
    return []


def _agreed(row: Row, candidates: list[_Candidate]) -> tuple[_Candidate, int]:
    """The candidate with most turns, and how many of them are the prompt.

    A text may be the first or the last thing that the user says in a chat beside it.
    """
    # Alpaca's `text` is the whole example as one text.
    rendered = [one for one in candidates if one.column == "text" and not one.is_chat] if len(candidates) > 1 else []
    others = [one for one in candidates if one not in rendered]
    whole = max(others, key=lambda one: len(one.chat.turns))
    turns = whole.chat.turns
    last = (len(turns) - 1) // 2 * 2
    asked = last + 1
    for one in others:
        length = len(one.chat.turns)
        if starts_with(turns, one.chat.turns):
            asked = min(asked, length - (length + 1) % 2)
        elif length > 1 or not same(one.chat.turns[0], turns[last]):
            row.differ([whole.column, one.column], "prompt")
    for one in rendered:
        words = " ".join(one.parts[0].split())
        if not all(" ".join(part.split()) in words for part in whole.parts):
            row.differ([whole.column, one.column], "prompt")
    return whole, asked


def _check_unanswered(row: Row, prompt: _Candidate) -> None:
    """A rendered example, as some sets have beside its parts, has the answer in it."""
    if prompt.column in row.columns.roles:
        return
    end = prompt.parts[-1].rstrip()
    for name in _ANSWERS:
        answer = row.cells.get(name)
        if not isinstance(answer, str) or is_empty(answer) or answer.strip() not in end:
            continue
        if re.search(_MARK + re.escape(answer.strip()) + r"(?:\s*<[^<>]*>)*\Z", end, re.MULTILINE):
            raise InputError(
                f"{row.place}: {prompt.column} ends with {name}, the answer to it: choose another column for the "
                f"prompt ({row.columns.choice('COLUMN', 'prompt')}), or keep it with "
                f"{row.columns.choice(prompt.column, 'prompt')}"
            )
