"""Scores of functions while other responses are still drawn: for functions that wait, for a server or a process.

A scoring model is not called so: it computes on the device that draws, and under ZeRO-3 all ranks have to call it.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from repo_fast.rollout import Request
from repo_fast.scoring.functions import FunctionScorer


class EarlyScores:
    """Calls functions in a thread beside the one that draws; is told of responses as a sampler's `finished`.

    One thread, so that a function is never called twice at once. To be used as a context: functions that are not yet
    called when it is left are not called any more.

    Args:
        scorers: The functions by name.
        requests: What is drawn for.
    """

    def __init__(self, scorers: Mapping[str, FunctionScorer], requests: Sequence[Request]) -> None:
        self._scorers, self._requests = scorers, requests
        self._thread = ThreadPoolExecutor(1, "scores")
        self._scored: list[tuple[Sequence[int], Future[dict[str, list[float]]]]] = []

    def __call__(self, places: Sequence[int], responses: Sequence[str]) -> None:
        prompts = [self._requests[place].prompt.text for place in places]
        self._scored.append((places, self._thread.submit(self._score, prompts, responses)))

    def _score(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, list[float]]:
        return {name: scorer.score_texts(prompts, responses) for name, scorer in self._scorers.items()}

    def scores(self) -> list[dict[str, float]]:
        """Of every request, by function; waits for what is not scored yet.

        Raises:
            InputError: A function failed, or did not return one finite number a response.
        """
        found: dict[int, dict[str, float]] = {}
        for places, future in self._scored:
            for name, values in future.result().items():
                for place, value in zip(places, values, strict=True):
                    found.setdefault(place, {})[name] = value
        return [found[place] for place in range(len(self._requests))]

    def __enter__(self) -> "EarlyScores":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
