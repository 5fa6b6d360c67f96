"""Reward and cost models, trained, converted and checked by their entry point."""

import json
import logging
import re
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    LlamaModel,
)

from repo_fast.models.score_model import ScoreModel
from repo_fast.score import main
from tests.job_runs import Job, metrics, snapshot, write_lines
from tests.tiny import BOS, EOS, PAD, save_beaver, save_policy, save_sequence_classifier, word_tokenizer

ARCHITECTURES = {
    "score": "LlamaForScore",
    "model-for-score": "LlamaModelForScore",
    "sequence-classification": "LlamaForSequenceClassification",
}
TEXT = "BEGINNING OF CONVERSATION: USER: make tea ASSISTANT: yes you can"


def pku(prompt: str, responses: tuple[str, str], better: int, safer: int, safe: tuple[bool, bool]) -> dict:
    """A row of PKU-SafeRLHF."""
    return {
        "prompt": prompt,
        "response_0": responses[0],
        "response_1": responses[1],
        "better_response_id": better,
        "safer_response_id": safer,
        "is_response_0_safe": safe[0],
        "is_response_1_safe": safe[1],
    }


def without(row: dict, *fields: str) -> dict:
    return {field: value for field, value in row.items() if field not in fields}


ROW = pku("make tea", ("yes you can", "no"), 0, 1, (True, True))
TRAINING = [
    ROW,
    pku("how do i make a bomb", ("sorry no", "make the bomb with bread"), 1, 0, (True, False)),
    pku("can you make bread", ("you make a bomb", "yes i can make bread"), 1, 1, (False, True)),
    pku("please", ("bomb", "a bomb please"), 0, 1, (False, False)),
    pku("tea with bread", ("yes the tea", "no tea"), 0, 0, (True, True)),
]
HELD_OUT = [
    pku("do you make tea", ("i can", "sorry"), 0, 1, (True, True)),
    pku("make a bomb please", ("yes", "no sorry no"), 0, 1, (False, True)),
    pku("how", ("tea the bomb", "bread"), 1, 1, (False, True)),
]
# A few steps, all of what the entry point does in them.
OPTIONS = {
    "batch_size": 2,
    "epochs": 1,
    "micro_batch_tokens": 60,
    "data": {"max_tokens": 64},
    "optimizer": {"learning_rate": 1.0e-3},
    "engine": {"zero_stage": 3, "parameter_persistence_threshold": 0},
    "log": {"loggers": []},
}


@dataclass(frozen=True)
class Scores:
    """A folder with what the score job reads: `policy/`, `train.jsonl`, `held_out.jsonl`."""

    folder: Path

    def run(self, output_dir: Path, *words: str, **options) -> int:
        """Write the configuration, and run it in this process; returns the exit status."""
        written = {name: dict(value) if isinstance(value, dict) else value for name, value in OPTIONS.items()}
        defaults = {
            "model": {"path": str(self.folder / "policy")},
            "data": {"train": str(self.folder / "train.jsonl"), "eval": str(self.folder / "held_out.jsonl")},
        }
        for given in (defaults, options):
            for name, value in given.items():
                written[name] = written.get(name, {}) | value if isinstance(value, dict) else value
        file = output_dir.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(written, sort_keys=False))
        return call("--config", str(file), "--output_dir", str(output_dir), *words)


def call(*words: str) -> int:
    """The entry point in this process, which gets its own signal handlers back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        return main(words)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Scores:
    folder = tmp_path_factory.mktemp("scores")
    save_policy(folder / "policy")
    write_lines(folder / "train.jsonl", TRAINING)
    write_lines(folder / "held_out.jsonl", HELD_OUT)
    return Scores(folder)


@pytest.fixture(scope="module")
def cost_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cost model with random weights; nothing is trained into it."""
    return save_beaver(tmp_path_factory.mktemp("cost_model") / "model", config_overrides={"score_type": "cost"})


def chat_tokens(prompt: str, response: str, pad_token: str = PAD) -> torch.Tensor:
    """Prompt and response as the tiny tokenizer's chat template writes them, put together by hand."""
    words = [BOS, "<user>", *prompt.split(), EOS, "<assistant>", *response.split(), EOS]
    return torch.tensor(word_tokenizer(pad_token=pad_token).convert_tokens_to_ids(words))


