"""Costs from guard models: causal language models whose next word is a verdict on a response.

cost = log p(unsafe) − log p(safe) at the verdict's place, so that above 0 unsafe is the likelier one. Nothing is
generated: every spelling of the verdict is a continuation of what the guard is asked, and its log-probability is the
sum of those of its tokens, from one packed forward in which all continuations share the prompt. Spellings, and fields
before the verdict that are tried in turn, add up as probabilities.
"""

import itertools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from repo_fast.config import GuardConfig
from repo_fast.data import Dialogue
from repo_fast.data.chat import ChatTemplate
from repo_fast.errors import InputError
from repo_fast.models.attention import PACKED, PADDED
from repo_fast.models.loss_head import Projection
from repo_fast.models.on_paper import position_limit
from repo_fast.ops import linear_log_probs
from repo_fast.packing.balance import split_by_tokens
from repo_fast.packing.rows import PackedBatch, pack
from repo_fast.rollout import Rollout
from repo_fast.scoring.guard_presets import PRESETS, GuardQuestion
from repo_fast.speed.flops import Shape, forward_work

log = logging.getLogger(__name__)

_FIELD = re.compile(r"\{([^{}]*\|[^{}]*)\}")
_SOME = Dialogue(("How many days has a week?",))


@dataclass(frozen=True)
class Continuation:
    """What a guard may write.

    Attributes:
        tokens: int64 [n], at least one.
        counted: bool [n]. Whose log-probabilities add up; the others are forced.
        unsafe: Whether it says so.
    """

    tokens: torch.Tensor
    counted: torch.Tensor
    unsafe: bool


