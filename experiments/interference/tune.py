"""Tunes every algorithm alike, on prompts that are not judged on later.

    python -m experiments.interference.tune --output_dir outputs/interference

Each family of `settings.py` runs once with every combination of `LEARNING_RATES` and `KL_COEFFICIENTS`, its knob at the
middle of its range, on four fifths of the training prompts. The rules judge the policies on the other fifth, and the
combination with the largest

    mean reward - 2 strict violation

is the best; the weight was chosen before anything was run. Printed is the table, and what belongs into `TUNED`.
Stopped, the same command goes on. About half an hour on two cores.
"""

import argparse
import json
import sys
from pathlib import Path

from experiments.interference.runs import Run, run_all
from experiments.interference.settings import FAMILIES, KL_COEFFICIENTS, LEARNING_RATES
from experiments.interference.world import World, split_prompts
from repo_fast.launch import guarded

VIOLATION_WEIGHT = 2.0
SEED = 1000


def main() -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Tune every algorithm alike.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/interference"))
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once")
    chosen = parser.parse_args()
    return guarded(lambda: tune(chosen.output_dir, chosen.jobs))


def tune(output_dir: Path, jobs: int) -> int:
    """Run, judge and print; returns the exit status."""
    world = World.learned(output_dir, jobs)
    train, held_out = split_prompts(output_dir / "tuning" / "prompts")
    tried = {}
    for family, entry in FAMILIES.items():
        for learning_rate in LEARNING_RATES:
            for kl in KL_COEFFICIENTS:
                options = world.options(family, learning_rate, kl, train, SEED)
                if entry.knob is not None:
                    options[entry.knob] = str(entry.middle)
                name = f"{family}-lr{learning_rate:g}-kl{kl:g}"
                tried[name] = (family, learning_rate, kl, Run(output_dir / "tuning" / "runs" / name, options))
    run_all([run for *_, run in tried.values()], jobs)
    policies = {name: run.policy for name, (*_, run) in tried.items()}
    report = world.evaluate(policies, held_out, output_dir / "tuning" / "evaluation")
    rows, best = [], {}
    for name, (family, learning_rate, kl, _) in tried.items():
        measured = {key: entry["value"] for key, entry in report["policies"][name].items()}
        utility = measured["mean_reward"] - VIOLATION_WEIGHT * measured["strict_violation"]
        rows.append({"family": family, "learning_rate": learning_rate, "kl": kl, "utility": utility, **measured})
        if family not in best or utility > best[family]["utility"]:
            best[family] = rows[-1]
    (output_dir / "tuning" / "tuning.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("| family | learning rate | KL | reward | strict violation | well-formed | utility |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        chosen = " (best)" if best[row["family"]] is row else ""
        print(
            f"| {row['family']} | {row['learning_rate']:g} | {row['kl']:g} | {row['mean_reward']:.3f} "
            f"| {row['strict_violation']:.3f} | {row['well_formed']:.3f} | {row['utility']:.3f}{chosen} |"
        )
    print("TUNED =", {family: (row["learning_rate"], row["kl"]) for family, row in best.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
