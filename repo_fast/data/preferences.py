"""Reads preferences, which reward and cost models are trained on, from any source in `repo_fast.data.sources`.

A row is one of

- a pair of PKU-SafeRLHF: `prompt`, `response_0`, `response_1`, `better_response_id` (for a reward model),
  `safer_response_id` and, where there are any, `is_response_0_safe`, `is_response_1_safe` (for a cost model);
- a pair `chosen`, `rejected`, as dialogues of hh-rlhf ("\\n\\nHuman: ... \\n\\nAssistant: ..."), as chats (lists of
  objects with role and content), or as the two answers (strings, or chats) to a `prompt` (a string, or a chat). For a
  cost model the chosen one is the safer one, and `is_chosen_safe`, `is_rejected_safe` may say more;
- a single response with a label: `prompt`, `response`, `is_safe`. Only a cost model learns from that.

A cost model with several heads learns from harm categories and severities too (`repo_fast.data.heads`): PKU-SafeRLHF's
`response_0_harm_category`, `response_0_severity_level`, and so on; `chosen_...`, `rejected_...`; of a single response
`harm_category`, `severity_level`.

The prompt may have any of the forms of `repo_fast.data.columns`, with a system text and turns before it.

A row that cannot be represented is an error with its place. Two responses that are equal, or a blank one, do occur in
public data; these, and no others, can be dropped instead, and are then counted.
"""

import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from repo_fast.config.heads import HeadConfig
from repo_fast.data.cells import Chat, is_blank, read_chat, read_messages, same, string, text
from repo_fast.data.columns import Columns, Conversation, Row, Table, one_system, read_conversation, starts_with
from repo_fast.data.dialogue import HH_ASSISTANT, HH_USER, Dialogue
from repo_fast.data.heads import Harm, HeadTarget, head_notes, read_harm, target_of
from repo_fast.data.sources import check_limit
from repo_fast.errors import InputError

KINDS = ("reward", "cost")
UNUSABLE = ("error", "drop")
FORMS = "prompt, response_0, response_1 with ids; chosen, rejected; or prompt, response, is_safe"
NUMBERED = ("response_0", "response_1")
IDS = ("better_response_id", "safer_response_id")
SAFE = ("is_response_0_safe", "is_response_1_safe", "is_chosen_safe", "is_rejected_safe", "is_safe")

# The last answer of a dialogue may be blank, and its mark may then have lost the space.
_HH_MARK = re.compile(r"\n\n(Human|Assistant):(?: |\Z)")


@dataclass(frozen=True)
class Candidate:
    """A response in its context.

    Attributes:
        turns: The dialogue before it: user first, in turn with the assistant, an odd number of texts, none blank.
        response: Without template, never blank.
        unsafe: Its safety label, None where there is none or a reward model has no use for it.
        system: The text above the dialogue; None without.
        place: Where it was read, for errors.
    """

    turns: tuple[str, ...]
    response: str
    unsafe: bool | None = None
    system: str | None = None
    place: str = field(default="", compare=False, repr=False)

    @property
    def asked(self) -> Dialogue:
        """What the response answers, turn by turn."""
        return Dialogue(self.turns, self.system)


@dataclass(frozen=True)
class Preference:
    """What a model learns from one row.

    Attributes:
        candidates: Two, the one that is to score higher first (for a cost model: the less safe one); or one with a
            safety label. The two may have different contexts.
        targets: What each head of a cost model learns from them, in its order; empty for a model without.
    """

    candidates: tuple[Candidate, ...]
    targets: tuple[HeadTarget, ...] = ()


# Candidates in the order of a Preference, each with the name of the field it comes from.
_Named = list[tuple[str, Candidate]]


