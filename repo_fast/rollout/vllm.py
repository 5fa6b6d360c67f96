"""vLLM in the processes of a job, and on their devices: how it is started, given weights, and drawn with.

It draws with its paged cache and continuous batching, in which a response that ends makes room at once, and a prompt is
computed once for all its responses; `hf` keeps computing for the longest of a batch. The ranks that share an engine
(`tensor_parallel`) all ask for the same, and each keeps its own.

The log-probabilities of what it draws are those of the distribution that was drawn from, temperature and top-p applied.
"""

import contextlib
import importlib.metadata
import importlib.util
import logging
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import PreTrainedTokenizerBase

from repo_fast.collectives import Ranks
from repo_fast.config import SamplingConfig
from repo_fast.errors import InputError
from repo_fast.models.lora import AdapterShape
from repo_fast.models.model_config import load_config
from repo_fast.models.vocabulary import never_drawn
from repo_fast.rollout import Finished, Request, Rollout
from repo_fast.rollout.hand_over import Verification, fixed_tokens
from repo_fast.rollout.hf import end_tokens, generation_settings

# Read when vLLM is imported. Its engine then runs in this process, which the weights are in.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}

# What vLLM tells adapters by; there is one at most.
_ADAPTER_NAME, _ADAPTER_ID = "policy", 1


