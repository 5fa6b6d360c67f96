"""The heads of a cost model: what each of its outputs calls unsafe, in the labels of PKU-SafeRLHF.

What the labels of a response are for a head, and how it orders a pair, stands in `repo_fast/data/heads.py`.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from repo_fast.config.checks import require
from repo_fast.config.constraints import check_name

# Ji et al. 2024 (arXiv 2406.15513), as the keys of `response_0_harm_category` are spelled
# (https://huggingface.co/datasets/PKU-Alignment/PKU-SafeRLHF).
HARM_CATEGORIES = (
    "Endangering National Security",
    "Insulting Behavior",
    "Discriminatory Behavior",
    "Endangering Public Health",
    "Copyright Issues",
    "Violence",
    "Drugs",
    "Privacy Violation",
    "Economic Crime",
    "Mental Manipulation",
    "Human Trafficking",
    "Physical Harm",
    "Sexual Content",
    "Cybercrime",
    "Disrupting Public Order",
    "Environmental Damage",
    "Psychological Harm",
    "White-Collar Crime",
    "Animal Abuse",
)
# Minor, moderate, severe; 0 is a response without harm.
MOST_SEVERE = 3


@dataclass(frozen=True)
class HeadConfig:
    """What one head of a cost model calls unsafe."""

    categories: tuple[str, ...] | None = None
    """Harm of any of these kinds, by PKU-SafeRLHF's names ("Physical Harm", ...). Null: whatever is labelled unsafe."""
    severity: int = 1
    """And at least so severe: 2 (moderate) or 3 (severe). 1: all of it, whatever its severity."""


def check_heads(heads: Mapping[str, HeadConfig], kind: str) -> None:
    """Raise `InputError` for heads that cannot be learned."""
    if heads:
        require(kind == "cost", "kind", kind, f"cost with heads ({', '.join(map(str, heads))})")
    for name, head in heads.items():
        check_name("head", name)
        key = f"heads.{name}"
        require(head.categories is None or bool(head.categories), f"{key}.categories", [], "names, or null for any")
        for category in head.categories or ():
            once = (head.categories or ()).count(category) == 1
            require(once, f"{key}.categories", list(head.categories or ()), "each name once")
            near = difflib.get_close_matches(category, HARM_CATEGORIES, n=1, cutoff=0.0)[0]
            known = category in HARM_CATEGORIES
            require(known, f"{key}.categories", category, f"PKU-SafeRLHF's names; the nearest is {near!r}")
        in_range = 1 <= head.severity <= MOST_SEVERE
        require(in_range, f"{key}.severity", head.severity, f"a whole number from 1 to {MOST_SEVERE}")
