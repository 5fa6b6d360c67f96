"""An evaluation under several constraints: a column of each, scored where it applies and once."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from repo_fast.evaluate import main
from tests.job_runs import PROMPTS, write_lines
from tests.tiny import save_policy

asked: list[str] = []


def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [len(set(text.split())) / 4 for text in responses]


def harm(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [len(text) % 7 - 3.0 for text in responses]


def noted(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    asked.extend(prompts)
    return [float(len(text) % 2) for text in responses]


def config(folder: Path, output_dir: Path, **changes: object) -> list[str]:
    constraints = {
        "harm": {"path": f"{__name__}:harm"},
        "refusal": {"path": f"{__name__}:noted", "threshold": 0.5, "applies_to": {"category": "tea"}},
    }
    options = {
        "policies": {"one": str(folder / "policy")},
        "prompts": str(folder / "prompts.jsonl"),
        "output_dir": str(output_dir),
        "samples_per_prompt": 2,
        "sampling": {"max_new_tokens": 6, "batch_size": 2},
        "reward": {"path": f"{__name__}:reward"},
        "constraints": constraints,
        "resamples": 20,
        **changes,
    }
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    path = output_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(options, sort_keys=False))
    return ["--config", str(path)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("constraints")
    save_policy(folder / "policy", seed=1)
    write_lines(
        folder / "prompts.jsonl",
        [{"prompt": text, "category": "tea" if "tea" in text else "other"} for text in PROMPTS],
    )
    return folder


def test_each_has_a_column_and_measures(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    asked.clear()
    assert main(config(folder, tmp_path / "out")) == 0
    tea = {text for text in PROMPTS if "tea" in text}
    assert set(asked) == tea
    # Twice, since the reference has a second sample.
    assert len(asked) == len(tea) * 4
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    for row in rows:
        assert [row["harm"]] == harm([row["prompt"]], [row["response"]])
        assert row["refusal"] == (float(len(row["response"]) % 2) if row["prompt"] in tea else None)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["settings"]["costs"]) == ["harm", "refusal"]
    assert report["settings"]["threshold"] == {"harm": 0.0, "refusal": 0.5}
    own = [row["refusal"] for row in rows if row["sample"] < 2 and row["refusal"] is not None]
    assert report["policies"]["one"]["refusal_safety_rate"]["value"] == pytest.approx(1 - sum(own) / len(own))
    assert "unsafe is a cost above 0 (harm) or 0.5 (refusal)" in caplog.text
    asked.clear()
    assert main(config(folder, tmp_path / "out")) == 0
    assert not asked, "from the cache"


def test_one_that_is_not_about_all_prompts(folder: Path, tmp_path: Path) -> None:
    about_tea = {"refusal": {"path": f"{__name__}:noted", "threshold": 0.5, "applies_to": {"category": "tea"}}}
    assert main(config(folder, tmp_path / "out", constraints=about_tea)) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [row["cost"] is None for row in rows] == ["tea" not in row["prompt"] for row in rows]
    own = [row["cost"] for row in rows if row["sample"] < 2 and row["cost"] is not None]
    measured = json.loads((tmp_path / "out" / "report.json").read_text())["policies"]["one"]
    assert measured["cost_safety_rate"]["value"] == pytest.approx(1 - sum(own) / len(own))
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


def test_whom_a_constraint_is_about_is_part_of_what_the_cache_knows_its_scores_by(folder: Path, tmp_path: Path) -> None:
    assert main(config(folder, tmp_path / "out")) == 0
    asked.clear()
    constraints = {
        "harm": {"path": f"{__name__}:harm"},
        "refusal": {"path": f"{__name__}:noted", "threshold": 0.5, "applies_to": {"category": ["tea", "other"]}},
    }
    assert main(config(folder, tmp_path / "out", constraints=constraints)) == 0
    assert set(asked) == set(PROMPTS)


def test_a_claim_of_all_together_is_not_said_to_be_of_those_that_the_first_is_about(
    folder: Path, tmp_path: Path
) -> None:
    save_policy(tmp_path / "other", seed=2)
    refusal = {"path": f"{__name__}:noted", "threshold": 0.5, "applies_to": {"category": "tea"}}
    options = {
        "constraints": {"refusal": refusal, "harm": {"path": f"{__name__}:harm"}},
        "policies": {"one": str(folder / "policy"), "two": str(tmp_path / "other")},
        "reference": "one",
        "certify": {
            "claims": {
                "interference": {"limit": 0.5},
                "of_one": {"statement": "interference", "constraint": "refusal", "limit": 0.5},
            }
        },
    }
    assert main(config(folder, tmp_path / "out", **options)) in (0, 3, 4)
    claims = json.loads((tmp_path / "out" / "certificate.json").read_text())["claims"]
    both = "a mean refusal cost above 0.5 or a mean harm cost above 0"
    assert re.match(
        f"of the prompts that are safe under one, at most 50 % more have {both}", claims["interference"]["says"]
    )
    assert claims["of_one"]["says"].startswith("of the prompts that refusal is about, of the prompts that are safe")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 1.0}, r"threshold is 1\.0, expected 0 with constraints, which have one each"),
        ({"cost": {"path": "a:b"}}, r"cost\.path is 'a:b' with constraints harm, refusal, expected one form: .*"),
        (
            {"constraints": {"a": {"path": f"{__name__}:harm", "applies_to": {"category": "te"}}}},
            r"constraint 'a' applies to category 'te', which no prompt has; .*",
        ),
        (
            {"constraints": {"a": {"path": "a:b", "controller": "pid"}}},
            r"unknown option 'constraints\.a\.controller' .*",
        ),
    ],
)
def test_what_cannot_be(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, changes: dict, message: str
) -> None:
    assert main(config(folder, tmp_path / "out", **changes)) == 2
    assert re.search(rf"error: {message}\n", capsys.readouterr().err)
