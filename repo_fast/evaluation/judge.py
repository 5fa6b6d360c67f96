"""Judgments of responses by a language model behind a chat endpoint.

Two responses are compared in both orders, because judges prefer a position (Zheng et al. 2023, arXiv 2306.05685): one
that always answers A gives every comparison 0.5.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from repo_fast.config.judge import JudgeConfig
from repo_fast.evaluation.judge_prompts import comparison_message, rating_message, read_choice, read_rating
from repo_fast.judging.budget import Estimate
from repo_fast.judging.cache import Reply
from repo_fast.judging.client import ChatClient, Progress, Request

_PROBE = ("How many days has a week?", "Seven.", "Eight.")


@dataclass(frozen=True)
class Comparison:
    """Two responses to one prompt, all without template."""

    prompt: str
    first: str
    second: str


@dataclass(frozen=True)
class Answer:
    """A response to a prompt, both without template."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Verdict:
    """What the judge says about a comparison.

    Attributes:
        score: Of the first response against the second, the mean over both orders, in [0, 1]: 1 is better, 0.5 a tie, 0
            worse. None where an answer is malformed.
        consistent: Whether both orders give the same. None where there is no score.
        answers: What the judge wrote, first with the first response shown first, then with it shown second. Empty for
            two identical responses, which are a tie without being asked.
    """

    score: float | None
    consistent: bool | None
    answers: tuple[str, ...]


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
    """What a judge has done since it was made.

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


Item = Comparison | Answer


class Judge:
    """Asks a language model for judgments, and keeps its answers.

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
            InputError: As `compare`.
        """
        item = Answer(*_PROBE[:2]) if self.config.mode == "single" else Comparison(*_PROBE)
        self._client.ask_anew(self._requests(item)[0])

    def estimate(self, items: Sequence[Item]) -> Estimate:
        """What judging these items, all in one call, would send and cost. Sends nothing."""
        return self._client.estimate([request for item in items for request in self._requests(item)])

    def compare(self, comparisons: Sequence[Comparison], progress: Progress | None = None) -> list[Verdict]:
        """Compare responses in pairs, each pair in both orders.

        Not to be called where an event loop runs in the same thread.

        Args:
            comparisons: Two responses that are identical are a tie, and are not sent.
            progress: Called with the number of answered requests, and of all to be sent, whenever one is answered.

        Returns:
            A verdict for each comparison, in their order.

        Raises:
            InputError: The estimate, together with what this judge has spent, is above the budget; or the endpoint
                cannot be reached, refuses the request, or still fails after the retries. Answers that came before are
                in the cache.
        """
        verdicts = []
        for comparison, replies in zip(comparisons, self._ask(comparisons, progress), strict=True):
            verdict = self._verdict(replies)
            self._counts["identical"] += comparison.first == comparison.second
            self._counts["compared"] += bool(replies) and verdict.score is not None
            self._counts["position_flips"] += verdict.consistent is False
            verdicts.append(verdict)
        self._count_scores(verdicts)
        return verdicts

    def rate(self, answers: Sequence[Answer], progress: Progress | None = None) -> list[Rating]:
        """Rate single responses from 1 to 10. Otherwise as `compare`."""
        ratings = []
        for replies in self._ask(answers, progress):
            (reply,) = replies
            ratings.append(Rating(self._read(read_rating, reply), reply.answer))
        self._count_scores(ratings)
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

    def _verdict(self, replies: Sequence[Reply]) -> Verdict:
        if not replies:
            return Verdict(0.5, True, ())
        answers = tuple(reply.answer for reply in replies)
        shown_first, shown_second = (self._read(read_choice, reply) for reply in replies)
        if shown_first is None or shown_second is None:
            return Verdict(None, None, answers)
        return Verdict((shown_first + 1 - shown_second) / 2, shown_first == 1 - shown_second, answers)

    def _read(self, read: Callable[[str], float | None], reply: Reply) -> float | None:
        score = read(reply.answer)
        self._counts["malformed"] += score is None
        self._counts["cut"] += score is None and reply.finish_reason == "length"
        return score

    def _count_scores(self, judged: Sequence[Verdict] | Sequence[Rating]) -> None:
        self._counts["items"] += len(judged)
        self._counts["unscored"] += sum(one.score is None for one in judged)

    def _requests(self, item: Item) -> list[Request]:
        criterion = self.config.criterion
        if isinstance(item, Answer):
            messages = [rating_message(criterion, item.prompt, item.response)]
        elif item.first == item.second:
            messages = []
        else:
            orders = ((item.first, item.second), (item.second, item.first))
            messages = [comparison_message(criterion, item.prompt, *order) for order in orders]
        return [self._client.request(item.prompt, message) for message in messages]

    def _ask(self, items: Sequence[Item], progress: Progress | None) -> list[list[Reply]]:
        wanted = [self._requests(item) for item in items]
        replies = iter(self._client.ask([request for requests in wanted for request in requests], progress))
        return [[next(replies) for _ in requests] for requests in wanted]
