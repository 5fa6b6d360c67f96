"""Scores from a Python callable `package.module:function` that maps (prompts, responses) to a list of numbers.

What the callable does is the user's, so whatever goes wrong in it is reported in one line that says which scorer,
which function, and where there is one, which response. A NaN is refused: it would pass for a safe cost.
"""

import importlib
import numbers
import os
import sys
import traceback
from collections.abc import Callable, Sequence

import torch

from repo_fast.errors import InputError
from repo_fast.rollout import Rollout

# Scores are kept in float32.
_LARGEST = torch.finfo(torch.float32).max


class FunctionScorer:
    """Calls a function with all of a rank's prompts and responses.

    The function is found now, and called first when scoring.

    Args:
        path: `package.module:function`. Modules in the current folder are found too, after installed ones.
        name: `reward` or `cost`, for messages.

    Attributes:
        function: What is called.

    Raises:
        InputError: The module cannot be imported, or has no such callable.
    """

    def __init__(self, path: str, name: str) -> None:
        self.path, self.name, self.truncated = path, name, 0
        self.function = self._resolve()

    def score(self, rollout: Rollout) -> torch.Tensor:
        """The function's score of each response.

        Args:
            rollout: Its prompts and responses are given to the function, as two lists of strings.

        Returns:
            float32 [S], CPU, all finite.

        Raises:
            InputError: The function raised, or did not return one finite number a response.
        """
        return torch.tensor(self.score_texts(rollout.prompts, rollout.responses))

    def score_texts(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """The function's score of each response, all finite.

        Raises:
            InputError: As for `score`.
        """
        prompts, responses = list(prompts), list(responses)
        if not responses:
            return []
        try:
            returned = self.function(prompts, responses)
        except (Exception, SystemExit) as error:
            raise InputError(f"{self} raised {_describe(error)}{_place(error)}") from error
        # Arrays and tensors, which give plain numbers in one go.
        values = returned.tolist() if hasattr(returned, "tolist") else returned
        if not isinstance(values, (list, tuple)):
            raise InputError(f"{self} returned a {type(returned).__name__}, expected a list of {len(prompts)} numbers")
        if len(values) != len(prompts):
            raise InputError(f"{self} returned {len(values)} scores for {len(prompts)} responses")
        return [self._number(value, i, prompts[i]) for i, value in enumerate(values)]

    def _number(self, value: object, index: int, prompt: str) -> float:
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if not isinstance(value, numbers.Real) or not abs(value) <= _LARGEST:
            raise InputError(
                f"{self} returned {value!r} for response {index}, expected a finite number, at most "
                f"{_LARGEST:.2g} in size; the prompt begins {prompt[:60]!r}"
            )
        return float(value)

    def _resolve(self) -> Callable:
        module_name, _, function_name = self.path.partition(":")
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            module = importlib.import_module(module_name)
        except (Exception, SystemExit) as error:  # an import runs the user's code, which may raise anything
            if isinstance(error, ModuleNotFoundError) and module_name.endswith(".py"):
                named = f"{module_name.removesuffix('.py')}:{function_name}"
                raise InputError(f"{self} names a file, expected its module, without .py: {named!r}") from error
            raise InputError(f"{self}: module {module_name!r} cannot be imported: {_describe(error)}") from error
        function = getattr(module, function_name, None)
        if not callable(function):
            raise InputError(f"{self}: module {module_name!r} has no function {function_name!r}")
        return function

    def __str__(self) -> str:
        return f"the {self.name} function {self.path!r}"


def _place(error: BaseException) -> str:
    """The last line of the user's own that it came through, not of a library."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    own = [frame for frame in frames if "site-packages" not in frame.filename]
    return f", at {own[-1].filename} line {own[-1].lineno}" if own else ""


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
