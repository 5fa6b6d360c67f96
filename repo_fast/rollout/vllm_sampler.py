"""Rollouts by vLLM, in the trainer's own processes and on its devices.

Before each step the policy's weights are handed over as vLLM would read them from files, a layer at a time: under
ZeRO-3 each is gathered, copied into the engine's own tensor, and released, so no second model is ever on the host. What
vLLM then computes is verified, at the start and once the weights have moved (`hand_over.py`).

vLLM draws with its paged cache and continuous batching, in which a response that ends makes room at once; `hf` keeps
computing for the longest of a batch. Between steps the engine sleeps: on CUDA it gives its weights and its cache back.

The sampler's log-probabilities are those of the distribution that was drawn from, temperature and top-p applied. They
differ from the trainer's by the kernels' rounding; each step logs by how much (`sampler_gap`).
"""

import importlib.util
import logging
import os
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from repo_fast.collectives import Ranks
from repo_fast.config import RolloutConfig
from repo_fast.errors import InputError
from repo_fast.models.model_config import load_config
from repo_fast.models.vocabulary import never_drawn
from repo_fast.rollout import Finished, Request, Rollout
from repo_fast.rollout.hand_over import Verification, as_in_files, fixed_tokens
from repo_fast.rollout.hf import end_tokens, generation_settings

if TYPE_CHECKING:
    from repo_fast.engine import Engine

# Read when vLLM is imported. Its engine then runs in this process, which the weights are in.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
_INSTEAD = "choose --rollout.engine hf"


class VllmSampler:
    """A `Sampler` by vLLM. All ranks must make it.

    Args:
        path: The policy's folder or hub name; only its configuration is read.
        policy: The policy, whose weights the engine is given.
        tokenizer: Its own.
        config: Sampling, and the engine's settings.
        ranks: This process among all; the process group is open.
        dtype: Of weights and activations.
        longest: Tokens of a prompt and its response at most.
        seed: Of the engine. Each response has a seed of its own, from torch's global random state.

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

        self._tokenizer, self._config, self._ranks = tokenizer, config, ranks
        self._sleeps = config.vllm.sleep and ranks.device.type == "cuda"
        self._left_out: str | None = None
        self._parameters = vllm.SamplingParams
        self._ends = end_tokens(generation_settings(path), tokenizer)
        vocabulary = load_config(path).vocab_size
        never = set(never_drawn(vocabulary, tokenizer, self._ends))
        self._allowed = [token for token in range(vocabulary) if token not in never] if never else None
        # Of which one can be compared.
        longest = max(longest, 3)
        special = never.union(self._ends, tokenizer.all_special_ids)
        self._verify = Verification(
            "vLLM",
            path,
            fixed_tokens(tokenizer, [token for token in range(vocabulary) if token not in special]),
            start=tokenizer.bos_token_id,
            longest=longest - 1,
            dtype=dtype,
            ranks=ranks,
        )
        logging.getLogger("vllm").setLevel(logging.WARNING)
        with ranks.together("the start of vLLM"):
            try:
                self._engine = vllm.LLM(
                    model=path,
                    # The weights come from the trainer.
                    load_format="dummy",
                    # A head in the files makes vLLM doubt it.
                    hf_overrides={"tie_word_embeddings": _is_tied(policy.module.model)},
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
            except Exception as error:
                raise _cannot_run(path, error) from error
        self._sleep()
        try:
            self._start(path, policy)
        except InputError:
            self.close()
            raise

    def _start(self, path: str, policy: "Engine") -> None:
        """Make sure that the engine can draw from the policy. Raises `InputError`."""
        kind = self._engine.collective_rpc(lambda worker: type(worker.get_model()))[0]
        if ".transformers." in f"{kind.__module__}.":
            # vLLM decorates transformers' own class for itself, and the trainer's models of that class fail.
            raise InputError(
                f"vLLM has no model of its own for the {type(policy.module.model).__name__} {path!r}; {_INSTEAD}"
            )
        if _is_tied(policy.module.model) and not all(self._engine.collective_rpc(_has_head)):
            # Its files do not have the head either, and its loader takes a name that it does not know for an error.
            self._left_out = _head_weight(policy.module)
        try:
            self._wake(policy)
        except InputError:
            raise
        except Exception as error:
            raise _cannot_run(path, error) from error
        self._sleep()

    def draw(self, policy: "Engine", requests: Sequence[Request], finished: Finished | None = None) -> Rollout:
        self._wake(policy)
        with self._ranks.together("generation"):
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

    def _wake(self, policy: "Engine") -> None:
        """Make the engine ready to draw from the policy as it is now."""
        if self._sleeps:
            self._engine.wake_up(tags=["weights"])
        self._hand_over(policy)
        with self._ranks.together("making room for vLLM's cache"):
            if self._sleeps:
                self._engine.wake_up(tags=["kv_cache"])
        self._verify(policy, self._log_probs)

    def _hand_over(self, policy: "Engine") -> None:
        """Copy the policy's weights into the engine's."""
        weights = policy.weights_one_by_one()
        handed = ((name.removeprefix("model."), weight) for name, weight in weights if name != self._left_out)
        named = as_in_files(policy.module.model, handed)
        with self._ranks.together("handing the weights to vLLM"):
            try:
                self._engine.collective_rpc(_load, args=(named,))
                # Of the weights before.
                self._engine.reset_prefix_cache()
            finally:
                # Where this rank fails, the others still gather.
                for _ in weights:
                    pass

    def _log_probs(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """As `Verification` asks for them. The ranks of an engine all ask for the same."""
        outputs = self._engine.generate(
            [{"prompt_token_ids": row.tolist()} for row in rows],
            self._parameters(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False),
            use_tqdm=False,
        )
        return torch.tensor(
            [
                at[token].logprob
                for row, output in zip(rows, outputs, strict=True)
                for at, token in zip(output.prompt_logprobs[1:], row.tolist()[1:], strict=True)
            ]
        )

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


def _cannot_run(path: str, error: Exception) -> InputError:
    """What vLLM raises of models and weights that it does not know has many types, and few say what they are about."""
    problem = textwrap.shorten(f"{type(error).__name__}: {error}", 400)
    return InputError(f"vLLM cannot run {path!r} ({problem}); {_INSTEAD}")


def _is_tied(model: Any) -> bool:
    """Whether a transformers model's head is its embedding."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _head_weight(policy: Any) -> str:
    """Name of the head's weight among the parameters of a policy."""
    head = policy.model.get_output_embeddings()
    return next(f"{name}.weight" for name, module in policy.named_modules() if module is head)


def _has_head(worker: Any) -> bool:
    """Whether the model of vLLM's worker has a head beside its embedding, tied or not."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return any(isinstance(module, ParallelLMHead) for module in worker.get_model().modules())


def _load(worker: Any, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Load weights named as in files into the model of vLLM's worker, packed as its kernels want them."""
    from vllm.platforms import current_platform

    kernels = {}
    if current_platform.is_cpu():
        # vLLM packs experts when it makes their kernel, and by nothing after: it is made anew.
        methods = [getattr(module, "quant_method", None) for module in worker.get_model().modules()]
        kernels = {method: method.moe_kernel for method in methods if getattr(method, "moe_kernel", None) is not None}
        for method in kernels:
            method.moe_kernel = None
    worker.reload_weights(weights_iterator=weights)
    for method, kernel in kernels.items():
        if method.moe_kernel is None:
            # It has been given nothing, which the verification will find.
            method.moe_kernel = kernel
