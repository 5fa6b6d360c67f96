"""A tokenizer's own chat template, checked: what it writes of a dialogue, and how it ends an answer.

A template is a program that came with a model. It may raise anything, leave a turn out, or write something before an
answer that its prompt for one has not: a space, an empty block of thoughts. So nothing is taken for granted: it is
asked for dialogues that differ in one turn, whose text must then differ, and for an answer that is easy to find again.
"""

import contextlib
import datetime
import re
from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from repo_fast.data.dialogue import Dialogue
from repo_fast.errors import InputError, first_line

_PROBE, _OTHER, _ANSWER = "first probe", "another probe", "probed answer"
# Different in every part.
_DATES = ("2001-02-03", "2010-11-12")
# A whole token of this form is no prose, also where a tokenizer does not call it special; <0x0A> is a byte.
_MARK = re.compile(r"<(?!0x)[^<>\s]+>")


class ChatTemplate:
    """What a tokenizer's chat template writes.

    Args:
        tokenizer: With a chat template.
        date: "YYYY-MM-DD", for templates that write the current date; None for the clock's.
        arguments: Of the template, beside those that all have.

    Raises:
        InputError: It cannot be rendered for a user's turn, or what it writes does not depend on that turn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        date: str | None = None,
        arguments: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.tokenizer, self.date, self.arguments = tokenizer, date, arguments
        self._checked: set[tuple[int, bool, bool]] = set()
        self._check(Dialogue((_PROBE,)))

    def render(self, dialogue: Dialogue, answer: str | None = None) -> str:
        """A dialogue up to where the assistant answers; with an answer, the finished dialogue.

        Raises:
            InputError: The template cannot write it, or leaves a part of it out.
        """
        self._check(dialogue)
        if answer is not None:
            self.check_finished()
        return self._render(dialogue, answer)

    def render_question(self, dialogue: Dialogue, answer: str) -> str:
        """A finished dialogue, and then the prompt for what is to be said about it.

        Raises:
            InputError: The template cannot write it, or leaves a part of it out.
        """
        self._check(dialogue, question=True)
        return self._render(dialogue, answer, question=True)

    @property
    def _name(self) -> str:
        """For messages."""
        path = self.tokenizer.name_or_path
        return f"the chat template of {path!r}" if path else "the tokenizer's chat template"

    def check_finished(self) -> None:
        """Raise `InputError` where it cannot write a finished dialogue, or not the answer as it is."""
        _ = self._finished_probe

    @cached_property
    def ending(self) -> str:
        """What it writes behind an answer, such as "<|im_end|>\\n".

        Raises:
            InputError: It cannot write a finished dialogue, or not the answer as it is.
        """
        return self._finished_probe[1]

    @cached_property
    def lead(self) -> str | None:
        """What it writes between a prompt and an answer, mostly nothing; None where a finished dialogue does not
        begin like the prompt."""
        before = self._finished_probe[0]
        prompt = self._render(Dialogue((_PROBE,)))
        return before.removeprefix(prompt) if before.startswith(prompt) else None

    @cached_property
    def end_of_turn(self) -> int | None:
        """The token that ends an answer, the first of the ending that is no text; None without one."""
        tokenizer = self.tokenizer
        special = {tokenizer.eos_token_id, *special_tokens(tokenizer)} - {tokenizer.unk_token_id}
        for token in tokenizer.encode(self.ending, add_special_tokens=False):
            if token in special or (token != tokenizer.unk_token_id and _MARK.fullmatch(_form(tokenizer, token))):
                return token
        return None

    @cached_property
    def head(self) -> str:
        """What every dialogue begins with, with a system text or without; may be empty."""
        rendered = []
        for text, date in zip((_PROBE, _OTHER), _DATES, strict=True):
            rendered.append(self._render(Dialogue((text,)), date=date))
            # Where it has no place for a system text.
            with contextlib.suppress(InputError):
                rendered.append(self._render(Dialogue((_PROBE,), text), date=date))
        first, last = min(rendered), max(rendered)
        same = [a == b for a, b in zip(first, last, strict=False)]
        return first[: same.index(False)] if False in same else first[: len(same)]

    @cached_property
    def depends_on_date(self) -> bool:
        """Whether it writes the current date, in dialogues with a system text or without."""
        for system in (None, _PROBE):
            # Where it has no place for a system text.
            with contextlib.suppress(InputError):
                one, other = (self._render(Dialogue((_PROBE,), system), date=date) for date in _DATES)
                if one != other:
                    return True
        return False

    @cached_property
    def _finished_probe(self) -> tuple[str, str]:
        rendered = self._render(Dialogue((_PROBE,)), _ANSWER)
        before, found, after = rendered.rpartition(_ANSWER)
        if not found:
            raise InputError(
                f"{self._name} writes a finished dialogue without its answer: {rendered[-60:]!r}, "
                "expected the answer in it"
            )
        return before, after

    def _check(self, dialogue: Dialogue, question: bool = False) -> None:
        """Once for each shape of dialogue: whether every part of it shows in what is written."""
        count, has_system = len(dialogue.turns), dialogue.system is not None
        if (count, has_system, question) in self._checked:
            return
        turns, system = (_PROBE,) * count, _PROBE if has_system else None
        answer = _ANSWER if question else None
        written = self._render(Dialogue(turns, system), answer, question=question)
        if not written.strip():
            raise InputError(f"{self._name} renders an empty text, expected one with the user's turn")
        others = {
            f"turn {i + 1} ({'assistant' if i % 2 else 'user'})": Dialogue(
                turns[:i] + (_OTHER,) + turns[i + 1 :], system
            )
            for i in range(count)
        }
        if has_system:
            others["the system text"] = Dialogue(turns, _OTHER)
        changed = {part: self._render(other, answer, question=question) for part, other in others.items()}
        if question:
            changed["the answer"] = self._render(Dialogue(turns, system), _OTHER, question=True)
        for part, other in changed.items():
            if other == written:
                raise InputError(
                    f"{self._name} leaves out {part} of {_what(dialogue, answer)}: it writes "
                    f"{written[:60]!r} whatever stands there"
                )
        self._checked.add((count, has_system, question))

    def _render(
        self, dialogue: Dialogue, answer: str | None = None, date: str | None = None, question: bool = False
    ) -> str:
        chat = [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(dialogue.turns)]
        if dialogue.system is not None:
            chat.insert(0, {"role": "system", "content": dialogue.system})
        if answer is not None:
            chat.append({"role": "assistant", "content": answer})
        options = dict(self.arguments)
        if day := date or self.date:
            # In a template's eyes this hides the function of the same name that reads the clock.
            options["strftime_now"] = datetime.datetime.fromisoformat(day).strftime
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    chat, add_generation_prompt=question or answer is None, tokenize=False, **options
                )
            )
        except Exception as error:  # a template may call what it likes, wrongly
            name = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            raise InputError(
                f"{self._name} cannot render {_what(dialogue, answer)}: {name}{first_line(error)}"
            ) from error


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends an answer in the tokenizer's own chat template; None without such a token or template."""
    if not tokenizer.chat_template:
        return None
    try:
        return ChatTemplate(tokenizer).end_of_turn
    except InputError:
        # Said where the template is used.
        return None


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The tokens that are no text, by their ids."""
    added = {token: str(entry) for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def _form(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(token))


def _what(dialogue: Dialogue, answer: str | None) -> str:
    turns = len(dialogue.turns)
    what = "a single user turn" if turns == 1 else f"a dialogue of {turns} turns"
    system = "" if dialogue.system is None else " with a system text"
    return f"{what}{system}{'' if answer is None else ' and its answer'}"
