"""Whole steps of the main job, and what of them is model work. Run under torchrun, with the options of the main job:

    torchrun --standalone --nproc-per-node 2 -m bench.step_phase OUT.json --config ... --total_steps 5

Beside the phases that the job itself logs, every call of a model under an engine is timed: the forwards that give
log-probabilities, the update's forward, backward and optimizer step. What is left of a step without these, generation
and scoring, is overhead: packing, advantages, what ranks say to each other, logging. The first step is not counted.
"""

import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from repo_fast.config import TrainConfig, parse
from repo_fast.engine import Engine, start_distributed, stop_distributed
from repo_fast.jobs.inputs import read_inputs
from repo_fast.jobs.trainer import Trainer
from repo_fast.report.metrics import read_metrics
from repo_fast.speed.throughput import PHASES

MODEL_WORK = ("forward", "backward", "optimizer")


class Stopwatch:
    """Adds up the seconds of named calls, step by step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._seconds: dict[str, float] = defaultdict(float)

    def watch(self, kind: type, method: str, name: str) -> None:
        """From here on, time every call of a class's method. A step ends with a call of `step`."""
        original: Callable[..., Any] = getattr(kind, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self._seconds[name] += time.perf_counter() - start
                if name == "step":
                    self.steps.append(dict(self._seconds))
                    self._seconds.clear()

        setattr(kind, method, timed)


def summarize(steps: list[dict[str, float]], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a step took, on the first rank.

    Args:
        steps: Seconds by name, of `step` and of its model work.
        records: The metrics of the same steps.

    Returns:
        Medians over the steps: `seconds` of the step and its parts; `overhead_share`, what is neither model work nor
        generation nor scoring; and the job's own `metrics` of its phases.
    """
    steps, records = steps[1:], records[1:]
    rows = [
        {**watched, **{f"{name}": record[f"{name}_seconds"] for name in ("generate", "score")}}
        for watched, record in zip(steps, records, strict=True)
    ]
    shares = [1 - sum(row[name] for name in (*MODEL_WORK, "generate", "score")) / row["step"] for row in rows]
    names = [f"{phase}_{what}" for phase in PHASES for what in ("seconds", "tokens", "tokens_per_second", "peak_gb")]
    return {
        "steps": len(rows),
        "seconds": {name: statistics.median(row[name] for row in rows) for name in rows[0]},
        "overhead_share": statistics.median(shares),
        "metrics": {
            name: statistics.median(record[name] for record in records)
            for name in (*names, "padding_share", "tokens_per_second", "response_length")
        },
    }


def main(out: str, *options: str) -> None:
    """Train, and write what came out, on the first rank."""
    config = parse(list(options), TrainConfig)
    inputs = read_inputs(config)
    ranks = start_distributed()
    trainer = Trainer(config, inputs, ranks)
    watch = Stopwatch()
    for method, name in (("__call__", "forward"), ("backward", "backward"), ("step", "optimizer")):
        watch.watch(Engine, method, name)
    watch.watch(Trainer, "_take_step", "step")
    trainer.run()
    if ranks.is_first:
        records = read_metrics(trainer.output_dir / "metrics.jsonl")
        Path(out).write_text(json.dumps(summarize(watch.steps, records)))
    stop_distributed()


if __name__ == "__main__":
    main(*sys.argv[1:])
