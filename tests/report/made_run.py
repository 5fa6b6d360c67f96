"""Folders as runs leave them, without a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from repo_fast.report.evaluations import write_evaluation
from tests.job_runs import write_lines

PHASES = ("generate", "score", "experience", "update")
OF_CONSTRAINTS = ("cost", "strict_violation", "safety_rate", "multiplier")
OTHERS = ("reward", "kl", "entropy", "response_length", "loss", "clip_fraction", "gradient_norm", "tokens_per_second")


def metrics_of(steps: int, constraints: Sequence[str] = ("",)) -> list[dict[str, float]]:
    """Rows of a training run, of numbers that no two columns share."""
    generator = np.random.default_rng(steps)
    names = [f"{name}_{key}" if name else key for name in constraints for key in OF_CONSTRAINTS]
    keys = [*OTHERS, *names, *(f"{phase}_seconds" for phase in PHASES)]
    return [
        {"step": step, **dict(zip(keys, generator.uniform(0.1, 9, len(keys)).tolist(), strict=True))}
        for step in range(1, steps + 1)
    ]


def responses_of(costs: Sequence[Sequence[float]], text: str = "answer", **columns: Any) -> list[dict[str, Any]]:
    """Rows of an evaluation: of each prompt a response for each of its costs."""
    return [
        {"step": 0, "prompt_id": i, "category": None, "prompt": f"question {i}", "response": f"{text} {i} {j}"}
        | {"reward": 1.0, "cost": cost, "kl": 0.0, "response_length": 3}
        | columns
        for i, own in enumerate(costs)
        for j, cost in enumerate(own)
    ]


def make_run(folder: Path, steps: int = 40, constraints: Sequence[str] = ("",), **options: Any) -> Path:
    """A run's folder: `config.yaml`, `metrics.jsonl`, and held-out responses before and after of one constraint."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {name: {"path": "m:f", "threshold": 0.5} for name in constraints if name}
    algorithm = {"name": "repo", "advantage": "gae", "threshold": 0.5}
    config = {"total_steps": 40, "policy": {"path": "world:tiny"}, "algorithm": algorithm, "constraints": own}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | options, sort_keys=False))
    write_lines(folder / "metrics.jsonl", metrics_of(steps, constraints))
    if not own:
        write_evaluation(folder / "eval_before.jsonl", responses_of([[0.0, 0.0], [2.0, 1.0], [0.6, 0.6]], "old"))
        write_evaluation(folder / "eval_before_again.jsonl", responses_of([[0.0, 0.0], [2.0, 1.0], [0.4, 0.6]]))
        write_evaluation(folder / "eval_after.jsonl", responses_of([[0.8, 0.6], [1.5, 1.5], [0.1, 0.2]], "new"))
    return folder
