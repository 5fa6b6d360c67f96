"""Times the update and experience phases of the embedded recipe `tiny` on two backends of the ops, in turn.

    OMP_NUM_THREADS=1 python -m bench.trainer.tiny_update [--rounds 15]

One rollout is drawn; then each round computes its experience and updates on it, once with `torch` and once with what
`auto` chooses here. The ratio is the median over rounds. Updates move the weights: the work is that of training.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from repo_fast.config import parse
from repo_fast.engine import start_distributed, stop_distributed
from repo_fast.jobs.inputs import read_inputs
from repo_fast.jobs.trainer import Trainer
from repo_fast.ops.dispatch import resolve
from repo_fast.rollout.seeds import Purpose


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """(the result, seconds)."""
    start = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - start


def measure(rounds: int, output_dir: Path) -> dict[str, dict[str, list[float]]]:
    """Seconds by phase and backend, a number a round."""
    config = parse(["--config", "tiny", "--output_dir", str(output_dir)])
    inputs = read_inputs(config)
    ranks = start_distributed()
    trainer = Trainer(config, inputs, ranks)
    prompts = inputs.requests[: config.rollout.prompts_per_step]
    rollout = trainer.generate(*trainer.share_requests(prompts, config.rollout.responses_per_prompt, Purpose.TRAINING))
    scores = trainer.score(rollout)
    learner = trainer.learner
    backends = "torch", resolve("fused_rectified_policy_loss", "auto", ranks.device)
    seconds: dict[str, dict[str, list[float]]] = {
        phase: {b: [] for b in backends} for phase in ("experience", "update")
    }
    for counted in [False] + [True] * rounds:
        for backend in backends:
            learner.ops_backend = backend
            (experience, _), experience_seconds = timed(learner.experience, rollout, scores)
            _, update_seconds = timed(learner.update, experience)
            if counted:
                seconds["experience"][backend].append(experience_seconds)
                seconds["update"][backend].append(update_seconds)
    stop_distributed()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(parser.parse_args().rounds, Path(folder) / "run")
    for phase, by_backend in seconds.items():
        (slow, baseline), (name, ours) = by_backend.items()
        ratio = statistics.median(a / b for a, b in zip(baseline, ours, strict=True))
        milliseconds = [1e3 * statistics.median(times) for times in (baseline, ours)]
        print(
            f"{phase}: {slow} {milliseconds[0]:.0f} ms, {name} {milliseconds[1]:.0f} ms, {slow} / {name} = {ratio:.3f}"
        )


if __name__ == "__main__":
    main()
