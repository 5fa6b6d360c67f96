"""What draws responses of a policy from its files: Hugging Face `generate`, or vLLM.

Both draw the same units; the tokens of one are not those of the other, which the cache keeps apart. vLLM draws several
units at once, so that room is made as responses end, and a prompt is computed once for all its responses among them.
Within them what is drawn beside a response may move its logits by rounding, as it does not with `generate`.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from repo_fast.collectives import Ranks
from repo_fast.config import EvaluateConfig
from repo_fast.evaluation.inputs import PolicyInput
from repo_fast.models.attention import attention_candidates
from repo_fast.models.policy import Policy
from repo_fast.models.vocabulary import never_drawn
from repo_fast.rollout import Rollout
from repo_fast.rollout.hand_over import policy_log_probs
from repo_fast.rollout.hf import end_tokens, generate
from repo_fast.rollout.units import Unit, grouped

# Responses that vLLM is asked for at once, on a rank; at least, for units are not cut.
_VLLM_AT_ONCE = 1024
_CPU = torch.device("cpu")


class Drawer(Protocol):
    """Draws from one policy."""

    def grouped(self, units: Sequence[Unit]) -> list[list[Unit]]:
        """The units that a rank draws at once, in order."""
        ...

    def draw(self, units: Sequence[Unit]) -> list[Rollout]:
        """The responses of each unit; none may be asked for. All ranks must call it, together."""
        ...

    def close(self) -> None:
        """Let go of the policy."""
        ...


def open_drawer(config: EvaluateConfig, policy: PolicyInput, ranks: Ranks, loading: dict[str, Any]) -> Drawer:
    """What the configuration asks for, with the policy loaded. All ranks must call it.

    Args:
        config: The resolved configuration.
        policy: Whom to draw from.
        ranks: This process among all.
        loading: dtype and attention implementations, as `loading_options` gives them.
    """
    return (_Vllm if config.sampling.engine == "vllm" else _HuggingFace)(config, policy, ranks, loading)


class _HuggingFace:
    def __init__(self, config: EvaluateConfig, policy: PolicyInput, ranks: Ranks, loading: dict[str, Any]) -> None:
        self._sampling, self._tokenizer, self._ranks = config.sampling, policy.tokenizer, ranks
        with ranks.together("loading a policy"):
            self._model = Policy.from_pretrained(policy.path, **loading).model.to(ranks.device)
        ends = end_tokens(self._model.generation_config, policy.tokenizer)
        self._never = never_drawn(self._model.config.vocab_size, policy.tokenizer, ends)

    def grouped(self, units: Sequence[Unit]) -> list[list[Unit]]:
        return [[unit] for unit in units]

    def draw(self, units: Sequence[Unit]) -> list[Rollout]:
        rollouts = []
        with self._ranks.together("generation"):
            for unit in units:
                options = self._sampling, self._ranks.device, self._never
                rollouts.append(generate(self._model, self._tokenizer, unit.requests, unit.seeds, *options))
        return rollouts

    def close(self) -> None:
        del self._model


class _Vllm:
    def __init__(self, config: EvaluateConfig, policy: PolicyInput, ranks: Ranks, loading: dict[str, Any]) -> None:
        from repo_fast.rollout.vllm import VllmEngine, verification

        self._ranks, parallel, dtype = ranks, config.sampling.vllm.tensor_parallel, loading["dtype"]
        longest = max(request.tokens.numel() for request in policy.requests) + config.sampling.max_new_tokens
        names = policy.path, policy.tokenizer
        check = verification(*names, ranks, "sampling", dtype=dtype, longest=longest)
        ours = None
        with ranks.together("loading a policy"):
            # Of an engine that several ranks share, by the first: on the host, for it is too large for one device.
            if ranks.rank % parallel == 0:
                device = ranks.device if parallel == 1 else _CPU
                candidates = loading["attention"] if parallel == 1 else attention_candidates("auto", _CPU, dtype)
                module = Policy.from_pretrained(policy.path, dtype=dtype, attention=candidates).to(device)
                ours = policy_log_probs(module, check.rows, device)
                del module
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        # On CUDA its memory is wanted for other models; elsewhere an engine keeps it as long as its process lives.
        self._sleeps = ranks.device.type == "cuda"
        self._engine = VllmEngine(
            *names,
            config.sampling,
            ranks,
            "sampling",
            dtype=dtype,
            longest=longest,
            seed=config.seed,
            sleeps=self._sleeps,
        )
        try:
            self._engine.check_own_model()
            check.check(ours, self._engine.log_probs)
        except BaseException:
            self.close()
            raise

    def grouped(self, units: Sequence[Unit]) -> list[list[Unit]]:
        return list(grouped(units, lambda unit: len(unit.requests), _VLLM_AT_ONCE))

    def draw(self, units: Sequence[Unit]) -> list[Rollout]:
        requests = [request for unit in units for request in unit.requests]
        seeds = [seed for unit in units for seed in unit.seeds]
        # A prompt's responses follow each other: it is still in the cache.
        order = sorted(range(len(requests)), key=lambda place: requests[place].prompt.id)
        with self._ranks.together("generation"):
            drawn = self._engine.draw([requests[place] for place in order], [seeds[place] for place in order])
        where = {place: number for number, place in enumerate(order)}
        ends = list(itertools.accumulate((len(unit.requests) for unit in units), initial=0))
        return [
            drawn.select([where[place] for place in range(first, last)]) for first, last in itertools.pairwise(ends)
        ]

    def close(self) -> None:
        if self._sleeps:
            self._engine.sleep()
        self._engine.close()
