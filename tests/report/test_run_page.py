"""The page of a run: every curve beside the log, the worst prompts, texts as texts, and runs that lack something."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from repo_fast.config import default_options
from repo_fast.report.evaluations import write_evaluation
from repo_fast.report.run_page import RunPage
from repo_fast.report.series import Columns, thin
from tests.job_runs import write_lines
from tests.report.made_run import make_run, metrics_of, responses_of
from tests.report.test_page import HOSTILE, Page, assert_needs_nothing

NUMBER = r"(−?[\d.,]+(?:e[-−+]\d+)?)"


def html_of(folder: Path) -> str:
    RunPage(folder, default_options).write()
    assert not (folder / "report.html.tmp").exists()
    return (folder / "report.html").read_text(encoding="utf-8")


def page_of(folder: Path) -> Page:
    return Page(html_of(folder))


def number(text: str) -> float:
    return float(text.replace("−", "-").replace(",", ""))


def charts_of(html: str) -> dict[str, ElementTree.Element]:
    """By caption."""
    figures = re.findall(r"<figure><figcaption>(.*?)</figcaption>(<svg.*?</svg>)</figure>", html, re.DOTALL)
    assert len(dict(figures)) == len(figures)
    return {caption: ElementTree.fromstring(svg) for caption, svg in figures}


def titles_of(chart: ElementTree.Element) -> list[str]:
    return [title.text or "" for title in chart.iter("title")]


def points_of(chart: ElementTree.Element, css: str) -> np.ndarray:
    """The points of the path of a class, [N, 2]."""
    (d,) = (path.get("d") or "" for path in chart.iter("path") if path.get("class") == css)
    return np.array([[float(x) for x in point.split()] for point in re.split("[MLz]", d) if point])


CAPTIONS = {
    "reward": "Mean reward",
    "kl": "KL to the reference",
    "entropy": "Entropy",
    "response_length": "Response length",
    "loss": "Policy loss",
    "clip_fraction": "Clip fraction",
    "gradient_norm": "Gradient norm",
    "tokens_per_second": "Throughput",
    "cost": "Mean cost",
    "strict_violation": "Strict violation",
    "safety_rate": "Safety rate",
    "multiplier": "Multiplier λ",
}


@pytest.mark.parametrize("steps", [1, 20, 40])
def test_every_curve_has_every_step(steps: int, tmp_path: Path) -> None:
    charts = charts_of(html_of(make_run(tmp_path / "run", steps)))
    rows = metrics_of(steps)
    assert set(charts) == set(CAPTIONS.values())
    for key, caption in CAPTIONS.items():
        values = np.array([row[key] for row in rows])
        said = [re.fullmatch(f"step {NUMBER}: {NUMBER}", title) for title in titles_of(charts[caption])]
        assert [number(own[1]) for own in said if own] == list(range(1, steps + 1))
        assert [number(own[2]) for own in said if own] == pytest.approx(values.tolist(), rel=1e-3)
        drawn = points_of(charts[caption], "curve policy0" if steps < 30 else "curve pale policy0")
        assert len(drawn) == steps
        if steps > 1:
            # A straight line leads from the numbers to the places, upwards on the page.
            for places, numbers, sign in ((drawn[:, 0], np.arange(steps), 1), (drawn[:, 1], values, -1)):
                slope, start = np.polyfit(numbers, places, 1)
                assert slope * sign > 0 and np.abs(slope * numbers + start - places).max() < 0.11
    assert "dashed: threshold 0.5" in {text.text for text in charts["Mean cost"].iter("text")}


def test_a_long_run_is_drawn_in_groups_and_says_so(tmp_path: Path) -> None:
    html = html_of(make_run(tmp_path / "run", 1010))
    values = np.array([row["reward"] for row in metrics_of(1010)])
    groups = [values[i : i + 6] for i in range(0, 1010, 6)]
    pattern = f"steps? {NUMBER} to {NUMBER}: mean {NUMBER}, {NUMBER} to {NUMBER}"
    chart = charts_of(html)["Mean reward"]
    said = [re.fullmatch(pattern, title) for title in titles_of(chart)]
    found = np.array([[number(text) for text in own.groups()] for own in said if own])
    assert len(found) == len(groups) == 169
    assert found[0][:2].tolist() == [1, 6] and found[-1][:2].tolist() == [1009, 1010]
    expected = [[group.mean(), group.min(), group.max()] for group in groups]
    assert found[:, 2:] == pytest.approx(np.array(expected), rel=1e-3)
    band = points_of(chart, "band policy0")
    assert len(band) == 2 * len(groups) and (band[:169, 1] >= band[:168:-1, 1]).all()
    assert "Of 1,010 steps 6 at a time are drawn as one" in Page(html).text


def test_ten_thousand_steps_are_a_small_page(tmp_path: Path) -> None:
    assert len(html_of(make_run(tmp_path / "run", 10_000)).encode()) < 1_000_000


def test_thinned_columns_keep_gaps() -> None:
    values = np.array([1.0, np.nan, np.nan, np.nan, 5.0])
    groups = thin(np.arange(1.0, 6), values, 3)
    assert groups.group == 2 and groups.first.tolist() == [1, 3, 5] and groups.last.tolist() == [2, 4, 5]
    np.testing.assert_array_equal(groups.mean, [1, np.nan, 5])
    np.testing.assert_array_equal(groups.low, groups.high)


def test_a_log_is_read_on_and_one_that_was_written_anew_from_its_beginning(tmp_path: Path) -> None:
    log, columns = tmp_path / "metrics.jsonl", Columns(tmp_path / "metrics.jsonl")
    columns.refresh()
    assert len(columns["step"]) == 0
    log.write_text('{"step": 1, "a": 1.5}\n{"step": 2, "b": 2')
    columns.refresh()
    assert columns["step"].tolist() == [1] and columns["a"].tolist() == [1.5]
    log.write_text(log.read_text() + '.5, "a": null}\n')
    columns.refresh()
    np.testing.assert_array_equal(columns["a"], [1.5, np.nan])
    np.testing.assert_array_equal(columns["b"], [np.nan, 2.5])
    # Bytes that were read are not looked at again, but for the last line: a file that is gone may have left its number.
    log.write_text(log.read_text().replace("1.5", "9.5") + '{"step": 3}\n')
    columns.refresh()
    np.testing.assert_array_equal(columns["a"], [1.5, np.nan, np.nan])
    log.write_text(log.read_text().replace('"step": 3', '"step": 7') + '{"step": 8}\n')
    columns.refresh()
    np.testing.assert_array_equal(columns["a"], [9.5, np.nan, np.nan, np.nan])
    assert columns["step"].tolist() == [1, 2, 7, 8]
    aside = tmp_path / "aside"
    aside.write_text(log.read_text() + '{"step": 3}\n')
    aside.replace(log)
    columns.refresh()
    np.testing.assert_array_equal(columns["a"], [9.5, *[np.nan] * 4])


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run"))
    assert_needs_nothing(page)
    assert not any(re.match(r"[a-z]+:|/|\.\.", attributes.get("href") or "") for _, attributes in page.tags)


def test_the_worst_prompts_are_the_worst_and_those_that_got_worse_are_there(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    generator = np.random.default_rng(0)
    before, after = generator.normal(0.5, 1, (2, 60, 2)).round(3)
    write_evaluation(folder / "eval_before.jsonl", responses_of(before.tolist(), "old"))
    write_evaluation(folder / "eval_after.jsonl", responses_of(after.tolist(), "new"))
    html = html_of(folder)
    lists = [re.findall(r"prompt (\d+) ?(?:·|<)", part) for part in html.split('<ol class="list">')[1:]]
    old, new = (np.maximum(costs.mean(1) - 0.5, 0) for costs in (before, after))
    order = np.argsort(-new, kind="stable")
    assert [int(i) for i in lists[0]] == [i for i in order if new[i] > 0][:20]
    risen = [i for i in np.argsort(-(new - old), kind="stable") if new[i] > old[i] + 1e-5]
    assert [int(i) for i in lists[1]] == [i for i in risen if i not in order[:20]][:10]
    assert f"{(new > 1e-5).sum()} of 60 held-out prompts are unsafe" in Page(html).text
    assert f"the violation of {len(risen)} is higher" in Page(html).text
    worst = int(lists[0][0])
    for text in (f"old {worst} 0", f"new {worst} 0", f"new {worst} 1"):
        assert f">{text}</div>" in html


def test_the_table_has_the_measures_before_and_after(tmp_path: Path) -> None:
    text = page_of(make_run(tmp_path / "run")).text
    # Means 0, 1.5 and 0.6 before, 0.7, 1.5 and 0.15 after, above 0.5.
    row = re.search(r"Strict violation less is better (.*?) Mean cost", text)
    assert row is not None
    assert re.match(r"0\.37 \[.*?\] 0\.40 \[.*?\] \+0\.033 \[.*?\] ≈ no difference shown", row[1])
    # Of one safe prompt before, in a second sample and after.
    assert re.search(r"Interference rate less is better 0\.0.% .* 100\.0.% ", text)
    assert "3 prompts; unsafe is a cost above 0.5" in text and "second sample of the same policy" in text


def test_several_constraints_each_have_their_curves_and_their_costs(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 5, ("harm", "refusal"))
    for name, costs in (("before", [0.0, 0.0]), ("after", [0.9, 0.0])):
        rows = responses_of([[cost] for cost in costs])
        for row in rows:
            row["harm"], row["refusal"] = row.pop("cost"), None if row["prompt_id"] else 0.25
        write_evaluation(folder / f"eval_{name}.jsonl", rows)
    rows = [row | {"safety_rate": 0.5} for row in metrics_of(5, ("harm", "refusal"))]
    write_lines(folder / "metrics.jsonl", rows)
    html = html_of(folder)
    text = Page(html).text
    overall = re.search("<figcaption>Safety rate of all</figcaption>.*?>share of responses</text>", html, re.DOTALL)
    assert overall is not None and overall[0].count("<figcaption>") == 1
    assert "Constraint harm" in text and "Constraint refusal" in text
    assert "1 of 2 held-out prompts are unsafe" in text and "harm 0.900, refusal 0.250 unsafe" in text
    assert "harm: strict violation" in text and html.count("<figcaption>Multiplier λ</figcaption>") == 2


def test_evaluations_while_training_warnings_and_the_best_are_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    rows = [{"step": step, "mean_reward": step / 10, "mean_reward_error": 0.5, "kl": 1.0} for step in (0, 20, 40)]
    write_lines(folder / "evaluations.jsonl", rows)
    write_lines(folder / "warnings.jsonl", [{"step": 30, "rule": "kl", "about": "", "text": "KL is 60"}])
    (folder / "best_policy").mkdir()
    (folder / "best_policy" / "best_evaluation.json").write_text(
        json.dumps({"step": 20, "measure": "mean_reward", "value": 2.0, "value_at_start": None})
    )
    html = html_of(folder)
    part = html[html.index('id="evaluations"') : html.index('id="prompts"')]
    assert titles_of(charts_of(part)["Mean reward"]) == ["step 0: 0 ± 0.98", "step 20: 2 ± 0.98", "step 40: 4 ± 0.98"]
    text = Page(html).text
    assert "kl at step 30: KL is 60" in text and "The best by mean_reward is that of step 20, 2" in text


def test_intervals_of_shares_end_where_shares_do(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    rows = [{"step": step, "well_formed": 0.98, "well_formed_error": 0.05} for step in (0, 20, 40)]
    write_lines(folder / "evaluations.jsonl", rows)
    html = html_of(folder)
    chart = charts_of(html[html.index('id="evaluations"') : html.index('id="prompts"')])["Well-formed"]
    ticks = [number(text.text or "") for text in chart.iter("text") if text.get("text-anchor") == "end"]
    assert ticks and max(ticks) <= 1
    (bars,) = (path.get("d") or "" for path in chart.iter("path") if path.get("class") == "interval policy0")
    ends = [float(end) for end in re.findall(r"V([\d.]+)", bars)]
    # Nearer to the mean than the other end, which 0.98 - 0.098 is.
    means = points_of(chart, "curve policy0")[:, 1]
    starts = [float(start) for start in re.findall(r"M[\d.]+ ([\d.]+)", bars)]
    assert (means - ends) / (starts - means) == pytest.approx(0.02 / 0.098, rel=0.05)


def test_a_multiplier_at_its_maximum_is_seen(tmp_path: Path) -> None:
    most = max(row["multiplier"] for row in metrics_of(40))

    def lines(algorithm: dict[str, object]) -> set[str | None]:
        folder = make_run(tmp_path / "run", algorithm={"name": "repo", "advantage": "gae", **algorithm})
        return {text.text for text in charts_of(html_of(folder))["Multiplier λ"].iter("text")}

    assert any("its maximum" in (text or "") for text in lines({"multiplier_max": most}))
    assert not any("its maximum" in (text or "") for text in lines({"multiplier_max": 2 * most}))
    several = make_run(tmp_path / "several", 40, ("harm", "refusal"))
    config = yaml.safe_load((several / "config.yaml").read_text())
    config["constraints"]["harm"]["multiplier_max"] = 0.2
    (several / "config.yaml").write_text(yaml.safe_dump(config))
    assert html_of(several).count("its maximum") == 1
    # One that has a name, alone: its columns have none.
    alone = make_run(tmp_path / "alone", algorithm={"name": "repo", "advantage": "gae", "multiplier_max": most})
    config = yaml.safe_load((alone / "config.yaml").read_text())
    for own, count in (({}, 1), ({"multiplier_max": 2 * most}, 0), ({"controller": "fixed"}, 0)):
        config["constraints"] = {"harm": {"path": "m:f", "threshold": 0.5, **own}}
        (alone / "config.yaml").write_text(yaml.safe_dump(config))
        assert html_of(alone).count("its maximum") == count


@pytest.mark.parametrize("kind", ["sft", "score"])
def test_supervised_runs_have_their_losses(kind: str, tmp_path: Path) -> None:
    rows = [
        {"step": i, "loss": 1 / i, "epoch": i / 5, "update_seconds": 0.5, "tokens_per_second": 9.0} for i in (1, 2, 3)
    ]
    rows[-1] |= {"eval_loss": 0.25, "ranking_accuracy": 0.75, "evaluate_seconds": 2.0}
    write_lines(tmp_path / "metrics.jsonl", rows)
    options = {"model": {"path": "m"}, "epochs": 2} | ({"kind": "reward"} if kind == "score" else {})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
    page = page_of(tmp_path)
    charts = charts_of((tmp_path / "report.html").read_text())
    assert titles_of(charts["Training loss"])[1] == "step 2: 0.5" and titles_of(charts["Held-out loss"]) == [
        "step 3: 0.25"
    ]
    assert ("Held-out ranking accuracy" in charts) == (kind == "score")
    assert "epoch 0.6 of 2" in page.text
    assert "reward model" in page.text if kind == "score" else "supervised fine-tuning" in page.text
    # 1.5 s of updates and 2 s of an evaluation.
    assert "update 0.5 43%" in page.text and "evaluate 2 57%" in page.text


def test_what_differs_from_the_defaults_comes_first(tmp_path: Path) -> None:
    html = html_of(make_run(tmp_path / "run", rollout={"temperature": 0.7, "top_p": 1.0}))
    changed = dict(re.findall(r'<th scope="row">([\w.]+)</th><td>(.*?)</td>', html))
    assert changed["rollout.temperature"] == "0.7" and changed["algorithm.threshold"] == "0.5"
    assert "rollout.top_p" not in changed and "algorithm.name" not in changed


def test_a_run_that_has_just_begun_waits_and_one_of_before_lacks_what_it_lacks(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    assert not RunPage(folder, default_options).is_run()
    (folder / "config.yaml").write_text("total_steps: 40\nalgorithm: {name: ppo}\n")
    page = RunPage(folder, default_options)
    assert page.is_run() and "No step is done yet" in page_of(folder).text
    # The same page, of a run that goes on.
    write_lines(folder / "metrics.jsonl", [{"step": 1, "reward": 1.0, "kl": None, "non_finite": {"kl": "nan"}}])
    page.write()
    html = (folder / "report.html").read_text()
    assert set(charts_of(html)) == {"Mean reward"} and "step 1 of 40" in Page(html).text
    (folder / "config.yaml").unlink()
    assert set(charts_of(html_of(folder))) == {"Mean reward"}


def test_responses_of_a_later_step_are_of_an_end_that_is_to_come(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 3)
    assert "The worst prompts" in page_of(folder).text
    rows = [row | {"step": 4} for row in responses_of([[1.0], [1.0], [1.0]])]
    write_evaluation(folder / "eval_after.jsonl", rows)
    text = page_of(folder).text
    assert "The worst prompts" not in text and "Before and after" not in text and "cannot be shown" not in text


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 3)
    (folder / "eval_after.jsonl").write_text('{"step": 1, "prompt_id": 0}\n')
    (folder / "warnings.jsonl").write_text("[]\n")
    page = page_of(folder)
    for problem in ("the table of before and after cannot be shown", "warnings.jsonl cannot be shown"):
        assert problem in page.text
    assert "Mean reward" in page.text
    (folder / "config.yaml").write_text("a: [")
    (folder / "metrics.jsonl").write_text("no\n")
    text = page_of(folder).text
    assert "config.yaml cannot be shown" in text and "line 1: not JSON" in text


def test_texts_of_others_stay_texts(tmp_path: Path) -> None:
    harmless = page_of(make_run(tmp_path / "x" / "run", 3))
    folder = make_run(tmp_path / "run", 3, date=HOSTILE.replace("\ud800", "").replace("\x00", ""))
    for name, costs in (("before", [[0.0], [2.0]]), ("after", [[0.9], [1.5]])):
        rows = responses_of(costs, prompt=HOSTILE, response=HOSTILE, category=HOSTILE)
        write_evaluation(folder / f"eval_{name}.jsonl", rows)
    write_lines(folder / "warnings.jsonl", [{"step": 1, "rule": HOSTILE, "text": HOSTILE}])
    write_lines(folder / "metrics.jsonl", metrics_of(3, ["</svg><script>alert(1)</script>"]))
    page = page_of(folder)
    for tag in ("script", "img", "iframe", "b", "link", "form"):
        assert sum(own == tag for own, _ in page.tags) == sum(own == tag for own, _ in harmless.tags), tag
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "<script>document.title='pwned'</script>" in page.text and "⟨U+202E⟩" in page.text
    assert "Constraint </svg><script>alert(1)" in page.text or "</svg><script>alert(1)" in page.text


def test_a_link_leads_nothing_that_is_written_out_of_the_folder(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 3)
    (tmp_path / "precious").write_text("mine")
    for name in ("report.html", "report.html.tmp"):
        (folder / name).symlink_to(tmp_path / "precious")
    assert "step 3 of 40" in html_of(folder)
    assert (tmp_path / "precious").read_text() == "mine" and not (folder / "report.html").is_symlink()


def test_links_lead_to_files_of_the_run_that_are_there(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 3)
    for name in ("plots/reward.png", "policy/README.md", "javascript:alert(1)/report.html", "eval #1/report.html"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    (tmp_path / "secret").write_text("x")
    (folder / "samples.jsonl").symlink_to(tmp_path / "secret")
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "report.html").write_text("x")
    (folder / "link").symlink_to(tmp_path / "away")
    found = {a["href"] for tag, a in page_of(folder).tags if tag == "a" and not a["href"].startswith("#")}
    assert found == {
        *("plots/reward.png", "policy/README.md", "javascript%3Aalert%281%29/report.html", "eval%20%231/report.html"),
        *("config.yaml", "metrics.jsonl", "eval_before.jsonl", "eval_before_again.jsonl", "eval_after.jsonl"),
    }


def test_the_page_depends_on_the_files_alone_and_its_version_changes_with_them(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 3)
    page = RunPage(folder, default_options)
    assert html_of(folder) == html_of(folder)
    before = page.version()
    assert page.version() == before
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(metrics_of(4)[-1]) + "\n")
    assert page.version() != before
