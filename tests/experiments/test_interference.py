"""The experiment of `experiments/interference`: its shrunk form runs and goes on, and its statistics are right."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import scipy.stats

from experiments import runs
from experiments.interference.__main__ import experiment
from experiments.interference.results import frontier_gaps, gap_between
from experiments.interference.settings import FAMILIES, HYPERPARAMETERS, TUNED, Setting, hyperparameters, settings
from experiments.interference.world import World, split_prompts
from experiments.runs import Run, run_all
from experiments.seeds import interval
from repo_fast.config import TrainConfig, parse
from repo_fast.errors import InputError
from repo_fast.world import corpus
from tests.job_runs import REPOSITORY, run, snapshot


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.1, 0.4, 0.2, 0.0, 0.3]])
def test_interval_over_seeds_is_students(values: list[float]) -> None:
    mean = sum(values) / len(values)
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, loc=mean, scale=scipy.stats.sem(values))
    assert interval(values) == pytest.approx((mean, low, high), abs=1e-3)


def test_one_seed_has_no_interval() -> None:
    mean, low, high = interval([0.5])
    assert mean == 0.5 and math.isnan(low) and math.isnan(high)


@pytest.mark.parametrize(
    ("one", "other", "gap", "ends"),
    [
        # A line a half above the other, of which a part is shared; the order of the points does not count.
        ([(2.0, 2.5), (0.0, 0.5)], [(1.0, 1.0), (3.0, 3.0)], 0.5, (1, 2)),
        # From 0.25 at x = 0 to 0.75 at x = 1.
        ([(0.0, 0.25), (1.0, 0.75)], [(-1.0, 0.0), (2.0, 0.0)], 0.5, (0, 1)),
        # A concave bend within the shared range: 1 on its left half and, on average, 0.5 on its right one.
        ([(0.0, 1.0), (1.0, 1.0), (2.0, 0.0)], [(0.0, 0.0), (2.0, 0.0)], 0.75, (0, 2)),
        # What is beaten by a mixture of others, or by another of the same x, does not count.
        ([(0.0, 1.0), (1.0, -5.0), (2.0, 1.0)], [(0.0, 0.0), (0.0, -3.0), (2.0, 0.0)], 1.0, (0, 2)),
        ([(0.0, 1.0), (1.0, 1.0)], [(1.0, 0.25), (2.0, 0.0)], 0.75, (1, 1)),
        ([(0.0, 1.0)], [(0.0, 0.0)], 1.0, (0, 0)),
        ([(0.0, 1.0), (1.0, 1.0)], [(1.5, 0.0), (2.0, 0.0)], None, None),
        ([(0.0, None), (1.0, 1.0)], [(0.0, 0.0), (2.0, 0.0)], None, None),
    ],
)
def test_a_gap_is_between_the_best_that_both_reach(one: list, other: list, gap: float | None, ends: tuple) -> None:
    found = gap_between(one, other, less_is_better=False)
    assert (found is None) == (gap is None)
    if found is not None:
        assert found.mean == pytest.approx(gap, abs=0.01) and (found.low, found.high) == ends
    # Where less is better, the same with every sign changed.
    negated = [[(x, None if y is None else -y) for x, y in points] for points in (one, other)]
    mirrored = gap_between(*negated, less_is_better=True)
    assert (mirrored is None) == (gap is None) and (mirrored is None or mirrored.mean == pytest.approx(-found.mean))


def test_frontiers_are_compared_seed_by_seed() -> None:
    grid = [Setting(f"{family}-{m}", family, m, 2) for family in ("repo", "ppo_lag", "ppo_lag_alike") for m in (0, 1)]
    # Rewards of 1 and 2 everywhere, and violations lower than that by what stands here, by seed.
    lower = {"repo": (0.5, 0.25), "ppo_lag": (0.0, 0.0), "ppo_lag_alike": (0.0, 1.0)}
    policies = {}
    for row in grid:
        for seed in range(2):
            reward = 2.0 - row.value
            measured = {"mean_reward": reward, "strict_violation": reward - lower[row.family][seed]}
            policies[f"{row.name}.{seed}"] = {name: {"value": value} for name, value in measured.items()}
    gaps = frontier_gaps(grid, {"policies": policies}, "mean_reward", "strict_violation")
    # In the second seed PPO-Lagrangian with RePO's hyperparameters is the better of the two.
    assert [gap.mean for gap in gaps] == pytest.approx([-0.5, 0.75])
    gaps = frontier_gaps(grid, {"policies": policies}, "strict_violation", "mean_reward")
    # In the second, the best reward at a violation of 1 or more, three quarters of the range, is 2.
    assert [gap.mean for gap in gaps] == pytest.approx([0.5, -0.75 / 4 - 0.75 / 2 * 3 / 4], abs=0.01)


@pytest.mark.slow
def test_every_setting_is_a_configuration_that_trains() -> None:
    small = World.small()
    names = set()
    for setting in settings():
        names.add(setting.name)
        trained = small.run(Path("x"), setting.family, hyperparameters(setting.family), setting.value, "world:train", 0)
        words = [word for key, value in trained.options.items() for word in (f"--{key}", value)]
        config = parse(words, TrainConfig)
        assert config.algorithm.name == FAMILIES[setting.family].options["algorithm.name"]
        if FAMILIES[setting.family].knob == "algorithm.margin":
            assert config.algorithm.margin == setting.value
    assert len(names) == len(settings())
    assert all(seeds >= 2 for seeds in (setting.seeds for setting in settings()))


def test_every_hyperparameter_of_a_family_has_one_of_the_values_that_were_tried() -> None:
    assert TUNED.keys() == {name for name, family in FAMILIES.items() if family.tuned_as is None}
    for name, tuned in TUNED.items():
        assert tuned.keys() == FAMILIES[name].untuned().keys()
        assert all(value in HYPERPARAMETERS[key] for key, value in tuned.items())
        assert ("algorithm.multiplier_learning_rate" in tuned) == (name not in ("ppo", "reward_shaping"))


def test_tuning_trains_on_no_prompt_that_it_judges_on(tmp_path: Path) -> None:
    train, tune = (
        [json.loads(line)["prompt"] for line in Path(path).read_text().splitlines()] for path in split_prompts(tmp_path)
    )
    assert not set(train) & set(tune)
    assert sorted(train + tune) == sorted(row["prompt"] for row in corpus.train_prompts())
    assert not set(tune) & {row["prompt"] for row in corpus.test_prompts()}


def test_a_run_of_other_options_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, origin = tmp_path / "run", {"sft": "one"}
    monkeypatch.setattr(runs, "module_command", lambda module, options: ["mkdir", str(folder / "policy")])
    run_all([Run(folder, {"seed": "0"}, origin)], jobs=1)
    before = snapshot(tmp_path)
    run_all([Run(folder, {"seed": "0"}, origin)], jobs=1)
    with pytest.raises(InputError, match="was made with seed 0, this command has 1"):
        run_all([Run(folder, {"seed": "1"}, origin)], jobs=1)
    with pytest.raises(InputError, match="was made with sft one, this command has another"):
        run_all([Run(folder, {"seed": "0"}, {"sft": "another"})], jobs=1)
    assert snapshot(tmp_path) == before
    (folder / "run.json").unlink()
    with pytest.raises(InputError, match="expected both, or neither"):
        run_all([Run(folder, {"seed": "0"}, origin)], jobs=1)


def test_a_failed_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 of 1 runs failed, .* see .*log.txt"):
        run_all([Run(tmp_path / "bad", {"policy.path": "/no/such"})], jobs=1)
    assert "/no/such" in (tmp_path / "bad" / "log.txt").read_text()


@pytest.mark.slow
def test_the_shrunk_experiment_runs_and_is_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-m", "experiments.interference", "--small", "--output_dir", str(tmp_path)]
    finished = run(command)
    assert finished.returncode == 0, finished.stderr[-4000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.keys() == {"rules", "learned"} and results["rules"].keys() == {"repo-0", "ppo_lag-0"}
    # The rules are both judges here, so both say the same.
    assert results["rules"] == results["learned"]
    entry = results["rules"]["repo-0"]["strict_violation"]
    assert len(entry["seeds"]) == 2 and entry["low"] <= entry["mean"] <= entry["high"]
    assert "RePO (prompt), m = 0 - PPO-Lagrangian, m = 0" in (tmp_path / "results.md").read_text()
    before = snapshot(tmp_path)
    assert {"frontier.png", "curves.png", "report/report.html"} <= before.keys()
    # Evaluations are left out, which have a cache of their own.
    monkeypatch.setattr(runs, "call", lambda *_, **__: None)
    assert experiment(tmp_path, jobs=1, small=True) == 0
    assert "4 runs, 4 of them complete" in capsys.readouterr().out
    assert snapshot(tmp_path) == before


TRAINING = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (folder / "saved").touch() or sys.exit(143))
(folder / "started").touch()
time.sleep(60)
"""
TRAININGS = f"""
import sys
from pathlib import Path
from experiments import runs
runs.module_command = lambda module, options: [sys.executable, "-c", {TRAINING!r}, options["output_dir"]]
trainings = [runs.Run(Path(sys.argv[1]) / name, {{"policy.path": "world:tiny"}}) for name in ("first", "second")]
sys.exit(runs.interruptible(lambda: runs.run_all(trainings, jobs=1)))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_what_is_under_way_save_and_starts_no_more(tmp_path: Path, number: int) -> None:
    command = [sys.executable, "-c", TRAININGS, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as child:
        while not (tmp_path / "first" / "started").exists():
            assert child.poll() is None
            time.sleep(0.05)
        child.send_signal(number)
        said, _ = child.communicate(timeout=30)
    assert child.returncode == 128 + number and "the same command goes on" in said
    assert (tmp_path / "first" / "saved").exists() and not (tmp_path / "second" / "started").exists()
