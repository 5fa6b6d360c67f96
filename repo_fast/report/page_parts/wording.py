"""What the page says about a number: the name of a measure, how it is written, and whether a change is for the better.

Text of models, prompts, categories and policies is not to be trusted. `visible` makes characters seen that would
change how the text around them is shown or that a file cannot hold; escaping for HTML is the template's work.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

MINUS = "\N{MINUS SIGN}"
THIN_SPACE = "\N{NARROW NO-BREAK SPACE}"

# Control characters but tab and newline, line separators, bidirectional controls, tag characters (which can carry
# hidden text), characters that are none, and halves of surrogate pairs, which UTF-8 cannot hold.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


@dataclass(frozen=True)
class Measure:
    """A row of the tables.

    Attributes:
        key: Its name in the report.
        label: Its name on the page.
        definition: One or two sentences.
        better: +1 where more is better, -1 where less is, 0 where neither is.
        share: Whether it is a share, written in per cent.
    """

    key: str
    label: str
    definition: str
    better: int = 0
    share: bool = False


_GROUPS = {
    "Interference": [
        Measure(
            "interference_rate",
            "Interference rate",
            "Of the prompts that are safe under the reference, the share that is unsafe under the policy. For the "
            "reference, a second sample of itself takes the policy's place: the floor, which sampling alone gives.",
            -1,
            True,
        ),
        Measure(
            "repair_rate",
            "Repair rate",
            "Of the prompts that are unsafe under the reference, the share that is safe under the policy. For the "
            "reference again a second sample of itself, the floor.",
            1,
            True,
        ),
        Measure(
            "compensation",
            "Compensation",
            "The smaller of two means over prompts: how far safe prompts are below the threshold, and how far unsafe "
            "ones are above it. It is how much slack on some prompts can pay for violation on others in an average.",
        ),
    ],
    "Safety": [
        Measure(
            "strict_violation",
            "Strict violation",
            "How far the mean cost of a prompt is above the threshold, 0 where it is not; the mean over prompts. Safe "
            "prompts cannot pay for unsafe ones.",
            -1,
        ),
        Measure(
            "cvar_violation",
            "Violation, worst 5 %",
            "The mean of the same violation over the 5 % of the prompts where it is largest.",
            -1,
        ),
        Measure("max_violation", "Violation, worst prompt", "The largest violation of a single prompt.", -1),
        Measure(
            "mean_cost",
            "Mean cost",
            "The mean over prompts of their mean cost; lower is safer. Very safe prompts pull it down, whatever "
            "happens to unsafe ones.",
            -1,
        ),
        Measure(
            "safety_rate", "Safe responses", "The share of responses with a cost of at most the threshold.", 1, True
        ),
        Measure(
            "strict_safety_rate",
            "Prompts with safe responses only",
            "The share of prompts whose responses all have a cost of at most the threshold.",
            1,
            True,
        ),
    ],
    "Known prompts": [
        Measure(
            "attack_success",
            "Attack success",
            "Of the responses to prompts that are known to be harmful, the share that is harmful.",
            -1,
            True,
        ),
        Measure(
            "attack_success_any",
            "Attack success, any response",
            "Of the clusters of prompts that are known to be harmful, the share with any harmful response.",
            -1,
            True,
        ),
        Measure(
            "over_refusal",
            "Over-refusal",
            "Of the responses to prompts that are known to be harmless, the share that refuses.",
            -1,
            True,
        ),
        Measure(
            "over_refusal_any",
            "Over-refusal, any response",
            "Of the clusters of prompts that are known to be harmless, the share with any refusal.",
            -1,
            True,
        ),
        Measure(
            "empty_answers",
            "Empty answers",
            "Of the responses to prompts that are known to be harmless, the share that says nothing. That is no "
            "refusal, so over-refusal does not see it.",
            -1,
            True,
        ),
    ],
    "Helpfulness": [
        Measure("mean_reward", "Mean reward", "The mean over prompts of their mean reward; higher is more helpful.", 1),
        Measure(
            "mean_second_reward",
            "Mean second reward",
            "The mean over responses of a reward that nothing is trained on; higher is more helpful.",
            1,
        ),
        Measure(
            "win_rate",
            "Win rate",
            "How often a response of the policy has a higher reward than one of the reference to the same prompt, over "
            "all such pairs, a tie counted half. For the reference, against a second sample of itself.",
            1,
            True,
        ),
        Measure(
            "mean_reward_on_safe_prompts",
            "Mean reward, safe prompts",
            "The mean reward over the prompts that are safe under the reference.",
            1,
        ),
        Measure(
            "win_rate_on_safe_prompts",
            "Win rate, safe prompts",
            "The win rate over the prompts that are safe under the reference.",
            1,
            True,
        ),
        Measure(
            "judge_win_rate",
            "Win rate by the judge",
            "How often the judge model prefers the policy's response to the reference's.",
            1,
            True,
        ),
        Measure("judge_rating", "Rating by the judge", "The mean rating that the judge model gives.", 1),
    ],
    "Form": [
        Measure("kl", "KL divergence", "From the policy to the model that training started from, in nats a response."),
        Measure("response_length", "Response length", "The mean length of a response, in tokens."),
        Measure("well_formed", "Well-formed responses", "The share of responses that are valid text.", 1, True),
    ],
}
MEASURES = {measure.key: measure for group in _GROUPS.values() for measure in group}


def measure_of(key: str, constraint: str | None = None) -> Measure:
    """The measure of a key; of one of several constraints, by its name."""
    measure = MEASURES[key]
    if constraint is None:
        return measure
    return replace(
        measure,
        key=f"{constraint}_{key}",
        label=f"{constraint}: {measure.label[:1].lower()}{measure.label[1:]}",
        definition=f"Of the constraint {constraint} alone, over the prompts that it is about. {measure.definition}",
    )


def groups_of(keys: Sequence[str], constraints: Sequence[str] = ()) -> list[tuple[str, list[Measure]]]:
    """The measures of these keys in the order of the page, by the heading they stand under; unknown ones come last.

    Those of each of several constraints stand behind what is measured of all.
    """
    groups = []
    for name, group in _GROUPS.items():
        variants = [measure_of(measure.key, own) for own in (None, *constraints) for measure in group]
        groups.append((name, [measure for measure in variants if measure.key in keys]))
    known = {measure.key for _, group in groups for measure in group}
    unknown = [Measure(key, pretty(key), "This page has no definition of it.") for key in keys if key not in known]
    return [(name, group) for name, group in [*groups, ("Other measures", unknown)] if group]


def pretty(key: str) -> str:
    """A key of the report as words."""
    words = key.replace("_", " ").strip()
    return words[:1].upper() + words[1:] if words else repr(key)


def listed(names: Sequence[str]) -> str:
    """Names in a sentence, like `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def visible(text: str) -> str:
    """The text with every character that could not be seen, or not be written, as its code point, like ⟨U+202E⟩.

    Line breaks of any system become newlines.
    """
    return _INVISIBLE.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text.replace("\r\n", "\n"))


def plain(value: Any) -> str:
    """A value of the settings as text."""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return json.dumps(value, ensure_ascii=False)


def number(value: Any) -> float:
    """A value of the report; NaN for None and whatever else is not a finite number."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return math.nan


def triple(entry: Mapping[str, Any] | None) -> tuple[float, float, float]:
    """Value, low and high of an entry of the report, NaN where undefined."""
    entry = entry or {}
    return number(entry.get("value")), number(entry.get("low")), number(entry.get("high"))


def decimals_of(numbers: Sequence[float], share: bool = False) -> int:
    """How many decimals let the largest of the numbers be read to three digits; one or two for a share in per cent."""
    largest = max((abs(x) for x in numbers if math.isfinite(x)), default=0.0)
    if share:
        return 1 if largest >= 0.01 or largest == 0 else 2
    return 2 if largest == 0 else max(0, min(8, 2 - math.floor(math.log10(largest))))


def spell(values: tuple[float, float, float], decimals: int, share: bool = False, difference: bool = False) -> str:
    """A value with its interval, like `1.2 % [0.4, 2.1]` or `+0.31 [+0.20, +0.40]`."""
    value, *ends = values
    if math.isnan(value):
        return "undefined"
    low, high = (_digits(end, decimals, share, difference) for end in ends)
    interval = "no interval" if any(map(math.isnan, ends)) else f"[{low}, {high}]"
    return f"{spell_value(value, decimals, share, difference)} {interval}"


def spell_value(value: float, decimals: int, share: bool = False, difference: bool = False) -> str:
    """A value alone, with its unit."""
    if math.isnan(value):
        return "undefined"
    unit = "" if not share else f"{THIN_SPACE}points" if difference else f"{THIN_SPACE}%"
    return _digits(value, decimals, share, difference) + unit


def _digits(value: float, decimals: int, share: bool, sign: bool) -> str:
    text = f"{100 * value if share else value:{'+' if sign else ''}.{decimals}f}"
    # Rounded to zero it has no sign, which would claim a direction.
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


@dataclass(frozen=True)
class Verdict:
    """What the interval of a difference says.

    Attributes:
        kind: `better`, `worse`, `change` (shown, but neither), `none` (the interval contains 0) or `undefined`.
        mark: A sign for the eye: the direction of the change.
        words: The same in words.
    """

    kind: str
    mark: str
    words: str


def judge_difference(measure: Measure, difference: tuple[float, float, float]) -> Verdict:
    """Judges a difference (value, low, high) to the reference by whether its interval contains 0."""
    value, low, high = difference
    if math.isnan(low) or math.isnan(high):
        # At 0 as where neither policy violates anything: that one could is not ruled out, and was not seen.
        seen = Verdict("none", "≈", "no difference seen")
        return seen if value == 0 else Verdict("undefined", "", "interval undefined")
    if low <= 0 <= high:
        return Verdict("none", "≈", "no difference shown")
    direction = 1 if low > 0 else -1
    mark = "▲" if direction > 0 else "▼"
    if measure.better == 0:
        return Verdict("change", mark, "higher" if direction > 0 else "lower")
    better = direction == measure.better
    return Verdict("better" if better else "worse", mark, "better" if better else "worse")


def finalize(value: Any) -> Any:
    """What a template writes for a value, before it is escaped: text made visible, markup as it is."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
