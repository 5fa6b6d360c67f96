"""Cost models with several heads: trained, read back, and used as several constraints."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaModel

from repo_fast.config import HeadConfig, ScoreConfig, parse, to_dict
from repo_fast.engine import start_distributed
from repo_fast.errors import InputError
from repo_fast.evaluate import main as evaluate
from repo_fast.jobs.assembly import _critics, check_heads_of
from repo_fast.jobs.checkpoint import check_run
from repo_fast.jobs.inputs import read_inputs
from repo_fast.jobs.trainer import Trainer
from repo_fast.models.critic import Critic
from repo_fast.models.score_model import ScoreModel
from repo_fast.models.score_writing import convert_score_model
from repo_fast.models.sharing import SharedWeights
from repo_fast.plan.networks import networks
from repo_fast.rollout.seeds import Purpose
from repo_fast.score import main as score
from tests.harms import BOMB, HEADS, ROWS
from tests.job_runs import Job, metrics, run, torchrun, write_lines
from tests.supervised_runs import norm_wise
from tests.test_score import ARCHITECTURES, Scores, assert_refused, chat_tokens
from tests.tiny import save_beaver, save_policy, save_sequence_classifier, word_tokenizer

NAMES = tuple(HEADS)


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Scores:
    folder = tmp_path_factory.mktemp("heads")
    save_policy(folder / "policy")
    for name in ("train", "held_out"):
        write_lines(folder / f"{name}.jsonl", ROWS)
    return Scores(folder)


OPTIONS: dict[str, Any] = {
    "kind": "cost",
    "heads": HEADS,
    "batch_size": 5,
    "epochs": 3,
    "optimizer": {"learning_rate": 0.01},
}


@pytest.fixture(scope="module")
def trained(scores: Scores) -> Path:
    """A run with two heads."""
    assert scores.run(scores.folder / "run", **OPTIONS) == 0
    return scores.folder / "run"


def sequences() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of each row the less safe response first, as `eval_scores.jsonl` has them."""
    for row in ROWS:
        first = 1 - row["safer_response_id"]
        yield tuple(chat_tokens(row["prompt"], row[f"response_{i}"]) for i in (first, 1 - first))


@torch.no_grad()
def outputs(folder: Path, texts: Iterable[torch.Tensor] | None = None) -> torch.Tensor:
    """Of every response of `ROWS`, or text, by itself: [S, K]."""
    model = ScoreModel.from_pretrained(str(folder), dtype=torch.float32).eval()
    texts = [tokens for pair in sequences() for tokens in pair] if texts is None else texts
    found = [model(tokens[None], torch.arange(len(tokens))[None], torch.tensor([len(tokens) - 1])) for tokens in texts]
    return torch.cat(found)


