"""Reads prompts and demonstrations from any of the sources in `repo_fast.data.sources`.

The columns of PKU-SafeRLHF (`prompt`), alpaca (`instruction`, `input`, `output`, `history`, `system`), dolly
(`context`), chats in OpenAI's and ShareGPT's notation (`messages`, `conversations`) and the usual names of
question-answering sets are understood: see `repo_fast.data.columns`. A row that cannot be represented is an error with
its place, never skipped: a prompt that is silently missing is a constraint that silently does not hold.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from repo_fast.data.cells import is_blank, read_chat, read_messages, same, string, text
from repo_fast.data.columns import Columns, Conversation, Row, Table, read_conversation
from repo_fast.data.dialogue import Dialogue
from repo_fast.data.sources import check_limit
from repo_fast.errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A prompt as the user wrote it.

    Attributes:
        id: Its index after de-duplication: stable for a given source.
        text: Without template, never blank; of a dialogue, `Dialogue.text`.
        category: The source's `category`, where it has one.
        dialogue: Where it is more than one turn of the user's.
        fields: Of its row, those that were asked for and are not null, as they stand there.
        place: Where it was read, for errors.
    """

    id: int
    text: str
    category: str | None = None
    dialogue: Dialogue | None = None
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    place: str = field(default="", compare=False, repr=False)

    @property
    def asked(self) -> Dialogue:
        """What is to be answered, turn by turn."""
        return self.dialogue or Dialogue((self.text,))


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the response to imitate, both without template and never blank.

    Attributes:
        prompt: What the user wrote; for a dialogue of several turns all texts before the response, the user's first,
            in turn, so an odd number of them.
        response: The assistant's last turn.
        system: The text above the dialogue; None without.
        given: How many of the first turns are a chat that the row calls its prompt: answers among them are not to be
            imitated, those behind them are.
        place: Where it was read, for errors.
    """

    prompt: str | tuple[str, ...]
    response: str
    system: str | None = None
    given: int = 0
    place: str = field(default="", compare=False, repr=False)

    @property
    def asked(self) -> Dialogue:
        """What the response answers, turn by turn."""
        return Dialogue(Dialogue.of(self.prompt).turns, self.system)


def load_prompts(
    source: str,
    *,
    split: str = "train",
    limit: int | None = None,
    columns: Columns | None = None,
    keep: Collection[str] = (),
) -> list[Prompt]:
    """Reads the distinct prompts of a source, in its order. The number of duplicates is logged.

    Args:
        source: A file, a folder, a part of the embedded world or a `datasets` name: see `repo_fast.data.sources`.
        split: For a `datasets` name, and a folder with several.
        limit: Stop after this many distinct prompts.
        columns: What the user says of columns.
        keep: Columns that `Prompt.fields` has, where a row has them.

    Returns:
        At least one prompt; `prompts[i].id == i`. A chat's last answer is not part of its prompt.

    Raises:
        InputError: The source is missing, empty or malformed, a row has no usable prompt, or two rows have the same
            prompt and differ in a column to be kept.
    """
    check_limit(limit)
    prompts: dict[Dialogue, Prompt] = {}
    n_rows = 0
    table = Table(source, split, columns)
    for place, row in table:
        n_rows += 1
        asked = _asked(row, place)
        kept = _fields(row, keep)
        if asked not in prompts:
            dialogue = None if asked == Dialogue((asked.text,)) else asked
            prompts[asked] = Prompt(len(prompts), asked.text, _category(row, place), dialogue, kept, place)
            if len(prompts) == limit:
                break
        elif kept != prompts[asked].fields:
            _refuse_other(prompts[asked], kept, place)
    if not prompts:
        raise InputError(f"{source}: empty, expected at least one prompt")
    log.info("%s: %d prompts (%d duplicates dropped)", source, len(prompts), n_rows - len(prompts))
    table.say_unused()
    return list(prompts.values())


def load_demonstrations(
    source: str, *, split: str = "train", limit: int | None = None, columns: Columns | None = None
) -> list[Demonstration]:
    """Reads prompts with the responses to imitate (SFT, the PTX loss), in the order of the source.

    A chat's last turn is the response, and the turns before it are its prompt. Rows whose response is blank (alpaca
    has a few) teach nothing: they are left out, and their number is logged.

    Args:
        source: A file, a folder, a part of the embedded world or a `datasets` name: see `repo_fast.data.sources`.
        split: For a `datasets` name, and a folder with several.
        limit: Stop after this many demonstrations.
        columns: What the user says of columns.

    Returns:
        At least one demonstration.

    Raises:
        InputError: The source is missing, empty or malformed, or a row has no usable prompt or response.
    """
    check_limit(limit)
    demonstrations: list[Demonstration] = []
    n_blank = 0
    table = Table(source, split, columns, generate=limit)
    for place, row in table:
        if not isinstance(row, Row):
            raise InputError(f"{place}: a {type(row).__name__}, expected an object with a response field")
        demonstration = _demonstration_of(row)
        if is_blank(demonstration.response):
            n_blank += 1
            continue
        demonstrations.append(demonstration)
        if len(demonstrations) == limit:
            break
    if not demonstrations:
        rows = f"no demonstrations ({n_blank} rows, all with a blank response)" if n_blank else "empty"
        raise InputError(f"{source}: {rows}, expected at least one demonstration")
    log.info("%s: %d demonstrations (%d with a blank response left out)", source, len(demonstrations), n_blank)
    table.say_unused()
    return demonstrations


def _category(row: Any, place: str) -> str | None:
    """A category as text; None for what is no name, such as a table of flags."""
    value = row.cells.get("category") if isinstance(row, Row) else None
    if not isinstance(value, str | int):
        return None
    return string(str(row.get("category")), "category", place)


def _fields(row: Any, keep: Collection[str]) -> dict[str, Any]:
    """The columns to be kept that a row has."""
    cells = row.cells if isinstance(row, Row) else {}
    return {name: row.get(name) for name in keep if name in cells}


def _refuse_other(first: Prompt, fields: Mapping[str, Any], place: str) -> NoReturn:
    """Whichever of two rows were taken, what depends on the column would be wrong for the other."""
    name = next(name for name in {**first.fields, **fields} if first.fields.get(name) != fields.get(name))
    raise InputError(
        f"{place}: the prompt of {first.place} again, with {name} {fields.get(name)!r} instead of "
        f"{first.fields.get(name)!r}; expected the same, since a constraint applies to prompts by it"
    )


def _asked(row: Any, place: str) -> Dialogue:
    if isinstance(row, str):
        return Dialogue((text(row, "prompt", place),))
    if not isinstance(row, Row):
        raise InputError(f"{place}: a {type(row).__name__}, expected an object with a prompt field")
    said = read_conversation(row)
    return row.missing("prompt") if said is None else said.asked


def _demonstration_of(row: Row) -> Demonstration:
    columns = row.of("response")
    said = read_conversation(row)
    if said is None:
        row.missing("prompt" if columns else "response")
    answers = [(name, _answer(row, name)) for name in columns]
    turns = said.turns
    if len(turns) % 2 == 0:
        # Where the option says what the response is, a chat's last turn is not.
        if not columns or columns[0] not in row.columns.roles:
            answers.insert(0, (said.column, turns[-1]))
        turns = turns[:-1]
    if not answers:
        _refuse_unanswered(row, said)
    told = [(name, answer) for name, answer in answers if not is_blank(answer)]
    if any(not same(answer, told[0][1]) for _, answer in told):
        row.differ([name for name, _ in told], "response")
    response = (told or answers)[0][1]
    prompt = turns[0] if len(turns) == 1 else turns
    return Demonstration(prompt, response, said.asked.system, said.given, row.place)


def _answer(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, list | dict):
        return string(value, column, row.place)
    messages = read_messages(value, column, row.place, row.see)
    speakers = [message.speaker for message in messages]
    if speakers != ["assistant"]:
        raise InputError(f"{row.place}: {column} has the turns {speakers}, expected one of the assistant")
    return string(messages[0].text, column, row.place)


def _refuse_unanswered(row: Row, said: Conversation) -> None:
    value = row.cells[said.column]
    if isinstance(value, list | dict) and said.column != "prompt":
        read_chat(value, said.column, row.place, last="assistant")
    row.missing("response")