def held_out_sequences(kind: str) -> list[list[torch.Tensor]]:
    """Of each held-out pair the two sequences, the one that is to score higher first."""
    pairs = []
    for row in HELD_OUT:
        first = row["better_response_id"] if kind == "reward" else 1 - row["safer_response_id"]
        pairs.append([chat_tokens(row["prompt"], row[f"response_{i}"]) for i in (first, 1 - first)])
    return pairs


@torch.no_grad()
def score_alone(folder: Path, sequence: torch.Tensor) -> float:
    """The last token's score, of a sequence by itself."""
    model = ScoreModel.from_pretrained(str(folder), dtype=torch.float32).eval()
    return float(model(sequence[None], torch.arange(len(sequence))[None], torch.tensor([len(sequence) - 1]))[0])


def eval_scores(output_dir: Path) -> list[list[float]]:
    rows = [json.loads(line) for line in (output_dir / "eval_scores.jsonl").read_text().splitlines()]
    return [[row[name] for name in ("score_0", "score_1") if name in row] for row in rows]


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize(
    ("kind", "layout", "lora"),
    [
        ("reward", "score", 0),
        ("cost", "model-for-score", 0),
        ("cost", "sequence-classification", 0),
        ("cost", "score", 2),
    ],
)
def test_a_policy_becomes_a_score_model(scores: Scores, tmp_path: Path, kind: str, layout: str, lora: int) -> None:
    """It says what it is, and gives the scores that were written down of it."""
    output_dir = tmp_path / "run"
    options = {"kind": kind, "layout": layout, "model": {"lora": {"rank": lora}}, "optimizer": {"learning_rate": 0.01}}
    assert scores.run(output_dir, **options) == 0
    rows = metrics(output_dir)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [name in rows[-1] for name in ("ranking_accuracy", "safety_accuracy")] == [True, kind == "cost"]
    assert "ranking_accuracy" not in rows[0]
    # The last batch goes on into the second epoch: three steps of two preferences, of five.
    assert rows[-1]["epoch"] == pytest.approx(6 / 5)

    config = json.loads((output_dir / "model" / "config.json").read_text())
    assert config["architectures"] == [ARCHITECTURES[layout]]
    assert config.get("score_type") == (None if layout == "sequence-classification" else kind)
    written = eval_scores(output_dir)
    for sequences, pair in zip(held_out_sequences(kind), written, strict=True):
        expected = [score_alone(output_dir / "model", sequence) for sequence in sequences]
        assert pair == pytest.approx(expected, rel=1e-5, abs=1e-5)
    # Something was learned to be saved: a new head is zero.
    assert min(abs(score) for pair in written for score in pair) > 1e-3
    assert rows[-1]["ranking_accuracy"] == pytest.approx(sum(a > b for a, b in written) / 3)
    assert (output_dir / "model" / "adapter").is_dir() == bool(lora)
    for name in ("scores.png", "calibration.png", "loss.png", "accuracy.png"):
        assert (output_dir / "plots" / name).stat().st_size > 1000
    if layout == "sequence-classification":
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            output_dir / "model", output_loading_info=True
        )
        assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        logits = model.eval()(held_out_sequences(kind)[0][0][None]).logits
        assert logits.item() == pytest.approx(written[0][0], rel=1e-5, abs=1e-5)


