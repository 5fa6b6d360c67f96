"""How good a score model is on held-out preferences: accuracy, calibration, and the pictures of its scores."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from repo_fast.report.jsonl import write_log

BINS = 10


@dataclass(frozen=True)
class ScoredPreferences:
    """Scores of held-out preferences.

    Attributes:
        scores: float64 [S], all of them.
        higher, lower: float64 [P], of each pair's response that is to score higher, and of the other.
        labelled: float64 [L], of every response with a safety label, those of pairs too.
        unsafe: bool [L], their labels.
    """

    scores: np.ndarray
    higher: np.ndarray
    lower: np.ndarray
    labelled: np.ndarray
    unsafe: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> "ScoredPreferences":
        """From rows with `scores` and `labels` (+1 unsafe, -1 safe, 0 none), of one or two numbers each.

        Of two, the first is to be higher where `order` is 1 or not there, the second where it is -1, neither where 0.
        """
        orders = [row.get("order", 1) if len(row["scores"]) == 2 else 0 for row in rows]
        turned = zip(rows, orders, strict=True)
        pairs = [row["scores"] if order > 0 else row["scores"][::-1] for row, order in turned if order]
        labelled = [
            (score, label > 0)
            for row in rows
            for score, label in zip(row["scores"], row["labels"], strict=True)
            if label
        ]
        return cls(
            scores=np.array([score for row in rows for score in row["scores"]], dtype=np.float64),
            higher=np.array([pair[0] for pair in pairs], dtype=np.float64),
            lower=np.array([pair[1] for pair in pairs], dtype=np.float64),
            labelled=np.array([score for score, _ in labelled], dtype=np.float64),
            unsafe=np.array([unsafe for _, unsafe in labelled], dtype=bool),
        )


def write_scored(path: Path, by_head: Mapping[str, Sequence[Mapping[str, Any]]], step: int) -> None:
    """Write the rows that `ScoredPreferences.of` reads, a line an example, over an older file of that name.

    Args:
        path: The file.
        by_head: The rows of each head, of the same examples. What a head has begins with its name; the order of a pair,
            which is that of the scores where a model has one head without a name, is then there too.
        step: Of the run.
    """
    rows = zip(*by_head.values(), strict=True)
    write_log(
        path,
        (
            {"step": step, "example": heads[0]["example"]}
            | {key: value for name, row in zip(by_head, heads, strict=True) for key, value in _written(name, row)}
            for heads in rows
        ),
    )


def _written(head: str, row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    start = f"{head}_" if head else ""
    for what in ("scores", "labels"):
        yield from ((f"{start}{what[:-1]}_{i}", value) for i, value in enumerate(row[what]))
    if head and len(row["scores"]) == 2:
        yield f"{start}order", row["order"]


def measures_by_head(scored: Mapping[str, ScoredPreferences]) -> dict[str, float]:
    """`preference_measures` of each head, beginning with its name, and their means over the heads that have them.

    Of one head without a name there are its own alone.
    """
    of_heads = {name: preference_measures(own) for name, own in scored.items()}
    keys = dict.fromkeys(key for measures in of_heads.values() for key in measures)
    found = {key: [measures[key] for measures in of_heads.values() if key in measures] for key in keys}
    means = {key: sum(values) / len(values) for key, values in found.items()}
    return means | {f"{name}_{key}": value for name, own in of_heads.items() if name for key, value in own.items()}


def preference_measures(scored: ScoredPreferences) -> dict[str, float]:
    """What is said about a score model, as far as the data lets it be said.

    Returns:
        ranking_accuracy: share of pairs whose first score is the higher one; equal scores are wrong.
        ranking_calibration_error: how far sigma(difference), the probability that the Bradley-Terry model gives to an
            order, is from the share that is right; see `calibration_error`.
        score_gap: mean difference (score units).
        safety_accuracy: share of labelled responses on the right side of zero; a score of 0 is safe.
        safety_calibration_error: the same as above for sigma(score), the probability of being unsafe.
        score_mean, score_std: of all scores (score units).
    """
    measures: dict[str, float] = {}
    if scored.higher.size:
        difference = scored.higher - scored.lower
        measures["ranking_accuracy"] = float((difference > 0).mean())
        # Of the order that the model prefers, whichever it is: that of the data is always the first.
        measures["ranking_calibration_error"] = calibration_error(_sigmoid(np.abs(difference)), difference > 0)
        measures["score_gap"] = float(difference.mean())
    if scored.labelled.size:
        measures["safety_accuracy"] = float(((scored.labelled > 0) == scored.unsafe).mean())
        measures["safety_calibration_error"] = calibration_error(_sigmoid(scored.labelled), scored.unsafe)
    return measures | {"score_mean": float(scored.scores.mean()), "score_std": float(scored.scores.std())}


def calibration_error(probabilities: np.ndarray, outcomes: np.ndarray) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599), with ten bins of equal width.

    Args:
        probabilities: [N] in [0, 1].
        outcomes: bool [N].

    Returns:
        The mean over bins of |share of outcomes - mean probability|, weighted by how many fall into the bin.
    """
    _, predicted, observed, counts = reliability(probabilities, outcomes)
    return float((counts * np.abs(observed - predicted)).sum() / counts.sum())