class VllmEngine:
    """One engine, on one rank or shared by several. All ranks must make it.

    Args:
        path: The model's folder or hub name.
        tokenizer: Its own.
        config: Sampling, and the engine's settings.
        ranks: This process among all; the process group is open.
        section: The section of the configuration that it was asked for in, for messages.
        dtype: Of weights and activations.
        longest: Tokens of a prompt and its response at most.
        seed: Of the engine. Each response has a seed of its own.
        tied: Of weights that `load` will give it, whether their head is the embedding. None: it reads the files.
        vocabulary: Of those weights, the number of rows. None: as the files say.
        pad_is_new: Whether the pad token was added for this run, and must not be drawn.
        adapter: That of the LoRA adapter that `adapt` will give it, and that it draws with. None: there is none.
        sleeps: Whether it can give its memory back for a while.

    Raises:
        InputError: vLLM is not installed, or cannot run the model, or no adapter of this rank.
    """

    def __init__(
        self,
        path: str,
        tokenizer: PreTrainedTokenizerBase,
        config: SamplingConfig,
        ranks: Ranks,
        section: str,
        *,
        dtype: torch.dtype,
        longest: int,
        seed: int,
        tied: bool | None = None,
        vocabulary: int | None = None,
        pad_is_new: bool = False,
        adapter: AdapterShape | None = None,
        sleeps: bool = False,
    ) -> None:
        check_installed(section)
        parallel = config.vllm.tensor_parallel
        if ranks.size % parallel:
            raise InputError(
                f"{section}.vllm.tensor_parallel is {parallel} on {ranks.size} ranks, expected a divisor of that number"
            )
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import vllm
        from vllm.lora.request import LoRARequest

        self._path, self._tokenizer, self._config, self._ranks = path, tokenizer, config, ranks
        self._instead = f"choose --{section}.engine hf"
        self._parameters = vllm.SamplingParams
        rows = load_config(path).vocab_size if vocabulary is None else vocabulary
        self._ends, never = _ends_and_never(path, tokenizer, rows, pad=pad_is_new)
        self._allowed = [token for token in range(rows) if token not in never] if never else None
        # What it holds is in memory: nothing is read from the path, which has only to be one.
        self._request = None if adapter is None else LoRARequest(_ADAPTER_NAME, _ADAPTER_ID, "/in/memory")
        self._adapter, self._sleep_level = adapter, 2 if adapter is None else 1
        given: dict[str, Any] = {}
        if tied is not None:
            # A head in the files of an embedding that is tied makes vLLM doubt it.
            overrides: dict[str, Any] = {"tie_word_embeddings": tied}
            if rows != load_config(path).vocab_size:
                overrides["vocab_size"] = rows
            given = {"load_format": "dummy", "hf_overrides": overrides}
        if adapter is not None:
            given |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _room_for(adapter.rank)}
            # Head and embedding have none, and the others compute faster without room for one.
            given["lora_target_modules"] = list(adapter.targets)
        logging.getLogger("vllm").setLevel(logging.WARNING)
        if ranks.device.type == "cpu":
            # What a part of a prompt draws is thrown away, and the random numbers for it are taken back: on a CPU they
            # cannot be, and vLLM ends there. It warns of doing without parts, as untested.
            given["enable_chunked_prefill"] = False
            logging.getLogger("vllm.engine.arg_utils").setLevel(logging.ERROR)
            if parallel > 1:
                # The memory that ranks share has a fixed name: what a run before left would be in the way.
                for left in Path("/dev/shm").glob("*-cpushm_*"):
                    with contextlib.suppress(OSError):
                        left.unlink()
                ranks.barrier()
        # On a CPU it writes its own over the launcher's, and others read that.
        local_ranks = os.environ.get("LOCAL_WORLD_SIZE")
        with ranks.together("the start of vLLM"):
            try:
                self._engine = vllm.LLM(
                    model=path,
                    **given,
                    dtype=str(dtype).removeprefix("torch."),
                    max_model_len=_longest(longest),
                    tensor_parallel_size=parallel,
                    # Of torchrun's ranks, beside the trainer's process group.
                    distributed_executor_backend="external_launcher",
                    gpu_memory_utilization=config.vllm.memory_share,
                    enable_sleep_mode=sleeps,
                    enforce_eager=not config.vllm.compile,
                    logprobs_mode="processed_logprobs",
                    seed=seed + ranks.rank // parallel,
                    disable_log_stats=True,
                )
            except Exception as error:
                raise self.cannot_run(error) from error
            finally:
                if local_ranks is not None:
                    os.environ["LOCAL_WORLD_SIZE"] = local_ranks

    def check_own_model(self) -> None:
        """Raise `InputError` where vLLM computes with transformers' class of the model: it decorates that for itself,
        and other models of the class fail in this process."""
        kind = self._engine.collective_rpc(lambda worker: type(worker.get_model()))[0]
        if ".transformers." in f"{kind.__module__}.":
            architecture = (load_config(self._path).architectures or ["model"])[0]
            raise InputError(f"vLLM has no model of its own for the {architecture} {self._path!r}; {self._instead}")

    def cannot_run(self, error: Exception) -> InputError:
        """What vLLM raises of models and weights that it does not know has many types, and few say what of."""
        problem = textwrap.shorten(f"{type(error).__name__}: {error}", 400)
        return InputError(f"vLLM cannot run {self._path!r} ({problem}); {self._instead}")

    def close(self) -> None:
        """Keep vLLM from tearing the trainer's process group down when it goes, or from failing where it is closed."""
        finalizer = getattr(self._engine.llm_engine.engine_core, "_finalizer", None)
        if finalizer is not None:
            finalizer.detach()

    # ---------------------------------------------------------------------------------------------------- weights

    def sleep(self) -> None:
        """Give weights and cache back.

        The weights go, and are handed over anew; but those that an adapter stands beside are handed over once, and wait
        on the host.
        """
        self._engine.sleep(level=self._sleep_level)

    def wake(self, part: str) -> None:
        """Make room for the `weights` or the `kv_cache` again."""
        self._engine.wake_up(tags=[part])

    def has_head(self) -> bool:
        """Whether its model has a head beside its embedding, tied or not."""
        return all(self._engine.collective_rpc(_has_head))

    def load(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Take over weights, named and shaped as in the model's files, and forget what was computed with others."""
        self._engine.collective_rpc(_load, args=(weights,))
        self._engine.reset_prefix_cache()

    def adapt(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace the adapter, and forget what was computed with the one before. After `load`, which drops it.

        Args:
            tensors: Its weights as in peft's files, whole, on any device; left as they are.

        Raises:
            InputError: The engine's model lacks a layer that has an adapter.
        """
        assert self._adapter is not None
        missing = self._engine.collective_rpc(_adapt, args=(tensors, self._adapter))[0]
        if missing:
            raise InputError(
                f"vLLM has no layer {missing[0]!r} for an adapter in its model of {self._path!r} "
                f"({len(missing)} such in all); choose --rollout.vllm.lora merged"
            )
        # Its cache tells adapters by their name alone.
        self._engine.reset_prefix_cache()

    def log_probs(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """As `Verification` asks for them. The ranks of an engine all ask for the same."""
        outputs = self._engine.generate(
            [{"prompt_token_ids": row.tolist()} for row in rows],
            self._parameters(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False),
            lora_request=self._request,
            use_tqdm=False,
        )
        return torch.tensor(
            [
                at[token].logprob
                for row, output in zip(rows, outputs, strict=True)
                for at, token in zip(output.prompt_logprobs[1:], row.tolist()[1:], strict=True)
            ]
        )

    # ---------------------------------------------------------------------------------------------------- drawing

    def draw(self, requests: Sequence[Request], seeds: Sequence[int], finished: Finished | None = None) -> Rollout:
        """One response for each of this rank's requests, in their order; may be none.

        The ranks of an engine must all call it.

        Args:
            requests: What is asked for. The responses to a prompt share it where they follow each other.
            seeds: Of each response, below 2^32.
            finished: Called on this rank as responses become known, each of them once.
        """
        config = self._config
        seeded = list(zip(requests, seeds, strict=True))
        parallel = config.vllm.tensor_parallel
        if parallel == 1:
            shared, first = seeded, 0
        else:
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
            lora_request=self._request,
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


def check_installed(section: str) -> None:
    """Raise `InputError` where there is no vLLM.

    Args:
        section: The section of the configuration that asks for it.
    """
    if importlib.util.find_spec("vllm") is None:
        raise InputError(f"{section}.engine is 'vllm', which is not installed: expected pip install repo_fast[vllm]")


def version() -> str:
    """Of the vLLM that is installed."""
    return importlib.metadata.version(importlib.metadata.packages_distributions()["vllm"][0])


def verification(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    ranks: Ranks,
    section: str,
    *,
    dtype: torch.dtype,
    longest: int,
) -> Verification:
    """What makes sure that an engine computes what the model does, of tokens that it reads; arguments as of the engine.

    Needs no vLLM.
    """
    rows = load_config(path).vocab_size
    ends, never = _ends_and_never(path, tokenizer, rows)
    special = never.union(ends, tokenizer.all_special_ids)
    ordinary = [token for token in range(rows) if token not in special]
    return Verification(
        "vLLM",
        path,
        fixed_tokens(tokenizer, ordinary),
        start=tokenizer.bos_token_id,
        longest=_longest(longest) - 1,
        dtype=dtype,
        ranks=ranks,
        instead=f"choose --{section}.engine hf",
    )


def _room_for(rank: int) -> int:
    """The least of the LoRA ranks that vLLM has kernels for."""
    from vllm.config.lora import MaxLoRARanks

    ranks = sorted(get_args(MaxLoRARanks))
    if rank > ranks[-1]:
        raise InputError(
            f"policy.lora.rank is {rank} with rollout.vllm.lora 'adapter', expected at most {ranks[-1]}, which is "
            "vLLM's largest; choose --rollout.vllm.lora merged"
        )
    return next(room for room in ranks if room >= rank)


def _longest(longest: int) -> int:
    """Of three tokens, one can be compared."""
    return max(longest, 3)


def _ends_and_never(
    path: str, tokenizer: PreTrainedTokenizerBase, rows: int, *, pad: bool = False
) -> tuple[list[int], set[int]]:
    """The tokens that end a response, and those among so many rows that are never drawn, the pad token too if asked."""
    ends = end_tokens(generation_settings(path), tokenizer)
    return ends, set(never_drawn(rows, tokenizer, ends, pad=pad))


def _has_head(worker: Any) -> bool:
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


def _adapt(worker: Any, tensors: Mapping[str, torch.Tensor], adapter: AdapterShape) -> list[str]:
    """Put an adapter into vLLM's worker, in place of the one before; returns its layers that the model lacks."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    manager = worker.model_runner.lora_manager
    adapters = manager._adapter_manager
    mapper = getattr(worker.get_model(), "hf_to_vllm_mapper", None)
    made = LoRAModel.from_lora_tensors(
        _ADAPTER_ID,
        # vLLM multiplies B by the scaling where it stands.
        {name: value.clone() for name, value in tensors.items()},
        PEFTHelper(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(adapter.targets)),
        device=str(next(iter(tensors.values())).device),
        dtype=manager.lora_config.lora_dtype,
        model_vocab_size=manager.vocab_size,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
    )
    # It leaves out what it finds no layer for, and says nothing.
    layers = set(adapters.modules).union(*adapters.packed_modules.values())
    missing = sorted(made.loras.keys() - layers)
    if not missing:
        adapters.remove_adapter(_ADAPTER_ID)
        adapters.add_adapter(made)
        adapters.activate_adapter(_ADAPTER_ID)
    return missing
