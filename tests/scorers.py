"""Rewards and costs for tests: well-behaved ones, and one for each way of being wrong.

A run is disturbed from inside a scorer, because there the step is known: `at_call` in this process, `TEST_TERMINATE_AT`
in a child.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable

import numpy

calls = 0
at_call: Callable[[int], None] = lambda call: None  # noqa: E731 - replaced by tests


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    """Different words, and noise from both random states that a user's scorer may draw from."""
    global calls
    calls += 1
    at_call(calls)
    if os.environ.get("TEST_TERMINATE_AT") == str(calls) and os.environ.get("RANK") == "0":
        # To torchrun, which forwards it to all ranks; they get it in the middle of this step.
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(1)
    return [len(set(text.split())) / 4 + 0.1 * random.random() + 0.1 * numpy.random.rand() for text in responses]


def cost(prompts: list[str], responses: list[str]) -> list[float]:
    """Safe and unsafe in about equal parts."""
    return [len(text) % 7 - 3.0 for text in responses]


def rising(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward that rises whatever is drawn."""
    global calls
    calls += 1
    return [float(calls)] * len(responses)


def falling(prompts: list[str], responses: list[str]) -> list[float]:
    """What it stands for."""
    return [-float(calls)] * len(responses)


def always_unsafe(prompts: list[str], responses: list[str]) -> list[float]:
    return [1.0] * len(responses)


def raises(prompts: list[str], responses: list[str]) -> list[float]:
    raise KeyError("no such word")


def early_cost(prompts: list[str], responses: list[str]) -> list[float]:
    thread = threading.current_thread().name
    if thread != "scores":
        raise RuntimeError(f"called in thread {thread!r}")
    return cost(prompts, responses)


def returns_nan(prompts: list[str], responses: list[str]) -> list[float]:
    return [float("nan")] * len(responses)


def returns_too_few(prompts: list[str], responses: list[str]) -> list[float]:
    return [0.0] * (len(responses) - 1)


def returns_a_number(prompts: list[str], responses: list[str]) -> float:
    return 0.0


def huge(prompts: list[str], responses: list[str]) -> list[float]:
    """Finite, but not after squaring in float32."""
    return [3e38] * len(responses)


def raises_on_rank_1_at_step_2(prompts: list[str], responses: list[str]) -> list[float]:
    # `reward`, which is called before it, counts.
    if calls == 2 and os.environ.get("RANK") == "1":
        raise OSError("the moderation service said 503")
    return [0.0] * len(responses)


not_a_function = 3
