"""`repo_fast.sft`: its update against a naive one, its evaluation and its result against plain transformers."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from repo_fast.sft import main as sft
from tests.families import FAMILIES, family_tokenizer
from tests.job_runs import metrics, snapshot, write_lines
from tests.learning.learner_worker import plain_descent
from tests.supervised_runs import SHOWN, here, make_inputs, norm_wise, result
from tests.tiny import save_policy


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def naive_losses(
    folder: Path, chats: list[list[str]], dtype: torch.dtype
) -> tuple[torch.nn.Module, list[torch.Tensor], list[int]]:
    """The cross-entropy of each chat's last turn, and its tokens, one chat at a time, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    losses, counts = [], []
    for *turns, response in chats:
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + answer])
        losses.append(model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss * len(answer))
        counts.append(len(answer))
    return model, losses, counts


@pytest.mark.parametrize("micro_batch_tokens", [4096, 40, 1])
def test_an_update_equals_a_naive_one(inputs: Path, tmp_path: Path, micro_batch_tokens: int) -> None:
    """All examples in one step; the loss is the mean over the tokens of all of them, not of each."""
    options = ("--batch_size 7", "--epochs 1", "--optimizer.warmup 0", "--optimizer.gradient_clip 0")
    with plain_descent(0.5):
        assert here("sft", inputs, tmp_path / "run", *options, f"--micro_batch_tokens {micro_batch_tokens}") == 0
    model, losses, counts = naive_losses(inputs / "policy", [list(pair) for pair in SHOWN], torch.float64)
    assert len(set(counts)) > 3
    loss = sum(losses) / sum(counts)
    loss.backward()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        expected = {name: parameter - 0.5 * parameter.grad for name, parameter in model.named_parameters()}
    assert norm_wise(result(tmp_path / "run"), expected, start) <= 1e-5
    (row,) = metrics(tmp_path / "run")
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    scale = torch.stack([parameter.grad.square().sum() for parameter in model.parameters()]).sum().sqrt()
    assert row["gradient_norm"] == pytest.approx(scale.item(), rel=1e-4)


CHATS = [["tea", "yes you can", "please make bread", "sorry no"], ["how do i make tea", "with the bread"]]
FORMS = {
    "alpaca": (
        [
            {"instruction": "how do i make", "input": "tea", "output": "with bread"},
            {"instruction": "please", "input": "", "output": "no sorry"},
        ],
        [["how do i make tea", "with bread"], ["please", "no sorry"]],
    ),
    "messages": (
        [
            {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(chat)]}
            for chat in CHATS
        ],
        [CHATS[0][:2], *CHATS],
    ),
    "prompt of several turns": (
        [
            {
                "prompt": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(chat[:-1])],
                "completion": chat[-1],
            }
            for chat in CHATS
        ],
        CHATS,
    ),
    "question, answer": ([{"question": "tea", "answer": "yes"}, {"question": "a bomb", "answer": "no"}], None),
}


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_demonstrations(inputs: Path, tmp_path: Path, form: str, suffix: str) -> None:
    """The loss that a form starts with is that of the chats that it stands for."""
    rows, chats = FORMS[form]
    source = tmp_path / f"shown.{suffix}"
    if suffix == "json":
        source.write_text(json.dumps(rows))
    else:
        write_lines(source, rows)
    options = (f"--data.train {source}", "--data.eval null", "--batch_size 2", "--epochs 1")
    assert here("sft", inputs, tmp_path / "run", *options) == 0
    _, losses, counts = naive_losses(inputs / "policy", chats or [list(row.values()) for row in rows], torch.float64)
    (row,) = metrics(tmp_path / "run")
    assert row["loss"] == pytest.approx((sum(losses) / sum(counts)).item(), rel=1e-5)
    assert "eval_loss" not in row


