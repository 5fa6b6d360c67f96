"""The responses of an evaluation with their scores, `eval_NAME.jsonl`: one JSON object a response."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from repo_fast.report.jsonl import Value, read_records, write_log
from repo_fast.report.measures import Evaluation

Judge = Callable[[list[str], list[str]], list]


def write_evaluation(path: Path, rows: Iterable[Mapping[str, Value]]) -> None:
    """Write an evaluation, over an older one of that name.

    Args:
        path: The file.
        rows: A mapping a response, with `step`, `prompt_id`, `category`, `prompt`, `response`, `reward`, `cost` (or
            that of each of several constraints under its name, None where it is not about the prompt), `kl` (nats),
            `response_length` (tokens) and, where they are there, `well_formed` and `second_reward`.
    """
    aside = path.with_name(path.name + ".tmp")
    write_log(aside, rows)
    os.replace(aside, path)


def written(cost: float) -> float | None:
    """A cost as it is written down: None for -inf, where a constraint is not about the prompt."""
    return None if cost == -math.inf else cost


def read_evaluation(path: Path, constraints: Sequence[str] = ()) -> tuple[Evaluation, dict[int, str | None]]:
    """Read what `write_evaluation` wrote.

    Args:
        path: The file.
        constraints: Names of several, whose costs are read. None: the one's.

    Returns:
        The evaluation, and the category of each prompt by its id.

    Raises:
        InputError: The file is missing or has a malformed line.
    """
    rows = list(read_records(path))
    well_formed = _column(rows, "well_formed") if rows and "well_formed" in rows[0] else None
    costs: Any = {name: [-math.inf if own is None else own for own in _column(rows, name)] for name in constraints}
    evaluation = _evaluation(rows, _column(rows, "reward"), costs or _column(rows, "cost"), well_formed)
    return evaluation, {row["prompt_id"]: row["category"] for row in rows}  # type: ignore[misc]


def judge_evaluation(path: Path, reward: Judge, cost: Judge, well_formed: Judge) -> Evaluation:
    """The responses of an evaluation under other scores than the ones they were written with.

    Args:
        path: What `write_evaluation` wrote.
        reward, cost, well_formed: Map lists of prompts and responses to a value for each.

    Raises:
        InputError: The file is missing or has a malformed line.
    """
    rows = list(read_records(path))
    texts = _column(rows, "prompt"), _column(rows, "response")
    return _evaluation(rows, reward(*texts), cost(*texts), well_formed(*texts))


def _evaluation(rows: list[dict], rewards: list, costs: Any, well_formed: list | None) -> Evaluation:
    def column(own: list) -> np.ndarray:
        # As they were scored: as a float64, a cost of 0.1 in float32 would be above a threshold of 0.1.
        return np.asarray(own, dtype=np.float32)

    return Evaluation(
        prompt_ids=_column(rows, "prompt_id"),
        rewards=rewards,
        costs={name: column(own) for name, own in costs.items()} if isinstance(costs, dict) else column(costs),
        kl=_column(rows, "kl"),
        response_lengths=_column(rows, "response_length"),
        well_formed=well_formed,
        second_rewards=_column(rows, "second_reward") if rows and "second_reward" in rows[0] else None,
    )


def _column(rows: list[dict], name: str) -> list:
    return [row[name] for row in rows]
