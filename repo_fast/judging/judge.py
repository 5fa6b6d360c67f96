"""Judgments of single responses by a language model behind a chat endpoint, and what all judgments share."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repo_fast.config.judge import JudgeConfig
from repo_fast.judging.budget import Estimate
from repo_fast.judging.cache import Reply
from repo_fast.judging.client import ChatClient, Progress, Request
from repo_fast.judging.prompts import rating_message, read_rating

QUESTION = ("How many days has a week?", "Seven.")
"""What an endpoint is tried on: a prompt and its response."""


@dataclass(frozen=True)
class Answer:
    """A response to a prompt, both without template."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Rating:
    """What the judge says about a single response.

    Attributes:
        score: A whole number from 1 (worst) to 10 (best). None where the answer is malformed.
        answer: What the judge wrote.
    """

    score: float | None
    answer: str


@dataclass(frozen=True)
class Summary:
    """What a judge has done since it was made; of comparisons 0, where it only rates.

    Attributes:
        items: Comparisons and ratings returned.
        identical: Comparisons of two identical responses among them.
        unscored: Items without a score.
        malformed: Answers that could not be read, of the two of a comparison and the one of a rating.
        cut: Malformed answers that ended at `max_tokens`.
        position_flips: Comparisons whose two orders disagree.
        position_flip_rate: Their share of the scored comparisons of different responses; None if there is none.
        requests: Answered by the endpoint; retries are not counted.
        cached: Requests whose answer the cache had.
        input_tokens: Sent in these requests, as the endpoint counts; 0 where it does not say.
        output_tokens: Answered, likewise.
        dollars: US dollars for these tokens; None without prices.
    """

    items: int
    identical: int
    unscored: int
    malformed: int
    cut: int
    position_flips: int
    position_flip_rate: float | None
    requests: int
    cached: int
    input_tokens: int
    output_tokens: int
    dollars: float | None


class Judge:
    """Asks a language model to rate responses, and keeps its answers.

    Args:
        config: Of the endpoint and of what it is asked; with a url.
        cache: JSON-lines file of answers, made if missing, its folder too. Its last line is dropped where a kill tore
            it. A file belongs to one judge at a time.

    Raises:
        InputError: The configuration cannot be honoured, the package `openai` is missing, or the cache cannot be used.
    """

    def __init__(self, config: JudgeConfig, cache: Path) -> None:
        self.config = config
        self._client = ChatClient(config, cache)
        self._counts: Counter[str] = Counter()

    def probe(self) -> None:
        """Ask one question, so that an endpoint that refuses is known at once.

        Raises:
            InputError: As `rate`.
        """
        self._client.ask_anew(self._requests(self._probe_item())[0])

    def estimate(self, items: Sequence[Any]) -> Estimate:
        """What judging these items, all in one call, would send and cost. Sends nothing."""
        return self._client.estimate([request for item in items for request in self._requests(item)])

    def rate(self, answers: Sequence[Answer], progress: Progress | None = None) -> list[Rating]:
        """Rate single responses from 1 to 10.

        Not to be called where an event loop runs in the same thread.

        Args:
            answers: The responses.
            progress: Called with the number of answered requests, and of all to be sent, whenever one is answered.

        Returns:
            A rating for each response, in their order.

        Raises:
            InputError: The estimate, together with what this judge has spent, is above the budget; or the endpoint
                cannot be reached, refuses the request, or still fails after the retries. Answers that came before are
                in the cache.
        """
        ratings = []
        for replies in self._ask(answers, progress):
            (reply,) = replies
            ratings.append(Rating(self._read(read_rating, reply), reply.answer))
        self._count_scores([rating.score for rating in ratings])
        return ratings

    def summary(self) -> Summary:
        """What was asked and answered so far, in all calls."""
        counts, compared = self._counts + self._client.counts, self._counts["compared"]
        counted = {field.name for field in dataclasses.fields(Summary)} - {"position_flip_rate", "dollars"}
        return Summary(
            position_flip_rate=counts["position_flips"] / compared if compared else None,
            dollars=self._client.spent(),
            **{name: counts[name] for name in counted},
        )

    def _probe_item(self) -> Any:
        return Answer(*QUESTION)

    def _messages(self, item: Any) -> list[str]:
        """What is asked about an item."""
        return [rating_message(self.config.criterion, item.prompt, item.response)]

    def _read(self, read: Callable[[str], float | None], reply: Reply) -> float | None:
        score = read(reply.answer)
        self._counts["malformed"] += score is None
        self._counts["cut"] += score is None and reply.finish_reason == "length"
        return score

    def _count_scores(self, scores: Sequence[float | None]) -> None:
        self._counts["items"] += len(scores)
        self._counts["unscored"] += sum(score is None for score in scores)

    def _requests(self, item: Any) -> list[Request]:
        return [self._client.request(item.prompt, message) for message in self._messages(item)]

    def _ask(self, items: Sequence[Any], progress: Progress | None) -> list[list[Reply]]:
        wanted = [self._requests(item) for item in items]
        replies = iter(self._client.ask([request for requests in wanted for request in requests], progress))
        return [[next(replies) for _ in requests] for requests in wanted]
