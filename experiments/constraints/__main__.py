"""What do several constraints do that one does not, and how are they best run?

    python -m experiments.constraints --output_dir outputs/constraints

Makes a reward model (the first stages of `repo_fast.pipeline`), trains every arm of `settings.py` with it under the
rules' costs, several seeds each, and evaluates all policies beside the start on held-out prompts. Written are
`results.json` and `results.md`. What is complete is not made again: stopped, the same command goes on.

Three quarters of an hour on two cores. `--packaged` is the configuration `tiny-constraints` as it is, with and without
its second constraint, on other seeds, and judged on prompts that nothing was chosen by, half an hour in a folder of its
own; `--small` the same as the first with everything as small as it gets, in a minute: it shows that the experiment
runs, and nothing else.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from experiments.constraints.results import write_results
from experiments.constraints.settings import BASE, CAP_QUANTILE, SEEDS, WITHOUT, Arm, arms
from experiments.runs import START, Run, call, evaluate, interruptible, module_command, run_all

JUDGES = Path(__file__).parent / "evaluation.yaml"


@dataclass(frozen=True)
class Size:
    """How much is run.

    Attributes:
        steps: Of a run.
        seeds: Of each arm.
        samples: Responses a prompt in evaluations.
        reward: Path of the reward that is trained on.
        advantage: Option of the algorithm.
        prompts: That policies are judged on.
        chosen: Names of the arms, of which none has a cap on the reward; empty for all.
        origin: Ids of the stages that made the reward model: another at the same path has another.
    """

    steps: int
    seeds: range
    samples: int
    reward: str
    advantage: str = "grpo"
    prompts: str = "world:test"
    chosen: tuple[str, ...] = ()
    origin: dict[str, str] = field(default_factory=dict)

    @classmethod
    def whole(cls, output_dir: Path) -> "Size":
        """All arms, with a learned reward, which is made here if need be."""
        models = output_dir / "models"
        # On as many ranks everywhere, for the model's sake: other ranks round differently.
        call(module_command("repo_fast.pipeline", {"output_dir": str(models), "ranks": "2", "until": "reward"}))
        record = json.loads((models / "reward" / "pipeline.json").read_text(encoding="utf-8"))
        return cls(40, range(SEEDS), 8, str(models / "reward" / "model"), origin={"reward": record["id"]})

    @classmethod
    def packaged(cls) -> "Size":
        """The packaged configuration, by the rules' reward, on seeds after those of the two looks before."""
        return cls(
            40,
            range(2 * SEEDS, 2 * SEEDS + 20),
            8,
            "repo_fast.world.rules:reward",
            "gae",
            "world:certify",
            (BASE, WITHOUT),
        )

    @classmethod
    def small(cls) -> "Size":
        """As small as it gets, with the rules as the reward: to see whether everything runs."""
        return cls(2, range(1), 2, "repo_fast.world.rules:reward", chosen=(BASE, WITHOUT))


def main() -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.constraints", description=__doc__.partition("\n")[0])
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--packaged", action="store_true", help="the packaged configuration and its first constraint alone"
    )
    form.add_argument("--small", action="store_true", help="a shrunk form that shows nothing but that it runs")
    chosen = parser.parse_args()
    output_dir = chosen.output_dir or Path("outputs/constraints-packaged" if chosen.packaged else "outputs/constraints")

    def run() -> int:
        size = Size.packaged() if chosen.packaged else Size.small() if chosen.small else Size.whole(output_dir)
        return experiment(output_dir, chosen.jobs, size)

    return interruptible(run)


def experiment(output_dir: Path, jobs: int, size: Size) -> int:
    """Train, evaluate, write; returns the exit status."""
    every = arms(math.inf if size.chosen else _cap(output_dir, size))
    compared = {name: every[name] for name in size.chosen or every}
    runs = {
        (name, seed): _run(output_dir, size, name, arm, seed) for name, arm in compared.items() for seed in size.seeds
    }
    run_all(list(runs.values()), jobs)
    policies = {f"{name}.{seed}": str(run.policy) for (name, seed), run in runs.items()}
    reports = {
        judge: evaluate(
            {START: "world:tiny", **policies},
            output_dir / f"evaluation-{judge}",
            {**_judged(output_dir, size), **scores},
        )
        for judge, scores in {"rules": {}, "learned": {"reward.path": size.reward}}.items()
    }
    print(write_results(output_dir, compared, reports))
    return 0


def _run(output_dir: Path, size: Size, name: str, arm: Arm, seed: int) -> Run:
    options = {
        "config": "tiny-constraints",
        "reward.path": size.reward,
        "data.eval_prompts": "null",
        "total_steps": str(size.steps),
        "algorithm.advantage": size.advantage,
        "engine.zero_stage": "1",
        "log.loggers": "[]",
        "seed": str(seed),
    }
    return Run(output_dir / "runs" / f"{name}-seed-{seed}", options | arm.options, size.origin)


def _judged(output_dir: Path, size: Size) -> dict[str, str]:
    return {
        "config": str(JUDGES),
        # Shared, so that evaluations of the same policies draw once.
        "cache_dir": str(output_dir / "evaluation-cache"),
        "samples_per_prompt": str(size.samples),
        "prompts": size.prompts,
    }


def _cap(output_dir: Path, size: Size) -> float:
    """A reward that a quarter of the start's responses to training prompts exceed."""
    folder = output_dir / "start"
    options = {"config": "tiny-constraints", "prompts": "world:train", "samples_per_prompt": str(size.samples)}
    evaluate({START: "world:tiny"}, folder, {**options, "reward.path": size.reward})
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    return round(float(np.quantile([row["reward"] for row in rows], CAP_QUANTILE)), 2)


if __name__ == "__main__":
    sys.exit(main())
