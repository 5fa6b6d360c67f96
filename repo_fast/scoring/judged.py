"""Scores from a judge: a language model behind a chat endpoint rates each response by a user's rubric.

Every answer is kept from when it arrives, and found again by what was asked: a run that goes on from a checkpoint, and
draws the same responses, pays for none of them twice.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from repo_fast.config import JudgeConfig, RubricConfig
from repo_fast.errors import InputError
from repo_fast.judging.client import ChatClient, Request
from repo_fast.judging.judge import QUESTION
from repo_fast.judging.prompts import read_rating, rubric_message
from repo_fast.rollout import Rollout

# A malformed answer is asked for again, in other words: the same would be answered the same.
_ATTEMPTS = 3


class JudgedScorer:
    """Asks a judge about each response.

    Args:
        model: Name of the judge's model.
        settings: Its endpoint, and the rubric.
        name: `reward`, `cost`, or that of one of several costs, for messages.
        cache: File of its answers, this process's own.
        others: Those of other ranks, also of those that there were before the run went on: nothing in them is asked
            again.
        ranks: How many share the budget. What all files have counts for it.

    Attributes:
        truncated: 0: nothing is cut here.

    Raises:
        InputError: As for `ChatClient`.
    """

    def __init__(
        self,
        model: str,
        settings: RubricConfig,
        name: str,
        cache: Path,
        others: Iterable[Path] = (),
        ranks: int = 1,
    ) -> None:
        self.name, self.truncated, self._rubric = name, 0, settings.rubric
        endpoint = {key: value for key, value in vars(settings).items() if key != "rubric"}
        self._client = ChatClient(JudgeConfig(**endpoint, model=model), cache, others)
        self._client.count_cached(ranks)

    def probe(self) -> None:
        """Ask one question, so that an endpoint that refuses, or answers no number, is known at once.

        Raises:
            InputError: As `score`.
        """
        self._client.ask_anew(self._request(*QUESTION))
        self.score_texts([QUESTION[0]], [QUESTION[1]])

    def score(self, rollout: Rollout) -> torch.Tensor:
        """The judge's number for each response: float32 [S], CPU, from 1 to 10.

        Raises:
            InputError: The estimate, together with what was spent, is above the budget; the endpoint fails; or it
                answers no number, three times. Answers that came before are kept.
        """
        return torch.tensor(self.score_texts(rollout.prompts, rollout.responses))

    def score_texts(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """The same of texts. Not to be called where an event loop runs in the same thread."""
        found: dict[int, float] = {}
        for attempt in range(_ATTEMPTS):
            left = [i for i in range(len(prompts)) if i not in found]
            if not left:
                break
            replies = self._client.ask([self._request(prompts[i], responses[i], attempt) for i in left])
            ratings = [(i, read_rating(reply.answer)) for i, reply in zip(left, replies, strict=True)]
            found |= {i: rating for i, rating in ratings if rating is not None}
            malformed = [
                (i, reply.answer) for (i, rating), reply in zip(ratings, replies, strict=True) if rating is None
            ]
        else:
            for i, answer in malformed:
                raise InputError(
                    f"the judge of the {self.name} answered {answer[:80]!r} the last of {_ATTEMPTS} times, expected a "
                    f"whole number from 1 to 10; the prompt begins {prompts[i][:60]!r}"
                )
        return [found[i] for i in range(len(prompts))]

    def _request(self, prompt: str, response: str, attempt: int = 0) -> Request:
        return self._client.request(prompt, rubric_message(self._rubric, prompt, response, attempt))