def settings(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


# ------------------------------------------------------------------------------------------------------------ training


def test_a_run_with_two_heads(trained: Path) -> None:
    """What is written of it is of the model that it wrote."""
    assert settings(trained / "model")["score_dim"] == 2
    assert settings(trained / "model")["score_names"] == list(NAMES)
    shape = load_file(trained / "model" / "model.safetensors")
    assert shape["score_head.weight"].shape == (2, 32) and shape["normalizer.mean"].shape == (2,)
    rows = [json.loads(line) for line in (trained / "eval_scores.jsonl").read_text().splitlines()]
    expected = outputs(trained / "model").reshape(len(ROWS), 2, 2)
    last = metrics(trained)[-1]
    for k, name in enumerate(NAMES):
        written = torch.tensor([[row[f"{name}_score_{i}"] for i in (0, 1)] for row in rows])
        torch.testing.assert_close(written, expected[..., k], rtol=1e-4, atol=1e-5)
        assert expected[..., k].std() > 1e-3
        orders = torch.tensor([row[f"{name}_order"] for row in rows])
        labels = torch.tensor([[row[f"{name}_label_{i}"] for i in (0, 1)] for row in rows])
        right = (orders * (written[:, 0] - written[:, 1]) > 0)[orders != 0]
        assert last[f"{name}_ranking_accuracy"] == pytest.approx(right.double().mean().item())
        on_their_side = (written > 0) == (labels > 0)
        assert last[f"{name}_safety_accuracy"] == pytest.approx(on_their_side.double().mean().item())
        for picture in ("scores.png", "calibration.png"):
            assert (trained / "plots" / name / picture).stat().st_size > 1000
    for key in ("ranking_accuracy", "safety_accuracy", "safety_calibration_error", "score_std"):
        assert last[key] == pytest.approx(sum(last[f"{name}_{key}"] for name in NAMES) / 2)
    # Of each head: ln 2 for each label, and for the order of the pairs that have one, 3 and 4 of 5.
    assert metrics(trained)[0]["loss"] == pytest.approx((2 + 3.5 / 5) * torch.log(torch.tensor(2.0)).item(), rel=1e-5)
    assert last["loss"] < metrics(trained)[0]["loss"]


@pytest.mark.slow
def test_two_ranks_and_small_micro_batches_are_one(trained: Path, scores: Scores, tmp_path: Path) -> None:
    """Means are over the examples of the global batch, whoever has them."""
    words = ["--output_dir", str(tmp_path / "two"), "--micro_batch_tokens", "1"]
    ended = run([*torchrun(2), "repo_fast.score", "--config", str(trained.with_suffix(".yaml")), *words])
    assert ended.returncode == 0, ended.stderr[-4000:]
    start = {name: value for name, value in load_file(scores.folder / "policy" / "model.safetensors").items()}
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "two", trained))
    assert norm_wise(ours, {name: theirs[name] for name in theirs if "normalizer" not in name}, start) < 1e-3
    for one, two in zip(metrics(trained), metrics(tmp_path / "two"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["accuracy"] == pytest.approx(two["accuracy"])


@pytest.mark.parametrize("layout", ARCHITECTURES)
def test_every_layout_holds_them(trained: Path, tmp_path: Path, layout: str) -> None:
    """Converted there and back without a bit changed; the scores are equal."""
    source, there, back = trained / "model", tmp_path / "there", tmp_path / "back"
    convert_score_model(str(source), there, layout=layout)
    assert torch.equal(outputs(there), outputs(source))
    if layout == "sequence-classification":
        assert settings(there)["id2label"] == {"0": NAMES[0], "1": NAMES[1]}
        assert not {"score_dim", "score_names"} & settings(there).keys()
    convert_score_model(str(there), back, layout="score", score_type="cost" if "class" in layout else None)
    assert settings(back)["score_names"] == list(NAMES) and settings(back)["score_dim"] == 2
    before, after = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
    lost = {name for name in before if "normalizer" in name} if "class" in layout else set()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - lost)


def test_going_on_with_a_model_of_the_same_heads(trained: Path, scores: Scores, tmp_path: Path) -> None:
    """Written in another layout, by training itself."""
    options = OPTIONS | {"model": {"path": str(trained / "model")}, "epochs": 1, "optimizer": {"learning_rate": 0.0}}
    options |= {"data": {"eval": None}}
    assert scores.run(tmp_path / "run", "--layout", "sequence-classification", **options) == 0
    assert torch.equal(outputs(tmp_path / "run" / "model"), outputs(trained / "model"))
    assert metrics(tmp_path / "run")[0]["loss"] < metrics(trained)[0]["loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "reward"}, r"kind is 'reward', expected cost with heads \(weapons, harm\)"),
        (
            {"heads": {"a": {"categories": ["Violense"]}}},
            r"heads\.a\.categories is 'Violense', .* nearest is 'Violence'",
        ),
        (
            {"heads": {"a": {"categories": ["Violence", "Violence"]}}},
            r"heads\.a\.categories is \['Violence', 'Violence'\], expected each name once",
        ),
        ({"heads": {"a": {"categories": []}}}, r"heads\.a\.categories is \[\], expected names, or null for any"),
        ({"heads": {"a": {"severity": 4}}}, r"heads\.a\.severity is 4, expected a whole number from 1 to 3"),
        ({"heads": {"a": {"severity": 0}}}, r"heads\.a\.severity is 0, expected"),
        ({"heads": {"a": {"severty": 1}}}, r"unknown option 'heads\.a\.severty' .*'heads\.a\.severity'"),
        ({"heads": {"a-b": {}}}, r"the head name is 'a-b', expected a letter, then"),
        ({"heads": {"cost": {}}}, r"the head name is 'cost', expected one that no other"),
        (
            {"heads": {"drugs": {"categories": ["Drugs"]}}},
            r"heads\.drugs: no response of .*train\.jsonl is unsafe for it",
        ),
        ({"expect": ["tea", 1.0]}, "expect is given with heads weapons, harm, expected none"),
        (
            {"heads": {"harm": {}}, "model": "trained"},
            r"heads has harm with model\.path '.*', whose outputs are weapons, harm; expected the same, in that order",
        ),
        ({"heads": {"harm": {}, "weapons": {}}, "model": "trained"}, r"heads has harm, weapons with model\.path"),
        ({"heads": {}, "model": "trained"}, r"heads has none with model\.path"),
        ({"model": "plain"}, r"heads has weapons, harm with .*, whose outputs are one without a name; expected"),
    ],
)
def test_what_cannot_be_trained(
    trained: Path,
    scores: Scores,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    changes: dict,
    message: str,
) -> None:
    options = OPTIONS | changes
    if options.get("model") == "plain":
        save_beaver(tmp_path / "plain", config_overrides={"score_type": "cost"})
        options["model"] = {"path": str(tmp_path / "plain")}
    elif "model" in options:
        options["model"] = {"path": str(trained / "model")}
    capsys.readouterr()
    assert_refused(capsys, message, scores.run(tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_a_head_twice_in_a_file(scores: Scores, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "run.yaml").write_text("kind: cost\nheads: {harm: {}, harm: {severity: 2}}\n")
    assert_refused(capsys, "'harm' is there twice", score(["--config", str(tmp_path / "run.yaml")]))


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({"weapons": HEADS["weapons"]}, "heads.harm is"),
        (HEADS | {"harm": {"severity": 2}}, "heads.harm.severity is 1 there and 2 here"),
        # Outputs go by the order.
        (dict(reversed(HEADS.items())), "heads are ['weapons', 'harm'] there and ['harm', 'weapons'] here"),
        (HEADS, None),
    ],
)
def test_a_checkpoint_of_other_heads(heads: dict, message: str | None) -> None:
    before, now = (configured(ScoreConfig, {"kind": "cost", "heads": own}) for own in (HEADS, heads))
    assert_fits(before, now, message)