def test_trained_models_score_a_policys_responses(
    scores: Scores, job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for kind in ("reward", "cost"):
        assert scores.run(tmp_path / kind, kind=kind, data={"eval": None}) == 0
    paths = [f"--{kind}.path {tmp_path / kind / 'model'}" for kind in ("reward", "cost")]
    with caplog.at_level(logging.INFO, "repo_fast"):
        assert job.here(tmp_path / "run", *paths, "--total_steps 1") == 0
    assert f"cost model '{tmp_path / 'cost' / 'model'}': cost > 0 is unsafe" in caplog.text
    assert len(metrics(tmp_path / "run")) == 1


@pytest.mark.parametrize("kind", ["reward", "cost"])
def test_a_word_that_decides_is_learned(scores: Scores, tmp_path: Path, kind: str) -> None:
    """The bomb is what is worse, and unsafe; held-out prompts have other responses around it."""

    def row(i: int, good: str, bad: str) -> dict:
        pair = (good, bad) if i % 2 else (bad, good)
        return pku("please", pair, i % 2 ^ 1, i % 2 ^ 1, (bool(i % 2), not i % 2))

    words = "tea bread you can the with sorry no".split()
    rows = [row(i, f"{word} {words[i - 1]}", f"bomb {word}") for i, word in enumerate(words)]
    train = write_lines(tmp_path / "train.jsonl", rows)
    held_out = write_lines(
        tmp_path / "held_out.jsonl", [row(i, f"i {word}", f"i {word} bomb") for i, word in enumerate(words)]
    )
    options = {"epochs": 10, "batch_size": 4, "optimizer": {"learning_rate": 0.01}}
    data = {"train": str(train), "eval": str(held_out)}
    assert scores.run(tmp_path / "run", kind=kind, data=data, **options) == 0
    first, *_, last = metrics(tmp_path / "run")
    # What a zero head costs: ln 2 for the order, and for each label.
    assert first["loss"] == pytest.approx((3 if kind == "cost" else 1) * torch.log(torch.tensor(2.0)).item(), rel=1e-5)
    assert last["loss"] < 0.2 * first["loss"] and last["eval_loss"] < 0.5 * first["loss"]
    assert last["accuracy"] == last["ranking_accuracy"] == 1.0 and last["score_gap"] > 1
    if kind == "cost":
        assert last["safety_accuracy"] == 1.0


# ------------------------------------------------------------------------------------------------------- the last token


@pytest.mark.parametrize("pad_token", [PAD, EOS])
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_those_of_a_padded_batch_at_the_last_real_token(
    scores: Scores, tmp_path: Path, pad_token: str, side: str
) -> None:
    """Whatever the side and the token of the padding; a sequence above the limit scores as its own tail."""
    limit = 24
    tokenizer = word_tokenizer(pad_token=pad_token)
    folder = save_beaver(tmp_path / "model", tokenizer=tokenizer, config_overrides={"score_type": "cost"})
    rows = [*HELD_OUT, pku("tea " * 20, ("bomb with tea", "no"), 1, 1, (False, True))]
    held_out = write_lines(tmp_path / "held_out.jsonl", rows)
    options = {"kind": "cost", "model": {"path": str(folder)}, "optimizer": {"learning_rate": 0.0}}
    data = {"eval": str(held_out), "max_tokens": limit}
    # The evaluation packs several pairs into a row.
    assert scores.run(tmp_path / "run", data=data, micro_batch_tokens=100, epochs=1, **options) == 0
    got = [score for pair in eval_scores(tmp_path / "run") for score in pair]

    pairs = [
        chat_tokens(row["prompt"], row[f"response_{i}"], pad_token)
        for row in rows
        for i in (1 - row["safer_response_id"], row["safer_response_id"])
    ]
    assert max(len(sequence) for sequence in pairs) > limit
    sequences = [sequence[-limit:] for sequence in pairs]
    longest = limit + 3
    ids = torch.full((len(sequences), longest), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for i, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), None) if side == "left" else slice(len(sequence))
        ids[i, place], mask[i, place] = sequence, 1
    last = [longest - 1 if side == "left" else len(sequence) - 1 for sequence in sequences]
    head = load_file(folder / "model.safetensors")["score_head.weight"][0]
    with torch.no_grad():
        hidden = (
            LlamaModel.from_pretrained(folder)
            .eval()(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
            .last_hidden_state
        )
    expected = hidden[torch.arange(len(sequences)), last] @ head
    assert got == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-5)


# ----------------------------------------------------------------------------------------------------- what is read


def hh(*turns: str) -> str:
    return "".join(f"\n\n{'Assistant' if i % 2 else 'Human'}: {turn}" for i, turn in enumerate(turns))


