"""What a judge is asked about an evaluation's responses, and how its answers become measures."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from repo_fast.data import Prompt
from repo_fast.judging import Answer, Comparison, Judge
from repo_fast.report.comparison import Judgments

log = logging.getLogger(__name__)

SECONDS_BETWEEN_MESSAGES = 20.0


def judge_policies(
    judge: Judge | None,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    reference: str,
    prompts: Mapping[int, Prompt],
) -> tuple[dict[str, Judgments], dict[str, Any] | None]:
    """Ask the judge: of each policy's responses against the reference's with the same number, or of each by itself.

    Args:
        judge: Who is asked; None: nobody.
        rows: The responses of each policy: `prompt_id`, `sample`, `response`.
        reference: Name of the policy that the others are compared with.
        prompts: By id.

    Returns:
        The judgments by policy; those without a score are left out, and counted in the second: what the report says of
        the judge. None without one.

    Raises:
        InputError: The judge cannot be asked; see `Judge`.
    """
    if judge is None:
        return {}, None
    config = judge.config
    judged = {
        name: [row for row in own if row["sample"] < config.samples_per_prompt]
        for name, own in rows.items()
        if config.mode == "single" or name != reference
    }
    flat = [(name, row) for name, own in judged.items() for row in own]
    # All at once, so that the estimate is of everything.
    if config.mode == "single":
        measure = "judge_rating"
        answers = [Answer(prompts[row["prompt_id"]].text, row["response"]) for _, row in flat]
        scores = [rating.score for rating in judge.rate(answers, _say_progress())]
    else:
        measure = "judge_win_rate"
        against = {(row["prompt_id"], row["sample"]): row["response"] for row in rows[reference]}
        comparisons = [
            Comparison(prompts[row["prompt_id"]].text, row["response"], against[row["prompt_id"], row["sample"]])
            for _, row in flat
        ]
        scores = [verdict.score for verdict in judge.compare(comparisons, _say_progress())]
    judgments = {}
    for name in judged:
        scored = [
            (row["prompt_id"], score)
            for (owner, row), score in zip(flat, scores, strict=True)
            if owner == name and score is not None
        ]
        if scored:
            judgments[name] = Judgments(measure, *(list(column) for column in zip(*scored, strict=True)))
    about = {"model": config.model, "mode": config.mode, "criterion": config.criterion}
    return judgments, about | {"summary": dataclasses.asdict(judge.summary())}


def _say_progress() -> Callable[[int, int], None]:
    said = time.monotonic()

    def say(answered: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said > SECONDS_BETWEEN_MESSAGES or answered == total:
            said = time.monotonic()
            log.info("  %d of %d judgments", answered, total)

    return say
