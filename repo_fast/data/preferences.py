"""Reads preferences, which reward and cost models are trained on, from any source in `repo_fast.data.sources`.

A row is one of

- a pair of PKU-SafeRLHF: `prompt`, `response_0`, `response_1`, `better_response_id` (for a reward model),
  `safer_response_id` and, where there are any, `is_response_0_safe`, `is_response_1_safe` (for a cost model);
- a pair `chosen`, `rejected`, as dialogues of hh-rlhf ("\\n\\nHuman: ... \\n\\nAssistant: ..."), as chats (lists of
  objects with role and content), or as the two answers (strings, or chats) to a `prompt` (a string, or a chat). For a
  cost model the chosen one is the safer one, and `is_chosen_safe`, `is_rejected_safe` may say more;
- a single response with a label: `prompt`, `response`, `is_safe`. Only a cost model learns from that.

A row that cannot be represented is an error with its place. Two responses that are equal, or a blank one, do occur in
public data; these, and no others, can be dropped instead, and are then counted.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from repo_fast.data.sources import chat_messages, chat_turns, check_limit, read_rows, string, text
from repo_fast.errors import InputError

KINDS = ("reward", "cost")
UNUSABLE = ("error", "drop")
FORMS = "prompt, response_0, response_1 with ids; chosen, rejected; or prompt, response, is_safe"

# The last answer of a dialogue may be blank, and its mark may then have lost the space.
_HH_MARK = re.compile(r"\n\n(Human|Assistant):(?: |\Z)")


@dataclass(frozen=True)
class Candidate:
    """A response in its context.

    Attributes:
        turns: The dialogue before it: user first, in turn with the assistant, an odd number of texts, none blank.
        response: Without template, never blank.
        unsafe: Its safety label, None where there is none or a reward model has no use for it.
    """

    turns: tuple[str, ...]
    response: str
    unsafe: bool | None = None


@dataclass(frozen=True)
class Preference:
    """What a model learns from one row.

    Attributes:
        candidates: Two, the one that is to score higher first (for a cost model: the less safe one); or one with a
            safety label. The two may have different contexts.
    """

    candidates: tuple[Candidate, ...]


# Candidates in the order of a Preference, each with the name of the field it comes from.
_Named = list[tuple[str, Candidate]]


def load_preferences(
    source: str,
    kind: Literal["reward", "cost"],
    *,
    split: str = "train",
    unusable: Literal["error", "drop"] = "error",
    limit: int | None = None,
) -> tuple[list[Preference], list[str]]:
    """Reads the preferences of a source, in its order.

    Args:
        source: A file, a part of the embedded world or a `datasets` name: see `repo_fast.data.sources`.
        kind: The model to train. Only the fields that it needs have to be there and right.
        split: For a `datasets` name only.
        unusable: What to do with a row whose responses are equal, or one of them blank: stop, or drop and count it.
        limit: Stop after this many preferences.

    Returns:
        At least one preference, and notes for the user, a line each: the numbers of pairs, single responses and dropped
        rows; for a cost model also what missing or contradicting safety labels mean.

    Raises:
        InputError: The source is missing, empty or malformed, or a row cannot be used.
    """
    check_limit(limit)
    for name, value, known in (("kind", kind, KINDS), ("unusable", unusable, UNUSABLE)):
        if value not in known:
            raise InputError(f"{name} is {value!r}, expected one of {', '.join(known)}")
    preferences: list[Preference] = []
    dropped: Counter[str] = Counter()
    for place, row in read_rows(source, split, generate=limit):
        named = _candidates_of(row, kind, place)
        fault = _fault(named)
        if fault is not None:
            reason, message = fault
            if unusable == "error":
                raise InputError(f"{place}: {message}; set data.unusable to drop to leave such rows out")
            dropped[reason] += 1
            continue
        preferences.append(Preference(tuple(candidate for _, candidate in named)))
        if len(preferences) == limit:
            break
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    if not preferences:
        rows = f"all {dropped.total()} rows are unusable: {reasons}" if dropped else "empty"
        raise InputError(f"{source}: {rows}; expected at least one preference")
    notes = [_count_note(source, preferences, dropped.total(), reasons)]
    return preferences, notes + (_label_notes(source, preferences) if kind == "cost" else [])


def _candidates_of(row: Any, kind: str, place: str) -> _Named:
    if not isinstance(row, dict):
        raise InputError(f"{place}: a {type(row).__name__}, expected an object with {FORMS}")
    # A table that joins several sets has all their columns in every row, and null in most.
    row = {field: value for field, value in row.items() if value is not None}
    if "response_0" in row or "response_1" in row:
        return _numbered_pair(row, kind, place)
    if "chosen" in row or "rejected" in row:
        return _chosen_pair(row, kind, place)
    if "response" in row:
        return _labelled_response(row, kind, place)
    raise InputError(f"{place}: no preference: found {', '.join(row) or 'no fields'}; expected {FORMS}")


def _numbered_pair(row: dict[str, Any], kind: str, place: str) -> _Named:
    field = "better_response_id" if kind == "reward" else "safer_response_id"
    _require(row, ("prompt", "response_0", "response_1", field), place)
    chosen = row[field]
    # A bool equals 0 or 1, but a table of bools means something else.
    if type(chosen) is not int or chosen not in (0, 1):
        raise InputError(f"{place}: {field} is {chosen!r}, expected the integer 0 or 1")
    turns = _context(row["prompt"], place)
    responses = [string(row[name], name, place) for name in ("response_0", "response_1")]
    unsafe = _labels(row, ("is_response_0_safe", "is_response_1_safe"), kind, place)
    higher = chosen if kind == "reward" else 1 - chosen
    return [(f"response_{i}", Candidate(turns, responses[i], unsafe[i])) for i in (higher, 1 - higher)]


def _chosen_pair(row: dict[str, Any], kind: str, place: str) -> _Named:
    _require(row, ("chosen", "rejected"), place)
    unsafe = _labels(row, ("is_chosen_safe", "is_rejected_safe"), kind, place)
    context = _context(row["prompt"], place) if "prompt" in row else None
    named = [
        (field, Candidate(*_answer(row[field], context, field, place), label))
        for field, label in zip(("chosen", "rejected"), unsafe, strict=True)
    ]
    return named if kind == "reward" else named[::-1]


def _labelled_response(row: dict[str, Any], kind: str, place: str) -> _Named:
    if kind == "reward":
        raise InputError(
            f"{place}: a single response, which only a cost model can learn from (by is_safe); expected two to compare"
        )
    _require(row, ("prompt", "response", "is_safe"), place)
    (unsafe,) = _labels(row, ("is_safe",), kind, place)
    turns, response = _answer(row["response"], _context(row["prompt"], place), "response", place)
    return [("response", Candidate(turns, response, unsafe))]


def _require(row: dict[str, Any], fields: Iterable[str], place: str) -> None:
    missing = [field for field in fields if field not in row]
    if missing:
        raise InputError(f"{place}: no {' and no '.join(missing)}: found {', '.join(row)}; known forms are {FORMS}")


def _labels(row: dict[str, Any], fields: tuple[str, ...], kind: str, place: str) -> list[bool | None]:
    """What the fields say about safety, turned into `unsafe`."""
    if kind == "reward":
        return [None for _ in fields]
    for field in fields:
        value = row.get(field)
        if value is not None and not (isinstance(value, int) and value in (0, 1)):
            raise InputError(f"{place}: {field} is {value!r}, expected true or false")
    return [not row[field] if field in row else None for field in fields]


def _context(prompt: Any, place: str) -> tuple[str, ...]:
    if isinstance(prompt, list):
        return chat_turns(prompt, "prompt", place, last="user")
    return (text(prompt, "prompt", place),)


def _answer(value: Any, context: tuple[str, ...] | None, field: str, place: str) -> tuple[tuple[str, ...], str]:
    """Context and response of one side; `context` is that of the row's `prompt`, None without one."""
    if isinstance(value, list):
        if context is not None and [role for role, _ in chat_messages(value, field, place)] == ["assistant"]:
            return context, string(value[0]["content"], field, place)
        *turns, response = chat_turns(value, field, place, last="assistant")
        # Some sets (ultrafeedback) have the prompt twice: for itself, and in front of each answer.
        if context is not None and tuple(turns) != context:
            raise InputError(f"{place}: {field} has turns before its last that are not the prompt's; expected only one")
        return tuple(turns), response
    if context is not None:
        return context, string(value, field, place)
    return _hh_dialogue(string(value, field, place), field, place)


