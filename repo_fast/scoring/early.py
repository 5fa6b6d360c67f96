"""Scores of functions and judges while other responses are still drawn: they wait, for a server or a process.

A scoring model is not called so: it computes on the device that draws, and under ZeRO-3 all ranks have to call it.
"""

import math
import queue
import threading
from collections.abc import Collection, Mapping, Sequence
from itertools import compress

import torch

from repo_fast.rollout import Request
from repo_fast.scoring.functions import FunctionScorer
from repo_fast.scoring.judged import JudgedScorer


class EarlyScores:
    """Calls functions in a thread beside the one that draws, which tells it of responses as a sampler's `finished`.

    There is one thread, so that a function is never called twice at once; what became known during a call is scored
    together in the next. A function that failed is not called again. The thread does not keep a process alive.

    Args:
        scorers: The functions by name.
        requests: What is drawn for.
        device: Of this rank: a thread has a current CUDA device of its own.
        exempt: Ids of prompts, by function, whose responses it is not given. Their score is -inf.
    """

    def __init__(
        self,
        scorers: Mapping[str, FunctionScorer | JudgedScorer],
        requests: Sequence[Request],
        device: torch.device,
        exempt: Mapping[str, Collection[int]] | None = None,
    ) -> None:
        self._scorers, self._requests, self._device, self._exempt = scorers, requests, device, exempt or {}
        # Places and texts of responses; None after the last.
        self._known: queue.SimpleQueue[tuple[Sequence[int], Sequence[str]] | None] = queue.SimpleQueue()
        self._scores: dict[int, dict[str, float]] = {}
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="scores", daemon=True)
        self._thread.start()

    def __call__(self, places: Sequence[int], responses: Sequence[str]) -> None:
        self._known.put((places, responses))

    def scores(self) -> list[dict[str, float]]:
        """Of every request, by function; waits for what is not scored yet. To be called once, after the last response.

        Raises:
            InputError: A function failed, or did not return one finite number a response.
        """
        self._known.put(None)
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return [self._scores[place] for place in range(len(self._requests))]

    def _run(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        more = True
        while more:
            known = [self._known.get()]
            while not self._known.empty():
                known.append(self._known.get())
            more = known[-1] is not None
            pairs = [pair for part in known if part is not None for pair in zip(*part, strict=True)]
            if not pairs:
                continue
            try:
                for name, scorer in self._scorers.items():
                    for (place, _), score in zip(pairs, self._score(name, scorer, pairs), strict=True):
                        self._scores.setdefault(place, {})[name] = score
            except Exception as error:
                self._failure = error
                return

    def _score(self, name: str, scorer: FunctionScorer | JudgedScorer, pairs: Sequence[tuple[int, str]]) -> list[float]:
        """Of places with their responses."""
        prompts = [self._requests[place].prompt for place, _ in pairs]
        asked = [prompt.id not in self._exempt.get(name, ()) for prompt in prompts]
        scored = iter(
            scorer.score_texts(
                [prompt.text for prompt in compress(prompts, asked)],
                [response for _, response in compress(pairs, asked)],
            )
        )
        return [next(scored) if is_asked else -math.inf for is_asked in asked]
