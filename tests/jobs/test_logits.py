"""Policies that scale or cap their logits after the head, or have a bias there: what is drawn, learned and written."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.trainer.architectures import config_of, save_model
from repo_fast.data import PromptTemplate, load_demonstrations
from repo_fast.models.loss_head import logit_settings
from tests.job_runs import Job, metrics
from tests.supervised_runs import here, make_inputs
from tests.tiny import word_tokenizer

FAMILIES = ["gemma2", "granite", "cohere", "phi", "nanochat", "falcon_h1"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def save(architecture: str, folder: Path) -> Path:
    config = config_of(architecture)
    config.vocab_size = len(word_tokenizer())
    save_model(config, folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", FAMILIES)
def test_sft_learns_the_cross_entropy_of_transformers(architecture: str, inputs: Path, tmp_path: Path) -> None:
    path = save(architecture, tmp_path / "policy")
    template = PromptTemplate(word_tokenizer())
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    assert here("sft", inputs, tmp_path / "out", f"--model.path {path}", "--batch_size 7", "--epochs 1") == 0
    total, count = 0.0, 0
    for shown in load_demonstrations(str(inputs / "sft.jsonl")):
        prompt, response = template.encode_prompt(shown.prompt), template.encode_response(shown.response)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1].double()
        total -= float(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum())
        count += len(response)
    assert metrics(tmp_path / "out")[0]["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_training_computes_what_the_sampler_drew_from(architecture: str, job: Job, tmp_path: Path) -> None:
    """The sampler has its log-probabilities from transformers' logits, the trainer from its head."""
    path = save(architecture, tmp_path / "policy")
    options = (f"--policy.path {path}", "--total_steps 1", "--update.minibatches 1", "--update.old_log_probs sampler")
    assert job.here(tmp_path / "out", *options) == 0
    row = metrics(tmp_path / "out")[0]
    assert row["sampler_gap_absolute"] < 1e-5
    assert abs(row["kl"]) < 1e-5  # the reference is the policy
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (path, tmp_path / "out" / "policy"))
    assert logit_settings("", after.config, type(after)) == logit_settings("", before.config, type(before))
    head = before.get_output_embeddings()
    if head.bias is not None:
        assert not torch.equal(head.bias, after.get_output_embeddings().bias)
