"""`repo_fast.evaluate` with claims: what it decides follows from what it wrote, and looks are counted."""

import json
import random
import shutil
from pathlib import Path

import pytest

from repo_fast.data import Dialogue
from repo_fast.errors import InputError
from repo_fast.evaluate import main
from repo_fast.evaluation import bounds, drawing
from repo_fast.evaluation.ledger import Ledger, ledger_of
from repo_fast.jobs.training_prompts import Source, prompt_hashes, write_record
from tests.job_runs import PROMPTS, run, snapshot, torchrun, write_lines
from tests.tiny import save_policy

K = 3
SCORERS = ("--reward.path", "tests.evaluation.test_certify:reward", "--cost.path", "tests.scorers:cost")


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    return [len(set(text.split())) / 4 for text in responses]


def random_cost(prompts: list[str], responses: list[str]) -> list[float]:
    return [random.SystemRandom().uniform(-1, 1) for _ in responses]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("policies")
    for seed, name in enumerate(("start", "after", "other"), start=1):
        save_policy(folder / name, seed=seed)
    return {name: folder / name for name in ("start", "after", "other")}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Their file, in a folder where nobody has looked yet."""
    path = tmp_path / "data" / "prompts.jsonl"
    path.parent.mkdir()
    write_lines(path, [{"prompt": text, "category": "tea" if "tea" in text else "other"} for text in PROMPTS])
    return path


def certify(
    policies: dict[str, Path], prompts: Path, out: Path, *options: str, names: tuple[str, ...] = ("start", "after")
) -> int:
    words = [word for name in names for word in ("--policy", f"{name}={policies[name]}")]
    words += ["--prompts", str(prompts), "--output_dir", str(out), "--samples_per_prompt", str(K), "--resamples", "20"]
    # With this seed few of the five prompts are unsafe: shown at 0.9, open at 0.5.
    words += ["--sampling.max_new_tokens", "6", "--seed", "2", "--cache_dir", str(prompts.parent.parent / "cache")]
    return main([*words, *SCORERS, *options])


def read(out: Path, name: str = "certificate.json") -> dict:
    return json.loads((out / name).read_text())


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def looks(prompts: Path) -> list[int]:
    """Those that are counted."""
    rows = [json.loads(line) for line in ledger_of(str(prompts)).read_text().splitlines()]
    return [row["look"] for row in rows if "rows" not in row]


def test_a_certificate_follows_from_its_responses(
    policies: dict[str, Path], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert certify(policies, prompts, out, "--claim", "unsafe_prompts=0.9") == 0
    found = read(out)
    means = {row["prompt_id"]: 0.0 for row in rows(out)}
    for row in rows(out):
        if row["policy"] == "after":
            means[row["prompt_id"]] += row["cost"] / K
    unsafe = sum(mean > 0 for mean in means.values())
    claim = found["claims"]["unsafe_prompts"]
    assert claim["p"] == pytest.approx(bounds.binomial_p(unsafe, 5, 0.9))
    assert claim["bound"] == pytest.approx(bounds.binomial_bound(unsafe, 5, 0.025))
    assert claim["estimate"] == unsafe / 5 and (claim["n"], claim["k"], claim["limit"]) == (5, K, 0.9)
    assert found["verdict"] == claim["verdict"] == "PASS"
    assert (found["delta"], found["look"], found["delta_of_look"]) == (0.05, 1, 0.025)
    assert found["policy"]["name"] == "after" and found["reference"]["name"] == "start"
    assert read(out, "report.json")["certificate"] == found
    capsys.readouterr()
    assert main(["--verify", str(out / "certificate.json")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("PASS: policy after. The claim is shown.\n") and "verified" in said


def test_the_model_card_leaves_the_policy_what_it_is(policies: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
    own = {"start": policies["start"], "after": shutil.copytree(policies["after"], tmp_path / "policy")}
    (own["after"] / "README.md").unlink(missing_ok=True)
    for name in ("report.html", "metrics.jsonl"):
        # Of the run that left the policy.
        (tmp_path / name).touch()
    certify(own, prompts, tmp_path / "out", "--claim", "unsafe_prompts=0.9")
    card, page = (own["after"] / "README.md").read_text(), (tmp_path / "out" / "report.html").read_text()
    assert "**PASS**" in card
    # They lead to each other, and to the page of the run.
    assert "(<../out/report.html>)" in card and "(<../report.html>)" in card
    assert 'href="../policy/README.md"' in page and 'href="../report.html"' in page
    run = (tmp_path / "report.html").read_text()
    assert 'href="policy/README.md"' in run and 'href="out/report.html"' in run
    # The same policy, the same look, and nothing is drawn again.
    certify(own, prompts, tmp_path / "again", "--claim", "unsafe_prompts=0.9")
    assert read(tmp_path / "again")["look"] == 1
    assert len(list((tmp_path / "cache").glob("*/samples.jsonl"))) == 2
    (own["after"] / "README.md").write_text("mine")
    certify(own, prompts, tmp_path / "third", "--claim", "unsafe_prompts=0.9")
    assert (own["after"] / "README.md").read_text() == "mine"
    assert "**PASS**" in (tmp_path / "third" / "model_card.md").read_text()


def test_exit_statuses(policies: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
    assert certify(policies, prompts, tmp_path / "fail", "--claim", "unsafe_prompts=0") == 3
    assert read(tmp_path / "fail")["verdict"] == "FAIL"
    assert main([f"--verify={tmp_path / 'fail' / 'certificate.json'}"]) == 3
    assert certify(policies, prompts, tmp_path / "open", "--claim", "unsafe_prompts=0.5") == 4
    found = read(tmp_path / "open")
    assert found["verdict"] == "UNDECIDED" and found["claims"]["unsafe_prompts"]["prompts_needed"] is not None


def test_every_statement_at_once(policies: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
    section = tmp_path / "claims.yaml"
    section.write_text(
        "claims:\n"
        "  unsafe_responses: {limit: 0.9}\n"
        "  all_constraints: {limit: 0.9}\n"
        "  interference: {limit: 0.8}\n"
        "  tail: {statement: worst_category, of: unsafe_responses, limit: 0.9}\n"
        "  no_worse: {limit: 0.9, bounds: [0, 2]}\n"
        "  mean_cost: {limit: 1, bounds: [-5, 5]}\n"
        "  by_t: {statement: mean_cost, limit: 1}\n"
        "delta: 0.2\n"
    )
    out = tmp_path / "out"
    assert certify(policies, prompts, out, "--certify", str(section), "--claim", "unsafe_prompts=0.9") == 4
    found = read(out)
    assert list(found["claims"]) == [*list(found["claims"])[:-1], "unsafe_prompts"] and found["delta"] == 0.2
    assert len(found["claims"]) == 8
    assert found["claims"]["tail"]["categories"].keys() == {"other", "tea"}
    assert found["claims"]["tail"]["category"] in ("other", "tea")
    assert found["claims"]["by_t"]["asymptotic"] and found["claims"]["by_t"]["bound"] is None
    assert main(["--verify", str(out / "certificate.json")]) == 4


def test_looks_are_counted_and_the_same_command_is_the_same_look(
    policies: dict[str, Path], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tmp_path / "first"
    assert certify(policies, prompts, first, "--claim", "unsafe_prompts=0.9") == 0
    before = {name: text for name, text in snapshot(first).items() if name != "evaluation.yaml"}
    assert certify(policies, prompts, first, "--claim", "unsafe_prompts=0.9") == 0
    assert {name: text for name, text in snapshot(first).items() if name != "evaluation.yaml"} == before
    # In another folder too: what is drawn is the same.
    assert certify(policies, prompts, tmp_path / "again", "--claim", "unsafe_prompts=0.9") == 0
    assert read(tmp_path / "again")["look"] == 1
    # Another limit, another policy, another seed and more prompts are further looks.
    certify(policies, prompts, tmp_path / "limit", "--claim", "unsafe_prompts=0.95")
    certify(policies, prompts, tmp_path / "other", "--claim", "unsafe_prompts=0.9", names=("start", "other"))
    certify(policies, prompts, tmp_path / "seed", "--claim", "unsafe_prompts=0.9", "--seed", "1")
    with prompts.open("a") as file:
        file.write(json.dumps({"prompt": "one more", "category": "tea"}) + "\n")
    certify(policies, prompts, tmp_path / "more", "--claim", "unsafe_prompts=0.9")
    found = [read(tmp_path / name) for name in ("limit", "other", "seed", "more")]
    assert [certificate["look"] for certificate in found] == [2, 3, 4, 5]
    assert [certificate["delta_of_look"] for certificate in found] == [0.05 / 4, 0.05 / 8, 0.05 / 16, 0.05 / 32]
    assert ledger_of(str(prompts)).parent == prompts.parent
    # Fresh prompts under the same name are looked at for the first time.
    write_lines(prompts, [{"prompt": f"fresh {i}", "category": None} for i in range(5)])
    certify(policies, prompts, tmp_path / "fresh", "--claim", "unsafe_prompts=0.9")
    assert read(tmp_path / "fresh")["look"] == 1


def test_a_look_is_spent_before_anything_is_drawn(
    policies: dict[str, Path], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(drawing, "generate", killed)
        certify(policies, prompts, tmp_path / "out", "--claim", "unsafe_prompts=0.9")
    assert read(tmp_path / "out", "claims.json")["look"] == 1 and not (tmp_path / "out" / "certificate.json").exists()
    assert looks(prompts) == [1]
    assert certify(policies, prompts, tmp_path / "out", "--claim", "unsafe_prompts=0.9") == 0
    assert read(tmp_path / "out")["look"] == 1 and looks(prompts) == [1]


@pytest.fixture(scope="module")
def certified(policies: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate."""
    folder = tmp_path_factory.mktemp("certified")
    write_lines(folder / "prompts.jsonl", [{"prompt": text} for text in PROMPTS])
    assert certify(policies, folder / "prompts.jsonl", folder / "out", "--claim", "unsafe_prompts=0.9") == 0
    return folder / "out"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("a score", "made again from the responses it is"),
        ("a text", "has the SHA-256"),
        ("a prompt", "are not the 5 of claims.json"),
        ("a dropped prompt", "there is no response 0 of policy 'start' to prompt"),
        ("a dropped response", "there is no response 2 of policy 'after' to prompt"),
        ("a threshold", "claims.json was changed after it was written"),
        ("a limit", "claims.json was changed after it was written"),
        ("the level", "claims.json was changed after it was written"),
        ("the verdict", "verdict is 'FAIL', made again from the responses it is 'PASS'"),
        ("another claim", "claims.mean_cost is .*, made again there is none"),
        ("a digest", "is not as repo_fast.evaluate wrote it: KeyError"),
        ("a word", "claims.unsafe_prompts.says is 'all is well', made again"),
        ("one more word", "approved is True, made again there is none"),
        ("a look of ages", "is not as repo_fast.evaluate wrote it: OverflowError"),
        ("no file", "cannot be read"),
        ("no JSON", "is not JSON"),
    ],
)
def test_verification_finds(
    change: str,
    message: str,
    certified: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    out = shutil.copytree(certified, tmp_path / "out")
    drawn, plan, certificate = rows(out), read(out, "claims.json"), read(out)
    if change == "a score":
        for row in drawn[-K:]:
            row["cost"] = 3.0 - row["cost"]
    elif change == "a text":
        drawn[0]["response"] += " "
    elif change == "a prompt":
        for row in drawn:
            row["prompt"] = row["prompt"].replace("tea", "coffee")
    elif change == "a dropped prompt":
        gone = drawn[0]["prompt_id"]
        drawn = [row for row in drawn if not (row["prompt_id"] == gone and row["policy"] == "start")]
    elif change == "a dropped response":
        drawn.pop(max(i for i, row in enumerate(drawn) if row["policy"] == "after" and row["sample"] == 2))
    elif change == "a threshold":
        plan["thresholds"]["cost"] = 1.0
    elif change == "a limit":
        plan["claims"]["unsafe_prompts"]["limit"] = 0.95
    elif change == "the level":
        plan["delta_of_look"] = 0.05
    elif change == "the verdict":
        certificate["verdict"] = "FAIL"
    elif change == "another claim":
        certificate["claims"]["mean_cost"] = certificate["claims"]["unsafe_prompts"]
    elif change == "a digest":
        certificate["files"] = {}
    elif change == "a word":
        certificate["claims"]["unsafe_prompts"]["says"] = "all is well"
    elif change == "one more word":
        certificate["approved"] = True
    elif change == "a look of ages":
        plan["look"] = 5000
    if change in ("a score", "a text", "a prompt", "a dropped prompt", "a dropped response"):
        write_lines(out / "samples.jsonl", drawn)
    if change in ("a threshold", "a limit", "the level", "a look of ages"):
        (out / "claims.json").write_text(json.dumps(plan))
    (out / "certificate.json").write_text(json.dumps(certificate))
    if change == "no file":
        (out / "samples.jsonl").unlink()
    elif change == "no JSON":
        (out / "claims.json").write_text("{")
    capsys.readouterr()
    assert main(["--verify", str(out / "certificate.json")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--claim", "unsafe=0.1"), "the claim's name 'unsafe' is not one of mean_cost, unsafe_prompts"),
        (("--claim", "unsafe_prompts"), "--claim is 'unsafe_prompts', expected NAME=LIMIT"),
        (("--claim", "unsafe_prompts=0.1", "--claim", "unsafe_prompts=0.2"), "the name is given twice"),
        (("--claim", "unsafe_prompts=1"), "certify.claims.unsafe_prompts.limit is 1.0, expected a share"),
        (("--claim", "unsafe_prompts=few"), "--claim unsafe_prompts is 'few', expected a number"),
        (("--claim", "unsafe_prompts=nan"), "--claim unsafe_prompts is 'nan', expected a number"),
        (("--claim", "a.b=0.1"), "the claim's name is 'a.b', expected letters"),
        (("--certify.claims.a.statement", "mean_cost"), "certify.claims.a.limit is None, expected a number"),
        (("--claim", "mean_cost=1", "--certify.claims.mean_cost.bounds", "[2, 1]"), "expected [lowest, highest]"),
        (("--claim", "mean_cost=9", "--certify.claims.mean_cost.bounds", "[0, 1]"), "at least 0 and below 1"),
        (("--claim", "unsafe_prompts=0.1", "--certify.claims.unsafe_prompts.bounds", "[0, 1]"), "has no use for it"),
        (("--claim", "unsafe_prompts=0.1", "--certify.claims.unsafe_prompts.constraint", "harm"), "a constraint: cost"),
        (("--claim", "no_worse=0.1", "--certify.claims.no_worse.measure", "well_formed"), "one of reward, cost"),
        (("--claim", "unsafe_prompts=0.1", "--certify.delta", "0"), "certify.delta is 0.0, expected a number between"),
        (("--claim", "unsafe_prompts=0.1", "--certify.policy", "best"), "certify.policy is 'best', expected the name"),
        (("--certify.delta", "0.1"), "certify.delta is 0.1 without claims"),
        (("--accept-asymptotic",), "certify.accept_asymptotic is True without claims"),
        (("--certify", "nothing.yaml"), "--certify 'nothing.yaml' is no file"),
        (("--verify", "certificate.json"), "expected --verify certificate.json and nothing else"),
    ],
)
def test_bad_claims_are_one_line(
    options: tuple[str, ...],
    message: str,
    policies: dict[str, Path],
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    assert certify(policies, prompts, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists() and not ledger_of(str(prompts)).exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("claims: {unsafe_prompts: {}}", "claims.unsafe_prompts is {}, expected a limit"),
        ("claims: null", "claims is None, expected a mapping with at least one claim"),
        ("delta: 0.1", "claims is None"),
        ("claims: {unsafe_prompts: {limit: null}}", "limit is None, expected a number"),
        ("claims: {unsafe_prompts: {limit: 2020-01-01}}", "limit"),
        ("claims: {unsafe_prompts: {limit: [1]}}", "limit"),
        ("claims: {unsafe_prompts: {limt: 1}}", "unknown option 'claims.unsafe_prompts.limt'"),
        ("claims: {unsafe_prompts: 1}", "claims.unsafe_prompts is 1, expected a mapping of options"),
        ("- a", "holds a list, expected a mapping of options"),
    ],
)
def test_a_file_of_claims_loses_none(
    text: str, message: str, policies: dict[str, Path], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "claims.yaml").write_text(text)
    assert certify(policies, prompts, tmp_path / "out", "--certify", str(tmp_path / "claims.yaml")) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_category_that_lost_its_prompts_is_not_shown(
    policies: dict[str, Path], prompts: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    trained = {"start": policies["start"], "after": shutil.copytree(policies["after"], run / "policy")}
    tea = [Dialogue((text,)) for text in PROMPTS if "tea" in text]
    write_record(run, "policy", (Source("data.prompts", "train.jsonl", None, prompt_hashes(tea)),))
    assert certify(trained, prompts, tmp_path / "out", "--claim", "worst_category=0.95") == 4
    claim = read(tmp_path / "out")["claims"]["worst_category"]
    assert claim["category"] == "tea" and "no prompt to test it on in tea" in claim["reason"]
    assert claim["categories"]["tea"] == {"n": 0, "estimate": None, "bound": None, "p": 1.0, "p_reverse": 1.0}


def test_who_is_certified_has_to_be_clear(
    policies: dict[str, Path], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    three, claim = ("start", "after", "other"), ("--claim", "unsafe_prompts=0.9")
    assert certify(policies, prompts, tmp_path / "out", *claim, names=three) == 2
    assert "certify.policy is null with the policies after, other" in capsys.readouterr().err
    certify(policies, prompts, tmp_path / "out", *claim, "--certify.policy", "other", names=three)
    assert read(tmp_path / "out")["policy"]["name"] == "other"
    # Alone, a policy is compared with nothing.
    certify(policies, prompts, tmp_path / "alone", *claim, names=("after",))
    found = read(tmp_path / "alone")
    assert found["policy"]["name"] == "after" and found["reference"] is None
    assert certify(policies, prompts, tmp_path / "beside", "--claim", "interference=0.1", names=("after",)) == 2
    assert "is of the reference itself" in capsys.readouterr().err


def test_a_certificate_is_not_written_over(
    policies: dict[str, Path], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    certify(policies, prompts, out, "--claim", "unsafe_prompts=0.9")
    before = snapshot(out)
    assert certify(policies, prompts, out, "--claim", "unsafe_prompts=0.8") == 2
    assert "has other claims" in capsys.readouterr().err
    assert certify(policies, prompts, out) == 2
    assert "is of a certificate" in capsys.readouterr().err
    assert snapshot(out) == before
    assert looks(prompts) == [1]


def test_prompts_that_the_policy_knows_are_left_out(
    policies: dict[str, Path], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    trained = {"start": policies["start"], "after": shutil.copytree(policies["after"], run / "policy")}
    write_lines(prompts, [{"prompt": text} for text in (*PROMPTS, PROMPTS[1].upper())])
    asked = [Dialogue((f"  {PROMPTS[0].upper()} ",)), Dialogue(("something else",))]
    known = Source("data.prompts", "train.jsonl", None, prompt_hashes(asked))
    hub = Source("cost.path", "owner/model", None, None)
    write_record(run, "policy", (known, hub))
    certify(trained, prompts, tmp_path / "out", "--claim", "unsafe_prompts=0.9")
    found = read(tmp_path / "out")
    assert found["prompts"]["excluded"] == [
        {"prompt_id": 0, "prompt": PROMPTS[0], "of": f"data.prompts (train.jsonl) of {run / 'policy'}"},
        {"prompt_id": len(PROMPTS), "prompt": PROMPTS[1].upper(), "of": "prompt 1 of the same set"},
    ]
    assert found["prompts"]["n"] == found["claims"]["unsafe_prompts"]["n"] == len(PROMPTS) - 1
    assert any("owner/model" in sentence for sentence in found["unknown"])
    assert {row["prompt_id"] for row in rows(tmp_path / "out")} == set(range(1, len(PROMPTS)))
    assert main(["--verify", str(tmp_path / "out" / "certificate.json")]) in (0, 4)
    # Without a claim nothing is left out.
    assert certify(trained, prompts, tmp_path / "plain") == 0
    assert {row["prompt_id"] for row in rows(tmp_path / "plain")} == set(range(len(PROMPTS) + 1))
    known = Source("data.prompts", "train.jsonl", None, prompt_hashes(Dialogue((text,)) for text in PROMPTS))
    write_record(run, "policy", (known,))
    assert certify(trained, prompts, tmp_path / "none", "--claim", "unsafe_prompts=0.9") == 2
    assert "expected prompts that are new to it" in capsys.readouterr().err


def test_a_claim_about_categories_needs_some(
    policies: dict[str, Path], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_lines(prompts, [{"prompt": text} for text in PROMPTS])
    assert certify(policies, prompts, tmp_path / "out", "--claim", "worst_category=0.9") == 2
    assert "no prompt of" in capsys.readouterr().err and not ledger_of(str(prompts)).exists()


def test_ranks_change_nothing(policies: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
    certify(policies, prompts, tmp_path / "one", "--claim", "unsafe_prompts=0.9")
    words = ["--prompts", str(prompts), "--output_dir", str(tmp_path / "two"), "--samples_per_prompt", str(K)]
    words += ["--policy", f"start={policies['start']}", "--policy", f"after={policies['after']}", "--resamples", "20"]
    words += ["--sampling.max_new_tokens", "6", "--seed", "2", "--claim", "unsafe_prompts=0.9", *SCORERS]
    done = run([*torchrun(2), "repo_fast.evaluate", *words])
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "two") == read(tmp_path / "one")


def test_ledgers_survive(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "new" / "looks.jsonl")

    def spend(key: str, *hashes: str, delta: float = 0.05) -> int:
        return ledger.spend(key, delta, hashes, {"policy": "a\ud800"})

    assert spend("a", "1", "2") == 1
    with ledger.path.open("ab") as file:
        file.write(b'{"look": 2, "key": "torn')
    assert spend("b", "2", "3") == 2
    # An editor may take the last newline.
    ledger.path.write_bytes(ledger.path.read_bytes().rstrip())
    assert spend("c", "4") == 1
    assert spend("d", "1", "4") == 3
    assert spend("a", "1", "2") == 1
    assert [json.loads(line)["key"] for line in ledger.path.read_text().splitlines()] == ["a", "b", "c", "d"]
    with pytest.raises(InputError, match="certify.delta is 0.1, and look 1 at these prompts, .* was of 0.05"):
        spend("e", "1", delta=0.1)
    for text in ("looks\n", "my notes"):
        ledger.path.write_text(text)
        with pytest.raises(InputError, match="line 1: b'.*' is not a look"):
            spend("e", "1")
        assert ledger.path.read_text() == text
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "looks.jsonl"):
        with pytest.raises(InputError, match="cannot be written"):
            Ledger(path).spend("e", 0.05, ["1"], {})


def test_the_same_look_that_comes_out_otherwise_is_another(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "looks.jsonl")
    given = ("a", 0.05, ["1"], {"policy": "a"})
    assert ledger.spend(*given) == 1
    assert [ledger.settle(*given, found) for found in ("x", "x", "y", "x", "z", "y")] == [1, 1, 2, 1, 3, 2]
    assert ledger.spend("b", 0.05, ["1"], {}) == 4


def test_responses_drawn_again_are_another_look(policies: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
    options = ("--claim", "unsafe_prompts=0.9", "--cost.path", "tests.evaluation.test_certify:random_cost")
    found = []
    for name in ("one", "two"):
        certify(policies, prompts, tmp_path / name, *options)
        shutil.rmtree(tmp_path / "cache")
        found.append(read(tmp_path / name)["look"])
        assert main(["--verify", str(tmp_path / name / "certificate.json")]) in (0, 3, 4)
    assert found == [1, 2] and read(tmp_path / "two")["delta_of_look"] == 0.05 / 4


def test_what_was_drawn_without_a_claim_is_a_look(policies: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
    for seed in ("0", "1"):
        assert certify(policies, prompts, tmp_path / f"plain-{seed}", "--seed", seed) == 0
    certify(policies, prompts, tmp_path / "claimed", "--seed", "1", "--claim", "unsafe_prompts=0.9")
    assert read(tmp_path / "claimed")["look"] == 3
    # Those that are noted are not noted again.
    certify(policies, prompts, tmp_path / "more", "--seed", "1", "--claim", "unsafe_prompts=0.8")
    assert read(tmp_path / "more")["look"] == 4


def test_a_lost_ledger_does_not_give_a_look_back(policies: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
    certify(policies, prompts, tmp_path / "first", "--claim", "unsafe_prompts=0.9")
    certify(policies, prompts, tmp_path / "second", "--claim", "unsafe_prompts=0.8")
    ledger_of(str(prompts)).unlink()
    certify(policies, prompts, tmp_path / "second", "--claim", "unsafe_prompts=0.8")
    assert read(tmp_path / "second")["look"] == 2
