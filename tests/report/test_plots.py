"""The pictures: real PNGs with something in them, from whatever a run has logged."""

import math
import sys

import numpy as np
import pytest

from repo_fast.report.plots import plot_evaluations, plot_metrics
from repo_fast.report.series import running_mean

ALL = {"reward_and_cost", "safety", "multiplier", "kl_and_entropy", "response_length", "loss", "speed"}
KEYS = (
    "reward cost strict_violation safety_rate multiplier kl entropy response_length loss clip_fraction "
    "generate_seconds score_seconds experience_seconds update_seconds tokens_per_second"
).split()


def records(steps):
    generator = np.random.default_rng(0)
    return [{"step": step, **{key: float(generator.random()) for key in KEYS}} for step in range(1, steps + 1)]


def has_color(path, color):
    from matplotlib.image import imread

    return bool((np.rint(255 * imread(path)[..., :3]) == color).all(axis=-1).any())


BLUE = (0, 114, 178)


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_every_picture_is_a_png_with_a_curve_in_it(tmp_path, steps):
    files = plot_metrics(records(steps), tmp_path / "plots")
    assert {path.stem for path in files} == ALL == {path.stem for path in (tmp_path / "plots").glob("*.png")}
    for path in files:
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert has_color(path, BLUE), path


def test_each_of_several_constraints_has_its_panels(tmp_path):
    def height(folder, rows, threshold):
        plot_metrics(rows, folder, threshold)
        from matplotlib.image import imread

        return {name: imread(folder / f"{name}.png").shape[0] for name in ("reward_and_cost", "safety", "multiplier")}

    one = height(tmp_path / "one", records(3), 0.0)
    names = ("harm", "refusal")
    own = ("cost", "strict_violation", "safety_rate", "multiplier")
    rows = [row | {f"{name}_{key}": row.pop(key) for key in own[:1] for name in names[:1]} for row in records(3)]
    rows = [row | {f"{name}_{key}": 0.5 for name in names for key in own} for row in rows]
    several = height(tmp_path / "several", rows, {"harm": 0.5, "refusal": 0.0})
    # A panel is 2.8 inches of 120 dots: reward and two costs; two violations, three rates; two multipliers.
    panels = {"reward_and_cost": (2, 3), "safety": (2, 5), "multiplier": (1, 2)}
    for name, (alone, together) in panels.items():
        assert (one[name], several[name]) == tuple(round(120 * (1 + 2.8 * n)) for n in (alone, together))


def test_the_phases_are_stacked_in_their_colors(tmp_path):
    plot_metrics(records(3), tmp_path)
    for color in ((86, 180, 233), (230, 159, 0), (204, 121, 167), (0, 158, 115)):
        assert has_color(tmp_path / "speed.png", color)


def test_gaps_are_gaps_and_missing_metrics_leave_no_picture(tmp_path):
    rows = [
        {"step": 1, "reward": 1.0, "cost": None, "multiplier": None, "kl": math.nan},
        {"step": 2, "reward": math.inf, "kl": 0.5, "loss": "text"},
        {"step": 4, "reward": 2.0, "cost": math.nan},
    ]
    assert {path.stem for path in plot_metrics(rows, tmp_path)} == {"reward_and_cost", "kl_and_entropy"}
    assert plot_metrics([], tmp_path / "none") == []


def test_running_mean_skips_gaps_and_is_cut_at_the_ends():
    values = np.array([1.0, 2.0, np.nan, 4.0, np.nan, np.nan, np.nan])
    expected = [1.5, 1.5, 3.0, 4.0, 4.0, np.nan, np.nan]
    np.testing.assert_allclose(running_mean(values, 3), expected)


def test_pyplot_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    monkeypatch.setenv("MPLBACKEND", "TkAgg")
    assert plot_metrics(records(2), tmp_path)


def test_evaluations_have_a_picture_of_their_own(tmp_path):
    rows = [{"step": step, "mean_reward": 1.0, "harm_strict_violation": 0.1 * step} for step in (0, 20, 40)]
    (path,) = plot_evaluations(rows, tmp_path, {"harm": 0.0, "refusal": 0.0})
    assert path.name == "evaluations.png" and has_color(path, BLUE)
    assert plot_evaluations([{"step": 0}], tmp_path) == []