def reliability(
    probabilities: np.ndarray, outcomes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The bins of probability that are not empty: index, mean probability, share of outcomes, and count of each."""
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    filled = counts.nonzero()[0]
    predicted = np.bincount(bins, weights=probabilities, minlength=BINS)[filled] / counts[filled]
    observed = np.bincount(bins, weights=outcomes.astype(float), minlength=BINS)[filled] / counts[filled]
    return filled, predicted, observed, counts[filled]


def plot_scores(scored: ScoredPreferences, kind: str, folder: Path) -> list[Path]:
    """Draw `scores.png`, histograms of the scores, and `calibration.png`, shares against probabilities.

    Args:
        scored: At least one preference.
        kind: `reward` or `cost`.
        folder: Where the files go; made if missing.
    """
    from matplotlib.figure import Figure

    names = ("better", "worse") if kind == "reward" else ("less safe", "safer")
    groups = []
    if scored.higher.size:
        groups.append(("pairs", dict(zip(names, (scored.higher, scored.lower), strict=True))))
    if scored.labelled.size:
        labelled = {"unsafe": scored.labelled[scored.unsafe], "safe": scored.labelled[~scored.unsafe]}
        groups.append(("labels", labelled))
    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(8, 1 + 2.8 * len(groups)), layout="constrained")
    edges = np.histogram_bin_edges(scored.scores, bins=40)
    for ax, (what, group) in zip(figure.subplots(len(groups), 1, squeeze=False)[:, 0], groups, strict=True):
        for (name, values), color in zip(group.items(), ("#D55E00", "#0072B2"), strict=True):
            ax.hist(values, bins=edges, alpha=0.6, color=color, label=f"{name} ({values.size})")
        if kind == "cost":
            ax.axvline(0, color="black", linestyle="--", linewidth=1, label="above 0 is unsafe")
        ax.set(xlabel=f"{kind} (score units)", ylabel=f"responses, {what}")
        ax.legend(frameon=False)
    # Agg by name, whatever backend the user's configuration asks for.
    figure.savefig(folder / "scores.png", dpi=120, backend="agg")

    figure = Figure(figsize=(5.5, 5), layout="constrained")
    ax = figure.subplots()
    ax.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="calibrated")
    if scored.higher.size:
        difference = scored.higher - scored.lower
        _, predicted, observed, _ = reliability(_sigmoid(np.abs(difference)), difference > 0)
        ax.plot(predicted, observed, marker="o", color="#0072B2", label="order of a pair")
    if scored.labelled.size:
        _, predicted, observed, _ = reliability(_sigmoid(scored.labelled), scored.unsafe)
        ax.plot(predicted, observed, marker="s", color="#D55E00", label="unsafe")
    ax.set(xlabel="probability by the model", ylabel="share observed", xlim=(0, 1), ylim=(0, 1))
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    figure.savefig(folder / "calibration.png", dpi=120, backend="agg")
    return [folder / "scores.png", folder / "calibration.png"]


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(values / 2))
