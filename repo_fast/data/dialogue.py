"""What a response answers: the turns up to there, and the system text above them."""

from collections.abc import Sequence
from dataclasses import dataclass

HH_USER, HH_ASSISTANT = "\n\nHuman: ", "\n\nAssistant:"


@dataclass(frozen=True)
class Dialogue:
    """The turns of user and assistant, up to where the assistant is to answer.

    Attributes:
        turns: The user's first and last, in turn, so an odd number of texts.
        system: What stands above them; None without.
    """

    turns: tuple[str, ...]
    system: str | None = None

    @classmethod
    def of(cls, prompt: "str | Sequence[str] | Dialogue") -> "Dialogue":
        """A prompt as a dialogue: a text is the user's only turn."""
        if isinstance(prompt, Dialogue):
            return prompt
        return cls((prompt,) if isinstance(prompt, str) else tuple(prompt))

    @property
    def text(self) -> str:
        """It as one text, for logs, functions and judges: the user's turn as it is, or speakers marked as hh-rlhf
        does, below the system text."""
        if len(self.turns) == 1 and self.system is None:
            return self.turns[0]
        marks = [HH_ASSISTANT + " " if i % 2 else HH_USER for i in range(len(self.turns))]
        return (self.system or "") + "".join(mark + turn for mark, turn in zip(marks, self.turns, strict=True))