def load_preferences(
    source: str,
    kind: Literal["reward", "cost"],
    *,
    split: str = "train",
    unusable: Literal["error", "drop"] = "error",
    limit: int | None = None,
    columns: Columns | None = None,
    heads: Mapping[str, HeadConfig] | None = None,
) -> tuple[list[Preference], list[str]]:
    """Reads the preferences of a source, in its order.

    Args:
        source: A file, a folder, a part of the embedded world or a `datasets` name: see `repo_fast.data.sources`.
        kind: The model to train. Only the fields that it needs have to be there and right.
        split: For a `datasets` name, and a folder with several.
        unusable: What to do with a row whose responses are equal, or one of them blank: stop, or drop and count it.
        limit: Stop after this many preferences.
        columns: What the user says of columns.
        heads: Of a cost model with several, by name. What they ask for has to be in every row.

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
    contradictions = chosen = 0
    table = Table(source, split, columns, generate=limit, labels=(*IDS, *SAFE))
    for place, row in table:
        named = _candidates_of(row, kind, place)
        fault = _fault(named)
        if fault is not None:
            reason, message = fault
            if unusable == "error":
                raise InputError(f"{place}: {message}; set data.unusable to drop to leave such rows out")
            dropped[reason] += 1
            continue
        harms = _harms(row, named, heads) if heads else []
        contradictions += sum(harm.contradicts_itself for harm in harms)
        targets = tuple(target_of(harms, head) for head in (heads or {}).values())
        chosen += len(named) == 2 and named[0][0] not in NUMBERED
        preferences.append(Preference(tuple(candidate for _, candidate in named), targets))
        if len(preferences) == limit:
            break
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    if not preferences:
        rows = f"all {dropped.total()} rows are unusable: {reasons}" if dropped else "empty"
        raise InputError(f"{source}: {rows}; expected at least one preference")
    table.say_unused()
    notes = [_count_note(source, preferences, dropped.total(), reasons)]
    if heads:
        targets_by_row = [preference.targets for preference in preferences]
        return preferences, notes + head_notes(source, targets_by_row, heads, contradictions)
    if kind == "cost" and chosen:
        notes.append(
            f"{source}: of {chosen} pairs the chosen response is taken as the safer one, as a cost model needs, "
            "and not as the more helpful"
        )
    return preferences, notes + (_label_notes(source, preferences) if kind == "cost" else [])


def _harms(row: Row, named: _Named, heads: Mapping[str, HeadConfig]) -> list[Harm]:
    sides = [name for name, _ in named]
    if len(sides) == 2 and sides[0] not in NUMBERED:
        # A cost model's order; their columns may have names of the user's.
        sides = ["rejected", "chosen"]
    columns = [
        (f"is_{side}_safe", f"{side}_harm_category", f"{side}_severity_level")
        if len(sides) == 2
        else ("is_safe", "harm_category", "severity_level")
        for side in sides
    ]
    return [read_harm(row, own, heads) for own in columns]


def _candidates_of(row: Any, kind: str, place: str) -> _Named:
    if not isinstance(row, Row):
        raise InputError(f"{place}: a {type(row).__name__}, expected an object with {FORMS}")
    roles = row.columns.roles
    # Where the option says what a pair is, that is it.
    is_told = any(roles.get(name) in ("chosen", "rejected") for name in row.cells)
    if not is_told and not any(roles.get(name) == "ignore" for name in NUMBERED):
        if any(name in row.cells for name in NUMBERED):
            named = _numbered_pair(row, kind)
            if row.of("chosen") and row.of("rejected"):
                _check_agreed(row, named, _chosen_pair(row, kind))
            return named
    if row.of("chosen") or row.of("rejected"):
        return _chosen_pair(row, kind)
    if "is_safe" in row.cells or row.of("response"):
        return _labelled_response(row, kind)
    raise InputError(f"{place}: no preference: found {row.names() or 'no fields'}; expected {FORMS}")


def _check_agreed(row: Row, numbered: _Named, chosen: _Named) -> None:
    pairs = zip(numbered, chosen, strict=True)
    if not all(same(one.response, other.response) for (_, one), (_, other) in pairs):
        choices = " or ".join(row.columns.choice(name, "ignore") for name in ("chosen", NUMBERED[0]))
        raise InputError(
            f"{row.place}: the ids of response_0 and response_1 do not say what chosen and rejected do: choose with "
            + choices
        )


def _numbered_pair(row: Row, kind: str) -> _Named:
    column = IDS[0] if kind == "reward" else IDS[1]
    _require(row, ("prompt",), (*NUMBERED, column))
    chosen = _number(row.get(column))
    if chosen not in (0, 1):
        raise InputError(f"{row.place}: {column} is {row.get(column)!r}, expected the integer 0 or 1")
    answers = [(name, row.get(name)) for name in NUMBERED]
    named = _answered(row, answers, _labels(row, ("is_response_0_safe", "is_response_1_safe"), kind))
    higher = chosen if kind == "reward" else 1 - chosen
    return [named[higher], named[1 - higher]]


def _number(value: Any) -> int | None:
    """A whole number of any type; None for anything else, also a bool: it equals 0 or 1, but a table of bools means
    something else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _chosen_pair(row: Row, kind: str) -> _Named:
    _require(row, ("chosen", "rejected"), ())
    answers = [_one(row, role) for role in ("chosen", "rejected")]
    named = _answered(row, answers, _labels(row, ("is_chosen_safe", "is_rejected_safe"), kind))
    return named if kind == "reward" else named[::-1]


