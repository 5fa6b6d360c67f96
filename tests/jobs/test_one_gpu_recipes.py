"""The recipes for one GPU, on small things that are laid out like what they name."""

import logging
import re
from pathlib import Path

import pytest

from repo_fast import score, train
from tests.config.test_configs import stand_ins
from tests.job_runs import metrics

SHORT = ["--total_steps", "2", "--rollout.max_new_tokens", "8", "--evaluation.samples_per_prompt", "1"]
# The plan's sizes are of 7B models.
TINY = ["--policy.lora.rank", "2", "--critics.lora.rank", "2"]


def given(words: list[str], *keys: str) -> list[str]:
    """Those of the options, with their values."""
    pairs = list(zip(words[::2], words[1::2], strict=True))
    return [word for pair in pairs if pair[0].removeprefix("--") in keys for word in pair]


def test_six_models_on_a_base_in_4_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As its first lines say: two score models, then the policy, where these were written."""
    words = stand_ins("alpaca-7b-24gb", tmp_path)
    values = dict(zip(words[::2], words[1::2], strict=True))
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "repo_fast")
    inputs = {"model.path": "--policy.path", "data.train": "--data.prompts", "data.eval": "--data.prompts"}
    for kind in ("reward", "cost"):
        command = ["--config", "alpaca-7b-24gb", "--kind", kind, "--output_dir", f"outputs/alpaca-7b-24gb/{kind}"]
        command += [word for key, name in inputs.items() for word in (f"--{key}", values[name])]
        assert score.main([*command, "--epochs", "1", "--batch_size", "4", "--model.lora.rank", "2"]) == 0
    left_out = ("config", "reward.path", "cost.path", "output_dir")
    own = given(words, *(key.removeprefix("--") for key in values if key.removeprefix("--") not in left_out))
    assert train.main(["--config", "alpaca-7b-24gb", *own, *SHORT, *TINY, "--engine.share_base", "true"]) == 0
    (line,) = [line for line in caplog.messages if "one copy of the weights" in line]
    models = ("the reward model", "the cost model", "the critic of reward", "the critic of cost")
    assert re.search(" that " + ", ".join(models) + " have frozen", line)
    assert caplog.text.count("parameters in 4 bits (nf4)") >= 7
    first, second = metrics(tmp_path / "outputs" / "alpaca-7b-24gb" / "repo")
    assert first["kl"] == pytest.approx(0, abs=1e-6) and second["gradient_norm"] > 0 and second["steps_skipped"] == 0


@pytest.mark.slow
def test_adapters_on_the_published_score_models(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Drawn by `hf` here; each critic shares the weights of its score model."""
    caplog.set_level(logging.INFO, "repo_fast")
    words = [*stand_ins("alpaca-7b-lora", tmp_path), *SHORT, *TINY, "--rollout.engine", "hf"]
    assert train.main([*words, "--reward.max_tokens", "64", "--cost.max_tokens", "64"]) == 0
    (line,) = [line for line in caplog.messages if "one copy of the weights" in line]
    assert "the critic of reward, the critic of cost have frozen" in line
    assert len(metrics(tmp_path / "out")) == 2
