"""Rollouts by vLLM, in the trainer's own processes.

Before each step the policy's weights are handed over as vLLM would read them from files, a layer at a time: under
ZeRO-3 each is gathered, copied into the engine's own tensor, and released, so no second model is ever on the host. What
vLLM then computes is verified, at the start and once the weights have moved (`hand_over.py`). Between steps the engine
sleeps: on CUDA it gives its weights and its cache back.

Of a policy with LoRA adapters the merged weights are handed over, formed a layer at a time; or the adapter alone, in
memory, beside base weights that the engine was given at the start and keeps, on the host while it sleeps.

Its log-probabilities differ from the trainer's by the kernels' rounding; each step logs by how much (`sampler_gap`).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from repo_fast.collectives import Ranks
from repo_fast.config import RolloutConfig
from repo_fast.errors import InputError
from repo_fast.models.lora import adapter_shape, adapter_state, base_one_by_one, merged_one_by_one, of_adapter
from repo_fast.rollout import Finished, Request, Rollout
from repo_fast.rollout.hand_over import as_in_files
from repo_fast.rollout.vllm import VllmEngine, verification

if TYPE_CHECKING:
    from repo_fast.engine import Engine

_SECTION = "rollout"


class VllmSampler:
    """A `Sampler` by vLLM. All ranks must make it.

    Args:
        path: The policy's folder or hub name; only its configuration is read. Its vocabulary may have grown since.
        policy: The policy, whose weights the engine is given.
        tokenizer: Its own.
        config: Sampling, and the engine's settings.
        ranks: This process among all; the process group is open.
        dtype: Of weights and activations.
        longest: Tokens of a prompt and its response at most.
        seed: Of the engine. Each response has a seed of its own.
        pad_is_new: Whether the pad token was added for this run, and must not be drawn.

    Raises:
        InputError: vLLM is not installed, cannot run the model, or does not compute what the policy does.
    """

    def __init__(
        self,
        path: str,
        policy: "Engine",
        tokenizer: PreTrainedTokenizerBase,
        config: RolloutConfig,
        ranks: Ranks,
        *,
        dtype: torch.dtype,
        longest: int,
        seed: int,
        pad_is_new: bool,
    ) -> None:
        model = policy.module.model
        tied = _is_tied(model)
        self._ranks = ranks
        self._sleeps = config.vllm.sleep and ranks.device.type == "cuda"
        self._left_out: str | None = None
        self._adapter_alone = config.vllm.lora == "adapter"
        self._base_is_there = False
        self._engine = VllmEngine(
            path,
            tokenizer,
            config,
            ranks,
            _SECTION,
            dtype=dtype,
            longest=longest,
            seed=seed,
            tied=tied,
            vocabulary=model.config.get_text_config().vocab_size,
            pad_is_new=pad_is_new,
            adapter=adapter_shape(policy.module) if self._adapter_alone else None,
            sleeps=self._sleeps,
        )
        self._verify = verification(path, tokenizer, ranks, _SECTION, dtype=dtype, longest=longest)
        self._sleep()
        try:
            self._engine.check_own_model()
            if tied and not self._engine.has_head():
                # Its files do not have the head either, and its loader takes a name that it does not know for an error.
                self._left_out = _head_weight(policy.module)
            self._start(policy)
        except InputError:
            self.close()
            raise

    def _start(self, policy: "Engine") -> None:
        """Make sure that the engine can draw from the policy. Raises `InputError`."""
        try:
            self._wake(policy)
        except InputError:
            raise
        except Exception as error:
            raise self._engine.cannot_run(error) from error
        self._sleep()

    def draw(
        self, policy: "Engine", requests: Sequence[Request], seeds: Sequence[int], finished: Finished | None = None
    ) -> Rollout:
        self._wake(policy)
        # The first time at the start does not count: a checkpoint may have been loaded after it.
        self._base_is_there = True
        with self._ranks.together("generation"):
            rollout = self._engine.draw(requests, seeds, finished)
        self._sleep()
        return rollout

    def close(self) -> None:
        self._engine.close()

    def _sleep(self) -> None:
        if self._sleeps:
            self._engine.sleep()

    def _wake(self, policy: "Engine") -> None:
        """Make the engine ready to draw from the policy as it is now."""
        if self._sleeps:
            self._engine.wake("weights")
        self._hand_over(policy)
        with self._ranks.together("making room for vLLM's cache"):
            if self._sleeps:
                self._engine.wake("kv_cache")
        self._verify(policy, self._engine.log_probs)

    def _hand_over(self, policy: "Engine") -> None:
        """Copy the policy's weights into the engine's."""
        if not (self._adapter_alone and self._base_is_there):
            self._hand_over_all(policy)
        if self._adapter_alone:
            # Of all ranks together, for a share of it is nothing that an engine can be given.
            adapter = adapter_state(policy.module, dict(policy.weights_one_by_one(of_adapter)))
            with self._ranks.together("handing the adapter to vLLM"):
                self._engine.adapt(adapter)

    def _hand_over_all(self, policy: "Engine") -> None:
        """The weights of a model without adapters: merged, or those that an adapter stands beside."""
        weights = policy.weights_one_by_one()
        plain = (base_one_by_one if self._adapter_alone else merged_one_by_one)(policy.module, weights)
        handed = ((name.removeprefix("model."), weight) for name, weight in plain if name != self._left_out)
        named = as_in_files(policy.module.model, handed)
        with self._ranks.together("handing the weights to vLLM"):
            try:
                self._engine.load(named)
            finally:
                # Where this rank fails, the others still gather.
                for _ in weights:
                    pass


def _is_tied(model: Any) -> bool:
    """Whether a transformers model's head is its embedding."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _head_weight(policy: Any) -> str:
    """Name of the head's weight among the parameters of a policy."""
    head = policy.model.get_output_embeddings()
    return next(f"{name}.weight" for name, module in policy.named_modules() if module is head)
