"""The model card: metadata that Hugging Face's library reads, a table that Markdown reads, and nobody else's README."""

import copy
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load
from markdown_it import MarkdownIt

from repo_fast.config import SftConfig, TrainConfig, parse, to_yaml
from repo_fast.errors import InputError
from repo_fast.evaluation.cache import fingerprint
from repo_fast.report.best import Best, write_best
from repo_fast.report.model_card import MARKER, model_card, read_training, write_model_card
from repo_fast.report.page_links import PAGE, pages_of_runs, relative_links

VERDICTS = ("PASS", "PASS (asymptotic)", "FAIL", "UNDECIDED")


def claim(**changes: Any) -> dict[str, Any]:
    return {
        "statement": "unsafe_prompts",
        "says": "at most 10 % of prompts have a mean cost above 0",
        "constraint": "cost",
        "verdict": "PASS",
        "reason": "0 of 200 prompts are unsafe",
        "p": 1.23e-9,
        "p_adjusted": 0.0246,
        "p_reverse": 1.0,
        "estimate": 0.031,
        "bound": 0.0546,
        "limit": 0.1,
        "n": 200,
        "k": 8,
        "share": True,
        "asymptotic": False,
        "category": None,
        "prompts_needed": None,
    } | changes


CERTIFICATE: dict[str, Any] = {
    "verdict": "PASS",
    "reason": "all 2 claims hold",
    "delta": 0.05,
    "look": 2,
    "delta_of_look": 0.0125,
    "accept_asymptotic": False,
    "claims": {"unsafe_prompts": claim()},
    "policy": {"name": "trained", "path": "outputs/tiny/policy", "fingerprint": "0123456789ab"},
    "reference": None,
    "prompts": {
        "source": "world:certify",
        "n": 280,
        "too_long": 3,
        "fingerprint": "ba9876543210",
        "excluded": [{"prompt_id": 1, "prompt": "tea", "of": "data.prompts (world:train)"}],
    },
    "unknown": [],
    "k": 8,
    "seed": 0,
    "versions": {"repo_fast": "0.1.0", "torch": "2.11"},
    "date": "2026-11-28",
}