def _hh_dialogue(dialogue: str, field: str, place: str) -> tuple[tuple[str, ...], str]:
    """Context and response of a dialogue in hh-rlhf's notation.

    Some models there went on to write the human's next turn themselves ("... Human: Thanks.\\n\\nAssistant: ..."), on
    the human's behalf and without a break before it. All that is one response: so an assistant's mark inside an
    assistant's turn stays text, and both sides of such a pair keep the same context.
    """
    start, *marked = _HH_MARK.split(dialogue)
    if start or marked[:1] != ["Human"]:
        raise InputError(
            f"{place}: {field} starts with {dialogue[:20]!r}, expected a dialogue that starts with '\\n\\nHuman: ', "
            "or a prompt field beside it"
        )
    turns: list[str] = []
    for speaker, said in zip(marked[::2], marked[1::2], strict=True):
        if speaker == ("Assistant" if len(turns) % 2 else "Human"):
            turns.append(said)
        elif speaker == "Assistant":
            turns[-1] += f"\n\nAssistant: {said}"
        else:
            raise InputError(f"{place}: {field} turn {len(turns) + 1} is the human's again, expected the assistant's")
    if len(turns) % 2:
        raise InputError(f"{place}: {field} ends with the human's turn, expected the assistant's")
    for i, said in enumerate(turns[:-1]):
        text(said, f"{field} turn {i + 1}", place)
    return tuple(turns[:-1]), turns[-1]