class Guard:
    """What a guard is asked, in its tokens.

    Args:
        tokenizer: Its own.
        settings: With a preset, or words.
        name: Of the cost, for messages.
        date: As for `ChatTemplate`.

    Attributes:
        question: Everything that it is asked by.
        continuations: What it may write.

    Raises:
        InputError: Its tokenizer has no chat template and there is no prompt, the template has no place for a response,
            the category is not known, or the tokenizer cannot write a verdict where it belongs.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settings: GuardConfig, name: str, date: str | None = None
    ) -> None:
        self.tokenizer, self.name = tokenizer, name
        self.question = _question(settings)
        known, given = self.question.categories, self.question.template_arguments
        if self.question.category is not None and self.question.category not in known:
            expected = f"one of {', '.join(known)}" if known else "null: this guard writes no codes"
            raise InputError(f"the category of the {name} guard is {self.question.category!r}, expected {expected}")
        for argument in self.question.needed:
            if not given.get(argument):
                raise InputError(
                    f"the {name} guard lacks template_arguments.{argument}, expected what it is to judge by"
                )
        if self.question.prompt is not None and given:
            raise InputError(f"the {name} guard has template_arguments {dict(given)} and a prompt, expected one only")
        self._chat = None
        if self.question.prompt is None:
            if not tokenizer.chat_template:
                raise InputError(
                    f"the tokenizer of the {name} guard has no chat template, expected one or guard.prompt"
                )
            self._chat = ChatTemplate(tokenizer, date, given)
            asked = self._chat.render_question(_SOME, "Seven.")
            for argument in settings.template_arguments:
                others = {key: value for key, value in given.items() if key != argument}
                if _asks_alike(tokenizer, date, others, asked):
                    raise InputError(
                        f"the {name} guard's template_arguments.{argument} changes nothing of what its chat template "
                        "writes, expected an argument that it has"
                    )
        self.continuations = self._continuations()

    def render(self, asked: Dialogue, response: str) -> str:
        """What the guard is asked about a response, up to where it answers.

        Raises:
            InputError: Its chat template cannot write the dialogue, or leaves a part of it out.
        """
        if self.question.prompt is not None:
            # Not by format: other braces in it are its own.
            texts = {"{prompt}": asked.text, "{response}": response}
            return re.sub(r"\{prompt\}|\{response\}", lambda match: texts[match[0]], self.question.prompt)
        assert self._chat is not None
        return self._chat.render_question(asked, response)

    @property
    def depends_on_date(self) -> bool:
        """Whether its chat template writes the current date."""
        return self._chat is not None and self._chat.depends_on_date

    @property
    def description(self) -> dict[str, Any]:
        """Everything that it is asked by, as plain values."""
        return {**vars(self.question), "template_arguments": dict(self.question.template_arguments)}

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest continuation."""
        return max(len(own.tokens) for own in self.continuations)

    def check_room(self, asked: Dialogue, max_tokens: int) -> None:
        """Raise `InputError` where a prompt leaves no room for a response, or the template cannot write it."""
        tokens, most = len(self.encode(self.render(asked, ""))), max_tokens - self.longest_answer
        if tokens > most:
            raise InputError(
                f"the {self.name} guard is asked {tokens} tokens about a prompt without its response, "
                f"expected at most {most}; the prompt begins {asked.text[:60]!r}"
            )

    def encode(self, text: str) -> list[int]:
        """Tokens of a whole text, which has its special tokens in it."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _continuations(self) -> list[Continuation]:
        found = []
        sides = [(word, False) for word in self.question.safe] + [(word, True) for word in self.question.unsafe]
        before = [part.split("|") if i % 2 else [part] for i, part in enumerate(_FIELD.split(self.question.prefix))]
        for fields in itertools.product(*before):
            pieces = [(text, i % 2 == 1) for i, text in enumerate(fields)]
            found += [self._continuation([*pieces, *self._verdict(word, unsafe)], unsafe) for word, unsafe in sides]
        self._check_exclusive(found)
        if self.question.category is not None:
            # S1 must not count where S10 is written.
            codes = [self._verdict(self.question.unsafe[0], True, code) for code in self.question.categories]
            self._check_exclusive([self._continuation([(text, True) for text, _ in code], True) for code in codes])
        return found

    def _verdict(self, word: str, unsafe: bool, category: str | None = None) -> list[tuple[str, bool]]:
        """The pieces of a verdict, and whether each counts."""
        category = category or self.question.category
        if not unsafe or category is None:
            return [(word, True)]
        return [(word, True), (self.question.before_category, False), (category, True)]

    def _check_exclusive(self, continuations: Sequence[Continuation]) -> None:
        for one, other in itertools.permutations(continuations, 2):
            if torch.equal(one.tokens, other.tokens[: len(one.tokens)]):
                texts = [self.tokenizer.decode(own.tokens) for own in (one, other)]
                raise InputError(
                    f"the {self.name} guard's {texts[0]!r} is the beginning of its {texts[1]!r} in tokens, expected "
                    "verdicts that exclude each other"
                )

    def _continuation(self, pieces: Sequence[tuple[str, bool]], unsafe: bool) -> Continuation:
        """Behind what is asked, where the tokens of a text can be others than those of it alone."""
        text = self.render(_SOME, "Seven.")
        before = self.encode(text)
        start, counted = len(before), []
        for piece, counts in pieces:
            text += piece
            tokens = self.encode(text)
            new = len(tokens) - len(before)
            if tokens[: len(before)] != before or (counts and new < 1) or self.tokenizer.unk_token_id in tokens[start:]:
                raise InputError(
                    f"the {self.name} guard's tokenizer cannot write {piece!r} behind {text[: -len(piece)][-30:]!r}, "
                    "expected words that begin a new token there, a space before them included"
                )
            counted += [counts] * new
            before = tokens
        return Continuation(torch.tensor(before[start:]), torch.tensor(counted), unsafe)


def _asks_alike(tokenizer: PreTrainedTokenizerBase, date: str | None, arguments: Mapping[str, Any], asked: str) -> bool:
    """Whether a chat template asks the same with these arguments."""
    try:
        return ChatTemplate(tokenizer, date, arguments).render_question(_SOME, "Seven.") == asked
    except InputError:
        # It cannot do without.
        return False


def _question(settings: GuardConfig) -> GuardQuestion:
    """The preset's with what is written in its place."""
    written = {key: value for key, value in vars(settings).items() if key != "preset" and value not in (None, {})}
    if settings.preset is None:
        return GuardQuestion(**written)
    question = PRESETS[settings.preset]
    if "prefix" in written:
        question = replace(question, approximation="")
    if "prompt" in written:
        question = replace(question, template_arguments={}, needed=())
    return replace(question, **written)


