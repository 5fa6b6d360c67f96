"""A run under several constraints: who is scored, what is written down of each, and that it goes on as it was."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

from repo_fast.config import parse
from repo_fast.jobs.multiplier_start import describe_start, multipliers_from
from repo_fast.report.evaluations import read_evaluation
from repo_fast.report.measures import by_constraint, score_prompts
from tests.job_runs import OPTIONS, Job, metrics, same_bits, weights, write_lines
from tests.tiny import save_policy

KINDS = {
    "how do i make tea": "harmless",
    "how do i make a bomb please": "harmful",
    "can you make bread": "harmless",
    "tea with bread please": "harmless",
    "yes": "other",
}
# A name that torch's modules have too.
CONSTRAINTS = {
    "harm": {"path": f"{__name__}:harm", "margin": 0.25},
    "type": {
        "path": f"{__name__}:kind",
        "threshold": 0.5,
        "applies_to": {"kind": ["harmless", "other"]},
        "controller": "pid",
        "pid": {"kd": 0.5, "tolerance": 0.1, "smoothing": 0.5},
    },
    "style": {
        "path": f"{__name__}:style",
        "threshold": 4.0,
        "scope": "response",
        "applies_to": {"kind": "harmless"},
        "controller": "fixed",
        "multiplier_init": 0.3,
    },
}
APPLIES = {"harm": {"harmless", "harmful", "other"}, "type": {"harmless", "other"}, "style": {"harmless"}}
asked: dict[str, set[str]] = {}


def _noted(name: str, prompts: Sequence[str]) -> None:
    asked.setdefault(name, set()).update(prompts)


def harm(prompts: list[str], responses: list[str]) -> list[float]:
    _noted("harm", prompts)
    return [len(text) % 7 - 3.0 for text in responses]


def kind(prompts: list[str], responses: list[str]) -> list[float]:
    _noted("type", prompts)
    return [len(text) % 3 - 0.5 for text in responses]


def style(prompts: list[str], responses: list[str]) -> list[float]:
    _noted("style", prompts)
    return [float(len(text.split())) for text in responses]


SCORES = {"harm": harm, "type": kind, "style": style}


def make(folder: Path, rows: Sequence[dict] | None = None, **sections: dict) -> Job:
    """A job whose prompts have a kind."""
    save_policy(folder / "policy")
    rows = [{"prompt": text, "kind": kind} for text, kind in KINDS.items()] if rows is None else rows
    prompts = str(write_lines(folder / "prompts.jsonl", rows))
    options = {name: dict(value) if isinstance(value, dict) else value for name, value in OPTIONS.items()}
    del options["cost"]
    options["policy"] = {"path": str(folder / "policy")}
    options["data"] |= {"prompts": prompts}
    options["algorithm"] = {"name": "repo", "advantage": "gae"}
    options |= {"constraints": CONSTRAINTS, "total_steps": 4, "log": {"loggers": [], "samples_every": 1}, **sections}
    (folder / "job.yaml").write_text(yaml.safe_dump(options, sort_keys=False))
    return Job(folder)


def samples(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "samples.jsonl").read_text().splitlines()]


def assert_what_is_written(output_dir: Path, steps: int) -> None:
    """Every response has the costs of the constraints that are about its prompt, and the metrics are of those."""
    rows = samples(output_dir)
    for name, function in SCORES.items():
        about = [KINDS[row["prompt"]] in APPLIES[name] for row in rows]
        assert [row[name] is not None for row in rows] == about
        scored = [row for row in rows if row[name] is not None]
        expected = function([row["prompt"] for row in scored], [row["response"] for row in scored])
        assert [row[name] for row in scored] == expected
    for step, record in enumerate(metrics(output_dir), start=1):
        ours = [row for row in rows if row["step"] == step]
        safe = torch.ones(len(ours), dtype=torch.bool)
        for name, settings in CONSTRAINTS.items():
            threshold = settings.get("threshold", 0.0)
            costs = {i: row[name] for i, row in enumerate(ours) if row[name] is not None}
            keys = [f"{name}_{key}" for key in ("cost", "strict_violation", "safety_rate", "unsafe_fraction")]
            if not costs:
                assert not set(keys) & record.keys()
                continue
            safe[[i for i, cost in costs.items() if cost > threshold]] = False
            by_prompt: dict[int, list[float]] = {}
            for i, cost in costs.items():
                by_prompt.setdefault(ours[i]["prompt_id"], []).append(cost)
            means = [sum(own) / len(own) - threshold for own in by_prompt.values()]
            assert record[keys[0]] == pytest.approx(sum(costs.values()) / len(costs), abs=1e-6)
            assert record[keys[1]] == pytest.approx(sum(max(v, 0) for v in means) / len(means), abs=1e-6)
            assert record[keys[2]] == pytest.approx(sum(c <= threshold for c in costs.values()) / len(costs))
        assert record["safety_rate"] == pytest.approx(float(safe.double().mean()))
        assert {f"{name}_multiplier" for name in CONSTRAINTS} <= record.keys()
    assert len(metrics(output_dir)) == steps


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    """A whole run, with held-out prompts of which none is 'other'."""
    folder = tmp_path_factory.mktemp("constraints")
    rows = [{"prompt": text, "kind": kind} for text, kind in KINDS.items() if kind != "other"]
    job = make(folder)
    write_lines(folder / "held_out.jsonl", rows)
    asked.clear()
    assert job.here(folder / "run", *evaluated(job)) == 0
    return job, folder / "run"


def evaluated(job: Job) -> tuple[str, str]:
    return f"--data.eval_prompts {job.folder / 'held_out.jsonl'}", "--evaluation.samples_per_prompt 2"


def test_scorers_are_given_the_prompts_that_they_are_about(finished: tuple[Job, Path]) -> None:
    assert asked == {name: {text for text, kind in KINDS.items() if kind in APPLIES[name]} for name in CONSTRAINTS}


def test_what_a_run_writes_down(finished: tuple[Job, Path]) -> None:
    assert_what_is_written(finished[1], steps=4)


def test_multipliers_are_of_their_controllers(finished: tuple[Job, Path]) -> None:
    rows = metrics(finished[1])
    assert len({row["harm_multiplier"] for row in rows}) > 1
    assert len({row["type_multiplier"] for row in rows}) > 1
    assert {row["style_multiplier"] for row in rows} == {0.3}


def test_plots_and_table_have_each_of_them(finished: tuple[Job, Path]) -> None:
    _, output_dir = finished
    for name in ("reward_and_cost", "safety", "multiplier"):
        assert (output_dir / "plots" / f"{name}.png").stat().st_size > 10_000
    table = (output_dir / "before_after.txt").read_text()
    for name in CONSTRAINTS:
        assert f"| {name}: strict violation" in table
    assert "unsafe is a cost above 0 (harm) or 0.5 (type) or 4 (style); rows without a name are of all." in table


def test_evaluations_read_back(finished: tuple[Job, Path]) -> None:
    evaluation, _ = read_evaluation(finished[1] / "eval_after.jsonl", list(CONSTRAINTS))
    parts = by_constraint(evaluation)
    assert {name: len(score_prompts(part).prompt_ids) for name, part in parts.items()} == {
        "harm": 4,
        "type": 3,
        "style": 3,
    }


def test_a_run_under_three_goes_on_as_it_was(finished: tuple[Job, Path], tmp_path: Path) -> None:
    job, whole = finished
    assert job.here(tmp_path / "run", *evaluated(job), "--stop_after 2") == 0
    assert job.here(tmp_path / "run", *evaluated(job), "--resume auto") == 0
    assert metrics(tmp_path / "run") == metrics(whole)
    assert same_bits(weights(tmp_path / "run"), weights(whole))


@pytest.mark.slow
def test_on_two_ranks_with_scores_while_others_are_drawn(tmp_path: Path) -> None:
    """A prompt's responses lie on both ranks, and one rank may have none that a constraint is about."""
    job = make(tmp_path)
    words = ("--rollout.score_early true", "--rollout.batch_size 1", "--total_steps 2")
    ended = job.torchrun(2, tmp_path / "run", *words)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert_what_is_written(tmp_path / "run", steps=2)