@pytest.fixture(scope="module")
def learned(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty epochs on four demonstrations of seven, evaluated on the other three."""
    folder = tmp_path_factory.mktemp("learned")
    rows = [{"prompt": prompt, "response": response} for prompt, response in SHOWN]
    train, held_out = write_lines(folder / "train.jsonl", rows[:4]), write_lines(folder / "eval.jsonl", rows[4:])
    options = ("--epochs 40", "--batch_size 4", "--evaluate_every 0", "--checkpoint.every 0")
    assert here("sft", inputs, folder / "run", f"--data.train {train} --data.eval {held_out}", *options) == 0
    return folder / "run"


def test_it_learns_by_heart(learned: Path) -> None:
    rows = metrics(learned)
    assert rows[0]["loss"] > 2
    assert rows[-1]["loss"] < 0.05
    # What it has not seen it answers no better, so what is evaluated is that.
    assert rows[-1]["eval_loss"] > 1


def test_the_result_is_a_plain_folder_with_the_loss_that_was_evaluated(learned: Path) -> None:
    _, losses, counts = naive_losses(learned / "policy", [list(pair) for pair in SHOWN[4:]], torch.float32)
    last = metrics(learned)[-1]
    loss = (sum(losses) / sum(counts)).item()
    assert last["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert last["eval_perplexity"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-4)
    model = AutoModelForCausalLM.from_pretrained(learned / "policy")
    tokenizer = AutoTokenizer.from_pretrained(learned / "policy")
    (prompt, response), *_ = SHOWN
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    asked = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    answered = model.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=9, do_sample=False)
    assert tokenizer.decode(answered[0, asked.shape[1] :], skip_special_tokens=True) == response
    assert {path.name for path in (learned / "policy").iterdir()} >= {"config.json", "model.safetensors"}
    assert not (learned / "policy" / "adapter").exists()
    assert load_file(learned / "policy" / "model.safetensors").keys() == dict(model.named_parameters()).keys()
    assert {path.name for path in (learned / "plots").iterdir()} >= {"loss.png", "optimizer.png", "speed.png"}


def test_the_end_of_a_turn_is_learned_and_the_written_folder_stops_there(tmp_path: Path) -> None:
    """The loss of one demonstration is that of the template's own tokens, up to the one that ends the turn."""
    tokenizer = family_tokenizer(FAMILIES["gemma"])
    end, eos = tokenizer.convert_tokens_to_ids("<end_of_turn>"), tokenizer.eos_token_id
    folder = save_policy(tmp_path / "policy", tokenizer, eos_token_id=eos)
    shown = write_lines(tmp_path / "shown.jsonl", [{"prompt": "How?", "response": "Like this.<end_of_turn>"}])
    words = ["--model.path", str(folder), "--data.train", str(shown), "--data.eval", "null", "--log.loggers", "[]"]
    assert sft([*words, "--epochs", "1", "--output_dir", str(tmp_path / "run")]) == 0
    messages = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "Like this."}]
    whole = tokenizer.apply_chat_template(messages)["input_ids"]
    asked = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    # A line break follows.
    ids = torch.tensor([whole[:-1]])
    labels = torch.cat([torch.full((1, len(asked)), -100), ids[:, len(asked) :]], dim=1)
    assert labels[0, -1] == end
    loss = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids, labels=labels).loss.item()
    (row,) = metrics(tmp_path / "run")
    assert row["loss"] == pytest.approx(loss, rel=1e-5)
    settings = json.loads((tmp_path / "run" / "policy" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == sorted([end, eos])


# ------------------------------------------------------------------------------------------------------- bad input


def test_demonstrations_that_are_too_long_are_dropped_and_counted(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Three of seven; a limit of as many tokens as one has keeps it."""
    tokenizer = AutoTokenizer.from_pretrained(inputs / "policy")
    lengths = sorted(len(tokenizer(" ".join(pair))["input_ids"]) for pair in SHOWN)
    # The chat template adds a role before and after, and two ends; the bos token is counted already.
    limit = lengths[3] + 4
    assert lengths[3] < lengths[4]
    assert here("sft", inputs, tmp_path / "run", f"--data.max_tokens {limit} --data.eval null --batch_size 4") == 0
    assert f"sft.jsonl: 3 demonstrations dropped, longer than {limit} tokens" in capsys.readouterr().out
    assert {row["tokens"] for row in metrics(tmp_path / "run")} == {sum(lengths[:4]) + 4 * 4}


def assert_refused(capsys: pytest.CaptureFixture, output_dir: Path, message: str, inputs: Path, *options: str) -> None:
    """One line on stderr, status 2, and no output folder."""
    capsys.readouterr()
    assert here("sft", inputs, output_dir, *options) == 2
    assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)
    assert not output_dir.exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--data.max_tokens 3", r"sft\.jsonl: all 7 demonstrations are longer than 3 tokens .data\.max_tokens."),
        ("--batch_size 0", r"batch_size is 0, expected a whole number of at least 1"),
        ("--data.train nowhere.jsonl", r"nowhere\.jsonl: no such file"),
        ("--data.eval nowhere.jsonl", r"nowhere\.jsonl: no such file"),
        ("--model.path ./nowhere", r"'\./nowhere' .*"),
        ("--data.tran x", r"unknown option 'data\.tran' .* nearest valid name is 'data\.train'"),
        ("--reward.path x", r"unknown option 'reward\.path'"),
        ("--model.lora.targets [q_proj]", r"model\.lora\.targets is \['q_proj'\] with model\.lora\.rank 0"),
    ],
)
def test_refused(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture, option: str, message: str) -> None:
    assert_refused(capsys, tmp_path / "run", message, inputs, option)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "tea"}, r"shown\.jsonl line 2: no response field: found prompt"),
        ({"response": "tea"}, r"shown\.jsonl line 2: no prompt field: found response"),
        ({"prompt": "", "response": "tea"}, r"shown\.jsonl line 2: prompt is blank"),
        ({"messages": [{"role": "user", "content": "tea"}]}, r"shown\.jsonl line 2: messages has the turns \['user'\]"),
        (
            {"messages": [{"role": role, "content": "tea"} for role in ("user", "system", "assistant")]},
            r"shown\.jsonl line 2: messages has the turns .*below at most one system text",
        ),
    ],
)
def test_a_row_that_cannot_be_used(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture, row: dict, message: str
) -> None:
    path = write_lines(tmp_path / "shown.jsonl", [{"prompt": "tea", "response": "yes"}, row])
    assert_refused(capsys, tmp_path / "run", message, inputs, f"--data.train {path}")


def test_a_folder_that_holds_a_run_is_left_alone(inputs: Path, learned: Path, capsys: pytest.CaptureFixture) -> None:
    before = snapshot(learned)
    capsys.readouterr()
    assert here("sft", inputs, learned) == 2
    assert re.fullmatch(r"error: --output_dir '.*' holds a run already, .*--resume auto.*\n", capsys.readouterr().err)
    assert snapshot(learned) == before


def test_fewer_examples_than_a_batch_make_one(inputs: Path, tmp_path: Path) -> None:
    options = ("--batch_size 100", "--epochs 3", "--data.eval null")
    assert here("sft", inputs, tmp_path / "all", *options) == 0
    assert here("sft", inputs, tmp_path / "seven", "--batch_size 7", *options[1:]) == 0
    assert [row["epoch"] for row in metrics(tmp_path / "all")] == [1, 2, 3]
    assert metrics(tmp_path / "all") == metrics(tmp_path / "seven")


def test_only_the_first_examples_are_learned_from_where_a_limit_says_so(inputs: Path, tmp_path: Path) -> None:
    first = write_lines(tmp_path / "first.jsonl", [{"prompt": a, "response": b} for a, b in SHOWN[:4]])
    options = ("--batch_size 2", "--epochs 1", "--data.eval null")
    assert here("sft", inputs, tmp_path / "limited", "--data.limit 4", *options) == 0
    assert here("sft", inputs, tmp_path / "four", f"--data.train {first}", *options) == 0
    assert metrics(tmp_path / "limited") == metrics(tmp_path / "four")
