"""`policy/`, which a run leaves behind, is an ordinary Hugging Face folder."""

import sys
from pathlib import Path

import pytest
import torch

from repo_fast.rollout.seeds import Purpose
from tests.job_runs import Job, run
from tests.tiny import save_policy

# Nothing of this project: what anybody would write.
READER = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder + "/run/policy")
    tokenizer = AutoTokenizer.from_pretrained(folder + "/run/policy")
    log_probs = []
    for prompt, response in torch.load(folder + "/tokens.pt"):
        with torch.no_grad():
            logits = model(torch.cat([prompt, response])[None]).logits[0].float()
        predicted = (logits[len(prompt) - 1 : -1] / 0.8).log_softmax(-1)
        log_probs.append(predicted.gather(1, response[:, None])[:, 0])
    batch = tokenizer(["how do i", "make"], return_tensors="pt", padding=True, padding_side="left")
    generated = model.generate(**batch, max_new_tokens=5, do_sample=False)
    torch.save({"log_probs": log_probs, "generated": tokenizer.batch_decode(generated)}, folder + "/read.pt")
assert not any(name.startswith(("repo_fast", "deepspeed")) for name in sys.modules)
"""


def train(job: Job, folder: Path, *, tied: bool) -> list[torch.Tensor]:
    """Two steps; saves responses of the trained policy, and returns the trainer's own log-probabilities of them."""
    from repo_fast.config import parse
    from repo_fast.engine import start_distributed, stop_distributed
    from repo_fast.jobs.inputs import read_inputs
    from repo_fast.jobs.trainer import Trainer

    save_policy(folder / "policy", tie_word_embeddings=tied)
    options = ["--total_steps 2", f"--policy.path {folder / 'policy'}", "--rollout.temperature 0.8"]
    config = parse(job.words(folder / "run", *options))
    inputs = read_inputs(config)
    trainer = Trainer(config, inputs, start_distributed())
    assert trainer.run() == 0
    rollout = trainer.generate(*trainer.share_requests(inputs.requests, 2, Purpose.TRAINING))
    log_probs = trainer.learner.log_probs(trainer.learner.models.policy, rollout)
    stop_distributed()
    torch.save(list(zip(rollout.prompt_tokens, rollout.response_tokens, strict=True)), folder / "tokens.pt")
    return list(log_probs.split([tokens.numel() for tokens in rollout.response_tokens]))


@pytest.fixture(scope="module")
def read(job: Job, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[list, dict, Path]]:
    """By whether the head is tied: the trainer's log-probabilities, and what a process with transformers alone got."""
    folders = {tied: tmp_path_factory.mktemp(f"export-{tied}") for tied in (False, True)}
    ours = {tied: train(job, folder, tied=tied) for tied, folder in folders.items()}
    finished = run([sys.executable, "-c", READER, *map(str, folders.values())])
    assert finished.returncode == 0, finished.stderr[-3000:]
    return {tied: (ours[tied], torch.load(folder / "read.pt"), folder) for tied, folder in folders.items()}


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_alone_reproduces_the_log_probs(read: dict, tied: bool) -> None:
    ours, theirs, _ = read[tied]
    assert len(ours) == len(theirs["log_probs"]) == 10
    for mine, other in zip(ours, theirs["log_probs"], strict=True):
        torch.testing.assert_close(other, mine, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_it_generates(read: dict, tied: bool) -> None:
    assert all(text.split() for text in read[tied][1]["generated"])


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_the_trained_model_and_its_kind_is_unchanged(read: dict, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    folder = read[tied][2]
    before = AutoModelForCausalLM.from_pretrained(folder / "policy")
    after = AutoModelForCausalLM.from_pretrained(folder / "run" / "policy")
    assert after.config.architectures == ["LlamaForCausalLM"]
    assert after.config.tie_word_embeddings is tied
    assert (after.lm_head.weight is after.model.embed_tokens.weight) is tied
    assert not torch.equal(after.lm_head.weight, before.lm_head.weight)
    differing = {
        key: (value, after.config.to_dict().get(key))
        for key, value in before.config.to_dict().items()
        if value != after.config.to_dict().get(key) and key not in ("_name_or_path", "transformers_version")
    }
    assert not differing
    assert after.generation_config.to_diff_dict() == before.generation_config.to_diff_dict()
