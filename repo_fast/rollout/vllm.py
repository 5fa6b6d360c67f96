"""Rollouts by vLLM, in the trainer's own processes and on its devices.

Before each step the policy's weights are handed over parameter by parameter: under ZeRO-3 each is gathered, copied into
the engine's own tensor, and released, so no second model is ever on the host. vLLM then draws with its paged cache and
continuous batching, in which a response that ends makes room at once; `hf` keeps computing for the longest of a batch.
Between steps the engine sleeps: on CUDA it gives its weights and its cache back.

The sampler's log-probabilities are those of the distribution that was drawn from, temperature and top-p applied. They
differ from the trainer's by the kernels' rounding; each step logs by how much (`sampler_gap`).
"""

import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from repo_fast.collectives import Ranks
from repo_fast.config import RolloutConfig
from repo_fast.errors import InputError, first_line
from repo_fast.models.model_config import load_config
from repo_fast.models.vocabulary import never_drawn
from repo_fast.rollout import Finished, Request, Rollout
from repo_fast.rollout.hf import end_tokens

if TYPE_CHECKING:
    from repo_fast.engine import Engine

# Read when vLLM is imported. Its engine then runs in this process, which the weights are in.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}


class VllmSampler:
    """A `Sampler` by vLLM.

    Args:
        path: The policy's folder or hub name; only its configuration is read.
        tokenizer: Its own.
        config: Sampling, and the engine's settings.
        ranks: This process among all; the process group is open.
        dtype: Of weights and activations.
        longest: Tokens of a prompt and its response at most.
        seed: Of the engine. Each response has a seed of its own, from torch's global random state.

    Raises:
        InputError: vLLM is not installed, or cannot run the model.
    """

    def __init__(
        self,
        path: str,
        tokenizer: PreTrainedTokenizerBase,
        config: RolloutConfig,
        ranks: Ranks,
        *,
        dtype: torch.dtype,
        longest: int,
        seed: int,
    ) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise InputError("rollout.engine is 'vllm', which is not installed: expected pip install repo_fast[vllm]")
        parallel = config.vllm.tensor_parallel
        if ranks.size % parallel:
            raise InputError(
                f"rollout.vllm.tensor_parallel is {parallel} on {ranks.size} ranks, expected a divisor of that number"
            )
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import vllm

        self._tokenizer, self._config, self._ranks, self._dtype = tokenizer, config, ranks, dtype
        self._sleeps = config.vllm.sleep and ranks.device.type == "cuda"
        self._parameters = vllm.SamplingParams
        self._ends = end_tokens(_generation_settings(path), tokenizer)
        vocabulary = load_config(path).vocab_size
        never = set(never_drawn(vocabulary, tokenizer, self._ends))
        self._allowed = [token for token in range(vocabulary) if token not in never] if never else None
        logging.getLogger("vllm").setLevel(logging.WARNING)
        with ranks.together("the start of vLLM"):
            try:
                self._engine = vllm.LLM(
                    model=path,
                    # The weights come from the trainer.
                    load_format="dummy",
                    dtype=str(dtype).removeprefix("torch."),
                    max_model_len=longest,
                    tensor_parallel_size=parallel,
                    # Of torchrun's ranks, beside the trainer's process group.
                    distributed_executor_backend="external_launcher",
                    gpu_memory_utilization=config.vllm.memory_share,
                    enable_sleep_mode=self._sleeps,
                    enforce_eager=not config.vllm.compile,
                    logprobs_mode="processed_logprobs",
                    seed=seed + ranks.rank // parallel,
                    disable_log_stats=True,
                )
            except (ValueError, RuntimeError) as error:
                raise InputError(f"vLLM cannot run {path!r}: {first_line(error)}") from error
        self._sleep()

    def draw(self, policy: "Engine", requests: Sequence[Request], finished: Finished | None = None) -> Rollout:
        if self._sleeps:
            self._engine.wake_up(tags=["weights"])
        self._hand_over(policy.weights_one_by_one())
        with self._ranks.together("generation"):
            if self._sleeps:
                self._engine.wake_up(tags=["kv_cache"])
            rollout = self._generate(requests, finished)
        self._sleep()
        return rollout

    def close(self) -> None:
        """Keep vLLM from tearing the trainer's process group down when it goes, or from failing where it is closed."""
        finalizer = getattr(self._engine.llm_engine.engine_core, "_finalizer", None)
        if finalizer is not None:
            finalizer.detach()

    def _sleep(self) -> None:
        if self._sleeps:
            # At level 2 the weights go too, and are handed over anew.
            self._engine.sleep(level=2)

    def _hand_over(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Copy the policy's weights into the engine's."""
        named = ((name.removeprefix("model."), weight) for name, weight in weights)
        with self._ranks.together("handing the weights to vLLM"):
            try:
                self._engine.collective_rpc(lambda worker: worker.model_runner.reload_weights(weights_iterator=named))
                # Of the weights before.
                self._engine.reset_prefix_cache()
            finally:
                # Where this rank fails, the others still gather.
                for _ in weights:
                    pass

    def _generate(self, requests: Sequence[Request], finished: Finished | None) -> Rollout:
        config = self._config
        seeded = list(zip(requests, torch.randint(2**31, (len(requests),)).tolist(), strict=True))
        parallel = config.vllm.tensor_parallel
        if parallel == 1:
            shared, first = seeded, 0
        else:
            # The ranks of an engine all ask for the same, and each keeps its own.
            everyone = self._ranks.gather_list([seeded])
            group = range(self._ranks.rank // parallel * parallel, (self._ranks.rank // parallel + 1) * parallel)
            shared = [item for rank in group for item in everyone[rank]]
            first = sum(len(everyone[rank]) for rank in group if rank < self._ranks.rank)
        common: dict[str, Any] = {
            "temperature": config.temperature,
            "top_p": config.top_p,
            "max_tokens": config.max_new_tokens,
            "stop": list(config.stop) or None,
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "stop_token_ids": self._ends,
            "allowed_token_ids": self._allowed,
            # Of the drawn token alone.
            "logprobs": 0,
            "detokenize": bool(config.stop),
        }
        numbers = self._engine.enqueue(
            [{"prompt_token_ids": request.tokens.tolist()} for request, _ in shared],
            [self._parameters(seed=seed, **common) for _, seed in shared],
            use_tqdm=False,
        )
        # An output has the number of its request, without what enqueue makes it unique by.
        places = {number.partition("-")[0]: place - first for place, number in enumerate(numbers)}
        drawn: dict[int, Any] = {}
        texts: dict[int, str] = {}
        while self._engine.llm_engine.has_unfinished_requests():
            ended = {places[output.request_id]: output.outputs[0] for output in self._engine.llm_engine.step()}
            mine = {place: output for place, output in ended.items() if 0 <= place < len(requests)}
            drawn |= mine
            decoded = {
                place: self._tokenizer.decode(output.token_ids, skip_special_tokens=True)
                for place, output in mine.items()
            }
            texts |= decoded
            if finished is not None and decoded:
                finished(list(decoded), list(decoded.values()))
        outputs = [drawn[place] for place in range(len(requests))]
        tokens = [torch.tensor(output.token_ids, dtype=torch.int64) for output in outputs]
        return Rollout(
            prompt_ids=torch.tensor([request.prompt.id for request in requests], dtype=torch.int64),
            prompts=[request.prompt.text for request in requests],
            responses=[texts[place] for place in range(len(requests))],
            prompt_tokens=[request.tokens for request in requests],
            response_tokens=tokens,
            finished=torch.tensor([output.finish_reason == "stop" for output in outputs], dtype=torch.bool),
            sampler_log_probs=[
                torch.tensor([at[token].logprob for at, token in zip(output.logprobs, output.token_ids, strict=True)])
                for output in outputs
            ],
            dialogues=[request.prompt.asked for request in requests],
            # No padding.
            computed_positions=sum(
                request.tokens.numel() + response.numel() for request, response in zip(requests, tokens, strict=True)
            ),
        )


def _generation_settings(path: str) -> GenerationConfig:
    """Those of a model's folder, which may have none."""
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        return GenerationConfig()