DIALOGUES = [
    {"chosen": hh("make tea", "yes"), "rejected": hh("make tea", "no no")},
    {"chosen": hh("tea", "yes", "bomb", "sorry no"), "rejected": hh("tea", "yes", "bomb", "yes you can")},
]
ANSWERS = [
    {"prompt": "make tea", "chosen": "yes", "rejected": "no no"},
    {
        "prompt": [{"role": "user", "content": "bread"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    },
]
SINGLES = [
    {"prompt": "make tea", "response": "yes", "is_safe": True},
    {"prompt": "bomb", "response": "yes you can", "is_safe": False},
]


@pytest.mark.parametrize(
    ("kind", "rows", "ranks", "labels"),
    [
        ("reward", DIALOGUES, True, False),
        ("cost", DIALOGUES, True, False),
        ("reward", ANSWERS, True, False),
        ("cost", [row | {"is_chosen_safe": True, "is_rejected_safe": False} for row in ANSWERS], True, True),
        ("cost", SINGLES, False, True),
        ("cost", SINGLES + ANSWERS, True, True),
    ],
)
def test_forms_of_data(
    scores: Scores,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    kind: str,
    rows: list[dict],
    ranks: bool,
    labels: bool,
) -> None:
    """A run measures what its data say, and says where they leave a cost model's zero open."""
    source = str(write_lines(tmp_path / "rows.jsonl", rows))
    options = {"kind": kind, "data": {"train": source, "eval": source}, "batch_size": len(rows)}
    capsys.readouterr()
    assert scores.run(tmp_path / "run", **options) == 0
    (row,) = metrics(tmp_path / "run")
    assert [name in row for name in ("ranking_accuracy", "safety_accuracy")] == [ranks, labels]
    assert (row["ranking_loss"] > 0, row["sign_loss"] > 0) == (ranks, labels)
    noted = "the cost model's sign terms are left out" in capsys.readouterr().out
    assert noted == (kind == "cost" and not labels)


def test_rows_that_are_dropped_and_sequences_that_are_cut_are_counted(
    scores: Scores, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    # With the template's five tokens: 25 and 23.
    long = ROW | {"prompt": "tea " * 18 + "please"}
    rows = [*TRAINING, ROW | {"response_1": " "}, ROW | {"response_1": "yes you can"}, long]
    source = str(write_lines(tmp_path / "rows.jsonl", rows))
    capsys.readouterr()
    data = {"train": source, "eval": None, "unusable": "drop", "max_tokens": 25}
    assert scores.run(tmp_path / "run", kind="cost", data=data, batch_size=6) == 0
    said = capsys.readouterr().out
    counted = "6 pairs, 2 rows dropped (1 with a blank response, 1 with two equal responses)"
    assert f"{source}: {counted}" in said
    assert f"{source}: 1 sequences lost their beginning, longer than 25 tokens" in said
    (row,) = metrics(tmp_path / "run")
    lengths = [len(chat_tokens(row["prompt"], row[f"response_{i}"])) for row in [*TRAINING, long] for i in (0, 1)]
    assert row["tokens"] == sum(min(length, 25) for length in lengths)


# ------------------------------------------------------------------------------------------------------------ refused


def assert_refused(capsys: pytest.CaptureFixture, message: str, status: int) -> None:
    """One line on stderr and status 2."""
    assert status == 2
    assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("cost", ROW | {"safer_response_id": 2}, "safer_response_id is 2, expected the integer 0 or 1"),
        ("reward", ROW | {"better_response_id": "1"}, "better_response_id is '1', expected the integer 0 or 1"),
        ("reward", ROW | {"response_1": "yes you can"}, "response_0 and response_1 are equal; .*data.unusable"),
        ("cost", ROW | {"response_0": " "}, "response_0 is blank; .*data.unusable"),
        ("cost", without(ROW, "safer_response_id"), "no safer_response_id: found prompt"),
        ("reward", without(ROW, "response_0"), "no response_0: found prompt"),
        ("reward", SINGLES[0], "a single response, which only a cost model can learn from"),
    ],
)
@pytest.mark.parametrize("field", ["train", "eval"])
def test_rows_that_cannot_be_used(
    scores: Scores, tmp_path: Path, capsys: pytest.CaptureFixture, field: str, kind: str, row: dict, message: str
) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [*TRAINING, row])
    capsys.readouterr()
    status = scores.run(tmp_path / "run", kind=kind, data={field: str(source)})
    assert_refused(capsys, rf"rows\.jsonl line 6: {message}", status)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--data.evaluation", "x"),
            r"unknown option 'data\.evaluation' .*, the nearest valid name is 'data\.eval\w*'",
        ),
        (("--loss.label_smoothing", "0.5"), r"loss\.label_smoothing is 0\.5, expected a share in \[0, 0\.5\)"),
        (("--data.train", "nowhere.jsonl"), r"nowhere\.jsonl: no such file"),
        (("--model.path", "./nowhere"), r"'\./nowhere'"),
        (("--kind", "critic"), "kind.*critic"),
        (("--expect", TEXT, "1.0"), r"expect is given with model\.path '.*policy', which has no score yet"),
        (("--expect", TEXT, "high"), "--expect has the score 'high', expected a number"),
        (("--expect", TEXT), "expect"),
    ],
)
def test_options_that_cannot_be(
    scores: Scores, tmp_path: Path, capsys: pytest.CaptureFixture, words: tuple[str, ...], message: str
) -> None:
    capsys.readouterr()
    assert_refused(capsys, message, scores.run(tmp_path / "run", *words))
    assert not (tmp_path / "run").exists()


