"""What requests to a chat endpoint cost, before and after they are sent."""

import math
from dataclasses import dataclass

from repo_fast.config.judge import JudgeConfig
from repo_fast.errors import InputError

MESSAGE_TOKENS = 8
"""What a chat template puts around a message, about (tokens)."""


@dataclass(frozen=True)
class Estimate:
    """What requests will cost, before they are sent.

    Attributes:
        requests: To be sent. Exact, but for retries.
        cached: Further ones, whose answers the cache has.
        input_tokens: To be sent: a quarter of the bytes in UTF-8, and `MESSAGE_TOKENS` a message. Close for English
            prose; code and other scripts may take half as many again.
        output_tokens: At most to be answered: `max_tokens` a request.
        dollars: US dollars for these tokens; None without prices.
    """

    requests: int
    cached: int
    input_tokens: int
    output_tokens: int
    dollars: float | None

    def __str__(self) -> str:
        cost = "" if self.dollars is None else f", about {self.dollars:.4g} US dollars"
        return (
            f"{self.requests} requests ({self.cached} more are cached), about {self.input_tokens} tokens in, at most "
            f"{self.output_tokens} out{cost}"
        )


def approximate_tokens(message: str) -> int:
    return math.ceil(len(message.encode()) / 4) + MESSAGE_TOKENS


def dollars(config: JudgeConfig, input_tokens: int, output_tokens: int) -> float | None:
    """US dollars for so many tokens; None without prices."""
    if config.input_price is None or config.output_price is None:
        return None
    return (input_tokens * config.input_price + output_tokens * config.output_price) / 1e6


def check_budget(config: JudgeConfig, estimate: Estimate, spent: float | None) -> None:
    """Raise `InputError` where an estimate, with the dollars spent before, is above the budget."""
    budget = config.budget
    if budget is None or spent is None or estimate.dollars is None or spent + estimate.dollars <= budget:
        return
    raise InputError(
        f"the judge's estimated cost is {spent + estimate.dollars:.4g} US dollars ({spent:.4g} spent before; "
        f"{estimate}), expected at most the budget of {budget:.4g}"
    )
