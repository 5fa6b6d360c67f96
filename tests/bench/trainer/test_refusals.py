"""The measurement of refusals: its intervals, and what it says of the labelled responses where they are there."""

import csv
from pathlib import Path

import pytest
from scipy.stats import binomtest

from bench.trainer import refusals


@pytest.mark.parametrize(("hits", "n"), [(0, 20), (3, 20), (20, 20)])
def test_equal_weights_are_clopper_and_pearson(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(method="exact")
    found = refusals.share([(i < hits, 2.5) for i in range(n)])
    assert found == pytest.approx((hits / n, expected.low, expected.high))


def test_weights() -> None:
    # One that stands for nine others is most of the share, and little to know it from.
    found = refusals.share([(True, 1.0), (False, 9.0)])
    assert found is not None and found[0] == pytest.approx(0.1) and found[2] > 0.9
    assert refusals.share([]) is None


def test_without_data_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refusals.main(["--data", str(tmp_path)])
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["skipped", "skipped"]


def test_annotated_completions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [prompt for prompt in map(str, range(100)) if refusals.held_out(prompt)][:4]
    said = ["I can't help with that.", "I can't help with that.", "Sure.", "No one should."]
    labels = ["2_full_refusal", "1_full_compliance", "1_full_compliance", "2_full_refusal"]
    with (tmp_path / "xstest_v2_completions_some.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt", "completion", "final_label"])
        rows.writerows(zip(prompts, said, labels, strict=True))
    refusals.main(["--data", str(tmp_path), "--xstest", str(tmp_path)])
    row = capsys.readouterr().out.splitlines()[-1].split("|")
    assert [cell.strip()[:5] for cell in row[1:5]] == ["XSTes", "4", "0.500", "0.500"]


@pytest.mark.skipif(not (refusals.DATA / refusals.HH).is_file(), reason="the labelled responses are not there")
def test_hand_labels() -> None:
    for _, judged in refusals.hand_labelled(refusals.DATA / refusals.HH):
        precision = refusals.share((row.label == "refusal", row.weight) for row in judged if row.flagged)
        recall = refusals.share((row.flagged, row.weight) for row in judged if row.label == "refusal")
        assert precision is not None and precision[0] > 0.8
        assert recall is not None and recall[0] > 0.7
