"""Compare a trained reward model with a bag of words on the same held-out pairs, and write results and a picture.

    python examples/preferences/compare.py --run outputs/smollm2-harmless --data outputs/preferences --out DIR

The baseline is a Bradley-Terry ranker on TF-IDF features of the whole dialogues (words and pairs of words, sublinear
counts, at least two documents): a logistic regression without intercept on the difference of the two texts. Its one
setting, the regularization, is chosen by five-fold cross-validation on the training pairs; the held-out pairs are
looked at once. Both rankers see the same training pairs.

Printed: the accuracy of both with a 95 % interval (Wilson), and their difference, paired: a bootstrap over pairs, and
McNemar's exact test on the pairs that one of them gets right and the other wrong.
"""

import argparse
import csv
import json
import math
import random
import sys
from pathlib import Path
from statistics import NormalDist

sys.path.insert(0, str(Path(__file__).parents[2]))

from repo_fast.data import Candidate, Preference, load_preferences  # noqa: E402
from repo_fast.report.jsonl import read_records  # noqa: E402

CURVE = ("step", "loss", "accuracy", "ranking_accuracy", "eval_loss", "ranking_calibration_error", "learning_rate")
RESAMPLES = 10_000


def text(candidate: Candidate) -> str:
    """The dialogue and the response, as the baseline reads them."""
    return "\n".join([*filter(None, [candidate.system]), *candidate.turns, candidate.response])


def baseline(train: list[Preference], held_out: list[Preference]) -> list[bool]:
    """Which held-out pairs the TF-IDF ranker orders as people did."""
    import numpy as np
    from scipy import sparse
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegressionCV

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    vectorizer.fit([text(candidate) for pair in train for candidate in pair.candidates])

    def differences(pairs: list[Preference]):
        first, second = (vectorizer.transform([text(pair.candidates[i]) for pair in pairs]) for i in (0, 1))
        return first - second

    features = differences(train)
    # Each pair in both orders: the classes are balanced, and the ranker has no side.
    both = sparse.vstack([features, -features]).tocsr()
    labels = np.repeat([1, 0], features.shape[0])
    pairs = np.tile(np.arange(features.shape[0]) % 5, 2)
    folds = [(np.flatnonzero(pairs != fold), np.flatnonzero(pairs == fold)) for fold in range(5)]
    model = LogisticRegressionCV(
        Cs=np.logspace(-2, 3, 11),
        cv=folds,
        fit_intercept=False,
        max_iter=2000,
        l1_ratios=(0,),
        scoring="accuracy",
        use_legacy_attributes=False,
    )
    model.fit(both, labels)
    return [bool(margin > 0) for margin in model.decision_function(differences(held_out))]


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share."""
    z = NormalDist().inv_cdf(0.975)
    centre, width = (right + z * z / 2) / (n + z * z), z * math.sqrt(right * (n - right) / n + z * z / 4) / (n + z * z)
    return centre - width, centre + width


def paired_interval(ours: list[bool], theirs: list[bool]) -> tuple[float, float]:
    """The 95 % bootstrap interval, over pairs, of the difference of two accuracies."""
    rng = random.Random(0)
    gains = [a - b for a, b in zip(ours, theirs, strict=True)]
    means = sorted(sum(rng.choices(gains, k=len(gains))) / len(gains) for _ in range(RESAMPLES))
    return means[round(0.025 * RESAMPLES)], means[round(0.975 * RESAMPLES) - 1]


def mcnemar(ours: list[bool], theirs: list[bool]) -> tuple[int, int, float]:
    """Pairs that only ours gets right, only theirs, and the exact two-sided p-value that the two are equally likely."""
    only_ours = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    only_theirs = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    n, least = only_ours + only_theirs, min(only_ours, only_theirs)
    tail = sum(math.comb(n, k) for k in range(least + 1)) / 2**n
    return only_ours, only_theirs, min(1.0, 2 * tail)


def draw(rows: list[dict], path: Path) -> None:
    """Loss and accuracy of the run over its steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    window = 15
    for ax, key, held_out, label in (
        (top, "loss", "eval_loss", "loss (nats a pair)"),
        (bottom, "accuracy", "ranking_accuracy", "accuracy (share of pairs)"),
    ):
        values = [row[key] for row in rows]
        recent = [values[max(0, i - window) : i] for i in range(1, len(values) + 1)]
        means = [sum(some) / len(some) for some in recent]
        ax.plot([row["step"] for row in rows], means, color="#0072B2", label=f"training, mean of {window} steps")
        points = [(row["step"], row[held_out]) for row in rows if held_out in row]
        ax.plot(*zip(*points, strict=True), color="#D55E00", marker="o", label="held out")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
        ax.legend(frameon=False)
    bottom.set_xlabel("step")
    figure.savefig(path, dpi=110, backend="agg")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="output folder of repo_fast.score")
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for curve.csv, curve.png and comparison.json")
    chosen = parser.parse_args()
    train, held_out = (
        load_preferences(str(chosen.data / f"{name}.jsonl"), "reward", unusable="drop")[0]
        for name in ("train", "held-out")
    )
    scores = list(read_records(chosen.run / "eval_scores.jsonl"))
    if [row["example"] for row in scores] != list(range(len(held_out))):
        sys.exit(
            f"error: {chosen.run} was evaluated on {len(scores)} pairs, expected the {len(held_out)} of {chosen.data}"
        )
    ours = [row["score_0"] > row["score_1"] for row in scores]  # type: ignore[operator]
    theirs = baseline(train, held_out)
    n = len(held_out)
    low, high = paired_interval(ours, theirs)
    only_ours, only_theirs, p = mcnemar(ours, theirs)
    comparison = {
        "pairs": n,
        "reward_model": [sum(ours) / n, *wilson(sum(ours), n)],
        "tfidf": [sum(theirs) / n, *wilson(sum(theirs), n)],
        "difference": [(sum(ours) - sum(theirs)) / n, low, high],
        "only_reward_model_right": only_ours,
        "only_tfidf_right": only_theirs,
        "mcnemar_p": p,
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "comparison.json").write_text(json.dumps(comparison, indent=1) + "\n", encoding="utf-8")
    rows = list(read_records(chosen.run / "metrics.jsonl"))
    with open(chosen.out / "curve.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, CURVE, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{row[key]:.6g}" for key in CURVE if key in row} for row in rows)
    draw(rows, chosen.out / "curve.png")
    for name in ("reward_model", "tfidf", "difference"):
        value, low, high = comparison[name]
        print(f"{name:13s} {100 * value:+6.1f} % [{100 * low:.1f}, {100 * high:.1f}]")
    print(f"of {n} pairs, {only_ours} only by the reward model, {only_theirs} only by TF-IDF; McNemar's p = {p:.3f}")


if __name__ == "__main__":
    main()