def certificate(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(CERTIFICATE) | changes


def table(text: str) -> list[list[str]]:
    """The cells of the card's only table, as Markdown reads them."""
    rows: list[list[str]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(ModelCard(text).text):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and token.level == 4:
            assert all(child.type.startswith("text") for child in token.children)
            rows[-1].append("".join(child.content for child in token.children))
    return rows


def training(*words: str) -> dict[str, Any]:
    return yaml.safe_load(to_yaml(parse(list(words), TrainConfig)))


def test_metadata() -> None:
    card = ModelCard(model_card(certificate(), training("--policy.path", "owner/model-1b")))
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["rlhf", "safe-rlhf", "repo"],
        "base_model": "owner/model-1b",
    }
    assert "Base model: owner/model-1b" in card.text


@pytest.mark.parametrize("path", ["world:tiny", "tests/policy", "../policy", "/policy", "a/b/c", "policy", "owner/a b"])
def test_a_base_model_that_is_not_of_the_hub_is_named_in_the_text(path: str) -> None:
    card = ModelCard(model_card(certificate(), training("--policy.path", path)))
    assert card.data.base_model is None and f"Base model: {path}" in card.text


@pytest.mark.parametrize("verdict", VERDICTS)
def test_each_verdict(verdict: str) -> None:
    one = claim(verdict=verdict, asymptotic="asym" in verdict)
    text = model_card(certificate(verdict=verdict, claims={"unsafe_prompts": one}), None)
    assert f"\n**{verdict}**: all 2 claims hold\n" in text
    assert table(text)[1][3] == verdict
    assert ("Claims by Student's t are right for many prompts only, and were not accepted." in text) == (
        verdict == "PASS (asymptotic)"
    )
    assert "how it was trained is not known" in text


def test_the_table_of_claims() -> None:
    claims = {
        "unsafe_prompts": claim(),
        "harm": claim(
            constraint=None, share=False, estimate=None, bound=1.23456, limit=-0.5, category="pets", prompts_needed=512
        ),
    }
    head, first, second = table(model_card(certificate(claims=claims), None))
    assert head[0] == "claim" and len(head) == len(first) == len(second) == 10
    says = "at most 10 % of prompts have a mean cost above 0"
    bounds = ["3.1 %", "5.46 %", "10 %"]
    assert first == [
        "unsafe_prompts",
        says,
        "cost",
        "PASS",
        *bounds,
        "200, with 8 responses each",
        "1.23e-09",
        "0.0246",
    ]
    assert second[:7] == ["harm", f"{says} (category pets)", "", "PASS", "–", "1.23", "-0.5"]
    assert second[7] == "200, with 8 responses each; 512 fresh ones needed"


def test_the_run_and_what_the_certificate_rests_on() -> None:
    reference = {"name": "start", "path": "world:tiny"}
    unknown = ["What cost.path (judge:x) was trained on is not known."]
    text = model_card(certificate(reference=reference, unknown=unknown), training("--config", "tiny-constraints"))
    for line in (
        "- Algorithm: repo, advantages gae",
        "- Steps: 40, seed 0",
        "- Reward: repo\\_fast.world.rules:reward",
        "- Constraint harm: repo\\_fast.world.rules:cost, at most 0",
        "- Constraint overcaution: repo\\_fast.world.rules:overcaution, at most 0, "
        "where category is writing or garden or pets or computers",
        "- Reference: start, world:tiny",
        "- What cost.path (judge:x) was trained on is not known.",
        "- Prompts: 280 of world:certify, fingerprint ba9876543210; 1 left out that the policy or a scorer has seen, "
        "or that are there twice, 3 too long",
        "- Made on 2026-11-28 with repo\\_fast 0.1.0, torch 2.11",
    ):
        assert f"\n{line}\n" in text, line
    assert "Look 2 on these prompts, which has 0.0125 of it." in text
    one = model_card(certificate(), training("--cost.path", "m:cost", "--algorithm.threshold", "0.25"))
    assert "- Constraint cost: m:cost, at most 0.25\n" in one
    run = training("--config", "tiny-constraints")
    run["constraints"]["harm"]["applies_to"] = {"category": ["a|b", "pets"], "adult": False}
    some = model_card(certificate(), run)
    assert "- Constraint harm: repo\\_fast.world.rules:cost, at most 0, where category is " in some
    assert " where category is a&#124;b or pets and adult is False\n" in some


@pytest.mark.parametrize(
    "text",
    [
        "a | b",
        "two\nlines\r\n\r\n# three",
        "<script>alert(1)</script> & <b>",
        "\\| \\\\( x",
        "[here](javascript:alert) ![](x)",
        "`code` *b* _i_ ~~s~~ $x$ &amp; &#124;",
        "<!-- -->",
    ],
)
def test_what_others_wrote_reads_as_it_is(text: str) -> None:
    one = claim(says=text, constraint=text, reason=text, category=text)
    changes = {"policy": {"name": text, "path": text, "fingerprint": text}, "reason": text, "unknown": [text]}
    card = model_card(certificate(claims={text: one}, **changes), None)
    shown = " ".join(text.split())
    assert table(card)[1][:3] == [shown, f"{shown} (category {shown})", shown]
    html = MarkdownIt("commonmark").enable("table").render(ModelCard(card).text)
    for tag in ("<script", "<b>", "<a ", "<img", "<code", "<em", "<h3"):
        assert tag not in html
    assert html.count("<h1>") == 1 and html.count("<h2>") == 3


def test_what_cannot_be_seen_is_shown() -> None:
    policy = {"name": "a\u202eb\x00c", "path": "p", "fingerprint": "f"}
    assert "# a⟨U+202E⟩b⟨U+0000⟩c\n" in model_card(certificate(policy=policy), None)


def test_a_card_of_ours_is_replaced_and_one_of_others_is_not(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("weights")
    before = fingerprint(str(tmp_path))
    first = model_card(certificate(verdict="UNDECIDED"), None)
    path = write_model_card(tmp_path, first)
    assert path == tmp_path / "README.md" and path.read_text() == first and MARKER in first
    second = model_card(certificate(), None)
    assert write_model_card(tmp_path, second) == path and path.read_text() == second
    assert metadata_load(path)["library_name"] == "transformers"
    # The policy is the same one.
    assert fingerprint(str(tmp_path)) == before
    (tmp_path / "config.json").write_text("{}")
    assert fingerprint(str(tmp_path)) != before
    path.write_text("# My model\n")
    with pytest.raises(InputError, match=r"README\.md is not a card of ours, expected none, or one: it is left"):
        write_model_card(tmp_path, second)
    assert path.read_text() == "# My model\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_a_link_in_a_policy_s_folder_leads_no_card_out(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "precious").write_text("mine")
    for name in (".README.md", "README.md.tmp"):
        (tmp_path / "policy" / name).symlink_to(tmp_path / "precious")
    path = write_model_card(tmp_path / "policy", model_card(certificate(), None))
    assert path.is_file() and not path.is_symlink() and (tmp_path / "precious").read_text() == "mine"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"README\.md cannot be written: No such file or directory, expected a folder"):
        write_model_card(tmp_path / "nowhere", "text")


def test_the_configuration_beside_a_policy(tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    policy.mkdir()
    assert read_training(str(policy)) is None and read_training("owner/model") is None
    file = tmp_path / "config.yaml"
    for words, kind in (([], TrainConfig), (["--epochs", "3"], SftConfig)):
        file.write_text(to_yaml(parse(words, kind)))
        text = model_card(certificate(), read_training(str(policy)))
        assert ("- Supervised fine-tuning: 3 epochs, seed 0" in text) == (kind is SftConfig)
    (tmp_path / "best_policy").mkdir()
    assert read_training(str(tmp_path / "best_policy")) is None
    write_best(tmp_path / "best_policy", Best(20, "strict_violation", 0.125))
    file.write_text(to_yaml(parse([], TrainConfig)))
    text = model_card(certificate(), read_training(str(tmp_path / "best_policy")))
    assert "- Steps: 20 of 40, the best of its evaluations by strict\\_violation, 0.125 there, seed 0" in text
    # It is about the policy only.
    (tmp_path / "other").mkdir()
    assert read_training(str(tmp_path / "other")) is None
    for text in ("", "seed: 0", "policy: {path: x}", "policy: [", "policy: {path: x}\nalgorithm: {name: repo}"):
        file.write_text(text)
        with pytest.raises(InputError, match=r"config\.yaml .*expected the configuration"):
            read_training(str(policy))


def test_links_to_the_report_and_the_run(tmp_path: Path) -> None:
    run, policy, out = tmp_path / "run", tmp_path / "run" / "policy", tmp_path / "a) [b](http:x) <c>"
    for folder in (policy, out):
        folder.mkdir(parents=True)
    (run / PAGE).touch()
    # It may be that of an evaluation.
    assert pages_of_runs([str(policy)]) == []
    (run / "metrics.jsonl").touch()
    assert pages_of_runs([str(policy), str(run / "no policy")]) == [run / PAGE]
    links = relative_links([out / PAGE, run / PAGE, run / PAGE], policy)
    assert [text for text, _ in links] == ["../../a) [b](http:x) <c>/report.html", "../report.html"]
    html = MarkdownIt("commonmark").render(ModelCard(model_card(certificate(), None, links)).text)
    found = re.findall(r'<a href="([^"]*)">', html)
    assert [(policy / unquote(href)).resolve() for href in found] == [out / PAGE, run / PAGE]
    assert "Pages:" not in model_card(certificate(), None)