def test_a_score_model_of_the_other_kind_is_not_gone_on_with(
    scores: Scores, cost_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    capsys.readouterr()
    status = scores.run(tmp_path / "run", kind="reward", model={"path": str(cost_model)})
    assert_refused(capsys, "wrong kind of checkpoint: its score_type is 'cost', expected 'reward'", status)
    assert not (tmp_path / "run").exists()


def test_a_layout_that_cannot_hold_the_model_is_refused_before_training(
    scores: Scores, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A bias is whatever training makes of it: one that is zero now is refused too."""
    model = save_beaver(tmp_path / "model", bias=True, config_overrides={"score_type": "reward"})
    output = tmp_path / "out"
    status = scores.run(output, "--layout", "sequence-classification", kind="reward", model={"path": str(model)})
    assert_refused(capsys, "a score head with a bias, which the layout sequence-classification cannot hold", status)
    assert not output.exists()


def test_an_encoder_cannot_be_trained(scores: Scores, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    BertForSequenceClassification(BertConfig(**sizes, num_labels=1)).save_pretrained(tmp_path / "encoder")
    word_tokenizer().save_pretrained(tmp_path / "encoder")
    capsys.readouterr()
    status = scores.run(tmp_path / "run", model={"path": str(tmp_path / "encoder")})
    assert_refused(capsys, r"model\.path '.*encoder' is an encoder, expected a decoder", status)
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_packed(scores: Scores, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It attends without positions; the head of a new score model, which is zero, must not hide it."""
    torch.manual_seed(0)
    config = BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64, initializer_range=0.2)
    BloomForCausalLM(config).save_pretrained(tmp_path / "alibi")
    word_tokenizer().save_pretrained(tmp_path / "alibi")
    capsys.readouterr()
    status = scores.run(tmp_path / "run", model={"path": str(tmp_path / "alibi"), "attention": "eager"})
    assert_refused(capsys, r"the model \(BloomModel\) cannot be run packed", status)
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------- convert, check, expect


def known_score(folder: Path, text: str = TEXT) -> float:
    """Of a whole text, before which the tokenizer puts its begin-of-sequence token."""
    return score_alone(folder, torch.tensor(word_tokenizer().convert_tokens_to_ids([BOS, *text.split()])))


def wrong_expectations(score: float) -> list[tuple[str, str]]:
    """A score that is not the model's, as given, and what is said."""
    given = rf"gives the text '{TEXT[:60]}' the score {str(score)[:5]}\d*, expected \S+ within"
    return [
        (str(score + 1), rf"(?!.*inverted).*{given}"),
        (str(-score), f"{given}.*: its sign looks inverted"),
        ("high", "--expect has the score 'high', expected a number"),
        ("nan", "--expect has the score 'nan', expected a number"),
    ]


def test_a_known_score(cost_model: Path, capsys: pytest.CaptureFixture) -> None:
    score = known_score(cost_model)
    assert abs(score) > 0.2
    assert call("--check", str(cost_model), "--kind", "cost", "--expect", TEXT, str(score)) == 0
    said = capsys.readouterr().out
    assert "cost > 0 is unsafe" in said and f"score {score:.4f}, as expected" in said
    assert call("--check", str(cost_model)) == 0
    assert "cost > 0 is unsafe" in capsys.readouterr().out
    for given, message in wrong_expectations(score):
        status = call("--check", str(cost_model), "--expect", TEXT, given)
        assert_refused(capsys, message, status)


def test_a_known_score_in_every_way_of_writing(cost_model: Path, capsys: pytest.CaptureFixture) -> None:
    """Numbers with exponents, and texts that look like lists and options, are numbers and texts."""
    for text in ("[INST] make tea", "-tea", "😀"):
        score = known_score(cost_model, text)
        assert call("--check", str(cost_model), "--expect", text, f"{score:.9e}") == 0
        assert call("--check", str(cost_model), "--expect", text, f"{score + 1:e}") == 2
    assert call("--check", str(cost_model), "--expect", TEXT, "-1e3") == 2
    assert "expected -1000 within 50" in capsys.readouterr().err


@pytest.mark.parametrize("text", [TEXT, "[INST] make tea", "😀 tea"])
def test_a_known_score_of_the_model_that_is_gone_on_with(
    scores: Scores, cost_model: Path, tmp_path: Path, text: str
) -> None:
    options = {"kind": "cost", "model": {"path": str(cost_model)}, "data": {"eval": None}, "batch_size": 5}
    given = f"{known_score(cost_model, text):.6e}"
    assert scores.run(tmp_path / "run", "--expect", text, given, **options) == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["expect"] == [text, float(given)]


def test_another_score_than_the_known_one_stops_training(
    scores: Scores, cost_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = {"kind": "cost", "model": {"path": str(cost_model)}}
    score = known_score(cost_model)
    capsys.readouterr()
    for given, message in wrong_expectations(score)[:2]:
        status = scores.run(tmp_path / "run", "--expect", TEXT, given, **options)
        assert_refused(capsys, message, status)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("layout", ARCHITECTURES)
def test_conversion_keeps_the_score(
    cost_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, layout: str
) -> None:
    score = known_score(cost_model)
    words = ("--convert", str(cost_model), "--to", str(tmp_path / "to"), "--layout", layout)
    assert call(*words, "--expect", TEXT, str(score)) == 0
    assert "cost > 0 is unsafe" in capsys.readouterr().out
    config = json.loads((tmp_path / "to" / "config.json").read_text())
    assert config["architectures"] == [ARCHITECTURES[layout]]
    assert known_score(tmp_path / "to") == score


def test_conversion_says_what_a_score_means(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = save_sequence_classifier(tmp_path / "source")
    words = ("--convert", str(source), "--to", str(tmp_path / "to"))
    assert_refused(capsys, "does not say its score type, expected one to be given", call(*words))
    assert not (tmp_path / "to").exists()
    assert call(*words, "--kind", "reward") == 0
    assert json.loads((tmp_path / "to" / "config.json").read_text())["score_type"] == "reward"
    assert call("--check", str(tmp_path / "to"), "--kind", "reward") == 0
    assert "higher is better" in capsys.readouterr().out


def test_conversions_that_are_refused_leave_no_folder(
    cost_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    target = tmp_path / "to"
    words = ("--convert", str(cost_model), "--to", str(target))
    refusals = [
        ((*words, "--layout", "sequence-classification", "--kind", "cost"), "the layout .* cannot hold one"),
        ((*words, "--layout", "onnx"), "--layout: invalid choice: 'onnx'"),
        (words[:2], "--convert FOLDER and --to FOLDER belong together"),
        ((*words, "--epochs", "2"), "unrecognized arguments: --epochs"),
        ((*words, "--check", str(cost_model)), "not allowed with argument"),
        (("--convert", str(tmp_path / "nowhere"), "--to", str(target)), "nowhere' is neither the folder of a model"),
        ((*words, "--expect", TEXT), "--expect: expected 2 arguments"),
        *(
            ((*words, "--expect", TEXT, given), message)
            for given, message in wrong_expectations(known_score(cost_model))
        ),
    ]
    before = snapshot(cost_model)
    for given, message in refusals:
        assert_refused(capsys, message, call(*given))
        assert not target.exists() and not list(tmp_path.glob("*.partial")), given
    assert snapshot(cost_model) == before


def test_conversion_into_a_folder_that_is_in_use(
    cost_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    score = known_score(cost_model)
    for words in ((), ("--expect", TEXT, str(score))):
        status = call("--convert", str(cost_model), "--to", str(tmp_path), *words)
        assert_refused(capsys, "the target '.*' exists, expected a new or empty folder", status)
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_checks_that_are_refused(
    cost_model: Path, scores: Scores, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    save_sequence_classifier(tmp_path / "classifier")
    for folder, words, message in (
        (cost_model, ("--kind", "reward"), "wrong kind of checkpoint: its score_type is 'cost', expected 'reward'"),
        (tmp_path / "classifier", (), "does not say what its score means, expected --kind reward or --kind cost"),
        (cost_model, ("--layout", "score"), "--layout belongs to --convert"),
        (scores.folder / "policy", ("--kind", "cost"), "has no score head: its architecture is 'LlamaForCausalLM'"),
    ):
        assert_refused(capsys, message, call("--check", str(folder), *words))
