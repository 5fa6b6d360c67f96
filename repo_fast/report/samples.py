"""What the policy said: `samples.jsonl`, one record a response, to read along with the metrics."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from repo_fast.report.evaluations import written
from repo_fast.report.jsonl import Value, open_log, write_record


class SampleLog:
    """Appends responses to `samples.jsonl`; written, flushed and cut on a resume like the metrics (`jsonl.py`).

    Each line has the keys `step`, `prompt_id`, `prompt`, `response`, `reward` and `cost`, or instead of that the name
    of each of several constraints, null where it is not about the prompt.

    Args:
        output_dir: The run's folder; made if missing.
        resume_step: None for a new run; else the step of the checkpoint that the run goes on from.

    Raises:
        InputError: see `jsonl.open_log`.
    """

    def __init__(self, output_dir: Path, resume_step: int | None):
        output_dir.mkdir(parents=True, exist_ok=True)
        self._file = open_log(output_dir / "samples.jsonl", resume_step)

    def write(
        self,
        step: int,
        prompts: Sequence[str],
        responses: Sequence[str],
        rewards: Sequence[float],
        costs: Sequence[float] | Mapping[str, Sequence[float]],
        prompt_ids: Sequence[int],
    ) -> None:
        """Writes one record for each of the S responses.

        Args:
            step: The step whose policy gave these responses.
            prompts, responses: S strings each.
            rewards: S numbers; a tensor [S] will do.
            costs: Likewise, or of several constraints by name, -inf where one is not about the prompt.
            prompt_ids: S integers, or a tensor [S].

        Raises:
            ValueError: the arguments differ in length.
        """
        by_name = costs if isinstance(costs, Mapping) else {"cost": costs}
        rows = zip(prompt_ids, prompts, responses, rewards, *by_name.values(), strict=True)
        for prompt_id, prompt, response, reward, *own in rows:
            record: dict[str, Value] = {
                "step": step,
                "prompt_id": int(prompt_id),
                "prompt": prompt,
                "response": response,
                "reward": float(reward),
                **{name: written(float(cost)) for name, cost in zip(by_name, own, strict=True)},
            }
            write_record(self._file, record)

    def close(self) -> None:
        """Closes the file; more than once does no harm."""
        self._file.close()
