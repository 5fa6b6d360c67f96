"""How many optimizer steps of a run were skipped, and when that ends it."""

from repo_fast.errors import InputError


class SkippedSteps:
    """Counts optimizer steps that were skipped for a non-finite loss or gradient.

    Args:
        limit: How many in a row end the run.
        key: The option that says so, for the message.
    """

    def __init__(self, limit: int, key: str) -> None:
        self._limit, self._key = limit, key
        self.total = 0
        self._in_a_row = 0

    def count(self, applied: bool) -> None:
        """Note one optimizer step.

        Raises:
            InputError: Too many in a row were skipped.
        """
        self._in_a_row = 0 if applied else self._in_a_row + 1
        self.total += not applied
        if self._in_a_row >= self._limit:
            raise InputError(
                f"{self._in_a_row} optimizer steps in a row had a non-finite loss or gradient, expected fewer than "
                f"{self._key} ({self._limit}); the last checkpoint is intact"
            )

    def state_dict(self) -> list[int]:
        return [self.total, self._in_a_row]

    def load_state_dict(self, state: list[int]) -> None:
        self.total, self._in_a_row = state
