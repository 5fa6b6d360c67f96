"""Renders dialogues into the tokens that a policy or a score model was trained to see: here, and nowhere else.

`chat` is the tokenizer's own chat template, `safe-rlhf` the template of Safe RLHF's Alpaca-type models (there is no
space after its last colon, and models trained with it notice one), `plain` the bare text. `auto` is `chat` where the
tokenizer has a chat template and `safe-rlhf` otherwise.

A prompt may be a dialogue: the texts of user and assistant in turn, ending with the user's. `safe-rlhf` ends each
earlier answer with the end-of-sequence token, as that code does; `plain` writes speakers as hh-rlhf does.

How a response ends:

- *For a score model*, in training, checks and use alike, a finished response is what the template makes of the
  finished dialogue, with all that follows the answer. Of `chat` these are `apply_chat_template(messages + answer)`'s
  tokens, which may end with "<|im_end|>\\n"; of the others, the last is the end-of-sequence token. There the score is
  read. One that was cut at a length limit is the same without what ends it; one that a stop string ended is finished.
- *For a policy*, the tokens to learn, and to draw, end with the one that ends the turn ("<|im_end|>"): nothing follows
  where generation stops. Where a chat template has none, it is the end-of-sequence token, which is said.

A begin-of-sequence token stands once, where the tokenizer puts one: chat templates write it themselves, the others get
it from the tokenizer. What a text already has of it, or of what ends a response, is not added again. Other special
tokens in a text stay there, and are named once.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from repo_fast.data.chat import ChatTemplate, end_of_turn, special_tokens
from repo_fast.data.dialogue import HH_ASSISTANT, Dialogue
from repo_fast.data.readers import Prompt
from repo_fast.errors import InputError, at, first_line, is_panic, readable

SAFE_RLHF_START, SAFE_RLHF_USER = "BEGINNING OF CONVERSATION: ", "USER: {} ASSISTANT:"
NAMES = ("auto", "chat", "safe-rlhf", "plain")

log = logging.getLogger(__name__)


class PromptTemplate:
    """Turns prompt and response texts into tokens for one tokenizer.

    Args:
        tokenizer: A Hugging Face tokenizer.
        name: `auto`, `chat`, `safe-rlhf` or `plain`.
        date: "YYYY-MM-DD", for chat templates that write the current date; None for the clock's.
        end_tokens: Which tokens end the model's responses, beside the tokenizer's and the template's own.

    Attributes:
        tokenizer, date: As given.
        name: The template in use: never `auto`.
        end_tokens: All that end a response, by their ids.

    Raises:
        InputError: An unknown name, `chat` without a chat template, or a chat template that cannot be rendered or
            leaves the user's turn out.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "auto",
        date: str | None = None,
        end_tokens: Iterable[int] = (),
    ) -> None:
        if name not in NAMES:
            raise InputError(f"template {name!r} is unknown, expected one of {', '.join(NAMES)}")
        if name == "auto":
            name = "chat" if tokenizer.chat_template else "safe-rlhf"
        if name == "chat" and not tokenizer.chat_template:
            raise InputError(
                "template 'chat' needs a tokenizer with a chat template, and that of "
                f"{tokenizer.name_or_path!r} has none"
            )
        self.tokenizer, self.name, self.date = tokenizer, name, date
        self._chat = ChatTemplate(tokenizer, date) if name == "chat" else None
        # Whatever the template: a policy that was trained as a chat model ends its turns so.
        own = (tokenizer.eos_token_id, end_of_turn(tokenizer))
        self.end_tokens = frozenset(end_tokens) | {token for token in own if token is not None}
        self._said: set[str] = set()

    @property
    def depends_on_date(self) -> bool:
        """Whether it writes the current date."""
        return self._chat is not None and self._chat.depends_on_date

    def render(self, prompt: str | Sequence[str] | Dialogue) -> str:
        """The templated prompt as text.

        Args:
            prompt: What the user wrote, or the turns of a dialogue up to there: user first, in turn, an odd number.

        Raises:
            InputError: The number of turns is even, or the tokenizer cannot write a dialogue of several turns: its chat
                template refuses, or it has no end-of-sequence token for `safe-rlhf`. There is a system text, and the
                template has no place for one. The chat template leaves a turn or the system text out.
        """
        return self._render(self._clean(prompt))

    def encode_prompt(self, prompt: str | Sequence[str] | Dialogue) -> list[int]:
        """The tokens of a prompt, from the begin-of-sequence token to where the response starts; see `render`."""
        return self._encode(self.render(prompt))

    def encode_response(self, text: str, *, finished: bool = True) -> list[int]:
        """The tokens of a response that a policy is to draw after a templated prompt.

        Of a chat template these are all that it writes after the prompt, so also a space or an empty block of thoughts
        before the answer. Where a finished dialogue does not go on as the prompt began (whose end may open a block of
        thoughts), the response is taken as it is, and that is said once.

        Tokenizers split a text differently at its start than in its middle, so the response is encoded behind the
        end of the template, as Safe RLHF does, unless the two merge into one token there.

        Args:
            text: The response.
            finished: Whether to end with the token that ends a turn; not for a response cut at a length limit.

        Raises:
            InputError: There is no token to end with, and one is needed.
        """
        text = self._clean_response(text)
        if self._chat is None:
            written, ending, end = text, "", None
        else:
            (written, ending), end = self._after_prompt(text), self._chat_end
        if finished and ending and end is not None:
            tokens = self._encode_in_place(written + ending)
            # What follows the end of a turn is nobody's to draw.
            behind = len(self._ending_tokens) - 1 - self._ending_tokens.index(end)
            if tokens[-1 - behind] == end:
                return tokens[: len(tokens) - behind]
        tokens = self._encode_in_place(written)
        return [*tokens, self._eos if end is None else end] if finished else tokens

    def encode_dialogue(
        self, prompt: str | Sequence[str] | Dialogue, response: str, *, finished: bool = True
    ) -> list[int]:
        """The tokens of a prompt and a response as a score model reads them; see the module's docstring.

        Args:
            prompt: As for `render`.
            response: What answers it, without template.
            finished: Whether it ended by itself; what ends it is left out else.

        Raises:
            InputError: As for `render`; or there is no way to end it.
        """
        if self._chat is None:
            return self.encode_prompt(prompt) + self.encode_response(response, finished=finished)
        return self._encode(self._chat_text(self._clean(prompt), self._clean_response(response), finished))

    def encode_drawn(
        self,
        prompt: str | Sequence[str] | Dialogue,
        tokens: Sequence[int],
        *,
        finished: bool,
        end_tokens: Iterable[int] = (),
        prompt_tokens: Sequence[int] | None = None,
    ) -> list[int]:
        """The same for a response that a policy with this template drew, or one that surrounds no answers.

        A response that was cut keeps its tokens. A finished one does where they are not the ones that its text is split
        into, unless the template writes the text otherwise, such as trimmed; else the result is that of
        `encode_dialogue` for the text.

        Args:
            prompt: As for `render`.
            tokens: The response in tokens of this tokenizer, with the one that ended it, if one did.
            finished: As for `encode_dialogue`.
            end_tokens: Which tokens may have ended it, beside this template's.
            prompt_tokens: Of the prompt under this template, where they are known.
        """
        own = list(tokens)
        asked = self.encode_prompt(prompt) if prompt_tokens is None else list(prompt_tokens)
        if not finished:
            return asked + own
        ends = self.end_tokens.union(end_tokens)
        while own and own[-1] in ends:
            own.pop()
        if self._chat is None:
            return [*asked, *own, self._eos]
        if len(own) < len(tokens) and self._before_end and own[-len(self._before_end) :] == self._before_end:
            own = own[: -len(self._before_end)]
        drawn, dialogue = self.tokenizer.decode(own), self._clean(prompt)
        # A policy draws what its template puts before an answer, which this one will.
        answer = drawn.removeprefix(self._chat.lead or "")
        try:
            written = self._chat.render(dialogue, self._clean_response(answer))
        except InputError as error:
            # What a policy draws is no reason to end its run.
            self._say("refused", f"a response is scored as it was drawn: {error}")
            return [*asked, *own, *self._ending_tokens]
        is_changed = written != self._render(dialogue) + drawn + self._chat.ending
        if is_changed or own == self._encode_in_place(drawn):
            return self._encode(written)
        return [*asked, *own, *self._ending_tokens]

    @property
    def surrounds_answers(self) -> bool:
        """Whether a policy that learned this template draws more than an answer and the token that ends it."""
        try:
            return self._chat is not None and bool(self._before_end or self._encode_in_place(self._chat.lead or ""))
        except InputError:
            # It cannot write a finished dialogue, and nothing is known of that.
            return False

    def answer_of(self, text: str, *, finished: bool) -> str:
        """What a policy's response says, without what its template has it write around that, such as a space.

        Args:
            text: The response, decoded without special tokens.
            finished: Whether it ended by itself.
        """
        if self._chat is None or not self.surrounds_answers:
            return text
        lead = self.tokenizer.encode(self._chat.lead or "", add_special_tokens=False)
        text = text.removeprefix(self.tokenizer.decode(lead, skip_special_tokens=True))
        return text.removesuffix(self.tokenizer.decode(self._before_end)) if finished else text

    def renders_like(self, other: "PromptTemplate") -> bool:
        """Whether both give the same tokens for every prompt, where their tokens mean the same."""
        if self.name != other.name or self.encode_prompt(_SOME_TEXT) != other.encode_prompt(_SOME_TEXT):
            return False
        return self.name != "chat" or self.tokenizer.chat_template == other.tokenizer.chat_template

    def check_finished(self) -> None:
        """Raise `InputError` where a response could not be ended."""
        if self._chat is None:
            _ = self._eos
        else:
            self._chat.check_finished()

    # ------------------------------------------------------------------------------------------------------- texts

    def _render(self, dialogue: Dialogue) -> str:
        turns = list(dialogue.turns)
        if len(turns) % 2 == 0:
            raise InputError(f"a prompt of {len(turns)} turns, expected an odd number: the user's first and last")
        if self._chat is not None:
            return self._chat.render(dialogue)
        if dialogue.system is not None:
            raise InputError(f"template {self.name!r} has no place for a system text ({dialogue.system[:40]!r})")
        if self.name == "safe-rlhf":
            users = [SAFE_RLHF_USER.replace("{}", turn) for turn in turns[::2]]
            answers = [answer + self._eos_token for answer in turns[1::2]]
            return SAFE_RLHF_START + "".join(user + answer for user, answer in zip(users, [*answers, ""], strict=True))
        return dialogue.text if len(turns) == 1 else dialogue.text + HH_ASSISTANT

    def _chat_text(self, dialogue: Dialogue, response: str, finished: bool) -> str:
        """What the chat template makes of a dialogue and its answer; of one that was cut, without what ends it."""
        assert self._chat is not None
        written, ending = self._chat.render(dialogue, response), self._chat.ending
        if finished:
            return written
        return written.removesuffix(ending) if written.endswith(ending) else self._render(dialogue) + response

    def _after_prompt(self, text: str) -> tuple[str, str]:
        """What the chat template writes after a prompt for a response, and what it writes behind that; the response
        itself and nothing where it cannot be told."""
        assert self._chat is not None
        try:
            ending = self._chat.ending
            written = self._chat.render(Dialogue((_SOME_TEXT,)), text)
        except InputError as error:
            self._say("finished", f"responses are learned as they are, with the end-of-sequence token: {error}")
            return text, ""
        prompt = self._render(Dialogue((_SOME_TEXT,)))
        if written.startswith(prompt) and written.endswith(ending) and len(written) >= len(prompt) + len(ending):
            return written[len(prompt) : len(written) - len(ending)], ending
        self._say(
            "otherwise",
            f"the chat template asks for an answer by {prompt[-40:]!r} and writes a finished one otherwise, as "
            f"{written[-60:]!r}: responses are learned as they are, behind the former",
        )
        return text, ending

    def _clean(self, prompt: str | Sequence[str] | Dialogue) -> Dialogue:
        """A prompt without the begin and end tokens that the template adds to it."""
        dialogue = Dialogue.of(prompt)
        if not _may_have(self._specials, (*dialogue.turns, dialogue.system or "")):
            return dialogue
        turns, system = list(dialogue.turns), dialogue.system
        if self._writes_begin and system is not None:
            system = _without_begin(system, self.tokenizer.bos_token)
        elif self._writes_begin and turns:
            turns[0] = _without_begin(turns[0], self.tokenizer.bos_token)
        for i, turn in enumerate(turns):
            ends = self._answer_ends if i % 2 else self._user_ends
            turns[i] = turn if i % 2 and self.name == "plain" else _without_end(turn, ends)
        self._say_special("a prompt", (*turns, system or ""))
        return Dialogue(tuple(turns), system)

    def _clean_response(self, text: str) -> str:
        """A response without the tokens that end it."""
        if not _may_have(self._specials, (text,)):
            return text
        text = _without_end(text, self._answer_ends)
        self._say_special("a response", (text,))
        return text

    def _say_special(self, what: str, texts: Iterable[str]) -> None:
        found = (
            next((match for text in texts if (match := self._specials.search(text))), None) if self._specials else None
        )
        if found is not None:
            self._say(
                what,
                f"{what} has the special token {found[0]!r} in its text ({found.string[:60]!r}), which the tokenizer "
                "reads as that token; it stays (said once)",
            )

    def _say(self, key: str, text: str) -> None:
        if key not in self._said:
            self._said.add(key)
            log.warning("%s", text)

    @cached_property
    def _specials(self) -> re.Pattern[str] | None:
        """Finds special tokens in a text; None where the tokenizer has none."""
        texts = {text for text in special_tokens(self.tokenizer).values() if text} | set(self._answer_ends)
        return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None

    @cached_property
    def _answer_ends(self) -> tuple[str, ...]:
        """The texts of tokens that end a response."""
        found = (self.tokenizer.convert_ids_to_tokens(token) for token in sorted(self.end_tokens))
        # A model's end tokens may be beyond its tokenizer's.
        return tuple(text for text in found if text)

    @cached_property
    def _user_ends(self) -> tuple[str, ...]:
        """The texts of tokens that the template puts right behind a user's turn."""
        if self._chat is None:
            return ()
        behind = self._render(Dialogue((_SOME_TEXT,))).rpartition(_SOME_TEXT)[2].lstrip()
        return tuple(text for text in self._answer_ends if behind.startswith(text))

    # ------------------------------------------------------------------------------------------------------ tokens

    @property
    def _eos_token(self) -> str:
        if self.tokenizer.eos_token is None:
            raise InputError(f"tokenizer {self.tokenizer.name_or_path!r} has no end-of-sequence token")
        return self.tokenizer.eos_token

    @property
    def _eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise InputError(f"tokenizer {self.tokenizer.name_or_path!r} has no end-of-sequence token")
        return self.tokenizer.eos_token_id

    @cached_property
    def _chat_end(self) -> int | None:
        """The token that ends a turn of the chat template; None where that is left to the end-of-sequence token."""
        assert self._chat is not None
        try:
            end = self._chat.end_of_turn
        except InputError:
            # Said where a response is encoded.
            return None
        if end is None:
            self._say(
                "end",
                f"the chat template ends an answer with {self._chat.ending!r}, in which no token ends a response: "
                f"{self._eos_token!r} is put there instead in what a policy learns",
            )
        return end

    @cached_property
    def _ending_tokens(self) -> list[int]:
        """Of what the chat template writes behind an answer."""
        assert self._chat is not None
        text, ending = self.tokenizer.encode(_SOME_TEXT, add_special_tokens=False), self._chat.ending
        whole = self.tokenizer.encode(_SOME_TEXT + ending, add_special_tokens=False)
        if whole[: len(text)] == text:
            return whole[len(text) :]
        return self.tokenizer.encode(ending, add_special_tokens=False)

    @cached_property
    def _before_end(self) -> list[int]:
        """The tokens of what the chat template writes between an answer and the token that ends its turn."""
        if self._chat is None or self._chat.end_of_turn is None:
            return []
        return self._ending_tokens[: self._ending_tokens.index(self._chat.end_of_turn)]

    @cached_property
    def _end_of_prompt(self) -> tuple[str, list[int]]:
        prompt = self._render(Dialogue(("" if self._chat is None else _SOME_TEXT,)))
        return prompt, self._encode(prompt)

    def _encode_in_place(self, text: str) -> list[int]:
        """The tokens of a text as they follow a templated prompt."""
        prompt_end, end_tokens = self._end_of_prompt
        tokens = self._encode(prompt_end + text)
        if tokens[: len(end_tokens)] == end_tokens:
            return tokens[len(end_tokens) :]
        return self.tokenizer.encode(text, add_special_tokens=False)

    @cached_property
    def _writes_begin(self) -> bool:
        """Whether a templated prompt begins with the begin-of-sequence token."""
        begin = self.tokenizer.bos_token_id
        return begin is not None and self._encode(self._render(Dialogue((_SOME_TEXT,))))[:1] == [begin]

    @cached_property
    def _added(self) -> tuple[list[int], list[int]]:
        return added_tokens(self.tokenizer)

    def _encode(self, rendered: str) -> list[int]:
        tokens = self.tokenizer.encode(rendered, add_special_tokens=False)
        return tokens if self.name == "chat" else _once(self._added[0], tokens, [])


