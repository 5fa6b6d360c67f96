"""Does a constraint on every prompt remove the interference that a constraint on the average leaves, and at what price?

    python -m experiments.interference --output_dir outputs/interference

Makes a policy, a reward model and a cost model (the first stages of `repo_fast.pipeline`), trains every setting of
`settings.py` from them, several seeds each, and evaluates all policies beside the start on held-out prompts: by the
corpus's own rules, which no run was trained on (tuning chose by them, on other prompts), and by the learned scores,
which all were trained on. Written are `results.json`, `results.md`, figures, and `report/report.html`, which shows the
first seed of the headline settings prompt by prompt. What is complete is not made again: stopped, the same command goes
on.

Two hours on two cores at most. `--small` is the same with everything as small as it gets, in two minutes: it shows that
the experiment runs, and nothing else.
"""

import argparse
import sys
from pathlib import Path

from experiments.interference.results import write_results
from experiments.interference.settings import Setting, headline, hyperparameters, settings
from experiments.interference.world import World
from experiments.runs import interruptible, run_all


def main() -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.interference", description=__doc__.partition("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/interference"))
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once")
    parser.add_argument("--small", action="store_true", help="a shrunk form that shows nothing but that it runs")
    chosen = parser.parse_args()
    return interruptible(lambda: experiment(chosen.output_dir, chosen.jobs, chosen.small))


def experiment(output_dir: Path, jobs: int, small: bool) -> int:
    """Train, evaluate, write; returns the exit status."""
    world = World.small() if small else World.learned(output_dir)
    grid = [Setting("repo-0", "repo", 0.0, 2), Setting("ppo_lag-0", "ppo_lag", 0.0, 2)] if small else settings()
    runs = {
        (setting.name, seed): world.run(
            output_dir / "runs" / f"{setting.name}-seed-{seed}",
            setting.family,
            hyperparameters(setting.family),
            setting.value,
            "world:train",
            seed,
        )
        for setting in grid
        for seed in range(setting.seeds)
    }
    # Seeds of a setting one after the other: a grid that is cut off has the headline whole.
    run_all(list(runs.values()), jobs)
    policies = {f"{name}.{seed}": run.policy for (name, seed), run in runs.items()}
    learned = {"reward.path": world.reward, "cost.path": world.cost}
    reports = {
        "rules": world.evaluate(policies, "world:test", output_dir / "evaluation-rules"),
        "learned": world.evaluate(policies, "world:test", output_dir / "evaluation-learned", learned),
    }
    first = {setting.name: runs[setting.name, 0].policy for setting in headline(grid)}
    world.evaluate(first, "world:test", output_dir / "report")
    print(write_results(output_dir, grid, {key: run.folder for key, run in runs.items()}, reports))
    return 0


if __name__ == "__main__":
    sys.exit(main())
