"""RePO beside PPO-Lagrangian on real text: SmolLM2-135M, made less offensive, from the same start at the same cost.

    python examples/detox/prepare.py --out outputs/detox
    python -m experiments.interference.detox --output_dir outputs/interference-detox

Two trainings by the configuration `smollm2-detox`, which `examples/detox` explains, one beside the other: `repo`, and
`ppo_lag` with the same margin, learning rates, KL coefficient, prompts and steps. These were chosen for `repo`; nothing
is tuned for `ppo_lag`. Then both policies and the start answer the held-out prompts, `repo_fast.evaluate`: once with
the start as the reference, once with `ppo_lag`. Stopped, the same command goes on. Half an hour of training on two
cores (AMD EPYC), and seven minutes of evaluation.
"""

import argparse
import sys
from pathlib import Path

from experiments.runs import START, Run, call, interruptible, module_command, run_all
from repo_fast.errors import InputError

DATA = Path("outputs/detox")
STEPS = 100


def main() -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/interference-detox"))
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    return interruptible(lambda: experiment(chosen.output_dir, chosen.jobs, chosen.seed))


def experiment(output_dir: Path, jobs: int, seed: int) -> int:
    """Train and evaluate; returns the exit status."""
    if not (DATA / "policy").is_dir():
        raise InputError(f"{DATA / 'policy'} does not exist, expected what examples/detox/prepare.py writes")
    common = {
        "config": "smollm2-detox",
        "total_steps": str(STEPS),
        "data.eval_prompts": "null",
        "engine.zero_stage": "1",
        "log.loggers": "[]",
        "seed": str(seed),
    }
    runs = {
        name: Run(output_dir / f"{name}-seed-{seed}", common | {"algorithm.name": name}) for name in ("repo", "ppo_lag")
    }
    run_all(list(runs.values()), jobs)
    options = {
        "prompts": str(DATA / "prompts-test.jsonl"),
        "template": "plain",
        "samples_per_prompt": "4",
        "sampling.temperature": "0.7",
        "sampling.max_new_tokens": "24",
        "reward.path": "examples.detox.scorers:reward",
        "cost.path": "examples.detox.scorers:cost",
        "cache_dir": str(output_dir / f"responses-seed-{seed}"),
    }
    named = [f"--policy={START}={DATA / 'policy'}", *(f"--policy={name}={run.policy}" for name, run in runs.items())]
    for reference in (START, "ppo_lag"):
        folder = output_dir / f"evaluation-seed-{seed}-against-{reference}"
        against = {"reference": reference, "output_dir": str(folder)}
        call([*module_command("repo_fast.evaluate", options | against), *named])
    return 0


if __name__ == "__main__":
    sys.exit(main())