# Stands for a prompt, or for an answer.
_SOME_TEXT = "some text"


def encode_whole(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that has all of prompt, response and template.

    The tokenizer's own begin and end tokens are added where the text has not got them already. None are added to a text
    that begins as every dialogue of the tokenizer's chat template does: such a template writes all there is.
    """
    tokens = tokenizer.encode(text, add_special_tokens=False)
    head = ""
    if tokenizer.chat_template:
        try:
            head = ChatTemplate(tokenizer).head
        except InputError:
            # Another template is used, or the error is said where this one is.
            pass
    if head and text.startswith(head):
        return tokens
    begin, end = added_tokens(tokenizer)
    return _once(begin, tokens, end)


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer by itself puts before and behind a text."""
    text, whole = tokenizer.encode(_SOME_TEXT, add_special_tokens=False), tokenizer.encode(_SOME_TEXT)
    for start in range(len(whole) - len(text) + 1):
        if text and whole[start : start + len(text)] == text:
            return whole[:start], whole[start + len(text) :]
    # A vocabulary that has nothing for this text.
    begin = [token for token in whole if token == tokenizer.bos_token_id]
    return begin, whole[len(begin) :]


def without_added(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> tuple[str, str]:
    """A pair of texts without the begin and end tokens that a tokenizer puts around it."""
    begin, end = ([str(tokenizer.convert_ids_to_tokens(token)) for token in part] for part in added_tokens(tokenizer))
    return _without_begin(prompt, begin[0]) if begin else prompt, _without_end(response, tuple(end))


def _once(begin: list[int], tokens: list[int], end: list[int]) -> list[int]:
    """Tokens between begin and end, each added only where it is not there."""
    has_begin = tokens[: len(begin)] == begin
    has_end = bool(end) and tokens[-len(end) :] == end
    return ([] if has_begin else begin) + tokens + ([] if has_end else end)


def _may_have(pattern: re.Pattern[str] | None, texts: Iterable[str]) -> bool:
    return pattern is not None and any(pattern.search(text) for text in texts)


def _without_begin(text: str, begin: str) -> str:
    while text.lstrip().startswith(begin):
        # The space is what decoders put behind a token.
        text = text.lstrip().removeprefix(begin).removeprefix(" ")
    return text


def _without_end(text: str, ends: tuple[str, ...]) -> str:
    while end := next((end for end in ends if text.rstrip().endswith(end)), None):
        text = text.rstrip().removesuffix(end).removesuffix(" ")
    return text


def load_tokenizer(path: str, *, must_end: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub name.

    Args:
        path: Folder or hub name.
        must_end: Whether it needs an end-of-sequence token; encoders' have none.

    Raises:
        InputError: There is none, or it has no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        # What is wrong with some of its settings shows only where they are used.
        tokenizer.decode(tokenizer.encode(_SOME_TEXT))
        special_tokens(tokenizer)
    except BaseException as error:  # its files are the user's, and may hold anything
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        with readable(Path(path)):
            adapters = Path(path, "adapter_config.json").is_file()
        if adapters:
            raise InputError(
                f"{path!r} holds adapters without a tokenizer, as policies' do: expected the folder of the merged model"
            ) from error
        raise InputError(f"{path!r} has no tokenizer that transformers can load: {first_line(error)}") from error
    if must_end and tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {path!r} has no eos_token, expected one: responses would never end")
    return tokenizer


def tokenize_prompts(
    prompts: Sequence[Prompt], template: PromptTemplate, max_tokens: int, option: str
) -> tuple[list[tuple[Prompt, list[int]]], int]:
    """Renders prompts, without those that are too long.

    Args:
        prompts: At least one.
        template: How to render them.
        max_tokens: The longest templated prompt to keep.
        option: What sets it, for messages.

    Returns:
        The prompts kept with their tokens, in order, and the number of prompts dropped.

    Raises:
        InputError: No prompt fits, or the template cannot render one.
    """
    encoded = []
    for prompt in prompts:
        with at(prompt.place):
            encoded.append((prompt, template.encode_prompt(prompt.asked)))
    kept = [(prompt, tokens) for prompt, tokens in encoded if len(tokens) <= max_tokens]
    if not kept:
        shortest = min(len(tokens) for _, tokens in encoded)
        raise InputError(
            f"all {len(encoded)} prompts are longer than the limit of {max_tokens} tokens ({option}) with the "
            f"template {template.name!r}: the shortest has {shortest}"
        )
    return kept, len(encoded) - len(kept)