class GuardScorer:
    """Scores with a guard model, in packed rows.

    Args:
        module: A `Policy`, or an engine around one. It is put into evaluation mode.
        guard: What it is asked.
        name: Of the cost, for messages.
        max_tokens: Longest question the model is given (tokens), where it has positions for as many.
        token_budget: Largest row (tokens). A longer question gets one of its own.
        device: Where the rows go.
        backend: Of the ops.
        agree_on_count: As for `ModelScorer`.

    Attributes:
        truncated: Responses that lost their end so far, because the question about them was too long.
    """

    def __init__(
        self,
        module: nn.Module,
        guard: Guard,
        *,
        name: str,
        max_tokens: int,
        token_budget: int,
        device: torch.device,
        backend: str = "auto",
        agree_on_count: Callable[[int], int] = lambda count: count,
    ) -> None:
        self.name, self.truncated = name, 0
        module.eval()
        model: Any = getattr(module, "module", module).model
        self._module, self._guard, self._device, self._backend = module, guard, device, backend
        self._token_budget, self._agree_on_count = token_budget, agree_on_count
        self._shape = Shape.of(model)
        self._shares = not getattr(model.base_model, PADDED, False) and model.config._attn_implementation == PACKED
        self._max_tokens = min(max_tokens, position_limit(model) or max_tokens) - guard.longest_answer
        if guard.question.approximation:
            log.info("the %s guard: %s", name, guard.question.approximation)

    @torch.no_grad()
    def score(self, rollout: Rollout) -> torch.Tensor:
        """log p(unsafe) − log p(safe) of each response; every rank must call it, as for `ModelScorer.score`.

        Raises:
            InputError: A prompt leaves no room for a response.
        """
        questions = [self._tokens(rollout.asked(i), response) for i, response in enumerate(rollout.responses)]
        answers = self._guard.continuations
        extra = sum(len(own.tokens) for own in answers)
        lengths = [len(own) * (1 if self._shares else len(answers)) + extra for own in questions]
        rows = split_by_tokens(lengths, self._token_budget, [forward_work(self._shape, [length]) for length in lengths])
        scores = torch.zeros(len(questions))
        # First, or a rank with fewer would wait here while another waits for it in a forward.
        count = self._agree_on_count(len(rows))
        for row in rows:
            scores[row] = self._forward([questions[i] for i in row])
        for _ in range(count - len(rows)):
            self._forward([torch.zeros(1, dtype=torch.int64)])
        return scores

    def _tokens(self, asked: Dialogue, response: str) -> torch.Tensor:
        tokens = self._guard.encode(self._guard.render(asked, response))
        if len(tokens) > self._max_tokens:
            self.truncated += 1
            own = self._guard.encode(response)
            # What is behind the response in the question has to stay.
            while len(tokens) > self._max_tokens and own:
                own = own[: max(0, len(own) - (len(tokens) - self._max_tokens))]
                tokens = self._guard.encode(self._guard.render(asked, self._guard.tokenizer.decode(own)))
            if len(tokens) > self._max_tokens:
                self._guard.check_room(asked, self._max_tokens + self._guard.longest_answer)
        return torch.tensor(tokens)

    def _forward(self, questions: Sequence[torch.Tensor]) -> torch.Tensor:
        """Of several questions: float32 [S], CPU."""
        answers = self._guard.continuations
        prompts = [question for question in questions for _ in answers]
        batch = pack(prompts, [own.tokens for own in answers] * len(questions), self._device, self._shares)

        def at_head(hidden: torch.Tensor, projection: Projection, packed: PackedBatch) -> torch.Tensor:
            return linear_log_probs(
                hidden, projection.weight, packed.targets, backend=self._backend, **projection.options
            )

        log_probs = self._module(batch, at_head).float()
        counted = torch.cat([own.counted for own in answers] * len(questions)).to(log_probs.device)
        sums = log_probs.new_zeros(len(prompts)).index_add_(0, batch.sequence_ids, log_probs * counted)
        sums = sums.view(len(questions), len(answers))
        unsafe = torch.tensor([own.unsafe for own in answers], device=sums.device)
        return (sums[:, unsafe].logsumexp(1) - sums[:, ~unsafe].logsumexp(1)).cpu()
