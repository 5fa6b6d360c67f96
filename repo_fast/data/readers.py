"""Reads prompts and demonstrations from any of the sources in `repo_fast.data.sources`.

The fields of PKU-SafeRLHF (`prompt`), alpaca (`instruction`, `input`, `output`), chats (`messages`) and the usual names
of question-answering sets are understood. A row that cannot be represented is an error with its place, never
skipped: a prompt that is silently missing is a constraint that silently does not hold.
"""

import logging
from dataclasses import dataclass
from typing import Any

from repo_fast.data.dialogue import Dialogue
from repo_fast.data.sources import chat_messages, chat_turns, check_limit, read_rows, string, text
from repo_fast.errors import InputError

log = logging.getLogger(__name__)

PROMPT_FIELDS = ("prompt", "instruction", "messages", "question", "query", "text")
RESPONSE_FIELDS = ("response", "completion", "output", "answer", "messages")


@dataclass(frozen=True)
class Prompt:
    """A prompt as the user wrote it.

    Attributes:
        id: Its index after de-duplication: stable for a given source.
        text: Without template, never blank; of a dialogue, `Dialogue.text`.
        category: The source's `category`, where it has one.
        dialogue: Where it is more than one turn of the user's.
    """

    id: int
    text: str
    category: str | None = None
    dialogue: Dialogue | None = None

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
    """

    prompt: str | tuple[str, ...]
    response: str


def _category(value: Any) -> str | None:
    """A category as text; None for what is no name, such as a table of flags."""
    return str(value) if isinstance(value, str | int) else None


def load_prompts(source: str, *, split: str = "train", limit: int | None = None) -> list[Prompt]:
    """Reads the distinct prompts of a source, in its order. The number of duplicates is logged.

    Args:
        source: A file, a part of the embedded world or a `datasets` name: see `repo_fast.data.sources`.
        split: For a `datasets` name only.
        limit: Stop after this many distinct prompts.

    Returns:
        At least one prompt; `prompts[i].id == i`.

    Raises:
        InputError: The source is missing, empty or malformed, or a row has no usable prompt. A chat of several turns
            is none.
    """
    check_limit(limit)
    prompts: dict[str, Prompt] = {}
    n_rows = 0
    for place, row in read_rows(source, split):
        n_rows += 1
        prompt = _prompt_of(row, place)
        if prompt not in prompts:
            category = row.get("category") if isinstance(row, dict) else None
            prompts[prompt] = Prompt(len(prompts), prompt, _category(category))
            if len(prompts) == limit:
                break
    if not prompts:
        raise InputError(f"{source}: empty, expected at least one prompt")
    log.info("%s: %d prompts (%d duplicates dropped)", source, len(prompts), n_rows - len(prompts))
    return list(prompts.values())


def load_demonstrations(source: str, *, split: str = "train", limit: int | None = None) -> list[Demonstration]:
    """Reads prompts with the responses to imitate (SFT, the PTX loss), in the order of the source.

    A chat's last turn is the response, and the turns before it are its prompt. Rows whose response is blank (alpaca
    has a few) teach nothing: they are left out, and their number is logged.

    Args:
        source: A file, a part of the embedded world or a `datasets` name: see `repo_fast.data.sources`.
        split: For a `datasets` name only.
        limit: Stop after this many demonstrations.

    Returns:
        At least one demonstration.

    Raises:
        InputError: The source is missing, empty or malformed, or a row has no usable prompt or response.
    """
    check_limit(limit)
    demonstrations: list[Demonstration] = []
    n_blank = 0
    for place, row in read_rows(source, split, generate=limit):
        prompt, response = _demonstration_of(row, place)
        if not response.strip():
            n_blank += 1
            continue
        demonstrations.append(Demonstration(prompt, response))
        if len(demonstrations) == limit:
            break
    if not demonstrations:
        raise InputError(f"{source}: no demonstrations ({n_blank} rows, all with a blank response)")
    log.info("%s: %d demonstrations (%d with a blank response left out)", source, len(demonstrations), n_blank)
    return demonstrations


def _prompt_of(row: Any, place: str) -> str:
    if isinstance(row, str):
        return text(row, "prompt", place)
    field = _field(row, PROMPT_FIELDS, "prompt", place)
    if not _is_chat(row, field):
        return _plain_prompt(row, field, place)
    turns = chat_messages(row[field], field, place)
    roles = [role for role, _ in turns]
    if roles not in (["user"], ["user", "assistant"]):
        raise InputError(
            f"{place}: {field} has the turns {roles}, expected one user turn and at most one answer: "
            "earlier turns and system texts cannot be kept"
        )
    return text(turns[0][1], f"{field} (user)", place)


def _demonstration_of(row: Any, place: str) -> tuple[str | tuple[str, ...], str]:
    field = _field(row, RESPONSE_FIELDS, "response", place)
    if field == "messages":
        # The whole dialogue is in here. A `prompt` beside it, as in ultrachat_200k, is only its first turn.
        *context, response = chat_turns(row[field], field, place, last="assistant")
        return _compact(context), response
    response = row[field]
    if isinstance(response, list):
        messages = chat_messages(response, field, place)
        roles = [role for role, _ in messages]
        if roles != ["assistant"]:
            raise InputError(f"{place}: {field} has the turns {roles}, expected one of the assistant")
        response = messages[0][1]
    response = string(response, field, place)
    field = _field(row, PROMPT_FIELDS, "prompt", place)
    if _is_chat(row, field):
        return _compact(chat_turns(row[field], field, place, last="user")), response
    return _plain_prompt(row, field, place), response


def _compact(turns: list[str] | tuple[str, ...]) -> str | tuple[str, ...]:
    return turns[0] if len(turns) == 1 else tuple(turns)


def _is_chat(row: dict[str, Any], field: str) -> bool:
    return field == "messages" or (field == "prompt" and isinstance(row[field], list))


def _plain_prompt(row: dict[str, Any], field: str, place: str) -> str:
    prompt = text(row[field], field, place)
    if field == "instruction" and row.get("input"):
        # Safe RLHF joins alpaca's two fields with one space, and its models were trained on that.
        prompt = f"{prompt} {text(row['input'], 'input', place)}"
    return prompt


def _field(row: Any, known: tuple[str, ...], what: str, place: str) -> str:
    if not isinstance(row, dict):
        raise InputError(f"{place}: a {type(row).__name__}, expected an object with a {what} field")
    for field in known:
        # A table that joins several sets has all their columns in every row, and null in most.
        if row.get(field) is not None:
            return field
    found = ", ".join(row) or "none"
    raise InputError(f"{place}: no {what} field: found {found}; expected one of {', '.join(known)}")
