"""What a judge is asked about an evaluation's responses, and how its answers become measures."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from repo_fast.data import Prompt
from repo_fast.evaluation.judge import ComparingJudge, Comparison
from repo_fast.judging.judge import Answer
from repo_fast.report.comparison import Judgments

log = logging.getLogger(__name__)

# The responses of each policy by its name: `prompt_id`, `sample`, `response`.
Rows = Mapping[str, Sequence[Mapping[str, Any]]]

SECONDS_BETWEEN_MESSAGES = 20.0


def judge_policies(
    judge: ComparingJudge,
    rows: Rows,
    reference: str,
    prompts: Mapping[int, Prompt],
) -> tuple[dict[str, Judgments], dict[str, Any]]:
    """Ask the judge: of each policy's responses against the reference's with the same number, or of each by itself.

    Args:
        judge: Who is asked.
        rows: The responses.
        reference: Name of the policy that the others are compared with.
        prompts: By id.

    Returns:
        The judgments by policy; those without a score are left out, and counted by policy in the second: what the
        report says of the judge.

    Raises:
        InputError: The judge cannot be asked; see `Judge.rate`.
    """
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
    judgments, unscored = {}, {}
    for name, own in judged.items():
        scored = [
            (row["prompt_id"], score)
            for (owner, row), score in zip(flat, scores, strict=True)
            if owner == name and score is not None
        ]
        unscored[name] = len(own) - len(scored)
        if scored:
            columns = (list(column) for column in zip(*scored, strict=True))
            # Against itself, the reference wins half.
            judgments[name] = Judgments(measure, *columns, reference=0.5 if config.mode == "pairwise" else None)
    about = {"model": config.model, "mode": config.mode, "criterion": config.criterion, "unscored": unscored}
    return judgments, about | {"summary": dataclasses.asdict(judge.summary())}


def _say_progress() -> Callable[[int, int], None]:
    said = time.monotonic()

    def say(answered: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said > SECONDS_BETWEEN_MESSAGES or answered == total:
            said = time.monotonic()
            log.info("  %d of %d judgments", answered, total)

    return say
