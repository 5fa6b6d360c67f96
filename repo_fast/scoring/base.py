"""What a scorer is, and which kind a path means."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from repo_fast.config.sections import GUARD, JUDGE
from repo_fast.errors import InputError
from repo_fast.models.model_config import folder_of, may_be_on_the_hub
from repo_fast.rollout import Rollout

_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class Scorer(Protocol):
    """Gives each response a number.

    Attributes:
        name: `reward`, `cost`, or that of one of several costs, for messages.
        truncated: Responses so far whose text was cut to fit the scorer.
    """

    name: str
    truncated: int

    def score(self, rollout: Rollout) -> torch.Tensor:
        """The score of each of a rank's S responses: float32 [S], CPU."""
        ...


@dataclass(frozen=True)
class ScorerSpec:
    """Where scores come from.

    Attributes:
        path: `package.module:function` for a function; a folder or hub name for a score model, or a guard; the name of
            a judge's model.
        kind: Which of them it is.
    """

    path: str
    kind: Literal["function", "model", "guard", "judge"]


def load_scorer_spec(path: str, name: str) -> ScorerSpec:
    """Decides what a path means, without importing or loading it.

    Args:
        path: As the user gave it.
        name: `reward` or `cost`, for the message.

    Raises:
        InputError: It is neither a function, nor a model folder, nor a hub name.
    """
    if path.startswith(JUDGE):
        return ScorerSpec(path.removeprefix(JUDGE), "judge")
    if path.startswith(GUARD):
        return ScorerSpec(_model_path(path.removeprefix(GUARD), f"{name} guard"), "guard")
    if _FUNCTION.fullmatch(path) and folder_of(path) is None:
        return ScorerSpec(path, "function")
    try:
        return ScorerSpec(_model_path(path, f"{name} model"), "model")
    except _NotAModelError:
        raise InputError(
            f"the {name} {path!r} is neither a function 'package.module:function', which maps (prompts, responses) to "
            "a list of numbers, nor the folder (or hub name 'owner/model') of a score model, nor guard:FOLDER or "
            "judge:MODEL"
        ) from None


class _NotAModelError(InputError):
    """A path that is no folder of a model, nor a name that may be one on the hub."""


def _model_path(path: str, what: str) -> str:
    """The folder or hub name of a model."""
    folder = folder_of(path)
    if path and folder is not None:
        # Of adapters by themselves the reader of configurations says more.
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise InputError(f"the {what} folder {path!r} has no config.json")
        return str(folder)
    # One without an owner is more often a mistyped path.
    if "/" in path and may_be_on_the_hub(path):
        return path
    raise _NotAModelError(f"the {what} {path!r} is neither a folder nor a hub name 'owner/model'")


def finite_scores(scorer: Scorer, rollout: Rollout, exempt: Collection[int] = ()) -> torch.Tensor:
    """The score of each response: float32 [S], CPU.

    Args:
        scorer: Every rank must call one that is a model.
        rollout: This rank's responses.
        exempt: Ids of prompts whose responses the scorer is not given.

    Returns:
        -inf for the responses of exempt prompts.

    Raises:
        InputError: A score is not finite: a NaN would pass for a safe cost.
    """
    asked = [i for i, prompt in enumerate(rollout.prompt_ids.tolist()) if prompt not in exempt]
    found = scorer.score(rollout if len(asked) == len(rollout.prompts) else rollout.select(asked))
    if not found.isfinite().all():
        raise InputError(f"the {scorer.name} model gave a score that is not finite, expected numbers")
    scores = torch.full([len(rollout.prompts)], -torch.inf)
    scores[asked] = found
    return scores
