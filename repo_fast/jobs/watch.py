"""What a training run is told of itself: its warnings, and which of its evaluations is the best so far.

Both depend on nothing but the rows of `metrics.jsonl` and `evaluations.jsonl`, of which a checkpoint keeps what is
needed: a resumed run says what an unbroken one would have, in whichever folder it goes on. The checkpoint of a step
comes before the step's evaluation, so a resumed run looks at that one again; what it had said of it stands in
`warnings.jsonl`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from repo_fast.config import ONLY, TrainConfig
from repo_fast.report.best import Best, better
from repo_fast.report.jsonl import Value, open_log, read_records, write_record
from repo_fast.report.warning_rules import (
    AT_MAXIMUM,
    EVALUATION_RULES,
    FIRST,
    STEP_KEYS,
    STEP_RULES,
    History,
    Rule,
    Warned,
)

FILE = "warnings.jsonl"
# Of a run that a warning of `evaluation.stop_on` ended.
EXIT_STATUS = 5


class Watch:
    """The rules, applied to each step and evaluation as it comes. The first rank's; the others' has seen nothing.

    Args:
        config: Of the run.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._stop_on, self._measure = config.evaluation.stop_on, config.checkpoint.keep_best
        self._kl_bound, self._constraints = config.evaluation.kl_bound, tuple(config.costs)
        self._multiplier_max: dict[str, float] = {
            "" if name == ONLY else name: cost.multiplier_max  # type: ignore[misc]
            for name, cost in config.controlled.items()
        }
        names = [key if name == ONLY else f"{name}_{key}" for name in config.costs for key in STEP_KEYS]
        self._keys = ("step", *STEP_KEYS, *names)
        self._steps: list[dict[str, Value]] = []
        self._evaluations: list[dict[str, Value]] = []
        # By rule and what it is about: the step that the warning began at.
        self._begun: dict[str, int] = {}
        self.best: Best | None = None
        self._file: TextIO | None = None
        self._written: set[tuple[Value, Value, Value]] = set()
        self._say: Callable[[str], None] = print

    def open(self, output_dir: Path, resume_step: int | None, say: Callable[[str], None]) -> None:
        """Open `warnings.jsonl`, cut to the step that is resumed from. Before anything is seen.

        Args:
            output_dir: The run's folder.
            resume_step: None for a new run.
            say: What a warning is said by.
        """
        path = output_dir / FILE
        self._file, self._say = open_log(path, resume_step), say
        self._written = {(row["step"], row["rule"], row["about"]) for row in read_records(path)}

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def see_step(self, row: Mapping[str, Value]) -> None:
        """Look at a row of `metrics.jsonl`."""
        self._steps.append({key: row[key] for key in self._keys if key in row})
        # What the rules do not look at would grow with the run.
        del self._steps[FIRST:-AT_MAXIMUM]
        self._apply(STEP_RULES, int(row["step"]))  # type: ignore[arg-type]

    def see_evaluation(self, row: Mapping[str, Value]) -> None:
        """Look at a row of `evaluations.jsonl`; that of step 0 is the start, which no policy is kept of."""
        step = int(row["step"])  # type: ignore[arg-type]
        if step <= self._seen:
            return
        self._evaluations.append(dict(row))
        del self._evaluations[1:-1]
        if step:
            self._apply(EVALUATION_RULES, step)
            self._compare(row)

    @property
    def _seen(self) -> int:
        """The step of the last evaluation; -1 before the first."""
        return int(self._evaluations[-1]["step"]) if self._evaluations else -1  # type: ignore[arg-type]

    def catch_up(self, rows: Iterable[Mapping[str, Value]]) -> None:
        """Look at the evaluations of before a resume that the checkpoint does not know, as that of its own step; and at
        all of them for the best, where none was chosen by this measure."""
        chooses, seen = self.best is None, self._seen
        for row in rows:
            if int(row["step"]) > seen:  # type: ignore[arg-type]
                self.see_evaluation(row)
            elif chooses and row["step"]:
                self._compare(row)

    def _compare(self, row: Mapping[str, Value]) -> None:
        start = next((first for first in self._evaluations[:1] if first["step"] == 0), None)
        if self._measure is not None:
            self.best = better(row, self._measure, self.best, self._constraints, start) or self.best

    def stopped_by(self) -> str | None:
        """The rule of `evaluation.stop_on` of which a warning stands, however long; None: none."""
        rules = (key.partition(":")[0] for key in self._begun)
        return next((rule for rule in rules if rule in self._stop_on), None)

    def _found(self, rules: Mapping[str, Rule]) -> dict[str, Warned]:
        history = History(self._steps, self._evaluations, self._kl_bound, self._multiplier_max)
        return {f"{rule}:{own.about}": own for rule, apply in rules.items() for own in apply(history)}

    def _apply(self, rules: Mapping[str, Rule], step: int) -> None:
        found = self._found(rules)
        for key in [key for key in self._begun if key.partition(":")[0] in rules and key not in found]:
            del self._begun[key]
        for key, warned in found.items():
            rule = key.partition(":")[0]
            if self._begun.setdefault(key, step) != step or (step, rule, warned.about) in self._written:
                continue
            record = {"step": step, "rule": rule, "about": warned.about, **warned.values, "text": warned.text}
            assert self._file is not None, "a watch that is not open has seen something"
            write_record(self._file, record)
            self._say(f"warning ({rule}) at step {step}: {warned.text}")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "steps": list(self._steps),
            "evaluations": list(self._evaluations),
            "begun": dict(self._begun),
            "best": None if self.best is None else asdict(self.best),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps, self._evaluations = list(state["steps"]), list(state["evaluations"])
        # The bounds may be others than they were.
        standing = self._found({**STEP_RULES, **EVALUATION_RULES})
        self._begun = {key: step for key, step in state["begun"].items() if key in standing}
        best = state["best"]
        # By another measure nothing has been compared yet.
        self.best = Best(**best) if best is not None and best["measure"] == self._measure else None