def test_one_in_a_mapping_is_one_as_ever(tmp_path: Path) -> None:
    one = {"path": f"{__name__}:harm", "threshold": 0.5, "margin": 0.25, "multiplier_init": 0.7}
    mapped = make(tmp_path / "mapped", constraints={"harm": one})
    plain = make(
        tmp_path / "plain",
        constraints={},
        cost={"path": one["path"]},
        algorithm={"threshold": 0.5, "margin": 0.25, "multiplier_init": 0.7},
    )
    for job in (mapped, plain):
        assert job.here(job.folder / "run", "--total_steps 2") == 0
    ours, theirs = (job.folder / "run" for job in (mapped, plain))
    assert metrics(ours) == metrics(theirs)
    assert same_bits(weights(ours), weights(theirs))
    assert samples(ours) == samples(theirs)


def test_multipliers_start_from_the_reference_s_responses(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    constraints = {
        "harm": {**CONSTRAINTS["harm"], "multiplier_init": "dual", "multiplier_learning_rate": 0.0},
        "type": {**CONSTRAINTS["type"], "multiplier_init": "dual"},
        "style": CONSTRAINTS["style"],
    }
    job = make(tmp_path, constraints=constraints, algorithm={"advantage": "rloo", "kl_coefficient": 0.5})
    words = (f"--data.eval_prompts {job.folder / 'prompts.jsonl'}", "--total_steps 1")
    assert job.here(tmp_path / "run", *words) == 0
    config = parse([*job.words(tmp_path / "run", *words)])
    names = list(constraints)
    evaluations = [
        read_evaluation(tmp_path / "run" / f"eval_{name}.jsonl", names)[0] for name in ("before", "before_again")
    ]
    start = multipliers_from(config, evaluations)
    assert start.converged
    assert start.multipliers[2] == 0.3
    assert describe_start(config, start) in capsys.readouterr().out
    (record,) = metrics(tmp_path / "run")
    assert record["harm_multiplier"] == pytest.approx(max(start.multipliers[0], 1e-3))
    assert 0 < start.multipliers[0] <= 5


def test_a_multiplier_cannot_start_from_prompts_that_its_constraint_is_not_about(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    style = {**CONSTRAINTS["style"], "multiplier_init": "dual"}
    job = make(tmp_path, constraints={"harm": CONSTRAINTS["harm"], "style": style})
    write_lines(tmp_path / "held_out.jsonl", [{"prompt": "yes", "kind": "other"}])
    capsys.readouterr()
    assert job.here(tmp_path / "run", f"--data.eval_prompts {tmp_path / 'held_out.jsonl'}") == 2
    expected = r"error: constraints\.style\.multiplier_init is 'dual', expected a number: none of the 1 prompts of .*\n"
    assert re.fullmatch(expected, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (
            None,
            {"kind": ["harmles"]},
            r"constraint 'type' applies to kind 'harmles', which no prompt has; .*'harmless'\?",
        ),
        (
            [{"prompt": "yes", "kind": "other"}, {"prompt": "tea"}],
            {"kind": "other"},
            r".*which .*jsonl line 2 lacks; .*",
        ),
        (
            [{"prompt": "yes", "kind": "a"}, {"prompt": "yes", "kind": "b"}],
            {"kind": ["a", "b"]},
            r".*line 2: the prompt of .*line 1 again, with kind 'b' instead of 'a'; expected the same, .*",
        ),
        (
            [{"prompt": "yes", "kind": "a", "of": "x"}, {"prompt": "no", "kind": "b", "of": "y"}],
            {"kind": "a", "of": "y"},
            r"constraint 'type' applies to none of the 2 prompts, expected at least one",
        ),
    ],
)
def test_constraints_that_fit_no_prompt_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, rows: list | None, changes: dict, message: str
) -> None:
    changed = {"harm": CONSTRAINTS["harm"], "type": {**CONSTRAINTS["type"], "applies_to": changes}}
    job = make(tmp_path, rows, constraints=changed, rollout={"prompts_per_step": 1, "responses_per_prompt": 2})
    capsys.readouterr()
    assert job.here(tmp_path / "run") == 2
    assert re.fullmatch(rf"error: {message}\n", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_one_that_is_not_about_all_is_measured_on_its_prompts(tmp_path: Path) -> None:
    job = make(tmp_path, constraints={"type": CONSTRAINTS["type"]})
    held_out = f"--data.eval_prompts {job.folder / 'prompts.jsonl'}"
    assert job.here(tmp_path / "run", held_out, "--total_steps 1", "--evaluation.samples_per_prompt 2") == 0
    rows = samples(tmp_path / "run")
    assert [row["cost"] is None for row in rows] == [KINDS[row["prompt"]] == "harmful" for row in rows]
    record = metrics(tmp_path / "run")[0]
    costs = [row["cost"] for row in rows if row["cost"] is not None]
    assert record["cost"] == pytest.approx(sum(costs) / len(costs))
    lines = (tmp_path / "run" / "before_after.txt").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("| cost: mean cost")]
    assert "nan" not in line
    after = [json.loads(row) for row in (tmp_path / "run" / "eval_after.jsonl").read_text().splitlines()]
    by_prompt: dict[str, list[float]] = {}
    for row in after:
        if row["cost"] is not None:
            by_prompt.setdefault(row["prompt"], []).append(row["cost"])
    mean = sum(sum(own) / len(own) for own in by_prompt.values()) / len(by_prompt)
    assert float(line.split("|")[3].split()[0]) == pytest.approx(mean, abs=1e-3)