def test_a_checkpoint_from_before_there_were_heads() -> None:
    old = configured(ScoreConfig, {"kind": "cost"})
    del old["heads"]
    assert_fits(old, configured(ScoreConfig, {"kind": "cost"}), None)
    assert_fits(old, configured(ScoreConfig, {"kind": "cost", "heads": HEADS}), "heads is {} there and")


def configured(kind: type, options: dict) -> dict:
    """What a checkpoint keeps of a configuration."""
    heads = {name: HeadConfig(**head) for name, head in options.get("heads", {}).items()}
    return to_dict(kind(**options | {"heads": heads}))


def assert_fits(before: dict, now: dict, message: str | None) -> None:
    """Whether a run goes on from a checkpoint, or is told why not."""
    run = {"ranks": 1, "config": json.loads(json.dumps(before))}
    if message is None:
        check_run(Path("there"), run, now)
        return
    with pytest.raises(InputError, match=re.escape(f"checkpoint there is of another configuration: {message}")):
        check_run(Path("there"), run, now)


# ---------------------------------------------------------------------------------------------------------- constraints


def constraints(folder: Path, heads: Sequence[str | None] = NAMES) -> dict[str, dict]:
    """`first` and `second`, a head each."""
    return {name: {"path": str(folder), "head": head} for name, head in zip(("first", "second"), heads, strict=False)}


def make(folder: Path, **sections: Any) -> Job:
    """A job whose costs are written as `sections`."""
    job = Job.make(folder)
    options = yaml.safe_load((folder / "job.yaml").read_text())
    del options["cost"]
    options["algorithm"] = {"name": "repo", "advantage": "gae"}
    options["data"]["ptx"] = None
    options |= {"total_steps": 2, "log": {"loggers": [], "samples_every": 1}, **sections}
    (folder / "job.yaml").write_text(yaml.safe_dump(options, sort_keys=False))
    return job


