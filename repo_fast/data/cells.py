"""What one cell of a row holds: a text, a chat in the notations of public data, or the turns before a prompt.

Whatever cannot be kept as text is an error with the row's place: pictures, calls of tools, hidden reasoning.
"""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from repo_fast.errors import InputError

# Of OpenAI's notation (role, content) and of ShareGPT's (from, value).
_SPEAKERS = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}
_ROLE_AND_CONTENT = (("role", "content"), ("from", "value"))
# Keys of a message that are part of what was said, beside its text.
_NOT_TEXT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "images", "audio", "videos")
_UNSEEN = ("Cc", "Cf", "Zs", "Zl", "Zp")


@dataclass(frozen=True)
class Message:
    """A message of a chat.

    Attributes:
        speaker: `user`, `assistant` or `system`.
        text: What was said, any content.
        name: Of the message, for errors.
    """

    speaker: str
    text: Any
    name: str


@dataclass(frozen=True)
class Chat:
    """The texts of user and assistant in turn, the user first; a last answer may be blank, no other text is.

    Attributes:
        turns: At least one.
        system: The text above them; None without.
    """

    turns: tuple[str, ...]
    system: str | None = None


def is_blank(value: str) -> bool:
    """Whether nothing of a text can be seen: white space, and marks without width such as U+200B and U+FEFF."""
    return not value.strip() or all(unicodedata.category(character) in _UNSEEN for character in value)


def is_empty(value: Any) -> bool:
    """Whether a cell says nothing: null, a blank text, an empty list."""
    return value is None or value in ([], {}, ()) or (isinstance(value, str) and is_blank(value))


def same(one: str, other: str) -> bool:
    """Whether two texts are equal but for white space."""
    return one == other or one.split() == other.split()


def string(value: Any, field: str, place: str) -> str:
    """A cell's text, which may be blank.

    Raises:
        InputError: It is not a string, or none that can be written as UTF-8.
    """
    if not isinstance(value, str):
        raise InputError(f"{place}: {field} is a {type(value).__name__}, expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place}: {field} has half a surrogate pair, {value[error.start]!r} at character {error.start}, expected "
            "text that can be written as UTF-8"
        ) from error
    return value


def text(value: Any, field: str, place: str) -> str:
    """A cell's text.

    Raises:
        InputError: It is not a string, or blank.
    """
    if is_blank(string(value, field, place)):
        raise InputError(f"{place}: {field} is blank")
    return value


def read_messages(
    messages: Any, field: str, place: str, unused: Callable[[str], None] = lambda key: None
) -> list[Message]:
    """The messages of a chat, as they come.

    Args:
        messages: A list of objects with `role` and `content` or with `from` and `value`, or one such object. A content
            in parts that are all text is their texts one after the other.
        field: Its name, for errors.
        place: Of the row, for errors.
        unused: Called with the name of each key that is not used.

    Raises:
        InputError: It is no such list, or a message has another role, or is not text alone.
    """
    found = []
    listed = [messages] if isinstance(messages, dict) else messages
    if not isinstance(listed, list) or not all(isinstance(message, dict) for message in listed):
        raise InputError(f"{place}: {field} is not a list of objects with role and content")
    for number, message in enumerate(listed, start=1):
        keys = next((keys for keys in _ROLE_AND_CONTENT if message.keys() >= set(keys)), None)
        if keys is None:
            raise InputError(f"{place}: {field} is not a list of objects with role and content")
        role, content = (message[key] for key in keys)
        speaker = _SPEAKERS.get(role.lower()) if isinstance(role, str) else None
        if speaker is None:
            raise InputError(
                f"{place}: {field} turn {number} has the role {role!r}, expected one of {', '.join(_SPEAKERS)}"
            )
        name = f"{field} turn {number} ({role})"
        for key in message:
            if key == "weight" and message[key] == 0:
                raise InputError(f"{place}: {name} has weight 0, expected none: which turns are learned is not kept")
            if key not in keys and not is_empty(message[key]):
                if key in _NOT_TEXT:
                    raise InputError(f"{place}: {name} has {key}, expected text alone: it cannot be kept")
                unused(f"{field}.{key}")
        found.append(Message(speaker, _joined(content, name, place), name))
    return found


def _joined(content: Any, name: str, place: str) -> Any:
    if not isinstance(content, list):
        return content
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise InputError(f"{place}: {name} has a part of the type {kind!r}, expected text alone")
        parts.append(string(part.get("text"), f"{name} part", place))
    return "".join(parts)


def read_chat(
    messages: Any,
    field: str,
    place: str,
    *,
    last: str | None = None,
    unused: Callable[[str], None] = lambda key: None,
) -> Chat:
    """A chat of user and assistant in turn, below a system text or none.

    Args:
        messages: See `read_messages`.
        field: Its name, for errors.
        place: Of the row, for errors.
        last: Whose the last turn has to be: `user` or `assistant`; None: either's.
        unused: See `read_messages`.

    Raises:
        InputError: It is no such chat.
    """
    said = read_messages(messages, field, place, unused)
    speakers = [message.speaker for message in said]
    system = None
    if speakers[:1] == ["system"]:
        system = string(said[0].text, said[0].name, place)
        said = said[1:]
    turns = [message.speaker for message in said]
    wrong_end = last is not None and turns[-1:] != [last]
    if not turns or turns != (["user", "assistant"] * len(turns))[: len(turns)] or wrong_end:
        missing = f"no {last} turn at the end: " if wrong_end else ""
        ends = f", the user first and the {last} last" if last else ", the user first"
        raise InputError(
            f"{place}: {field} has the turns {speakers}, {missing}expected user and assistant in turn{ends}, below at "
            "most one system text"
        )
    *before, end = said
    texts = [text(message.text, message.name, place) for message in before]
    return Chat((*texts, (string if end.speaker == "assistant" else text)(end.text, end.name, place)), system)


def read_history(value: Any, field: str, place: str, unused: Callable[[str], None] = lambda key: None) -> Chat:
    """The turns before a prompt: a list of [what the user said, what was answered], or of a chat's messages.

    Raises:
        InputError: It is no such list, or one of its texts is blank.
    """
    if not isinstance(value, list):
        raise InputError(f"{place}: {field} is a {type(value).__name__}, expected a list of [user, assistant] pairs")
    if not value:
        return Chat(())
    if all(isinstance(entry, dict) for entry in value):
        chat = read_chat(value, field, place, last="assistant", unused=unused)
        text(chat.turns[-1], f"{field} turn {len(value)} (assistant)", place)
        return chat
    turns = []
    for number, entry in enumerate(value, start=1):
        if not isinstance(entry, list | tuple) or len(entry) != 2:
            raise InputError(
                f"{place}: {field} entry {number} is {str(entry)[:40]!r}, expected a pair of a user's and an "
                "assistant's text"
            )
        turns += [
            text(said, f"{field} entry {number} ({speaker})", place)
            for said, speaker in zip(entry, ("user", "assistant"), strict=True)
        ]
    return Chat(tuple(turns))
