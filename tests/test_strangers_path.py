"""A stranger's path: a folder of a model, twenty prompts, a reward and two costs of one's own, to a certificate.

`docs/start/your-own.md` is followed from top to bottom in an empty folder, with no other knowledge: a block with a
title is a file, a block of bash is commands. The certificate's figures are then computed anew, from the responses by
the page's own costs.
"""

import csv
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.job_runs import REPOSITORY, run

PAGE = REPOSITORY / "docs/start/your-own.md"
BLOCK = re.compile(r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$', re.DOTALL | re.MULTILINE)

VERDICTS = {"PASS": 0, "UNDECIDED": 4}  # and their exit statuses


@dataclass(frozen=True)
class Followed:
    """Where the page was followed, and what each of its commands did."""

    folder: Path
    commands: dict[str, subprocess.CompletedProcess]

    def only(self, *words: str) -> subprocess.CompletedProcess:
        """The one command that has all of these words."""
        (found,) = [done for command, done in self.commands.items() if set(words) <= set(command.split())]
        return found

    def scores(self, name: str) -> Callable[[list[str], list[str]], list[float]]:
        """One of the functions that the page shows."""
        return runpy.run_path(str(self.folder / "scores.py"))[name]


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Followed:
    folder = tmp_path_factory.mktemp("stranger")
    commands = {}
    for block in BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
        if block["title"]:
            (folder / block["title"]).write_text(block["text"], encoding="utf-8")
        elif block["language"] == "bash":
            for command in block["text"].replace("\\\n", " ").splitlines():
                commands[command] = in_folder(folder, command)
    return Followed(folder, commands)


def in_folder(folder: Path, command: str) -> subprocess.CompletedProcess:
    """A command as it is typed with the environment active. A certificate on other processors may be UNDECIDED."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = run(["bash", "-c", f"cd {folder} && {command}"], {"PATH": path})
    assert done.returncode in (VERDICTS.values() if "certif" in command else [0]), (
        f"{command}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return done


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_it_trains_adapters_under_two_constraints_on_twenty_prompts(followed: Followed) -> None:
    settings = yaml.safe_load((followed.folder / "outputs/mine/config.yaml").read_text())
    assert set(settings["constraints"]) == {"danger", "rudeness"}
    assert settings["policy"]["lora"]["rank"] == 8 and settings["algorithm"]["name"] == "repo"
    assert len((followed.folder / "prompts.jsonl").read_text().splitlines()) == 20
    assert "prompts.jsonl: 20 prompts" in followed.only("train").stdout
    policy = followed.folder / "outputs/mine/policy"
    assert (policy / "adapter/adapter_model.safetensors").exists()
    AutoTokenizer.from_pretrained(policy)
    AutoModelForCausalLM.from_pretrained(policy)


def test_the_strict_violation_of_both_constraints_falls(followed: Followed) -> None:
    for folder in ("evaluate", "certificate"):
        policies = read_json(followed.folder / f"outputs/{folder}/report.json")["policies"]
        for name in ("danger", "rudeness"):
            before, after = (policies[policy][f"{name}_strict_violation"]["value"] for policy in ("before", "after"))
            assert before > 0.2 and after < before / 4


def test_the_certificate_names_both_constraints_and_decides_the_exit_status(followed: Followed) -> None:
    folder = followed.folder / "outputs/certificate"
    certificate = read_json(folder / "certificate.json")
    assert certificate["look"] == 1
    assert followed.only("--certify").returncode == VERDICTS[certificate["verdict"]]
    assert followed.only("--verify").returncode == VERDICTS[certificate["verdict"]]
    assert {claim["constraint"] for claim in certificate["claims"].values()} == {"danger", "rudeness"}
    assert certificate == read_json(folder / "report.json")["certificate"] | {"files": certificate["files"]}
    report = (folder / "report.html").read_text(encoding="utf-8")
    card = (followed.folder / "outputs/mine/policy/README.md").read_text(encoding="utf-8")
    for page in (report, card):
        assert certificate["verdict"] in page and "danger" in page and "rudeness" in page
    run = (followed.folder / "outputs/mine/report.html").read_text(encoding="utf-8")
    assert 'href="policy/README.md"' in run


def test_the_certificate_says_of_the_responses_what_the_costs_say(followed: Followed) -> None:
    folder = followed.folder / "outputs/certificate"
    with (followed.folder / "fresh.csv").open(encoding="utf-8", newline="") as file:
        electric = {row["prompt"]: row["category"] == "electric" for row in csv.DictReader(file)}
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    after = [row for row in rows if row["policy"] == "after"]
    assert {row["prompt"] for row in after} == electric.keys()
    for claim in read_json(folder / "certificate.json")["claims"].values():
        about = [row for row in after if claim["constraint"] == "rudeness" or electric[row["prompt"]]]
        costs = followed.scores(claim["constraint"])(
            [row["prompt"] for row in about], [row["response"] for row in about]
        )
        assert len(costs) == 8 * claim["n"]
        assert claim["estimate"] == pytest.approx(sum(cost > 0 for cost in costs) / len(costs))


def test_the_certificate_is_verified_and_an_edited_one_is_not(followed: Followed) -> None:
    verify = "repo-fast evaluate --verify outputs/certificate/certificate.json"
    assert "verified: outputs/certificate/certificate.json" in followed.commands[verify].stdout
    path = followed.folder / "outputs/certificate/certificate.json"
    kept = path.read_text(encoding="utf-8")
    certificate = json.loads(kept)
    next(iter(certificate["claims"].values()))["bound"] = 0.01
    try:
        path.write_text(json.dumps(certificate), encoding="utf-8")
        with pytest.raises(AssertionError, match="error: "):
            in_folder(followed.folder, verify)
    finally:
        path.write_text(kept, encoding="utf-8")
