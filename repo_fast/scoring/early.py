"""Scores of functions while other responses are still drawn: for functions that wait, for a server or a process.

A scoring model is not called so: it computes on the device that draws, and under ZeRO-3 all ranks have to call it.
"""

import queue
import threading
from collections.abc import Mapping, Sequence

import torch

from repo_fast.rollout import Request
from repo_fast.scoring.functions import FunctionScorer


class EarlyScores:
    """Calls functions in a thread beside the one that draws, which tells it of responses as a sampler's `finished`.

    There is one thread, so that a function is never called twice at once; what became known during a call is scored
    together in the next. A function that failed is not called again. The thread does not keep a process alive.

    Args:
        scorers: The functions by name.
        requests: What is drawn for.
        device: Of this rank: a thread has a current CUDA device of its own.
    """

    def __init__(
        self, scorers: Mapping[str, FunctionScorer], requests: Sequence[Request], device: torch.device
    ) -> None:
        self._scorers, self._requests, self._device = scorers, requests, device
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
            places, responses = zip(*pairs, strict=True)
            prompts = [self._requests[place].prompt.text for place in places]
            try:
                for name, scorer in self._scorers.items():
                    for place, score in zip(places, scorer.score_texts(prompts, responses), strict=True):
                        self._scores.setdefault(place, {})[name] = score
            except Exception as error:
                self._failure = error
                return
