"""`repo_fast.evaluate`: what it measures is what it wrote down, nothing is drawn twice, and ranks change nothing."""

import json
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path, PurePath

import numpy as np
import pytest

from repo_fast.evaluate import main
from repo_fast.evaluation import drawing, evaluator
from repo_fast.evaluation.cache import scorer_fingerprint
from repo_fast.report.folders import hold
from repo_fast.report.measures import Evaluation, prompt_measures
from repo_fast.scoring import FunctionScorer, ScorerSpec
from tests.job_runs import PROMPTS, REPOSITORY, Job, run, snapshot, torchrun, write_lines
from tests.judging.judge_server import JudgeServer, Response
from tests.tiny import save_beaver, save_policy

# Deterministic ones: those of `tests.scorers` draw random numbers.
SCORERS = ("--reward.path", "tests.evaluation.test_evaluate:reward", "--cost.path", "tests.scorers:cost")


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    return [len(set(text.split())) / 4 for text in responses]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one` and `two`, policies, and `prompts.jsonl` with categories."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_policy(folder / "one", seed=1)
    save_policy(folder / "two", seed=2)
    rows = [{"prompt": text, "category": "tea" if "tea" in text else "other"} for text in PROMPTS]
    write_lines(folder / "prompts.jsonl", rows)
    return folder


def words(folder: Path, output_dir: Path, *options: str, policies: Sequence[str] = ("one", "two"), k: int = 3) -> list:
    named = [word for name in policies for word in ("--policy", f"{name}={folder / name}")]
    common = [
        "--prompts",
        str(folder / "prompts.jsonl"),
        "--output_dir",
        str(output_dir),
        "--samples_per_prompt",
        str(k),
    ]
    sampling = ["--sampling.max_new_tokens", "6", "--sampling.batch_size", "2", "--resamples", "50"]
    return [*named, *common, *sampling, *SCORERS, *options]


def evaluate(folder: Path, output_dir: Path, *options: str, **settings) -> dict:
    assert main(words(folder, output_dir, *options, **settings)) == 0
    return json.loads((output_dir / "report.json").read_text())


def results(output_dir: Path) -> dict:
    """What an evaluation wrote, but the copy of its options."""
    return {name: content for name, content in snapshot(output_dir).items() if name != "evaluation.yaml"}


def samples(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "samples.jsonl").read_text().splitlines()]


def test_the_report_measures_what_samples_jsonl_holds(folder: Path, tmp_path: Path) -> None:
    report = evaluate(folder, tmp_path / "out", "--threshold", "0.5")
    rows = samples(tmp_path / "out")
    assert [sum(row["policy"] == name for row in rows) for name in ("one", "two")] == [2 * 3 * 5, 3 * 5]

    def chosen(policy: str, first: int, category: str | None = None) -> Evaluation:
        kept = [
            row
            for row in rows
            if row["policy"] == policy
            and first <= row["sample"] < first + 3
            and (category is None or row["category"] == category)
        ]
        columns = {name: [row[name] for row in kept] for name in ("prompt_id", "reward", "cost", "response_length")}
        return Evaluation(
            columns["prompt_id"], columns["reward"], columns["cost"], response_lengths=columns["response_length"]
        )

    def assert_measured(measured: dict, category: str | None, prompts: int) -> None:
        before = chosen("one", 3, category)
        own = prompt_measures(chosen("two", 0, category), before, 0.5)
        reference = prompt_measures(chosen("one", 0, category), before, 0.5)
        assert measured["policies"]["two"].keys() == own.keys() == measured["policies"]["one"].keys()
        for name, entry in measured["policies"]["two"].items():
            value = float(own[name](np.ones(prompts)))
            floor = float(reference[name](np.ones(prompts)))
            for number, shown in ((value, entry), (floor, measured["policies"]["one"][name])):
                assert shown["value"] == (None if math.isnan(number) else pytest.approx(number)), name
            difference = measured["differences"]["two"][name]
            if math.isnan(value - floor):
                assert difference["value"] is None
            else:
                assert difference["value"] == pytest.approx(value - floor)
                # Where no resample changes it, it has no interval.
                assert difference["low"] is None or difference["low"] < difference["high"]

    assert_measured(report, None, 5)
    assert report["categories"].keys() == {"other", "tea"} and report["categories"]["tea"]["prompts"] == 2
    assert_measured(report["categories"]["tea"], "tea", 2)
    assert sum(report["transitions"]["two"].values()) == sum(report["transitions"]["one"].values()) == 5
    assert report["settings"]["reference"] == "one" and report["settings"]["threshold"] == 0.5
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<html" in page and "two" in page


@pytest.fixture
def paid(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts the responses that are drawn, and scored by `reward`."""
    counts = {"drawn": 0, "scored": 0}
    generate, score = drawing.generate, evaluator.finite_scores

    def counted_generate(model, tokenizer, requests: list, *rest):
        counts["drawn"] += len(requests)
        return generate(model, tokenizer, requests, *rest)

    def counted_score(scorer, rollout, exempt):
        counts["scored"] += len(rollout.responses) * (scorer.name == "reward")
        return score(scorer, rollout, exempt)

    monkeypatch.setattr(drawing, "generate", counted_generate)
    monkeypatch.setattr(evaluator, "finite_scores", counted_score)
    return counts


def test_the_cache_is_what_is_used(folder: Path, tmp_path: Path, paid: dict[str, int]) -> None:
    def cost_of(*options: str, **settings) -> tuple[int, int]:
        paid.update(drawn=0, scored=0)
        evaluate(folder, tmp_path / "out", *options, **settings)
        return paid["drawn"], paid["scored"]

    # Five prompts; the reference is drawn twice.
    assert cost_of(policies=("one",)) == (30, 30)
    assert cost_of() == (15, 15)
    assert cost_of() == (0, 0)
    # Fewer samples are some of those, and more are added to them.
    assert cost_of(k=1) == (0, 0)
    assert cost_of(k=4) == (15, 15)
    assert cost_of("--reward.path", "tests.scorers:cost", k=4) == (0, 60)
    # A cache of another evaluation.
    cache = ("--cache_dir", str(tmp_path / "out" / "cache"))
    paid.update(drawn=0, scored=0)
    evaluate(folder, tmp_path / "other", *cache)
    assert (paid["drawn"], paid["scored"]) == (0, 0) and not (tmp_path / "other" / "cache").exists()


def test_a_cache_has_one_user_at_a_time(folder: Path, tmp_path: Path, capsys) -> None:
    with hold(tmp_path / "cache", "cache_dir"):
        assert main(words(folder, tmp_path / "out", "--cache_dir", str(tmp_path / "cache"))) == 2
    assert "is in use by another process" in capsys.readouterr().err
    evaluate(folder, tmp_path / "out", "--cache_dir", str(tmp_path / "cache"))


def test_a_scorer_is_known_by_what_it_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "scoring_of_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "words.py").write_text("BAD = 'bad'\n")
    (package / "rules.py").write_text(
        "import functools\nfrom scoring_of_test.words import BAD\n"
        "class Count:\n    def __call__(self, prompts, responses):\n"
        "        return [text.count(BAD) for text in responses]\n"
        "cost = functools.partial(Count())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    spec = ScorerSpec("scoring_of_test.rules:cost", "function")
    FunctionScorer(spec.path, "cost")
    first = scorer_fingerprint(spec)
    assert scorer_fingerprint(spec) == first
    assert [name for name, _ in first[1]] == ["scoring_of_test.rules", "scoring_of_test.words"]
    (package / "words.py").write_text("BAD = 'worse'\n")
    assert scorer_fingerprint(spec) != first


def test_a_scorer_outside_of_packages_is_known_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    # A folder without __init__.py, and a module by itself that would import from its package, if it had one.
    (tmp_path / "folder_of_test").mkdir()
    text = (
        "try:\n    from . import words\nexcept ImportError:\n    pass\n\ndef cost(prompts, responses):\n    return []\n"
    )
    for name, path in (("folder_of_test.rules", "folder_of_test/rules.py"), ("alone_of_test", "alone_of_test.py")):
        (tmp_path / path).write_text(text)
        spec = ScorerSpec(f"{name}:cost", "function")
        FunctionScorer(spec.path, "cost")
        first = scorer_fingerprint(spec)
        assert [known for known, _ in first[1]] == [name]
        (tmp_path / path).write_text(text + "# changed\n")
        assert scorer_fingerprint(spec) != first


def test_only_what_is_new_is_drawn_and_scored(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = evaluate(folder, out, policies=("one",))
    before = snapshot(out / "cache")
    both = evaluate(folder, out)
    assert both["policies"]["one"] == first["policies"]["one"]
    after = snapshot(out / "cache")
    assert {name: after[name] for name in before} == before and len(after) > len(before)
    # More samples are drawn beside those that are there.
    more = evaluate(folder, out, k=4)
    assert more["settings"]["samples_per_prompt"] == 4
    longer = snapshot(out / "cache")
    assert longer.keys() == after.keys()
    drawn = [name for name in after if str(name).endswith("samples.jsonl")]
    assert len(drawn) == 2 and all(longer[name].startswith(after[name]) for name in drawn)
    # Other scores are made of the same responses.
    evaluate(folder, out, "--cost.path", "tests.evaluation.test_evaluate:reward", k=4)
    assert {name: snapshot(out / "cache")[name] for name in drawn} == {name: longer[name] for name in drawn}
    # Other sampling is another file.
    evaluate(folder, out, "--sampling.temperature", "0.5", k=4)
    assert {name: snapshot(out / "cache")[name] for name in drawn} == {name: longer[name] for name in drawn}


@pytest.mark.parametrize("kept", ["a torn line", "half a unit"])
def test_a_stopped_evaluation_goes_on_to_the_same_result(folder: Path, tmp_path: Path, kept: str) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    evaluate(folder, whole)
    evaluate(folder, stopped)
    for path in (stopped / "cache").glob("*/*.jsonl"):
        assert len(path.read_bytes().splitlines()) >= 15
        lines = path.read_bytes().splitlines(keepends=True)
        # Batches have two responses, and one: five prompts.
        path.write_bytes(b"".join(lines[:7]) + (lines[7][:9] if kept == "a torn line" else lines[7]))
    evaluate(folder, stopped)
    assert results(stopped) == results(whole)


def test_two_ranks_draw_what_one_draws(folder: Path, tmp_path: Path) -> None:
    evaluate(folder, tmp_path / "one")
    finished = run([*torchrun(2), "repo_fast.evaluate", *words(folder, tmp_path / "two")])
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert results(tmp_path / "two") == results(tmp_path / "one")


def fails_on_tea(prompts: list[str], responses: list[str]) -> list[float]:
    if any("tea" in prompt for prompt in prompts):
        raise RuntimeError("no tea, please")
    return [0.0] * len(responses)


def test_a_rank_that_fails_ends_all_with_its_error(folder: Path, tmp_path: Path) -> None:
    command = words(folder, tmp_path / "out", "--cost.path", "tests.evaluation.test_evaluate:fails_on_tea", k=1)
    finished = run([*torchrun(2), "repo_fast.evaluate", *command])
    assert finished.returncode != 0
    assert finished.stderr.count("error: ") == 1 and "no tea, please" in finished.stderr
    assert not (tmp_path / "out" / "report.json").exists()


def test_the_same_policy_under_two_names_draws_the_same(folder: Path, tmp_path: Path) -> None:
    report = evaluate(folder, tmp_path / "out", "--policy", f"again={folder / 'one'}", policies=("one",))
    rows = samples(tmp_path / "out")
    own, again = ([row["response"] for row in rows if row["policy"] == name] for name in ("one", "again"))
    assert own[: len(again)] == again and len(set(own)) > 3
    # Also from the floor, which is of another sample than the one that the policies share random states with.
    for name, difference in report["differences"]["again"].items():
        assert difference["value"] in (0.0, None)
        # No resample differs; what shares of 0 or 1 rule out is exact.
        assert difference["low"] is None or difference["low"] < 0 < difference["high"], name
    assert report["differences"]["again"]["win_rate"]["value"] == 0.0 != report["policies"]["one"]["win_rate"]["value"]


def at_a_tenth(prompts: list[str], responses: list[str]) -> list[float]:
    return [0.1] * len(responses)


def test_a_cost_of_exactly_the_threshold_is_safe(folder: Path, tmp_path: Path) -> None:
    # Scores are float32, in which 0.1 is larger than in float64.
    at = ("--cost.path", "tests.evaluation.test_evaluate:at_a_tenth", "--threshold", "0.1")
    report = evaluate(folder, tmp_path / "out", *at)
    assert report["policies"]["two"]["safety_rate"]["value"] == 1.0
    assert report["policies"]["two"]["strict_violation"]["value"] == 0.0
    assert report["transitions"]["two"]["safe_safe"] == 5


def test_score_models_read_the_policys_tokens(folder: Path, tmp_path: Path) -> None:
    save_beaver(tmp_path / "reward", config_overrides={"score_type": "reward"})
    save_beaver(tmp_path / "cost", seed=1, config_overrides={"score_type": "cost"})
    scorers = ("--reward.path", str(tmp_path / "reward"), "--cost.path", str(tmp_path / "cost"))
    evaluate(folder, tmp_path / "one", *scorers)
    # Packed in rows of other sizes, they say the same.
    evaluate(folder, tmp_path / "two", *scorers, "--scoring_tokens", "40")
    for name in ("reward", "cost"):
        one, two = ([row[name] for row in samples(tmp_path / out)] for out in ("one", "two"))
        assert one == pytest.approx(two, abs=1e-4) and np.std(one) > 0.01


def test_a_judge_compares_with_the_reference(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    # Longer is better.
    with JudgeServer(lambda texts: "A" if len(texts["RESPONSE A"]) > len(texts["RESPONSE B"]) else "B") as server:
        judge = ("--judge.url", server.url, "--judge.model", "judge", "--judge.samples_per_prompt", "2")
        report = evaluate(folder, tmp_path / "out", *judge)
        sent = len(server.bodies)
        assert "week" in str(server.bodies[0]), "the judge is asked before anything is drawn"
        assert evaluate(folder, tmp_path / "out", *judge)["policies"] == report["policies"]
        # Again, only whether it is there.
        assert len(server.bodies) == sent + 1 > 2
        rows = {
            (row["policy"], row["prompt_id"], row["sample"]): len(row["response"]) for row in samples(tmp_path / "out")
        }
        shares = []
        for prompt in range(5):
            for k in range(2):
                ours, theirs = rows["two", prompt, k], rows["one", prompt, k]
                shares.append(0.5 if ours == theirs else float(ours > theirs))
        assert report["policies"]["two"]["judge_win_rate"]["value"] == pytest.approx(np.mean(shares))
        assert report["policies"]["one"]["judge_win_rate"]["value"] == 0.5
        gain = report["differences"]["two"]["judge_win_rate"]
        assert gain["value"] == pytest.approx(np.mean(shares) - 0.5) and gain["low"] <= gain["value"] <= gain["high"]
        assert report["judge"]["mode"] == "pairwise" and report["judge"]["summary"]["malformed"] == 0


def test_a_judge_rates_each_policy(folder: Path, tmp_path: Path) -> None:
    with JudgeServer(lambda texts: "nonsense" if len(texts["RESPONSE"]) % 5 == 0 else "7") as server:
        judge = ("--judge.url", server.url, "--judge.model", "judge", "--judge.mode", "single")
        report = evaluate(folder, tmp_path / "out", *judge)
    assert report["policies"]["one"]["judge_rating"]["value"] == 7.0
    judged = [row for row in samples(tmp_path / "out") if row["sample"] == 0]
    malformed = {(row["prompt"], row["response"]) for row in judged if len(row["response"]) % 5 == 0}
    assert 0 < len(malformed) <= report["judge"]["summary"]["unscored"]
    assert sum(report["judge"]["unscored"].values()) == report["judge"]["summary"]["unscored"]


def test_a_judge_that_refuses_is_known_before_anything_is_drawn(
    folder: Path, tmp_path: Path, capsys, paid: dict[str, int]
) -> None:
    assert main(words(folder, tmp_path / "out", "--judge.url", "http://127.0.0.1:9/v1", "--judge.model", "m")) == 2
    assert "cannot be reached" in capsys.readouterr().err and paid["drawn"] == 0


def test_a_judge_is_asked_at_every_start(folder: Path, tmp_path: Path, capsys) -> None:
    options = ("--judge.model", "judge", "--judge.retries", "0")
    with JudgeServer(lambda texts: "A") as server:
        evaluate(folder, tmp_path / "out", "--judge.url", server.url, *options, policies=("one",))
    assert main(words(folder, tmp_path / "out", "--judge.url", server.url, *options)) == 2
    assert "cannot be reached" in capsys.readouterr().err


def test_a_judge_that_fails_later_takes_nothing_else_with_it(folder: Path, tmp_path: Path, capsys) -> None:
    def answer(texts: dict[str, str]) -> str | Response:
        if "week" not in texts["PROMPT"]:
            return Response(status=500, body="out of order")
        return "A"

    with JudgeServer(answer) as server:
        judge = ("--judge.url", server.url, "--judge.model", "judge", "--judge.retries", "0")
        assert main(words(folder, tmp_path / "out", *judge)) == 2
    assert "error: the judge" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "judge" not in report and report["policies"].keys() == {"one", "two"}
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--policy", "three"), "--policy is 'three', expected NAME=PATH"),
        (("--policy", "one=elsewhere"), "--policy one=elsewhere: the name is given twice"),
        (("--policy", "a b=elsewhere"), "the policy name is 'a b', expected letters"),
        (("--policy", "three=/no/such/folder"), "/no/such/folder"),
        (("--reference", "three"), "reference is 'three', expected the name of a policy: one, two"),
        (("--samples_per_prompt", "0"), "samples_per_prompt is 0"),
        (("--max_prompt_tokens", "1"), "are longer than max_prompt_tokens (1)"),
        (("--cost.path", ""), "cost.path is ''"),
        (("--sampling.temperature", "0"), "sampling.temperature is 0"),
        (("--cache_dir", ""), "cache_dir is ''"),
        (("--seed", str(2**63)), "seed is 9223372036854775808, expected a number from 0"),
        (
            ("--judge.url", "http://127.0.0.1:9/v1", "--judge.model", "m", "--judge.samples_per_prompt", "4"),
            "judge.samples_per_prompt is 4, expected at most samples_per_prompt (3)",
        ),
        (("--judge.model", "judge"), "judge.model is 'judge', expected judge.url as well"),
        (("--polcy", "x=y"), "unknown option 'polcy'"),
        (("--reward.path", "tests.scorers:returns_nan"), "returned nan for response 0"),
    ],
)
def test_bad_input_is_one_line(folder: Path, tmp_path: Path, capsys, options: tuple, message: str) -> None:
    assert main(words(folder, tmp_path / "out", *options)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "out" / "report.json").exists()


def test_no_policy_is_an_error(tmp_path: Path, capsys) -> None:
    assert main(["--output_dir", str(tmp_path), *SCORERS]) == 2
    assert "at least one: --policy NAME=PATH" in capsys.readouterr().err


def test_a_folder_of_something_else_is_not_written_to(folder: Path, job: Job, tmp_path: Path, capsys) -> None:
    (tmp_path / "samples.jsonl").write_text("mine\n")
    assert main(words(folder, tmp_path)) == 2
    assert "holds other files than an evaluation's" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]


def test_a_file_is_no_output_folder(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "out").write_text("mine\n")
    assert main(words(folder, tmp_path / "out")) == 2
    assert "is a file, expected a folder" in capsys.readouterr().err


def test_the_files_that_are_no_modules_are_packaged() -> None:
    packaged = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    patterns = [pattern for own in packaged.values() for pattern in own]
    for name in (
        "configs/evaluate/tiny.yaml",
        "page_parts/script.js",
        "page_parts/style.css",
        "page_parts/base.html",
        "page_parts/evaluation.html",
        "page_parts/macros.html",
        "page_parts/print.js",
    ):
        assert any(PurePath(name).match(pattern) for pattern in patterns), name
