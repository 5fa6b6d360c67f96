"""A known score tells a model that is read the right way round from one that is not."""

import math

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from repo_fast.errors import InputError
from repo_fast.scoring import check_expected_score, load_score_model, score_text
from repo_fast.scoring.expectation import check_folder
from tests.tiny import BOS, save_beaver, save_sequence_classifier, word_tokenizer

TEXT = "BEGINNING OF CONVERSATION: USER: make tea ASSISTANT: yes you can"


@pytest.mark.parametrize(
    ("score", "expected"), [(1.0, 1.0), (10.4, 10.0), (-10.4, -10.0), (0.04, 0.0), (-0.01, 0.03), (9.6, 10.0)]
)
def test_scores_within_the_tolerance(score, expected):
    check_expected_score(lambda text: {TEXT: score}[text], TEXT, expected, "the cost model")


@pytest.mark.parametrize(
    ("score", "expected", "inverted"),
    [(10.6, 10.0, False), (0.06, 0.0, False), (-10.4, 10.0, True), (3.0, -3.1, True), (math.nan, 1.0, False)],
)
def test_other_scores_are_an_error_with_both_numbers(score, expected, inverted):
    with pytest.raises(InputError) as caught:
        check_expected_score(lambda _: score, TEXT, expected, "the cost model 'x'")
    message = str(caught.value)
    assert message.startswith(f"the cost model 'x' gives the text '{TEXT[:60]}' the score {score:.6g}, expected")
    assert f"expected {expected:.6g}" in message and "\n" not in message
    assert ("sign looks inverted" in message) == inverted


def test_what_is_expected_must_be_a_number():
    with pytest.raises(InputError, match="expected score is nan"):
        check_expected_score(lambda _: 1.0, TEXT, math.nan, "the cost model")


@pytest.mark.parametrize("save", [save_beaver, save_sequence_classifier])
def test_a_decoder_is_read_at_the_last_token_and_no_eos_is_added(tmp_path, save):
    path = save(tmp_path)
    model, tokenizer = load_score_model(str(path), dtype=torch.float32).eval(), word_tokenizer()
    ids = torch.tensor(tokenizer.convert_tokens_to_ids([BOS, *TEXT.split()]))
    with torch.no_grad():
        hidden = model.trunk(ids[None]).last_hidden_state[0, -1]
        expected = float(model.score_head(hidden)[0])
    assert score_text(model, tokenizer, TEXT, torch.device("cpu")) == pytest.approx(expected, rel=1e-5)

    class Engine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = model

        def forward(self, *inputs):
            return self.module(*inputs)

    assert score_text(Engine(), tokenizer, TEXT, "cpu") == score_text(model, tokenizer, TEXT, "cpu")


def test_an_encoder(tmp_path):
    tokenizer = word_tokenizer(chat_template=False)
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(intermediate_size=64, max_position_embeddings=12, initializer_range=0.2, num_labels=1)
    reference = BertForSequenceClassification(BertConfig(**sizes)).eval()
    reference.save_pretrained(tmp_path)
    model = load_score_model(str(tmp_path), dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(**tokenizer("make tea", return_tensors="pt")).logits.item()
    assert score_text(model, tokenizer, "make tea", "cpu") == pytest.approx(expected, rel=1e-5)
    with pytest.raises(InputError, match="has 21 tokens, expected 1 to 12"):
        score_text(model, tokenizer, "tea " * 20, "cpu")


def test_an_encoder_whose_tokenizer_has_no_end_of_sequence_token(tmp_path, job):
    """As BERT's: it marks the ends of its texts by itself. It is checked, and gives a run's costs."""
    tokenizer = word_tokenizer(chat_template=False)
    tokenizer.eos_token = None
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    sizes |= dict(intermediate_size=64, max_position_embeddings=64, initializer_range=0.2, num_labels=1)
    BertForSequenceClassification(BertConfig(**sizes)).save_pretrained(tmp_path / "cost")
    tokenizer.save_pretrained(tmp_path / "cost")
    model = load_score_model(str(tmp_path / "cost"), dtype=torch.float32).eval()
    score = score_text(model, tokenizer, "make tea")
    assert f"score {score:.4f}, as expected" in check_folder(str(tmp_path / "cost"), "cost", ("make tea", score))
    assert job.here(tmp_path / "run", f"--cost.path {tmp_path / 'cost'}", "--total_steps 1") == 0


def test_a_text_without_tokens(tmp_path):
    model = load_score_model(str(save_beaver(tmp_path)), dtype=torch.float32)
    with pytest.raises(InputError, match="has 0 tokens"):
        score_text(model, word_tokenizer(bos_token=None), "", "cpu")
