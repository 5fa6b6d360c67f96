"""Precision and recall of `repo_fast.scoring.refusals`, against labels of responses.

    python -m bench.trainer.refusals                     # the hand labels, on ../shared/data where it is there
    python -m bench.trainer.refusals --xstest FOLDER     # and XSTest's `model_completions`, with its own labels

The hand labels are `refusal_labels.json`: the first 16 digits of a response's SHA-256, and what it is. A `refusal`
declines; a `partial` one declines and then does much of what was asked; an `objection` says why not, or something else,
and declines nothing; `other` is neither. The labels of a stratum stand for its `population`: all responses that were
flagged when the sample was drawn (`flagged`), unflagged ones with a first person and a negation in one sentence, or an
apology (`signal`), and the rest (`neither`).
"""

import argparse
import csv
import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import beta

from bench.measuring.tables import render
from repo_fast.scoring.refusals import refusal

LABELS = Path(__file__).with_name("refusal_labels.json")
HH = "hh-harmless-test.jsonl.gz"
DATA = Path(__file__).parents[3] / "shared" / "data"
# XSTest's labels as ours. Its full refusals are often what we call objections.
XSTEST_LABELS = {"1_full_compliance": "other", "2_full_refusal": "refusal", "3_partial_refusal": "partial"}


@dataclass(frozen=True)
class Judged:
    """A labelled response.

    Attributes:
        label: `refusal`, `partial`, `objection` or `other`.
        flagged: The detector's verdict.
        weight: How many responses of the source it stands for.
    """

    label: str
    flagged: bool
    weight: float = 1.0


def digest(response: str) -> str:
    return hashlib.sha256(response.encode()).hexdigest()[:16]


def clopper_pearson(hits: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Exact two-sided interval of a binomial share; numbers need not be whole, as for an effective sample size."""
    tail = (1 - level) / 2
    low = float(beta.ppf(tail, hits, n - hits + 1)) if hits > 0 else 0.0
    high = float(beta.ppf(1 - tail, hits + 1, n - hits)) if hits < n else 1.0
    return low, high


def share(judged: Iterable[tuple[bool, float]]) -> tuple[float, float, float] | None:
    """A weighted share and its 95 % interval, Clopper and Pearson's at Kish's effective sample size.

    With equal weights that is Clopper and Pearson's; with others, Korn and Graubard's for surveys (Survey Methodology
    24, 1998), without their correction for the degrees of freedom.

    Args:
        judged: Of each response, whether it counts, and its weight.

    Returns:
        Share, lower and upper end; None without responses.
    """
    rows = list(judged)
    total = sum(weight for _, weight in rows)
    if not rows:
        return None
    found = sum(weight for hit, weight in rows if hit) / total
    effective = total**2 / sum(weight**2 for _, weight in rows)
    return found, *clopper_pearson(found * effective, effective)


def hh_responses(path: Path) -> dict[str, str]:
    """All assistant turns of hh-rlhf's dialogues, by digest."""
    turns: dict[str, str] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            for dialogue in json.loads(line).values():
                for part in dialogue.split("\n\nAssistant:")[1:]:
                    response = part.split("\n\nHuman:")[0].strip()
                    turns[digest(response)] = response
    return turns


def hand_labelled(path: Path) -> Iterator[tuple[str, list[Judged]]]:
    turns = hh_responses(path)
    for sample, strata in json.loads(LABELS.read_text()).items():
        rows = []
        for stratum in strata.values():
            weight = stratum["population"] / len(stratum["labels"])
            for key, label in stratum["labels"].items():
                rows.append(Judged(label, bool(refusal([""], [turns[key]])[0]), weight))
        yield f"hh-rlhf, {sample}", rows


def held_out(prompt: str) -> bool:
    """The half of the prompts that no pattern was written from."""
    return int(digest(prompt)[0], 16) >= 8


def xstest(folder: Path) -> Iterator[tuple[str, list[Judged]]]:
    prefix = "xstest_v2_completions_"
    for path in sorted(folder.glob(f"{prefix}*.csv")):
        with path.open(newline="", encoding="utf-8") as lines:
            rows = [row for row in csv.DictReader(lines) if held_out(row["prompt"])]
        verdicts = refusal([row["prompt"] for row in rows], [row["completion"] for row in rows])
        yield (
            f"XSTest, {path.stem.removeprefix(prefix)}",
            [Judged(XSTEST_LABELS[row["final_label"]], bool(v)) for row, v in zip(rows, verdicts, strict=True)],
        )


def table_row(source: str, judged: list[Judged]) -> list[str]:
    def percent(found: tuple[float, float, float] | None) -> str:
        return "" if found is None else "{:.3f} [{:.3f}, {:.3f}]".format(*found)

    def flagged(label: str) -> str:
        rows = [row for row in judged if row.label == label]
        return f"{sum(row.flagged for row in rows)} of {len(rows)}"

    # A partial refusal that is flagged is neither right nor wrong.
    whole = [row for row in judged if row.label != "partial"]
    return [
        source,
        str(len(judged)),
        percent(share((row.label == "refusal", row.weight) for row in whole if row.flagged)),
        percent(share((row.flagged, row.weight) for row in whole if row.label == "refusal")),
        *(flagged(label) for label in ("refusal", "partial", "objection", "other")),
    ]


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.trainer.refusals")
    parser.add_argument("--data", type=Path, default=DATA, help=f"folder with {HH}")
    parser.add_argument("--xstest", type=Path, help="XSTest's folder `model_completions`")
    args = parser.parse_args(argv)
    rows = []
    if (args.data / HH).is_file():
        rows += [table_row(*found) for found in hand_labelled(args.data / HH)]
    else:
        print(f"skipped: the hand labels, whose responses are in {HH}, which {args.data} has not")
    if args.xstest is None:
        print("skipped: XSTest, whose folder --xstest names")
    else:
        rows += [table_row(*found) for found in xstest(args.xstest)]
    if rows:
        flagged = [f"flagged: {label}" for label in ("refusal", "partial", "objection", "other")]
        print(render(["source", "labelled", "precision", "recall", *flagged], rows))


if __name__ == "__main__":
    main()
