"""The HTML report under several constraints: rows, charts and the list have each of them."""

import math

import numpy as np
import pytest

from repo_fast.report.comparison import compare
from repo_fast.report.measures import Evaluation
from tests.report.test_page import page_of

THRESHOLDS = {"harm": 0.0, "refusal": 0.5}
PROMPTS, SAMPLES = 12, 2


def about(name: str, prompt: int) -> bool:
    """The last prompt is under none."""
    return prompt < PROMPTS - 1 if name == "harm" else prompt % 2 == 0 and prompt < 8


def rows_of(policy: str, first: int = 0) -> list[dict]:
    generator = np.random.default_rng(len(policy) + first)
    return [
        {
            "policy": policy,
            "prompt_id": prompt,
            "category": ("even", "odd")[prompt % 2],
            "prompt": f"prompt {prompt}",
            "sample": first + sample,
            "response": f"{policy} says {prompt} {first + sample}",
            "reward": float(generator.normal()),
            **{name: float(np.float32(generator.normal())) if about(name, prompt) else None for name in THRESHOLDS},
            "response_length": 3,
            "finished": True,
        }
        for prompt in range(PROMPTS)
        for sample in range(SAMPLES)
    ]


def evaluation(rows: list[dict]) -> Evaluation:
    costs = {
        name: np.array([-math.inf if row[name] is None else row[name] for row in rows], dtype=np.float32)
        for name in THRESHOLDS
    }
    return Evaluation([row["prompt_id"] for row in rows], [row["reward"] for row in rows], costs)


@pytest.fixture(scope="module")
def compared() -> tuple[dict, list[dict]]:
    first, second, other = rows_of("before"), rows_of("before", SAMPLES), rows_of("repo")
    names = {row["prompt_id"]: row["category"] for row in first}
    categories = {name: [prompt for prompt in names if names[prompt] == name] for name in set(names.values()) - {None}}
    report = {
        "settings": {"reference": "before", "threshold": THRESHOLDS, "samples_per_prompt": SAMPLES},
        **compare(
            {"before": evaluation(first), "repo": evaluation(other)},
            evaluation(second),
            "before",
            threshold=THRESHOLDS,
            categories=categories,
            resamples=100,
        ),
    }
    return report, [*first, *second, *other]


def test_every_measure_of_each_has_a_row_and_a_definition(compared, tmp_path):
    report, samples = compared
    page = page_of(tmp_path, report, samples)
    for name in THRESHOLDS:
        assert page.text.count(f"{name}: strict violation") >= 3
        assert f"Of the constraint {name} alone, over the prompts that it is about. How far the mean cost" in page.text
    assert "Other measures" not in page.text
    assert "a prompt is unsafe where its mean cost is above 0 (harm) or 0.5 (refusal)" in page.text
    assert "A prompt is safe where its mean cost is at most 0 (harm) and 0.5 (refusal)." in page.text
    headings = [text.strip() for text in page.words]
    # Scatter and distribution of each.
    assert [headings.count(name) for name in THRESHOLDS] == [2, 2]


def test_the_list_has_the_costs_and_the_sides_of_all(compared, tmp_path):
    report, samples = compared
    page = page_of(tmp_path, report, samples)
    (index,), chunks = page.data("data-index"), page.data("data-responses")
    assert index["constraints"] == list(THRESHOLDS)
    for policy, name in enumerate(("before", "repo")):
        for prompt in range(PROMPTS):
            own = [row for row in samples if row["policy"] == name and row["prompt_id"] == prompt]
            own = [row for row in own if name == "repo" or row["sample"] >= SAMPLES]
            excess = [
                np.mean([row[key] for row in own]) - limit for key, limit in THRESHOLDS.items() if about(key, prompt)
            ]
            assert index["cost"][policy][prompt] == (pytest.approx(max(excess), rel=1e-3) if excess else None)
            assert index["unsafe"][policy][prompt] == str(int(bool(excess) and max(excess) > 0))
            total, records = chunks[0][prompt][policy]
            assert total == len(records) == SAMPLES
            for record in records:
                row = next(row for row in own if row["sample"] == record[0])
                found = [
                    None if cost is None else pytest.approx(cost, rel=1e-4) for cost in (row[k] for k in THRESHOLDS)
                ]
                assert record[8] == found
                over = [row[key] > limit for key, limit in THRESHOLDS.items() if row[key] is not None]
                assert record[5] == int(any(over))


def test_a_category_has_the_constraints_that_are_about_it(compared, tmp_path):
    report, samples = compared
    measured = {name: set(own["policies"]["repo"]) for name, own in report["categories"].items()}
    assert "refusal_mean_cost" in measured["even"] and "refusal_mean_cost" not in measured["odd"]
    assert "harm_mean_cost" in measured["odd"]
    # Nor has it a row in the chart of one that is not.
    charts = page_of(tmp_path, report, samples).text.split("By category", 1)[1].split("Table of the categories")[0]
    harm, refusal = charts.split("refusal: strict violation", 1)
    assert "even" in harm and "odd" in harm
    of_refusal = refusal.split("Interference rate", 1)[0]
    assert "even" in of_refusal and "odd" not in of_refusal


def test_the_worst_five_percent_of_a_few_prompts_have_no_interval():
    """100 prompts have one, of which the second constraint is about 20."""
    ids = np.arange(100)
    generator = np.random.default_rng(0)
    costs = {"a": generator.normal(size=100), "b": np.where(ids < 20, generator.normal(size=100), -np.inf)}
    own = Evaluation(ids, generator.normal(size=100), costs)
    report = compare({"x": own}, own, "x", threshold={"a": 0.0, "b": 0.0}, resamples=50)
    measured = report["policies"]["x"]
    assert measured["a_cvar_violation"]["low"] is not None
    assert measured["b_cvar_violation"]["low"] is None and measured["b_cvar_violation"]["value"] is not None
    assert measured["a_max_violation"]["low"] is None and measured["b_strict_violation"]["low"] is not None
