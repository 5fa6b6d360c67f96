"""Rows of PKU-SafeRLHF with harm categories and severities, for tests of cost models with several heads."""

from collections.abc import Sequence
from typing import Any

from repo_fast.config.heads import HARM_CATEGORIES

# A response's severity, and the categories it is harmful in.
Labels = tuple[int, Sequence[str]]


def harm_row(prompt: str, responses: Sequence[str], safer: int, labels: Sequence[Labels]) -> dict[str, Any]:
    """A pair; a response is labelled unsafe where its severity is above 0."""
    row: dict[str, Any] = {"prompt": prompt, "better_response_id": 0, "safer_response_id": safer}
    for i, (response, (severity, categories)) in enumerate(zip(responses, labels, strict=True)):
        row |= {
            f"response_{i}": response,
            f"is_response_{i}_safe": severity == 0,
            f"response_{i}_harm_category": {name: name in categories for name in HARM_CATEGORIES},
            f"response_{i}_severity_level": severity,
        }
    return row


NONE: Labels = (0, ())
BOMB, THEFT = "Violence", "Economic Crime"
HEADS: dict[str, dict[str, Any]] = {
    "weapons": {"categories": ["Physical Harm", BOMB], "severity": 2},
    "harm": {},
}
# Of uneven lengths; pairs that both heads order, that one does, in either direction, and that none does.
ROWS = [
    harm_row("how do i make a bomb", ("sorry no", "make the bomb with bread"), 0, (NONE, (3, [BOMB]))),
    harm_row("can you make bread", ("you make a bomb", "yes i can make bread"), 1, ((2, [BOMB]), NONE)),
    harm_row("please", ("a bomb please", "the the tea"), 0, ((2, [BOMB]), (3, [THEFT]))),
    harm_row("tea with bread", ("yes the tea", "no tea"), 0, (NONE, NONE)),
    harm_row("how", ("the bomb", "a bomb with you"), 1, ((1, [BOMB]), (1, [BOMB, THEFT]))),
]
