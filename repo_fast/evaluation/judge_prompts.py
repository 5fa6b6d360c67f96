"""What a judge is asked about two responses, and how its choices are read; more in `judging/prompts.py`."""

from repo_fast.config.judge import Criterion
from repo_fast.judging.prompts import DEFINITIONS, MATERIAL, answer_line, only_answer, sections

_COMPARISON = """\
You compare two responses, A and B, to the same prompt, by their {criterion} alone: {definition}
Length is no merit in itself, and the order of the responses means nothing.

{material}

{sections}

Which response is better in {criterion}? Answer with A, with B, or with TIE if neither is, and with nothing else."""


def comparison_message(criterion: Criterion, prompt: str, a: str, b: str) -> str:
    return _COMPARISON.format(
        criterion=criterion,
        definition=DEFINITIONS[criterion],
        material=MATERIAL,
        sections=sections({"PROMPT": prompt, "RESPONSE A": a, "RESPONSE B": b}),
    )


_CHOICE = answer_line("(A|B|TIE)")
_CHOICE_SCORES = {"A": 1.0, "B": 0.0, "TIE": 0.5}


def read_choice(answer: str) -> float | None:
    """The score of the response shown first: 1 for A, 0 for B, 0.5 for TIE, None for a malformed answer."""
    word = only_answer(answer, _CHOICE)
    return None if word is None else _CHOICE_SCORES[word]