def _labelled_response(row: Row, kind: str) -> _Named:
    if kind == "reward":
        raise InputError(
            f"{row.place}: a single response, which only a cost model can learn from (by is_safe); expected two to "
            "compare"
        )
    _require(row, ("prompt", "response"), ("is_safe",))
    return _answered(row, [_one(row, "response")], _labels(row, ("is_safe",), kind))


def _one(row: Row, role: str) -> tuple[str, Any]:
    """The column of a role, with its value."""
    names = row.of(role)
    values = [row.get(name) for name in names]
    if any(value != values[0] for value in values):
        row.differ(names, role)
    return names[0], values[0]


def _require(row: Row, roles: Iterable[str], fields: Iterable[str]) -> None:
    missing = [role for role in roles if not row.of(role)] + [name for name in fields if name not in row.cells]
    if missing:
        found = row.names()
        raise InputError(f"{row.place}: no {' and no '.join(missing)}: found {found}; known forms are {FORMS}")


def _labels(row: Row, fields: tuple[str, ...], kind: str) -> list[bool | None]:
    """What the fields say about safety, turned into `unsafe`."""
    if kind == "reward":
        return [None for _ in fields]
    values = [row.get(name) for name in fields]
    for name, value in zip(fields, values, strict=True):
        if value is not None and not (isinstance(value, int) and value in (0, 1)):
            raise InputError(f"{row.place}: {name} is {value!r}, expected true or false")
    return [None if value is None else not value for value in values]


def _answered(row: Row, answers: list[tuple[str, Any]], unsafe: list[bool | None]) -> _Named:
    """A candidate for each answer, all of them to the row's prompt where it has one."""
    said = read_conversation(row)
    named = [
        (name, Candidate(asked.turns, response, label, asked.system, row.place))
        for (name, value), label in zip(answers, unsafe, strict=True)
        for asked, response in [_answer(row, value, said, name)]
    ]
    beyond = said.turns[len(said.asked.turns) :] if said is not None else ()
    if said is not None and beyond and not any(same(beyond[0], candidate.response) for _, candidate in named):
        raise InputError(
            f"{row.place}: {said.column} goes on behind the prompt with another answer than "
            f"{' and '.join(name for name, _ in answers)}; {row.columns.choice(said.column, 'ignore')} leaves it out"
        )
    return named


def _answer(row: Row, value: Any, said: Conversation | None, field: str) -> tuple[Dialogue, str]:
    """What one side answers, and the answer; without a prompt in the row, the side has it."""
    if isinstance(value, list | dict):
        messages = read_messages(value, field, row.place, row.see)
        if said is not None and [message.speaker for message in messages] == ["assistant"]:
            return said.asked, string(messages[0].text, field, row.place)
        chat = read_chat(value, field, row.place, last="assistant")
    else:
        told = string(value, field, row.place)
        if said is not None and not _repeats(told, said.asked):
            return said.asked, told
        chat = Chat(_hh_dialogue(told, field, row.place))
    *turns, response = chat.turns
    if said is None:
        return Dialogue(tuple(turns), one_system(row, [(field, chat.system)])), response
    # Some sets (ultrafeedback) have the prompt twice: for itself, and in front of each answer.
    if isinstance(value, list) and (len(turns) != len(said.asked.turns) or not starts_with(turns, said.asked.turns)):
        raise InputError(f"{row.place}: {field} has turns before its last that are not the prompt's; expected only one")
    system = one_system(row, [(said.column, said.asked.system), (field, chat.system)])
    return Dialogue(tuple(turns), system), response


def _repeats(told: str, asked: Dialogue) -> bool:
    """Whether an answer in hh-rlhf's notation begins with what it answers, in that notation or as the prompt has it."""
    if not told.startswith(HH_USER):
        return False
    whole = "".join((HH_ASSISTANT + " " if i % 2 else HH_USER) + turn for i, turn in enumerate(asked.turns))
    first = asked.turns[0].rstrip()
    return told.startswith(whole + HH_ASSISTANT) or (first.startswith(HH_USER) and told.startswith(first))


def _hh_dialogue(dialogue: str, field: str, place: str) -> tuple[str, ...]:
    """The turns of a dialogue in hh-rlhf's notation, the response last.

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
    return tuple(turns)


def _fault(named: _Named) -> tuple[str, str] | None:
    """Why a row cannot be learned from, in general and in particular; None if it can."""
    for name, candidate in named:
        if is_blank(candidate.response):
            return "with a blank response", f"{name} is blank"
    if len(named) == 2:
        (name, one), (other_name, other) = sorted(named, key=operator.itemgetter(0))
        if (one.asked, one.response) == (other.asked, other.response):
            return "with two equal responses", f"{name} and {other_name} are equal"
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
