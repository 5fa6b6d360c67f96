"""`pad_token` and `pad_vocabulary_to` in every entry point, under ZeRO-3."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from repo_fast.config import parse
from repo_fast.engine import start_distributed
from repo_fast.jobs.inputs import read_inputs
from repo_fast.jobs.trainer import Trainer
from repo_fast.models import vocabulary
from repo_fast.models.score_model import ScoreModel
from repo_fast.rollout.seeds import Purpose
from tests.job_runs import Job, metrics, same_bits, weights
from tests.supervised_runs import here, make_inputs, result
from tests.tiny import save_beaver, save_policy, word_tokenizer

NEW = "<|pad|>"
PADDED = f"--model.pad_token {NEW} --model.pad_vocabulary_to 16"
OF_POLICY = f"--policy.pad_token {NEW} --policy.pad_vocabulary_to 16"
TOKENS = len(word_tokenizer())
ROWS = -(-(TOKENS + 1) // 16) * 16
KINDS = ("train", "sft", "cost")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The jobs' inputs, with `bare/`: a policy whose tokenizer has no pad token, and whose rows are its tokens."""
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    save_policy(folder / "bare", word_tokenizer(pad_token=None))
    return folder


@pytest.fixture(scope="module")
def runs(inputs: Path, job: Job, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of the model that each entry point wrote, the score model in Hugging Face's layout."""
    folders = {kind: tmp_path_factory.mktemp(kind) / "run" for kind in KINDS}
    bare = inputs / "bare"
    assert job.here(folders["train"], f"--policy.path {bare}", OF_POLICY, "--total_steps 2") == 0
    assert here("sft", inputs, folders["sft"], f"--model.path {bare}", PADDED) == 0
    layout = "--layout sequence-classification"
    assert here("cost", inputs, folders["cost"], f"--model.path {bare}", PADDED, layout) == 0
    return {kind: folder / ("model" if kind == "cost" else "policy") for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_a_plain_folder_with_the_new_rows_and_token(runs: dict[str, Path], kind: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(runs[kind])
    assert (tokenizer.pad_token, tokenizer.pad_token_id, len(tokenizer)) == (NEW, TOKENS, TOKENS + 1)
    loader = AutoModelForSequenceClassification if kind == "cost" else AutoModelForCausalLM
    model = loader.from_pretrained(runs[kind])
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == ROWS > TOKENS + 1
    batch = tokenizer(["how do i", "make tea bread please"], return_tensors="pt", padding=True, padding_side="left")
    assert NEW in tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    if kind == "cost":
        # Only with a pad token in its configuration does transformers score a padded batch.
        assert model.config.pad_token_id == TOKENS
        right = tokenizer(["how do i", "make tea bread please"], return_tensors="pt", padding=True)
        alone = model(**tokenizer("how do i", return_tensors="pt")).logits[0]
        torch.testing.assert_close(model(**right).logits[0], alone, atol=1e-5, rtol=1e-5)
    else:
        assert model.generation_config.pad_token_id == TOKENS
        assert model.get_output_embeddings().weight.shape[0] == ROWS
        assert model.generate(**batch, max_new_tokens=3, do_sample=False).shape == (2, batch["input_ids"].shape[1] + 3)


def test_old_rows_are_trained_as_without_the_new_ones(inputs: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    """A score model has no logits, so rows that no text uses change nothing."""
    assert here("cost", inputs, tmp_path / "run", f"--model.path {inputs / 'bare'}") == 0
    padded = load_file(runs["cost"] / "model.safetensors")["model.embed_tokens.weight"]
    torch.testing.assert_close(padded[:TOKENS], result(tmp_path / "run")["model.embed_tokens.weight"])
    before = load_file(inputs / "bare" / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(padded[:TOKENS], before)


@pytest.mark.parametrize("kind", KINDS)
def test_again_there_is_nothing_to_do(inputs: Path, job: Job, runs: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """From the result, with the same options, and with nothing learned, the same model comes out."""
    if kind == "train":
        options = (f"--policy.path {runs[kind]}", OF_POLICY, "--policy_optimizer.learning_rate 0", "--total_steps 1")
        assert job.here(tmp_path / "run", *options) == 0
        after = weights(tmp_path / "run")
    else:
        options = (f"--model.path {runs[kind]}", PADDED, "--optimizer.learning_rate 0", "--epochs 1")
        assert here(kind, inputs, tmp_path / "run", *options) == 0
        after = result(tmp_path / "run")
    before = load_file(runs[kind] / "model.safetensors")
    # The layouts of score models differ in what stands beside the trunk.
    assert all(torch.equal(after[name], value) for name, value in before.items() if name.startswith(("model", "lm_")))
    again = AutoTokenizer.from_pretrained(tmp_path / "run" / runs[kind].name)
    assert again.get_vocab() == AutoTokenizer.from_pretrained(runs[kind]).get_vocab()
    assert again.pad_token == NEW


def test_a_checkpoint_with_more_rows_resumes_exactly(inputs: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    options = (f"--model.path {inputs / 'bare'}", PADDED)
    assert here("sft", inputs, tmp_path / "run", *options, "--stop_after 2") == 0
    assert here("sft", inputs, tmp_path / "run", *options, "--resume auto") == 0
    assert metrics(tmp_path / "run") == metrics(runs["sft"].parent)
    assert same_bits(weights(tmp_path / "run"), load_file(runs["sft"] / "model.safetensors"))


# -------------------------------------------------------------------------------------------------- while training


def make_trainer(job: Job, output_dir: Path, *options: str) -> Trainer:
    """A run that has not started."""
    config = parse(job.words(output_dir, *options))
    return Trainer(config, read_inputs(config), start_distributed())


@pytest.mark.parametrize("options", [OF_POLICY, "--policy.pad_vocabulary_to 16"], ids=["token and rows", "rows"])
def test_what_was_added_is_never_drawn(
    inputs: Path, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    """Although the added rows, the pad token's among them, would almost always win."""
    appended = vocabulary._with_mean_rows

    def loud(weight: torch.nn.Parameter, rows: int) -> torch.nn.Parameter:
        longer = appended(weight, rows)
        noise = torch.Generator().manual_seed(5)
        longer.data[TOKENS:] = 30 * torch.randn(longer[TOKENS:].shape, generator=noise)
        return longer

    monkeypatch.setattr(vocabulary, "_with_mean_rows", loud)
    trainer = make_trainer(job, tmp_path / "run", f"--policy.path {inputs / 'bare'}", options)
    with trainer.learner.models.policy.gathered() as policy:
        logits = policy.model.get_output_embeddings().weight @ torch.randn(32, 200)
    assert (logits.argmax(0) >= TOKENS).float().mean() > 0.8
    rollout = trainer.generate(*trainer.share_requests(trainer.inputs.requests, 4, Purpose.TRAINING))
    drawn = torch.cat(rollout.response_tokens)
    assert drawn.numel() > 60
    assert int(drawn.max()) < TOKENS
    assert all(part.isfinite().all() for part in rollout.sampler_log_probs)


def test_a_scorer_with_the_policys_tokenizer_still_reads_its_tokens(inputs: Path, job: Job, tmp_path: Path) -> None:
    """A response's text has no special tokens: tokenised anew, it would score otherwise. And critics start from it."""
    save_beaver(tmp_path / "cost", tokenizer=word_tokenizer(pad_token=None), config_overrides={"score_type": "cost"})
    options = (f"--policy.path {inputs / 'bare'}", OF_POLICY, f"--cost.path {tmp_path / 'cost'}")
    trainer = make_trainer(job, tmp_path / "run", *options)
    assert trainer.inputs.tokenizer.pad_token == NEW
    rollout = trainer.generate(*trainer.share_requests(trainer.inputs.requests, 4, Purpose.TRAINING))
    special = torch.tensor(word_tokenizer().all_special_ids)
    assert any(torch.isin(response[:-1], special).any() for response in rollout.response_tokens)
    model = ScoreModel.from_pretrained(str(tmp_path / "cost"), dtype=torch.float32)
    expected = []
    for prompt, response in zip(rollout.prompt_tokens, rollout.response_tokens, strict=True):
        tokens = torch.cat([prompt, response])
        with torch.no_grad():
            expected.append(model(tokens[None], torch.arange(len(tokens))[None], torch.tensor([len(tokens) - 1]))[0])
    torch.testing.assert_close(trainer.score(rollout)["cost"], torch.stack(expected), atol=1e-4, rtol=1e-4)
    values = {name: trainer.learner.values(critic, rollout) for name, critic in trainer.learner.models.critics.items()}
    assert values["cost"].any() and not values["reward"].any()


@pytest.mark.parametrize(
    ("kind", "option", "message"),
    [
        ("sft", "--model.pad_vocabulary_to 0", r"model\.pad_vocabulary_to is 0, expected a whole number of at least 1"),
        ("train", "--policy.pad_vocabulary_to 0", r"policy\.pad_vocabulary_to is 0, expected a whole number"),
        ("cost", "--model.pad_token=", r"the pad token is '', expected a token such as '<pad>'"),
    ],
)
def test_refused(
    inputs: Path, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture, kind: str, option: str, message: str
) -> None:
    run = job.here if kind == "train" else lambda *words: here(kind, inputs, *words)
    assert run(tmp_path / "run", option) == 2
    assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
