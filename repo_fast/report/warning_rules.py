"""When a run that learns is going wrong: rules on its metrics and evaluations, pure functions of numbers.

| rule | fires where | looked at |
|---|---|---|
| `kl` | the policy is far from the reference | each step |
| `entropy` | it has nearly stopped varying its responses | each step |
| `length` | responses have become very short, very long, or mostly cut | each step |
| `exploitation` | the reward rises at the expense of form, or of a second reward | each evaluation |
| `multiplier` | lambda can rise no further, and violations stay | each step |

A docstring says what exactly fires a rule, why that is wrong, and what to do. The numbers were chosen such that the
embedded default (`tiny`, seeds 0 to 2) raises none; they are no laws. Each warning is about one thing (a constraint,
say), and is said when it begins; where it ends and begins again, it is said again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from repo_fast.report.jsonl import Value

# Steps whose mean is the start, and those whose mean is the present: single steps are noisy.
FIRST, RECENT = 5, 5
# Steps that the multiplier has to be at its maximum in.
AT_MAXIMUM = 10
# Shares of what was at the start.
ENTROPY_LEFT = 0.2
SHORT, LONG = 1 / 3, 3.0
# Of responses that end by themselves; below it, most are cut at the limit.
FINISHED_LEFT = 0.5
# A difference of so many standard errors is no noise.
ERRORS = 2.0
# Of well-formed responses, a share: as many are lost to other causes in runs that go well.
FORM_LOST = 0.15
# A violation that falls by less than a tenth, and is more than half of the start's, stays.
NOT_FALLING, STILL_THERE = 0.9, 0.5

Row = Mapping[str, Value]


@dataclass(frozen=True)
class Warned:
    """What a rule found.

    Attributes:
        about: What of it: a constraint or a measure; empty where a rule is about one thing.
        values: The numbers that fired it, by name.
        text: For people: the numbers, and what to do.
    """

    about: str
    values: dict[str, float]
    text: str


@dataclass(frozen=True)
class History:
    """What is known of a run at some step.

    Rules look at no more than the first `FIRST` steps and the last `AT_MAXIMUM`, the first evaluation and the last:
    what lies between may be left out.

    Attributes:
        steps: Rows of `metrics.jsonl`, in order.
        evaluations: Rows of `evaluations.jsonl`, in order.
        kl_bound: `evaluation.kl_bound` (nats a response).
        multiplier_max: Of each constraint whose multiplier is controlled, by its name: the largest lambda. A single one
            is called '', as its metrics have no name before them.
    """

    steps: Sequence[Row]
    evaluations: Sequence[Row] = ()
    kl_bound: float = 50.0
    multiplier_max: Mapping[str, float] = field(default_factory=dict)


Rule = Callable[[History], Iterator[Warned]]


def kl(history: History) -> Iterator[Warned]:
    """The mean `kl` of the last 5 steps is above `evaluation.kl_bound`, or no number.

    Why: so far from the reference, rewards and costs that were learned near it say little, and text degenerates. What
    is far depends on the length of responses, so the bound is an option.

    What to do: raise `algorithm.kl_coefficient`, lower the learning rate, or take an earlier checkpoint; where
    responses are long and evaluations good, raise the bound.
    """
    now = _mean(history.steps[-RECENT:], "kl") if len(history.steps) >= RECENT else None
    if now is not None and not now <= history.kl_bound:
        text = f"KL {now:.3g} nats a response over {RECENT} steps, above evaluation.kl_bound {history.kl_bound:g}"
        advice = "raise algorithm.kl_coefficient, or lower the learning rate"
        yield Warned("", {"kl": now, "kl_bound": history.kl_bound}, f"{text}; {advice}")


def entropy(history: History) -> Iterator[Warned]:
    """The mean `entropy` of the last 5 steps is below 0.2 of that of the first 5 (nats a token; after 15 steps).

    Why: a policy that no longer varies its responses gives advantages nothing to compare, and learns no more.

    What to do: raise `algorithm.kl_coefficient`, give `algorithm.entropy_coefficient` a small value, or lower the
    learning rate. Where one short response to everything is what is wanted, nothing.
    """
    start, now = _start_and_now(history, "entropy")
    if start is not None and now is not None and now < ENTROPY_LEFT * start:
        text = f"entropy {now:.3g} nats a token over {RECENT} steps, {start:.3g} at the start"
        advice = "raise algorithm.kl_coefficient or algorithm.entropy_coefficient"
        yield Warned("", {"entropy": now, "entropy_at_start": start}, f"{text}; {advice}")


def length(history: History) -> Iterator[Warned]:
    """The mean `response_length` of the last 5 steps is below a third, or above the threefold, of that of the first 5;
    or the mean `finished_share` is below a half where it was above at the start (after 15 steps).

    Why: the reward or the cost is met by saying nothing, or by going on for ever; cut responses are scored as they are.

    What to do: read `samples.jsonl`; mend the reward; raise `rollout.max_new_tokens` where responses are cut.
    """
    start, now = _start_and_now(history, "response_length")
    if start is not None and now is not None and not SHORT * start <= now <= LONG * start:
        about = "short" if now < start else "long"
        text = f"responses of {now:.3g} tokens over {RECENT} steps, {start:.3g} at the start"
        values = {"response_length": now, "response_length_at_start": start}
        yield Warned(about, values, f"{text}; read samples.jsonl: is it what the reward is meant to ask for?")
    start, now = _start_and_now(history, "finished_share")
    if start is not None and now is not None and now < FINISHED_LEFT < start:
        text = f"{now:.0%} of responses end before rollout.max_new_tokens over {RECENT} steps, {start:.0%} at the start"
        values = {"finished_share": now, "finished_share_at_start": start}
        yield Warned("cut", values, f"{text}; raise the limit, or read samples.jsonl")


def exploitation(history: History) -> Iterator[Warned]:
    """In the last evaluation `mean_reward` is above that of the first by more than 2 standard errors of the difference,
    and `mean_second_reward` below its own by more than 2; or `well_formed` by more than 2 and more than 0.15.

    Why: what is learned from is rising and what it stands for is not: the policy has found what the reward gets wrong.

    What to do: take the policy of before (`checkpoint.keep_best`), cap the reward (`algorithm.reward_cap`), raise
    `algorithm.kl_coefficient`, or mend the reward.
    """
    if len(history.evaluations) < 2:
        return
    first, last = history.evaluations[0], history.evaluations[-1]
    risen = _change(first, last, "mean_reward")
    if risen is None or not risen[0] > ERRORS * risen[1]:
        return
    for name, least in (("mean_second_reward", 0.0), ("well_formed", FORM_LOST)):
        fallen = _change(first, last, name)
        if fallen is None or not -fallen[0] > max(least, ERRORS * fallen[1]):
            continue
        names = ("mean_reward", name)
        values = {key: _number(last, key) for key in names} | {f"{key}_at_start": _number(first, key) for key in names}
        moved = " and ".join(f"{key} from {_number(first, key):.3g} to {_number(last, key):.3g}" for key in names)
        yield Warned(name, values, f"{moved}; cap the reward (algorithm.reward_cap), or take an earlier policy")


def multiplier(history: History) -> Iterator[Warned]:
    """A constraint's `multiplier` was at its maximum in each of the last 10 steps, and its mean `strict_violation` of
    the last 5 of them is above 0.9 of that of the 5 before, and above half of that of the first 5 of the run (after 15
    steps).

    Why: the constraint is violated about as before, and nothing will weigh it more. Where violations are few by then,
    the multiplier is only slow to fall, and the rule is silent.

    What to do: raise `algorithm.multiplier_max` (or `constraints.NAME.multiplier_max`); see whether the threshold can
    be met at all, and whether the cost is right.
    """
    if len(history.steps) < FIRST + AT_MAXIMUM:
        return
    for name, most in history.multiplier_max.items():
        prefix = f"{name}_" if name else ""
        rows, key = history.steps[-AT_MAXIMUM:], f"{prefix}strict_violation"
        multipliers = [_number(row, f"{prefix}multiplier") for row in rows]
        # As far as rounding in the logarithm takes it.
        if not all(value >= most * (1 - 1e-6) for value in multipliers):
            continue
        start, before, now = (_mean(part, key) for part in (history.steps[:FIRST], rows[:-RECENT], rows[-RECENT:]))
        if start is None or before is None or now is None:
            continue
        if now > NOT_FALLING * before and now > STILL_THERE * start:
            of = f" of {name}" if name else ""
            text = f"lambda{of} at its maximum {most:g} for {AT_MAXIMUM} steps, strict violation {now:.3g}"
            values = {"multiplier": most, "strict_violation": now, "strict_violation_at_start": start}
            advice = "raise multiplier_max, or see whether the threshold can be met"
            yield Warned(name, values, f"{text}, {start:.3g} at the start; {advice}")


STEP_RULES: dict[str, Rule] = {"kl": kl, "entropy": entropy, "length": length, "multiplier": multiplier}
EVALUATION_RULES: dict[str, Rule] = {"exploitation": exploitation}
# What of a row the rules on steps read; those of a constraint come behind its name.
STEP_KEYS = ("kl", "entropy", "response_length", "finished_share", "multiplier", "strict_violation")


def _start_and_now(history: History, key: str) -> tuple[float | None, float | None]:
    if len(history.steps) < FIRST + AT_MAXIMUM:
        return None, None
    return _mean(history.steps[:FIRST], key), _mean(history.steps[-RECENT:], key)


def _mean(rows: Sequence[Row], key: str) -> float | None:
    """Of the rows that have it, of which a constraint that no prompt was about has none; None without any."""
    values = [_number(row, key) for row in rows if key in row]
    return float(np.mean(values)) if values else None


def _change(first: Row, last: Row, key: str) -> tuple[float, float] | None:
    """How much a measure rose, and the standard error of that; None where it was not measured."""
    if key not in first or key not in last:
        return None
    error = float(np.hypot(_number(first, f"{key}_error"), _number(last, f"{key}_error")))
    return _number(last, key) - _number(first, key), error


def _number(row: Row, key: str) -> float:
    """NaN, which fires nothing, where it is missing or no number."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else float("nan")