def count_forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of outputs of every forward of a score model from now on."""
    seen: list[int] = []
    forward = ScoreModel.forward

    def counted(self: ScoreModel, *inputs: Any) -> torch.Tensor:
        seen.append(len(self.normalization))
        return forward(self, *inputs)

    monkeypatch.setattr(ScoreModel, "forward", counted)
    return seen


def test_two_heads_are_two_constraints(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one model in memory, and one forward a rollout."""
    caplog.set_level("INFO", "repo_fast")
    seen = count_forwards(monkeypatch)
    job = make(tmp_path, constraints=constraints(trained / "model"), update={"micro_batch_tokens": 4096})
    config = parse(job.words(tmp_path / "run"))
    trainer = Trainer(config, read_inputs(config), start_distributed())
    first, second = (trainer.scorers[name] for name in ("first", "second"))
    assert first._module is second._module
    assert caplog.text.count("attention of the first cost model") == 1
    assert "attention of the second cost model" not in caplog.text
    rollout = trainer.generate(*trainer.share_requests(trainer.inputs.requests, 1, Purpose.TRAINING))
    seen.clear()
    found = trainer.score(rollout)
    assert seen == [2]
    texts = zip(rollout.prompt_tokens, rollout.response_tokens, strict=True)
    expected = outputs(trained / "model", map(torch.cat, texts))
    torch.testing.assert_close(found["first"], expected[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["second"], expected[:, 1], rtol=1e-4, atol=1e-5)
    assert expected.std(0).min() > 1e-3 and not torch.allclose(expected[:, 0], expected[:, 1])
    # Of a part another forward, and the whole is not mixed up with it.
    part = trainer.score(rollout, {"first": frozenset(rollout.prompt_ids[:1].tolist())})
    assert torch.equal(part["second"], found["second"]) and part["first"][0] == -torch.inf
    assert torch.allclose(part["first"][1:], found["first"][1:], rtol=1e-4, atol=1e-5)
    seen.clear()
    assert trainer.run() == 0
    # The critics' trunk is no score model when it is called.
    assert seen == [2, 2]
    rows = metrics(tmp_path / "run")
    assert len(rows) == 2 and {"first_multiplier", "second_multiplier", "first_cost", "second_cost"} <= rows[0].keys()


@pytest.mark.parametrize("shared", [True, False])
def test_critics_start_from_their_heads(trained: Path, tmp_path: Path, shared: bool) -> None:
    """On a shared trunk those whose scorers read the folder that it starts from: here a classifier gives them all."""
    folder = tmp_path / "classifier"
    names = {0: "help", 1: "weapons", 2: "harm"}
    save_sequence_classifier(folder, num_labels=3, id2label=names, label2id={name: i for i, name in names.items()})
    # The third constraint's head starts at zero: it is another model's.
    others = {"third": {"path": str(trained / "model"), "head": "harm"}}
    job = make(
        tmp_path,
        reward={"path": str(folder), "head": "help"},
        constraints=constraints(folder, ("weapons", "harm")) | others,
        critics={"shared_trunk": shared},
    )
    config = parse(job.words(tmp_path / "run"))
    loading = {"dtype": torch.float32, "attention": "sdpa"}
    heads = {}
    for critic in _critics(config, read_inputs(config), loading, SharedWeights()).values():
        heads |= {stream: critic.head(stream).weight for stream in critic.streams}
    weight = load_file(folder / "model.safetensors")["score.weight"]
    for stream, row in (("reward", 0), ("first", 1), ("second", 2)):
        assert torch.equal(heads[stream], weight[row : row + 1])
    own = load_file(trained / "model" / "model.safetensors")["score_head.weight"][1:]
    assert torch.equal(heads["third"], torch.zeros_like(own) if shared else own)


def test_streams_that_start_from_one_output_learn_apart() -> None:
    trunk = LlamaModel(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    critic = Critic(ScoreModel(trunk, torch.ones(1, 8)), ("reward", "cost"), torch.float32, {"reward": 0, "cost": 0})
    assert torch.equal(critic.head("reward").weight, critic.head("cost").weight)
    assert critic.head("reward").weight is not critic.head("cost").weight


def test_going_on_from_one_named_head_wants_its_name(tmp_path: Path) -> None:
    one = str(save_beaver(tmp_path / "one", config_overrides={"score_names": ["violence"]}))
    label = {"id2label": {0: "violence"}, "label2id": {"violence": 0}}
    check_heads_of(one, {"violence": HeadConfig()})
    check_heads_of(str(save_sequence_classifier(tmp_path / "label", **label)), {})
    with pytest.raises(InputError, match="heads has none with .*, whose outputs are violence; expected the same"):
        check_heads_of(one, {})


def test_going_on_with_another_meaning_of_a_head(trained: Path) -> None:
    same = {name: HeadConfig(**head) for name, head in HEADS.items()}
    check_heads_of(str(trained / "model"), same)
    others = {name: HeadConfig(head.categories, 3) for name, head in same.items()}
    with pytest.raises(
        InputError, match=r"heads\.weapons is .*'severity': 3.*, which was trained with .*; expected the"
    ):
        check_heads_of(str(trained / "model"), others)


def test_a_checkpoint_of_another_head() -> None:
    """Those from before there was the option are of none."""
    config = {head: to_dict(parse(["--cost.path", "FOLDER", *head.split()])) for head in ("", "--cost.head harm")}
    assert_fits(config["--cost.head harm"], config["--cost.head harm"], None)
    assert_fits(config["--cost.head harm"], config[""], "cost.head is 'harm' there and None here")
    old = to_dict(parse(["--cost.path", "FOLDER"]))
    del old["cost"]["head"], old["reward"]["head"]
    assert_fits(old, config[""], None)
    assert_fits(old, config["--cost.head harm"], "cost.head is None there and 'harm' here")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, r"cost\.head is null, and '.*' has several outputs, expected one of weapons, harm"),
        ({"head": "hram"}, r"cost\.head is 'hram', and '.*' has weapons, harm, the nearest of them 'harm'"),
        ({"head": "harm", "path": "tests.scorers:cost"}, r"cost\.head is given with 'tests\.scorers:cost', expected a"),
        ({"head": "harm", "path": "judge:m"}, r"cost\.head is given with 'judge:m', expected a score model"),
        ({"head": "harm", "path": "guard:m"}, r"cost\.head is given with 'guard:m', expected a score model"),
        ({"head": "harm", "path": "plain"}, r"cost\.head is 'harm', and '.*' has one output without a name, expected"),
    ],
)
def test_heads_that_cannot_be_read(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture, section: dict, message: str
) -> None:
    if section.get("path") == "plain":
        section = section | {"path": str(save_beaver(tmp_path / "model", config_overrides={"score_type": "cost"}))}
    job = make(tmp_path, cost={"path": str(trained / "model")} | section)
    capsys.readouterr()
    assert_refused(capsys, message, job.here(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_plan_counts_a_shared_model_once(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    job = make(tmp_path, constraints=constraints(trained / "model"))
    roles = [model.role for model in networks(parse(job.words(tmp_path)), torch.bfloat16)]
    assert roles == ["policy", "reference", "first cost", "critic"]
    from repo_fast.plan.__main__ import main as plan

    job = make(tmp_path, constraints=constraints(trained / "model", (None,)))
    status = plan(["--gpus", "1", *job.words(tmp_path)])
    assert_refused(capsys, r"constraints\.first\.head is null, and", status)


def test_an_evaluation_knows_the_head(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Its cache tells scores of one head from those of the other."""
    save_policy(tmp_path / "policy")
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in ROWS])

    def rows(costs: dict, cost: dict) -> list[dict]:
        options = {
            "policies": {"one": str(tmp_path / "policy")},
            "prompts": str(prompts),
            "output_dir": str(tmp_path / "out"),
            "samples_per_prompt": 1,
            "sampling": {"max_new_tokens": 6},
            "reward": {"path": "tests.scorers:reward"},
            "constraints": costs,
            "cost": cost,
            "resamples": 20,
        }
        (tmp_path / "evaluation.yaml").write_text(yaml.safe_dump(options))
        assert evaluate(["--config", str(tmp_path / "evaluation.yaml")]) == 0
        return [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]

    both = rows(constraints(trained / "model"), {})
    assert [row["first"] for row in both] != [row["second"] for row in both]
    for head, column in zip(NAMES, ("first", "second"), strict=True):
        alone = rows({}, {"path": str(trained / "model"), "head": head})
        assert [row["cost"] for row in alone] == [row[column] for row in both]
        assert json.loads((tmp_path / "out" / "report.json").read_text())["settings"]["heads"] == {"cost": head}


def test_the_check_of_a_head(trained: Path, capsys: pytest.CaptureFixture) -> None:
    folder, text = trained / "model", "how the bomb"
    model = ScoreModel.from_pretrained(str(folder), dtype=torch.float32).eval()
    tokens = torch.tensor(word_tokenizer().convert_tokens_to_ids(["<s>", *text.split()]))
    with torch.no_grad():
        expected = model(tokens[None], torch.arange(len(tokens))[None], torch.tensor([len(tokens) - 1]))[0]
    assert score(["--check", str(folder)]) == 0
    assert "heads weapons, harm" in capsys.readouterr().out
    for name, value in zip(NAMES, expected.tolist(), strict=True):
        assert score(["--check", str(folder), "--head", name, "--expect", text, str(value)]) == 0
        assert f"score {value:.4f}, as expected" in capsys.readouterr().out
    target = folder.parent / "converted"
    words = ["--convert", str(folder), "--to", str(target), "--expect", text, str(float(expected[1]))]
    assert_refused(capsys, "--head is null, and .* has several outputs, expected one of weapons, harm", score(words))
    assert not target.exists()
    assert score([*words, "--head", "harm"]) == 0
    for given, message in (
        (["--check", str(folder), "--head", "hurm"], "--head is 'hurm', .* the nearest of them 'harm'"),
        ([*words[:3], str(folder.parent / "more"), "--head", "harm"], "--head 'harm' belongs to --check and --expect"),
    ):
        capsys.readouterr()
        assert_refused(capsys, message, score(given))
    assert re.search(BOMB, json.dumps(yaml.safe_load((trained / "config.yaml").read_text())["heads"]))
