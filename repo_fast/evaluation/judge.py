"""Comparisons of responses by a language model behind a chat endpoint.

Two responses are compared in both orders, because judges prefer a position (Zheng et al. 2023, arXiv 2306.05685): one
that always answers A gives every comparison 0.5.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from repo_fast.evaluation.judge_prompts import comparison_message, read_choice
from repo_fast.judging.cache import Reply
from repo_fast.judging.client import Progress
from repo_fast.judging.judge import QUESTION, Answer, Judge


@dataclass(frozen=True)
class Comparison:
    """Two responses to one prompt, all without template."""

    prompt: str
    first: str
    second: str


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


class ComparingJudge(Judge):
    """A judge that also compares responses; what it is tried on is what `config.mode` says."""

    def compare(self, comparisons: Sequence[Comparison], progress: Progress | None = None) -> list[Verdict]:
        """Compare responses in pairs, each pair in both orders.

        Otherwise as `rate`.

        Args:
            comparisons: Two responses that are identical are a tie, and are not sent.
            progress: As there.

        Returns:
            A verdict for each comparison, in their order.
        """
        verdicts = []
        for comparison, replies in zip(comparisons, self._ask(comparisons, progress), strict=True):
            verdict = self._verdict(replies)
            self._counts["identical"] += comparison.first == comparison.second
            self._counts["compared"] += bool(replies) and verdict.score is not None
            self._counts["position_flips"] += verdict.consistent is False
            verdicts.append(verdict)
        self._count_scores([verdict.score for verdict in verdicts])
        return verdicts

    def _verdict(self, replies: Sequence[Reply]) -> Verdict:
        if not replies:
            return Verdict(0.5, True, ())
        answers = tuple(reply.answer for reply in replies)
        shown_first, shown_second = (self._read(read_choice, reply) for reply in replies)
        if shown_first is None or shown_second is None:
            return Verdict(None, None, answers)
        return Verdict((shown_first + 1 - shown_second) / 2, shown_first == 1 - shown_second, answers)

    def _probe_item(self) -> Answer | Comparison:
        return Answer(*QUESTION) if self.config.mode == "single" else Comparison(*QUESTION, "Eight.")

    def _messages(self, item: Answer | Comparison) -> list[str]:
        if isinstance(item, Answer):
            return super()._messages(item)
        if item.first == item.second:
            return []
        orders = ((item.first, item.second), (item.second, item.first))
        return [comparison_message(self.config.criterion, item.prompt, *order) for order in orders]
