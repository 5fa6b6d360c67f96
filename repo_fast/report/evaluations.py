"""The responses of an evaluation with their scores, `eval_NAME.jsonl`: one JSON object a response."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from repo_fast.report.jsonl import Value, open_log, read_records, write_record
from repo_fast.report.measures import Evaluation


def write_evaluation(path: Path, rows: Iterable[Mapping[str, Value]]) -> None:
    """Write an evaluation, over an older one of that name.

    Args:
        path: The file.
        rows: A mapping a response, with `step`, `prompt_id`, `category`, `prompt`, `response`, `reward`, `cost`, `kl`
            (nats), `response_length` (tokens) and, where it is checked, `well_formed`.
    """
    path.unlink(missing_ok=True)
    file = open_log(path, None)
    try:
        for row in rows:
            write_record(file, row)
    finally:
        file.close()


def read_evaluation(path: Path) -> tuple[Evaluation, dict[int, str | None]]:
    """Read what `write_evaluation` wrote.

    Args:
        path: The file.

    Returns:
        The evaluation, and the category of each prompt by its id.

    Raises:
        InputError: The file is missing or has a malformed line.
    """
    rows = list(read_records(path))

    def column(name: str) -> list:
        return [row[name] for row in rows]

    evaluation = Evaluation(
        prompt_ids=column("prompt_id"),
        rewards=column("reward"),
        costs=column("cost"),
        kl=column("kl"),
        response_lengths=column("response_length"),
        well_formed=column("well_formed") if rows and "well_formed" in rows[0] else None,
    )
    return evaluation, {row["prompt_id"]: row["category"] for row in rows}  # type: ignore[misc]
