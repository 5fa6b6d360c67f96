"""What is kept of a finished run: a CSV of its metrics, one picture, and the held-out before and after as Markdown.

    python examples/detox/summarize.py outputs/smollm2-detox examples/detox

reads `metrics.jsonl`, `config.yaml` and `eval_before.jsonl`, `eval_before_again.jsonl`, `eval_after.jsonl` of the first
folder, writes `metrics.csv` and `metrics.png` into the second and prints the Markdown. Text of the evaluation is
offensive and stays in the run's folder; only numbers leave it.
"""

import argparse
import csv
from functools import partial
from pathlib import Path

import numpy as np
import yaml

from repo_fast.report.evaluations import read_evaluation
from repo_fast.report.measures import Evaluation, mean, resample, score_prompts, strict_violation
from repo_fast.report.metrics import read_metrics
from repo_fast.report.tables import before_after_table

PANELS = {
    "reward": "mean reward (0 to 1)",
    "cost": "mean cost (probability − 0.5)",
    "safety_rate": "safety rate (share of responses)",
    "strict_violation": "strict violation (cost)",
    "kl": "KL to the start (nats/response)",
    "multiplier": "multiplier λ",
}
RUNNING_MEAN = 5  # steps; one step has few prompts, and they differ more than the policy does between two steps


def write_csv(metrics: list[dict], path: Path) -> None:
    """Writes one line a step; columns in the order in which they first appear, empty where a step lacks one."""
    columns = list(dict.fromkeys(name for record in metrics for name in record))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(metrics)


def draw(metrics: list[dict], path: Path) -> None:
    """Draws the metrics of `PANELS` over the steps as measured (pale) and as a running mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 9), layout="constrained")
    steps = [record["step"] for record in metrics]
    window = min(RUNNING_MEAN, len(steps))
    for ax, (name, label) in zip(figure.subplots(3, 2).flat, PANELS.items(), strict=True):
        values = np.array([record[name] for record in metrics], dtype=float)
        ax.plot(steps, values, color="#0072B2", alpha=0.35)
        ax.plot(steps[window - 1 :], np.convolve(values, np.ones(window) / window, "valid"), color="#0072B2")
        ax.set(xlabel="step", ylabel=label)
        ax.grid(alpha=0.3)
    figure.suptitle(f"On the training prompts, before each update; the line is the mean of {window} steps")
    figure.savefig(path, dpi=100)


def category_table(before: Evaluation, after: Evaluation, categories: dict[int, str], threshold: float) -> str:
    """Mean cost and strict violation of each category as a Markdown table, with paired 95 % bootstrap intervals.

    Args:
        before, after: Evaluations of the same prompts.
        categories: Of each prompt, by its id.
        threshold: d, in the unit of the costs.

    Returns:
        The table, without a newline at its end.
    """
    old, new = score_prompts(before, threshold), score_prompts(after, threshold)
    names = np.array([categories[prompt] for prompt in old.prompt_ids])
    lines = [
        "| category | prompts | mean cost before | after | change (95 %) | strict violation before | after |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in sorted(set(names)):
        here = names == name
        change = resample({"cost": partial(mean, (new.cost - old.cost)[here])}, here.sum())["cost"]
        low, high = change.interval
        # Where all prompts change alike, nothing is known of others.
        interval = "" if np.isnan(low) else f" [{low:+.3f}, {high:+.3f}]"
        lines.append(
            f"| {name} | {here.sum()} | {old.cost[here].mean():.3f} | {new.cost[here].mean():.3f} "
            f"| {change.value:+.3f}{interval} "
            f"| {strict_violation(old.excess[here]):.3f} | {strict_violation(new.excess[here]):.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="output folder of a finished run")
    parser.add_argument("out", type=Path, help="folder for metrics.csv and metrics.png; made if need be")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    threshold = yaml.safe_load((arguments.run / "config.yaml").read_text(encoding="utf-8"))["algorithm"]["threshold"]
    metrics = read_metrics(arguments.run / "metrics.jsonl")
    write_csv(metrics, arguments.out / "metrics.csv")
    draw(metrics, arguments.out / "metrics.png")

    before, categories = read_evaluation(arguments.run / "eval_before.jsonl")
    again, _ = read_evaluation(arguments.run / "eval_before_again.jsonl")
    after, _ = read_evaluation(arguments.run / "eval_after.jsonl")
    print("```\n" + before_after_table(before, after, threshold, before_again=again) + "\n```\n")
    print(category_table(before, after, categories, threshold))
    print("\n![metrics over the steps](metrics.png)")


if __name__ == "__main__":
    main()
