"""Tunes every algorithm alike, on prompts that are not judged on later.

    python -m experiments.interference.tune --output_dir outputs/interference

The hyperparameters are tried one after the other: each family of `settings.py` runs with every value of
`HYPERPARAMETERS`, all others as they are best so far, its knob at the middle of its range, on four fifths of the
training prompts, once. The rules judge the policies on the other fifth, and the value with the largest

    mean reward - 2 strict violation

is kept; the weight was chosen before anything was run. Families have as many runs as they have hyperparameters to
tune: eight with a multiplier, six without. Printed is the table, and what belongs into `TUNED`. Stopped, the same
command goes on. About 40 minutes on two cores.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from experiments.interference.settings import FAMILIES, HYPERPARAMETERS
from experiments.interference.world import World, split_prompts
from experiments.runs import Run, interruptible, run_all

VIOLATION_WEIGHT = 2.0
SEED = 1000


def main() -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Tune every algorithm alike.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/interference"))
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once")
    chosen = parser.parse_args()
    return interruptible(lambda: tune(chosen.output_dir, chosen.jobs))


def tune(output_dir: Path, jobs: int) -> int:
    """Run, judge and print; returns the exit status."""
    world, folder = World.learned(output_dir), output_dir / "tuning"
    train, held_out = split_prompts(folder / "prompts")
    best = {name: family.untuned() for name, family in FAMILIES.items() if family.tuned_as is None}
    runs: dict[str, Run] = {}
    rows: dict[str, dict] = {}
    for key, values in HYPERPARAMETERS.items():
        tried = {}
        for family in (name for name in best if key in best[name]):
            for value in values:
                chosen = best[family] | {key: value}
                tried[_name(family, chosen)] = (family, chosen)
        for name, (family, chosen) in tried.items():
            runs[name] = world.run(folder / "runs" / name, family, chosen, FAMILIES[family].middle, train, SEED)
        run_all([runs[name] for name in tried], jobs)
        report = world.evaluate({name: run.policy for name, run in runs.items()}, held_out, folder / "evaluation")
        for name, (family, chosen) in tried.items():
            rows[name] = {"family": family, **chosen, **_judged(report, name)}
        for family in {family for family, _ in tried.values()}:
            own = [name for name, (owner, _) in tried.items() if owner == family]
            best[family] = tried[max(own, key=lambda name: rows[name]["utility"])][1]
    (folder / "tuning.json").write_text(json.dumps(list(rows.values()), indent=1) + "\n", encoding="utf-8")
    print(_table(rows, {_name(family, chosen) for family, chosen in best.items()}))
    print("TUNED =", json.dumps(best, indent=4))
    return 0


def _name(family: str, chosen: Mapping[str, float]) -> str:
    return "-".join([family, *(f"{value:g}" for value in chosen.values())])


def _judged(report: dict, name: str) -> dict[str, float]:
    measured = {key: entry["value"] for key, entry in report["policies"][name].items()}
    return {"utility": measured["mean_reward"] - VIOLATION_WEIGHT * measured["strict_violation"], **measured}


def _table(rows: Mapping[str, dict], best: set[str]) -> str:
    """All that was tried, by family and utility."""
    lines = [
        "| family | learning rate | KL | λ rate | reward | strict violation | well-formed | utility |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in sorted(rows.items(), key=lambda item: (item[1]["family"], -item[1]["utility"])):
        tried = " | ".join(f"{row[key]:g}" if key in row else "-" for key in HYPERPARAMETERS)
        measured = " | ".join(f"{row[key]:.3f}" for key in ("mean_reward", "strict_violation", "well_formed"))
        chosen = " (best)" if name in best else ""
        if chosen and any(row[key] in (values[0], values[-1]) for key, values in HYPERPARAMETERS.items() if key in row):
            chosen = " (best, at an edge)"
        lines.append(f"| {row['family']} | {tried} | {measured} | {row['utility']:.3f}{chosen} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
