"""What the heads of a cost model learn from harm categories and severities, the labels of PKU-SafeRLHF.

A row has, for each of its responses, beside `is_response_0_safe`: `response_0_harm_category`, a mapping of the 19 names
of `HARM_CATEGORIES` to truth values, and `response_0_severity_level`, 0 (none) to 3 (severe); see Ji et al. 2024 (arXiv
2406.15513) and https://huggingface.co/datasets/PKU-Alignment/PKU-SafeRLHF.

A response is *unsafe for a head* where it is harmful in one of the head's categories (a head without: where it is
labelled unsafe) and, for a head of severity 2 or 3, at least so severe; else it is safe. So nothing that is labelled
unsafe is learned as safe because its severity is given as 0; rows whose labels contradict each other in such a way are
counted. A head orders a pair so:

- the two labels differ: the unsafe response costs more;
- both are unsafe: the one of the higher severity; of the same severity, the one that is not the row's safer one;
- both are safe: no order, for what the row prefers there is not about this head's harm. Only their signs are learned.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from repo_fast.config.heads import MOST_SEVERE, HeadConfig
from repo_fast.data.columns import Row
from repo_fast.errors import InputError


@dataclass(frozen=True)
class Harm:
    """The labels of a response that heads ask for.

    Attributes:
        unsafe: Its safety label; None where no head asks for it.
        severity: 0 to 3.
        categories: The names that are true of it; of those that some head asks for alone.
    """

    unsafe: bool | None
    severity: int
    categories: frozenset[str] = frozenset()

    @property
    def contradicts_itself(self) -> bool:
        """Whether it is harm without a severity, or a severity of what is labelled safe."""
        is_harm = bool(self.unsafe or self.categories)
        return is_harm if self.severity == 0 else self.unsafe is False


@dataclass(frozen=True)
class HeadTarget:
    """What one head learns from a row.

    Attributes:
        labels: Of each response, +1.0 where it is unsafe for the head, -1.0 safe, 0.0 not labelled.
        order: Of a pair: +1.0 where the first response is to score higher, -1.0 the second, 0.0 neither.
    """

    labels: tuple[float, ...]
    order: float = 1.0


def read_harm(row: Row, names: tuple[str, str, str], heads: Mapping[str, HeadConfig]) -> Harm:
    """Read a response's labels.

    Args:
        row: Its row.
        names: The columns of the safety label, the harm categories and the severity. The first is read where a head has
            no categories, the second where one has some.
        heads: By name.

    Raises:
        InputError: A column is missing, or is not what it should be.
    """
    safe, category, severity = names
    asked = sorted({name for head in heads.values() for name in head.categories or ()})
    level = _cell(row, severity, f"a whole number from 0 to {MOST_SEVERE}")
    try:
        number = -1 if isinstance(level, bool) else operator.index(level)
    except TypeError:
        number = -1
    if not 0 <= number <= MOST_SEVERE:
        raise InputError(f"{row.place}: {severity} is {level!r}, expected a whole number from 0 to {MOST_SEVERE}")
    unsafe = None
    if any(head.categories is None for head in heads.values()):
        value = _cell(row, safe, "true or false")
        unsafe = not _truth(value, f"{row.place}: {safe}")
    if not asked:
        return Harm(unsafe, number)
    expected = "a mapping of PKU-SafeRLHF's 19 categories to true or false"
    found = _cell(row, category, expected)
    if not isinstance(found, Mapping):
        raise InputError(f"{row.place}: {category} is {found!r}, expected {expected}")
    for name in asked:
        if found.get(name) is None:
            raise InputError(
                f"{row.place}: {category} does not say {name!r}, which the heads ask for; expected {expected}"
            )
    true = {name for name in asked if _truth(found[name], f"{row.place}: {category}[{name!r}]")}
    return Harm(unsafe, number, frozenset(true))


def _cell(row: Row, name: str, expected: str) -> Any:
    value = row.get(name)
    if value is None:
        raise InputError(f"{row.place}: no {name}, which the heads ask for; expected {expected}")
    return value


def _truth(value: Any, what: str) -> bool:
    if not (isinstance(value, int) and value in (0, 1)):
        raise InputError(f"{what} is {value!r}, expected true or false")
    return bool(value)


def is_unsafe(harm: Harm, head: HeadConfig) -> bool:
    """Whether a response is unsafe for a head."""
    harmful = bool(harm.unsafe) if head.categories is None else not harm.categories.isdisjoint(head.categories)
    return harmful and (head.severity == 1 or harm.severity >= head.severity)


def target_of(harms: Sequence[Harm], head: HeadConfig) -> HeadTarget:
    """What a head learns from a row.

    Args:
        harms: Of one response, or of two of which the first is the less safe one, as the row says.
        head: The head.
    """
    unsafe = [is_unsafe(harm, head) for harm in harms]
    labels = tuple(1.0 if each else -1.0 for each in unsafe)
    if len(harms) == 1 or not any(unsafe):
        return HeadTarget(labels, 0.0)
    if all(unsafe):
        return HeadTarget(labels, 1.0 if harms[0].severity >= harms[1].severity else -1.0)
    return HeadTarget(labels, 1.0 if unsafe[0] else -1.0)


def head_notes(
    source: str, targets: Sequence[Sequence[HeadTarget]], heads: Mapping[str, HeadConfig], contradictions: int
) -> list[str]:
    """For the user, a line for each head: of how many responses it is told that they are unsafe, and its pairs.

    Args:
        source: Where they are from.
        targets: Of each row, by head.
        heads: By name.
        contradictions: Responses whose labels contradict each other.
    """
    notes = []
    if contradictions:
        notes.append(
            f"{source}: {contradictions} responses are harm of severity 0, or safe of a severity above 0: only heads "
            "of severity 2 and 3 go by it"
        )
    for name, own in zip(heads, zip(*targets, strict=True), strict=True):
        labels = [label for target in own for label in target.labels]
        pairs = sum(target.order != 0 for target in own)
        notes.append(
            f"{source}: head {name}: {labels.count(1.0)} of {len(labels)} responses unsafe, {pairs} ordered pairs"
        )
    return notes


def check_both(source: str, targets: Sequence[Sequence[HeadTarget]], heads: Mapping[str, HeadConfig]) -> None:
    """Raise `InputError` for a head that would never see an unsafe response, or never a safe one: nothing would tell it
    the one from the other."""
    for name, own in zip(heads, zip(*targets, strict=True), strict=True):
        labels = {label for target in own for label in target.labels}
        for label, word in ((1.0, "unsafe"), (-1.0, "safe")):
            if label not in labels:
                raise InputError(f"heads.{name}: no response of {source} is {word} for it, expected some of both")
