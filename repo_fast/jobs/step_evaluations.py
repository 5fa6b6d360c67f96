"""The files of the evaluations while training: `evaluations.jsonl`, a row an evaluation, and what was drawn for each.

    evaluations/step-000020.partial.jsonl  units (`repo_fast/rollout/units.py`) with their scores, appended as they come
    evaluations/step-000020.jsonl          all responses with their scores, as `eval_after.jsonl` has them

The checkpoint of a step is complete before the first unit of its evaluation is drawn. So units on disk, up to the step
that a run resumes from, were drawn by that checkpoint's weights or those before it, and are not drawn again; those of
later steps go, as the rows of all logs do: whatever weights the resumed run gets there, it draws for itself.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from repo_fast.collectives import Ranks
from repo_fast.report.evaluations import write_evaluation
from repo_fast.report.jsonl import Value, open_log, read_records, write_record
from repo_fast.report.unit_file import UnitFile
from repo_fast.rollout.units import Unit, drawn_in_turn

FILE, FOLDER = "evaluations.jsonl", "evaluations"
_RESPONSES = re.compile(r"step-(\d{6,})(\.partial)?\.jsonl(\.tmp)?")

Row = dict[str, Value]


class StepEvaluations:
    """The evaluations of a run. All ranks have one; the first rank's has the files.

    Args:
        output_dir: The run's folder.
        units: What is drawn at each evaluation.
        ranks: This process among all.
        resume_step: None for a new run; else the step of the checkpoint that the run goes on from.
        keep_units: Whether units of an evaluation that was broken off are kept.
    """

    def __init__(
        self,
        output_dir: Path,
        units: Sequence[Unit],
        ranks: Ranks,
        resume_step: int | None,
        *,
        keep_units: bool = True,
    ) -> None:
        self._units, self._ranks, self._folder = units, ranks, output_dir / FOLDER
        self._rows: dict[int, Row] = {}
        self._file: TextIO | None = None
        # Rows of before are cut also where there will be no more.
        if not ranks.is_first or not (units or (output_dir / FILE).exists()):
            return
        # A run that starts anew after a stop before its first step evaluates its start anew, too.
        kept = -1 if resume_step == 0 else resume_step
        self._file = open_log(output_dir / FILE, kept)
        self._folder.mkdir(exist_ok=True)
        self._rows = {int(row["step"]): row for row in read_records(output_dir / FILE)}  # type: ignore[arg-type]
        for path in self._folder.iterdir():
            named = _RESPONSES.fullmatch(path.name)
            later = named is not None and kept is not None and int(named[1]) > kept
            if named and (later or (named[2] and not keep_units)):
                path.unlink()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def row(self, step: int) -> Row | None:
        """The row of a step, on the first rank; None where the step has not been evaluated to the end."""
        return self._rows.get(step)

    def responses(self, step: int) -> Path:
        """Where the responses of a step are."""
        return self._folder / f"step-{step:06d}.jsonl"

    def draw(self, step: int, draw: Callable[[Unit | None], list[Row]], stopped: Callable[[], bool]) -> bool:
        """Draw the units of a step that are not on disk, and write all of its responses. All ranks must call it.

        Args:
            step: The policy's.
            draw: Gives the scored rows of a unit; of None it gives none, and takes part in what all ranks call.
            stopped: Asked after each unit, the same on all ranks: whether the rest is left to a resumed run.

        Returns:
            Whether all responses are there.
        """
        ranks, file = self._ranks, UnitFile(self._partial(step), [len(unit.requests) for unit in self._units])
        done = 0
        with ranks.together("reading what was drawn"):
            if ranks.is_first:
                done = self._complete(file)
        done = ranks.max(done)
        left = self._units[done:]
        with file.appending(ranks.is_first) as append:
            for drawn in drawn_in_turn(left, ranks, draw):
                with ranks.together("writing what was drawn"):
                    for rows in drawn:
                        append(rows)
                done += len(drawn)
                if done < len(self._units) and stopped():
                    return False
        with ranks.together("writing an evaluation"):
            if ranks.is_first:
                write_evaluation(self.responses(step), ({**row, "step": step} for row in file.read()))
        return True

    def _complete(self, file: UnitFile) -> int:
        """How many units are on disk, all of prompts that they would be drawn for now. Others go."""
        done = file.complete()
        asked = [(request.prompt.id, request.prompt.text) for unit in self._units[:done] for request in unit.requests]
        rows = [row for row in file.read() if row["step"] < done] if done else []
        if [(row["prompt_id"], row["prompt"]) for row in rows] != asked:
            # Of a run that was gone on with, with other data (`resume_changed_data`).
            file.path.unlink()
            return 0
        return done

    def write(self, row: Mapping[str, Value]) -> None:
        """Write the row of an evaluation, whose units are then no longer needed. For the first rank to call."""
        assert self._file is not None
        write_record(self._file, row)
        step = int(row["step"])  # type: ignore[arg-type]
        self._rows[step] = dict(row)
        self._partial(step).unlink(missing_ok=True)

    def rows(self) -> list[Row]:
        """All rows, in order. On the first rank."""
        return list(self._rows.values())

    def _partial(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}.partial.jsonl"
