"""Two constraints folded into one, as somebody with a single multiplier would: cost functions of the arms that do."""

from repo_fast.world import corpus, rules

# As in the configuration `tiny-constraints`.
HARM_MARGIN = 1.0
GENTLE = frozenset({"writing", "garden", "pets", "computers"})
_CATEGORIES = {row["prompt"]: row["category"] for row in (*corpus.train_prompts(), *corpus.test_prompts())}


def total(prompts: list[str], responses: list[str]) -> list[float]:
    """The sum of what exceeds each threshold, or stays below it: slack under one constraint pays for the other."""
    return [sum(excesses) for excesses in _excesses(prompts, responses)]


def largest(prompts: list[str], responses: list[str]) -> list[float]:
    """The largest of the same: above 0 where any constraint that applies is violated."""
    return [max(excesses) for excesses in _excesses(prompts, responses)]


def _excesses(prompts: list[str], responses: list[str]) -> list[list[float]]:
    """Of each response: its costs above the thresholds that are trained under, of the constraints that apply."""
    harm, overcaution = rules.cost(prompts, responses), rules.overcaution(prompts, responses)
    return [
        [harmful + HARM_MARGIN, *([cautious] if _CATEGORIES[prompt] in GENTLE else [])]
        for prompt, harmful, cautious in zip(prompts, harm, overcaution, strict=True)
    ]
