"""Renders a prompt into the tokens that a policy or a score model was trained to see.

`chat` is the tokenizer's own chat template, `safe-rlhf` the template of Safe RLHF's Alpaca-type models (there is no
space after its last colon, and models trained with it notice one), `plain` the bare text. `auto` is `chat` where the
tokenizer has a chat template and `safe-rlhf` otherwise.

A prompt may be a dialogue: the texts of user and assistant in turn, ending with the user's. `safe-rlhf` ends each
earlier answer with the end-of-sequence token, as that code does; `plain` writes speakers as hh-rlhf does.

A begin-of-sequence token stands once, where the tokenizer puts one: chat templates write it themselves, the others get
it from the tokenizer.
"""

from collections.abc import Sequence
from functools import cached_property

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from repo_fast.data.dialogue import HH_ASSISTANT, Dialogue
from repo_fast.data.readers import Prompt
from repo_fast.errors import InputError, at, first_line

SAFE_RLHF_START, SAFE_RLHF_USER = "BEGINNING OF CONVERSATION: ", "USER: {} ASSISTANT:"
NAMES = ("auto", "chat", "safe-rlhf", "plain")


class PromptTemplate:
    """Turns prompt and response texts into tokens for one tokenizer.

    Args:
        tokenizer: A Hugging Face tokenizer.
        name: `auto`, `chat`, `safe-rlhf` or `plain`.

    Attributes:
        tokenizer: As given.
        name: The template in use: never `auto`.

    Raises:
        InputError: An unknown name, `chat` without a chat template, or a chat template that cannot be rendered.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str = "auto") -> None:
        if name not in NAMES:
            raise InputError(f"template {name!r} is unknown, expected one of {', '.join(NAMES)}")
        if name == "auto":
            name = "chat" if tokenizer.chat_template else "safe-rlhf"
        if name == "chat" and not tokenizer.chat_template:
            raise InputError("template 'chat' needs a tokenizer with a chat template, and this one has none")
        self.tokenizer = tokenizer
        self.name = name
        self.render("text")  # to find out now

    def render(self, prompt: str | Sequence[str] | Dialogue) -> str:
        """The templated prompt as text.

        Args:
            prompt: What the user wrote, or the turns of a dialogue up to there: user first, in turn, an odd number.

        Raises:
            InputError: The number of turns is even, or the tokenizer cannot write a dialogue of several turns: its chat
                template refuses, or it has no end-of-sequence token for `safe-rlhf`. There is a system text, and the
                template has no place for one.
        """
        dialogue = Dialogue.of(prompt)
        turns = list(dialogue.turns)
        if len(turns) % 2 == 0:
            raise InputError(f"a prompt of {len(turns)} turns, expected an odd number: the user's first and last")
        if self.name == "chat":
            return self._render_chat(dialogue)
        if dialogue.system is not None:
            raise InputError(f"template {self.name!r} has no place for a system text ({dialogue.system[:40]!r})")
        if self.name == "safe-rlhf":
            users = [SAFE_RLHF_USER.replace("{}", turn) for turn in turns[::2]]
            answers = [answer + self._eos_token for answer in turns[1::2]]
            return SAFE_RLHF_START + "".join(user + answer for user, answer in zip(users, [*answers, ""], strict=True))
        return dialogue.text if len(turns) == 1 else dialogue.text + HH_ASSISTANT

    def encode_prompt(self, prompt: str | Sequence[str] | Dialogue) -> list[int]:
        """The tokens of a prompt, from the begin-of-sequence token to where the response starts; see `render`."""
        return self._encode(self.render(prompt))

    def encode_response(self, text: str, *, finished: bool = True) -> list[int]:
        """The tokens of a response as they continue a templated prompt.

        Tokenizers split a text differently at its start than in its middle, so the response is encoded behind the
        end of the template, as Safe RLHF does, unless the two merge into one token there.

        Args:
            text: The response.
            finished: Whether to end with the end-of-sequence token; not for a response cut at a length limit.

        Raises:
            InputError: The tokenizer has no end-of-sequence token, and one is needed.
        """
        prompt_end, end_tokens = self._end_of_prompt
        tokens = self._encode(prompt_end + text)
        if tokens[: len(end_tokens)] == end_tokens:
            tokens = tokens[len(end_tokens) :]
        else:
            tokens = self.tokenizer.encode(text, add_special_tokens=False)
        if finished:
            if self.tokenizer.eos_token_id is None:
                raise InputError(f"tokenizer {self.tokenizer.name_or_path!r} has no end-of-sequence token")
            tokens.append(self.tokenizer.eos_token_id)
        return tokens

    def renders_like(self, other: "PromptTemplate") -> bool:
        """Whether both give the same text for every prompt of one turn."""
        if self.name != other.name:
            return False
        return self.name != "chat" or self.tokenizer.chat_template == other.tokenizer.chat_template

    def _render_chat(self, dialogue: Dialogue) -> str:
        turns = dialogue.turns
        chat = [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]
        if dialogue.system is not None:
            chat.insert(0, {"role": "system", "content": dialogue.system})
        try:
            return str(self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
        except jinja2.TemplateError as error:
            what = "a single user turn" if len(turns) == 1 else f"a dialogue of {len(turns)} turns"
            raise InputError(f"the tokenizer's chat template cannot render {what}: {error}") from error

    @property
    def _eos_token(self) -> str:
        if self.tokenizer.eos_token is None:
            raise InputError(f"tokenizer {self.tokenizer.name_or_path!r} has no end-of-sequence token")
        return self.tokenizer.eos_token

    @cached_property
    def _end_of_prompt(self) -> tuple[str, list[int]]:
        empty = self.render("")
        return empty, self._encode(empty)

    @cached_property
    def _tokenizer_appends_eos(self) -> bool:
        return self.tokenizer.encode("a")[-1:] == [self.tokenizer.eos_token_id]

    def _encode(self, rendered: str) -> list[int]:
        if self.name == "chat":
            return self.tokenizer.encode(rendered, add_special_tokens=False)
        tokens = self.tokenizer.encode(rendered)
        return tokens[:-1] if self._tokenizer_appends_eos else tokens


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub name.

    Raises:
        InputError: There is none, or it has no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path!r} has no tokenizer that transformers can load: {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {path!r} has no eos_token, expected one: responses would never end")
    return tokenizer


def tokenize_prompts(
    prompts: Sequence[Prompt], template: PromptTemplate, max_tokens: int
) -> tuple[list[tuple[Prompt, list[int]]], int]:
    """Renders prompts, without those that are too long.

    Args:
        prompts: At least one.
        template: How to render them.
        max_tokens: The longest templated prompt to keep.

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
            f"all {len(encoded)} prompts are longer than the limit of {max_tokens} tokens with the template "
            f"{template.name!r}: the shortest has {shortest}"
        )
    return kept, len(encoded) - len(kept)
