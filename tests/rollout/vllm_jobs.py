"""What `tests/rollout/test_vllm.py` runs on every rank of a torchrun.

    torchrun ... -m tests.rollout.vllm_jobs WORDS OF repo_fast.train

is the main job with an engine that fails on rank 1 in its second step, as `TEST_VLLM` says: `raise`, `kill`, or
`stale`, which keeps an old head. Without it, what the sampler said is compared with the trainer, and written to
`TEST_VLLM_OUT`.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from vllm.v1.engine.llm_engine import LLMEngine

from repo_fast.engine import Engine
from repo_fast.learning.learner import Learner
from repo_fast.rollout import vllm as engine
from repo_fast.rollout.vllm import VllmEngine
from repo_fast.rollout.vllm_sampler import VllmSampler
from repo_fast.train import main

RANK = os.environ["RANK"]


def fail_in_the_second_step() -> None:
    """When the rollout's first tokens are drawn."""
    draw, step = VllmEngine.draw, LLMEngine.step
    rollouts, tokens = 0, 0

    def counted(*args: Any) -> Any:
        nonlocal rollouts, tokens
        rollouts, tokens = rollouts + 1, 0
        return draw(*args)

    def failing(engine: LLMEngine) -> Any:
        nonlocal tokens
        tokens += 1
        if rollouts == 2 and tokens == 2 and RANK == "1":
            if os.environ["TEST_VLLM"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the paged cache has no page 7")
        return step(engine)

    VllmEngine.draw, LLMEngine.step = counted, failing


def keep_the_head_of_the_first_step() -> None:
    """Of the hand-overs, the first is at the start."""
    load, hand_overs = engine._load, 0

    def stale(worker: Any, weights: Any) -> None:
        nonlocal hand_overs
        hand_overs += 1
        if hand_overs > 2 and RANK == "1":
            weights = ((name, weight) for name, weight in weights if name != "lm_head.weight")
        load(worker, weights)

    engine._load = stale


def compare(found: dict[str, list]) -> None:
    """In each step: the largest gap between the sampler's and the trainer's log-probabilities, and unequal weights.

    Of each draw of an evaluation: the last step, the largest gap, and by how much the log-probabilities of that step's
    responses have moved since.
    """
    experience, hand_over, response_kl = Learner.experience, VllmSampler._hand_over, Learner.response_kl
    rollouts: list[Any] = []

    def compared_experience(self: Learner, rollout: Any, scores: Any) -> Any:
        result = experience(self, rollout, scores)
        gap = torch.cat(rollout.sampler_log_probs) - result[0].old_log_probs
        found["gaps"].append(float(gap.abs().max()))
        found["lengths"].append([tokens.numel() for tokens in rollout.response_tokens])
        found["finished"].append(rollout.finished.tolist())
        rollouts.append(rollout)
        return result

    def compared_response_kl(self: Learner, rollout: Any) -> Any:
        now, drawn = self.log_probs(self.models.policy, rollout), rollout.sampler_log_probs
        gap = float((now - torch.cat(drawn)).abs().max()) if drawn else 0.0
        moved = 0.0
        if rollouts:
            before = torch.cat(rollouts[-1].sampler_log_probs)
            moved = float((self.log_probs(self.models.policy, rollouts[-1]) - before).abs().mean())
        found["evaluated"].append((len(rollouts), gap, moved))
        return response_kl(self, rollout)

    def compared_hand_over(self: VllmSampler, policy: Engine) -> None:
        kept = {name.removeprefix("model."): weight.clone() for name, weight in policy.weights_one_by_one()}
        hand_over(self, policy)
        inside = self._engine._engine.collective_rpc(lambda worker: weights_of(worker.model_runner.model))[0]
        found["unequal"].append(unequal(kept, inside))

    Learner.experience, VllmSampler._hand_over = compared_experience, compared_hand_over
    Learner.response_kl = compared_response_kl


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The engine's weights. A linear layer's may be packed away on a CPU: the identity gives them back, bit for bit."""
    found = {}
    for name, module in model.named_modules():
        for part, value in module.named_parameters(recurse=False):
            if value.numel() == 0:
                value = module.quant_method.apply(module, torch.eye(module.input_size), None).T
            found[f"{name}.{part}"] = value
    return found


def unequal(kept: dict[str, torch.Tensor], inside: dict[str, torch.Tensor]) -> list[str]:
    """The trainer's weights that are not, bit for bit, in the engine, where some are joined and vocabularies padded."""
    joined = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    names = []
    for name, value in inside.items():
        whole, parts = next(((w, p) for w, p in joined.items() if w in name), ("", ()))
        sources = [name.replace(whole, part) for part in parts] or [name]
        expected = torch.cat([kept.pop(source) for source in sources])
        if not torch.equal(expected, value[: len(expected)]):
            names.append(name)
    return names + list(kept)


if __name__ == "__main__":
    found: dict[str, list] = {name: [] for name in ("gaps", "lengths", "finished", "unequal", "evaluated")}
    if os.environ.get("TEST_VLLM") == "stale":
        keep_the_head_of_the_first_step()
    elif "TEST_VLLM" in os.environ:
        fail_in_the_second_step()
    else:
        compare(found)
    status = main(sys.argv[1:])
    if "TEST_VLLM_OUT" in os.environ:
        Path(os.environ["TEST_VLLM_OUT"], f"rank-{RANK}.json").write_text(json.dumps(found))
    sys.exit(status)
