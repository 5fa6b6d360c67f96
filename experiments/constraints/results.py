"""What came out: measures of each arm over its seeds, and the answers to the questions."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path

from experiments.constraints.settings import QUESTIONS, RUN_AHEAD, TOTAL, Arm
from experiments.runs import START
from experiments.seeds import cell, over_seeds

# Of the report by the rules, with what a table calls them.
MEASURES = {
    "harm_strict_violation": "harm above -1",
    "danger_strict_violation": "harm above 0",
    "overcaution_strict_violation": "overcaution",
    "refusal_mean_cost": "refusals there",
    TOTAL: "harm above -1, and overcaution",
    "mean_reward": "reward (rules)",
    RUN_AHEAD: "learned reward ahead (SD)",
    "well_formed": "well-formed",
}
# Beside the answer to each question.
_BESIDE = ("harm_strict_violation", "overcaution_strict_violation", "mean_reward")

Measured = Mapping[str, Mapping[str, float]]


def measured(rules: Mapping, learned: Mapping, spread: tuple[float, float]) -> dict[str, dict[str, float]]:
    """The measures of every policy by its name, `ARM.SEED` or that of the start.

    Args:
        rules, learned: `report.json` by each judge of the reward.
        spread: Standard deviation of the rules' and of the learned rewards of the start's responses.
    """
    found = {}
    for name, own in rules["policies"].items():
        values = {key: own[key]["value"] for key in MEASURES if key in own}
        values[TOTAL] = values["harm_strict_violation"] + values["overcaution_strict_violation"]
        risen = [
            (report["policies"][name]["mean_reward"]["value"] - report["policies"][START]["mean_reward"]["value"])
            / deviation
            for report, deviation in zip((rules, learned), spread, strict=True)
        ]
        values[RUN_AHEAD] = risen[1] - risen[0]
        found[name] = values
    return found


def write_results(
    output_dir: Path,
    compared: Mapping[str, Arm],
    reports: Mapping[str, Mapping],
) -> str:
    """Write `results.json` and `results.md`.

    Args:
        output_dir: Where to; has the evaluations.
        compared: The arms by name.
        reports: By judge of the reward, `rules` and `learned`.

    Returns:
        The content of `results.md`.
    """
    spread = tuple(_spread(output_dir / f"evaluation-{judge}" / "samples.jsonl") for judge in ("rules", "learned"))
    found = measured(reports["rules"], reports["learned"], spread)
    text = "\n\n".join([_answers(found, compared), _table(found, compared)])
    (output_dir / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (output_dir / "results.md").write_text(text + "\n", encoding="utf-8")
    return text


def _spread(samples: Path) -> float:
    rows = (json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines())
    return statistics.stdev(row["reward"] for row in rows if row["policy"] == START)


def _seeds(found: Measured, arm: str, measure: str) -> list[float]:
    """By seed; of the start, the one value."""
    return [own[measure] for name, own in found.items() if name.rpartition(".")[0] == arm or name == arm]


def difference(found: Measured, arm: str, other: str, measure: str) -> dict:
    """An arm's measure minus another's at the same seeds, or minus the start's: `over_seeds`."""
    one, two = (_seeds(found, name, measure) for name in (arm, other))
    return over_seeds([a - b for a, b in zip(one, two * len(one) if other == START else two, strict=True)])


def _answers(found: Measured, compared: Mapping[str, Arm]) -> str:
    lines = [
        "Differences at the same seeds, mean and 95 % t-interval over seeds.",
        "",
        "| question | measure | expected | difference | " + " | ".join(MEASURES[name] for name in _BESIDE) + " |",
        "|---|---|---|---:|" + "---:|" * len(_BESIDE),
    ]
    for question in QUESTIONS:
        if not {question.arm, question.other} <= {START, *compared}:
            continue
        cells = [
            _bounds(difference(found, question.arm, question.other, measure), "+")
            for measure in (question.measure, *_BESIDE)
        ]
        head = (question.asked, MEASURES[question.measure], {"-": "lower", "+": "higher", "?": "-"}[question.expected])
        lines.append("| " + " | ".join([*head, f"**{cells[0]}**", *cells[1:]]) + " |")
    return "\n".join(lines)


def _table(found: Measured, compared: Mapping[str, Arm]) -> str:
    lines = [
        "Mean over seeds and 95 % t-interval, judged on held-out prompts by the corpus's rules.",
        "",
        "| arm | seeds | " + " | ".join(MEASURES.values()) + " |",
        "|---|---:|" + "---:|" * len(MEASURES),
    ]
    for name, label in {START: START, **{name: arm.label for name, arm in compared.items()}}.items():
        seeds = len(_seeds(found, name, TOTAL))
        cells = [_bounds(over_seeds(_seeds(found, name, measure))) for measure in MEASURES]
        lines.append(f"| {label} | {'' if name == START else seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _bounds(entry: Mapping, sign: str = "") -> str:
    return cell(entry["mean"], entry["low"], entry["high"], sign)