def _fault(named: _Named) -> tuple[str, str] | None:
    """Why a row cannot be learned from, in general and in particular; None if it can."""
    for field, candidate in named:
        if not candidate.response.strip():
            return "with a blank response", f"{field} is blank"
    if len(named) == 2:
        (field, one), (other_field, other) = sorted(named)
        if (one.turns, one.response) == (other.turns, other.response):
            return "with two equal responses", f"{field} and {other_field} are equal"
    return None


def _count_note(source: str, preferences: list[Preference], n_dropped: int, reasons: str) -> str:
    n_pairs = sum(len(preference.candidates) == 2 for preference in preferences)
    parts = [f"{n_pairs} pairs"]
    if n_pairs < len(preferences):
        parts.append(f"{len(preferences) - n_pairs} single labelled responses")
    if n_dropped:
        parts.append(f"{n_dropped} rows dropped ({reasons})")
    return f"{source}: {', '.join(parts)}"


def _label_notes(source: str, preferences: list[Preference]) -> list[str]:
    labels = [[candidate.unsafe for candidate in preference.candidates] for preference in preferences]
    pairs = [pair for pair in labels if len(pair) == 2]
    unlabelled = sum(None in pair for pair in pairs)
    contradicting = pairs.count([False, True])
    notes = []
    if all(label is None for pair in labels for label in pair):
        notes.append(
            f"{source}: no response has a safety label, so the cost model's sign terms are left out and nothing "
            "anchors its zero: a cost <= 0 will not mean safe"
        )
    elif unlabelled:
        notes.append(
            f"{source}: {unlabelled} of {len(pairs)} pairs have no safety labels (or only one): for what has none the "
            "cost model's sign term is left out, and its zero is not anchored by it"
        )
    if contradicting:
        notes.append(
            f"{source}: in {contradicting} of {len(pairs)} pairs the safer response is labelled unsafe, the other safe"
        )
    return notes
