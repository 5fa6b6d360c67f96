"""The sections of a configuration: typed dataclasses whose field docstrings are the help text, unit and meaning.

Each job has its own configuration made of these: `train.py`, `sft.py`, `score.py` beside this file. A section that two
jobs share stands here once.
"""

import datetime
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from repo_fast.config.checks import check_finite, check_given, check_unused, require, require_at_least
from repo_fast.config.judge import RubricConfig, check_endpoint
from repo_fast.errors import InputError

# A value of a mapping that is not ours. Text first: as `Any`, the text "1" would become the number, "a: b" a mapping.
Plain = str | bool | int | float | list | dict | None
# Before the folder of a guard model, and the name of a judge's.
GUARD, JUDGE = "guard:", "judge:"
# vLLM's own lower limit of the temperature.
_VLLM_COLDEST = 0.01
# What a column of a data file may be.
COLUMN_ROLES = ("prompt", "response", "chosen", "rejected", "history", "system", "ignore")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) in the linear layers of a frozen model."""

    rank: int = 0
    """Rank of the adapters; 0 trains the model itself, without adapters."""
    alpha: float = 16.0
    """An adapter's output is scaled by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers that get one (q_proj, ...). Empty: all in the transformer layers."""


@dataclass(frozen=True)
class ModelConfig:
    """A model that is trained."""

    path: str = "world:tiny"
    """Hugging Face folder or hub name; `world:tiny`: the embedded policy, made on first use; `world:base`: the same
    model before any supervised stage."""
    trainable_layers: int | None = None
    """Train only this many last transformer layers, the final norm, and a score head (layers). Null trains all."""
    attention: Literal["auto", "packed", "sdpa", "eager", "flash_attention_2", "padded"] = "auto"
    """Attention implementation. `packed`: each sequence of a packed row by itself; `sdpa`, `eager`: the row under a
    mask; `padded`: each sequence a row of its own, slower and with more memory. `auto`: the first that is right for the
    architecture, found by trying: flash_attention_2 on CUDA where flash-attn is installed, then these in order."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    pad_token: str | None = None
    """Added to a tokenizer that has no pad token, and saved with it. Null: the tokenizer stays as it is."""
    quantize: Literal["nf4"] | None = None
    """`nf4`: the frozen model's linear layers are held in 4 bits (`pip install repo_fast[quantize]`), all but the head;
    needs `lora`. What is saved is the dequantised model with the adapters merged. Null: none are."""
    pad_vocabulary_to: int = 1
    """The vocabulary is padded to a multiple of this (tokens); the rows added are the mean of the others."""


@dataclass(frozen=True)
class CriticConfig:
    """The value models of `algorithm.advantage gae`."""

    shared_trunk: bool | None = None
    """One trunk with a head for each stream instead of a model for each. It starts from the reward stream's. Null: from
    two constraints on."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    quantize: Literal["nf4"] | None = None
    """As `policy.quantize`; needs `lora`."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = 1e-5
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after the warm-up, over all optimizer steps of `total_steps`."""
    warmup: float = 0.03
    """Share of the optimizer steps spent on linear warm-up, in [0, 1)."""
    weight_decay: float = 0.01
    """Decoupled weight decay; biases and norms are exempt."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates."""
    gradient_clip: float = 1.0
    """Largest gradient norm; 0 switches clipping off."""


@dataclass(frozen=True)
class EngineConfig:
    """DeepSpeed."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and activations. `auto`: bfloat16 on a GPU, float32 on CPU."""
    zero_stage: Literal[1, 2, 3] = 3
    """ZeRO stage: 1 shards optimizer states, 2 gradients too, 3 parameters too (frozen models' as well)."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory."""
    offload_parameters: bool = False
    """Keep parameters in host memory between uses (ZeRO stage 3)."""
    offload_frozen: bool = False
    """Keep the parameters of frozen models (reference, reward, cost) in host memory between uses (ZeRO stage 3)."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward instead of keeping them."""
    parameter_persistence_threshold: int = 10_000
    """ZeRO stage 3: parameters smaller than this stay on every rank (elements)."""
    share_base: bool | Literal["auto"] = "auto"
    """Frozen weights that models have alike, to the bit, are kept once (ZeRO stages 1 and 2). `auto`: where they are
    alike; `true`: a model whose base is unlike the policy's is an error, a merged score model's too; `false`: models
    are kept apart."""
    ops_backend: Literal["auto", "torch", "cpp", "triton"] = "auto"
    """Backend of `repo_fast.ops`."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state of the run is saved."""

    every: int = 100
    """Steps between checkpoints; the last step is always saved. 0: only the last."""
    keep: int = 2
    """Newest checkpoints kept; older ones go once a newer one is complete. 0: keep all."""
    background: bool = False
    """Write them while training goes on, from a copy in host memory: trained weights in float32 and AdamW's moments.
    The last one, and one that an evaluation or a stop waits for, is not; nor is any where host memory is short."""


@dataclass(frozen=True)
class LogConfig:
    """What is written down while training."""

    loggers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Besides `metrics.jsonl`, which is always written."""


@dataclass(frozen=True)
class VllmConfig:
    """vLLM in the same process, on the same devices."""

    memory_share: float = 0.9
    """Of the device's memory, for weights and cache while it draws; in (0, 1). On CPU the environment variable
    VLLM_CPU_KVCACHE_SPACE (GiB) says how large the cache is."""
    tensor_parallel: int = 1
    """Ranks that share one engine: neighbours, so that it divides the number of ranks. 1: each has its own."""
    compile: bool = True
    """Compile the model and capture CUDA graphs: faster, and a minute at the start."""


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn."""

    temperature: float = 1.0
    """Sampling temperature. In training, log-probabilities, and so the KL, are taken at it too."""
    top_p: float = 1.0
    """Nucleus mass kept when sampling, in (0, 1]. Below 1 the sampler and a trained policy differ; it is logged."""
    max_new_tokens: int = 256
    """Longest response (tokens)."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, besides the tokens that do. The string stays part of the response, which is then
    finished like others: score models read it with the end of a turn."""
    batch_size: int = 64
    """Responses generated at once on a rank (responses)."""
    engine: Literal["hf", "vllm"] = "hf"
    """What draws: `hf`, the policy's own module; or vLLM (`pip install repo_fast[vllm]`), which computes a prompt once
    for all its responses, and with `vllm.tensor_parallel` holds a policy that is too large for one device. It is
    verified: a mean gap of its log-probabilities to those of `transformers` above 0.001 nats in float32, or 0.1 in
    bfloat16, is an error. What one engine drew is never taken for what the other would."""
    vllm: VllmConfig = field(default_factory=VllmConfig)


@dataclass(frozen=True)
class GuardConfig:
    """How a guard model (`path guard:FOLDER`) is asked: the cost is log p(unsafe) - log p(safe) of its verdict."""

    preset: (
        Literal[
            "llama-guard-3",
            "qwen3guard",
            "qwen3guard-refusal",
            "shieldgemma",
            "wildguard",
            "wildguard-refusal",
            "granite-guardian",
            "granite-guardian-3.3",
        ]
        | None
    ) = None
    """Its family, and what is asked (`repo_fast/scoring/guard_presets.py`); what is written below takes the place of
    the preset's. None has been run on the published weights yet. Null: your own, with `safe` and `unsafe`."""
    prompt: str | None = None
    """What it is asked, {prompt} and {response} in it. Null: its chat template, of both as messages."""
    template_arguments: dict[str, Plain] = field(default_factory=dict)
    """Of its chat template, such as `guideline` (ShieldGemma) or `guardian_config` (Granite Guardian)."""
    prefix: str | None = None
    """What it writes before the verdict, as is. Of {yes|no} in it both are tried, and their probabilities count."""
    safe: tuple[str, ...] | None = None
    """Spellings of the verdict, a space before them included, that say safe."""
    unsafe: tuple[str, ...] | None = None
    """Spellings of the verdict that say unsafe."""
    category: str | None = None
    """Only harm of this kind: the code that stands first behind `unsafe`, on its own line, such as S1. Null: any."""
    categories: tuple[str, ...] | None = None
    """All codes that may stand there, so that S1 is not taken for the beginning of S10. Null: the preset's."""


@dataclass(frozen=True)
class ScorerConfig:
    """Where a score comes from."""

    path: str = ""
    """A Python callable `package.module:function` (`(prompts, responses) -> list[float]`), a score-model folder,
    `guard:FOLDER`, a guard model, or `judge:MODEL`, a judge behind an endpoint."""
    head: str | None = None
    """Of a score model with several outputs, the name of the one that is the score. Null: it has one."""
    quantize: Literal["nf4"] | None = None
    """`nf4`: the linear layers of a score model or guard are held in 4 bits (`pip install repo_fast[quantize]`), all
    but the head. Its scores are then others. Null: none are."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    judge: RubricConfig = field(default_factory=RubricConfig)
    template: Literal["auto", "chat", "safe-rlhf", "plain"] = "auto"
    """Template for score models whose tokenizer is not the policy's."""
    max_tokens: int = 2048
    """Longest text a score model is given (tokens)."""
    expect: tuple[str, float] | None = None
    """A whole text, template included, and the score that the model is known to give it: checked when it is loaded."""


@dataclass(frozen=True)
class JobConfig:
    """What every job has: where it writes, and what it draws from."""

    PROGRAM: ClassVar[str]
    FOLDER: ClassVar[str]
    DEFAULT: ClassVar[str | None] = "tiny"
    """The packaged configuration without `--config`; None: the defaults of the fields."""
    ALSO: ClassVar[Mapping[str, str]] = {}
    """What the job's command line takes beside its options, as it is typed, and what it does."""

    output_dir: str = "outputs/run"
    """Folder for everything the job writes."""
    seed: int = 0
    """Of sampling, data order and initialisation; each rank derives its own."""
    date: str | None = None
    """YYYY-MM-DD, the day that chat templates which write the current date (Llama 3) are to write, also a score
    model's. Null: that of the checkpoint resumed from, or of the earlier evaluation in `output_dir`; else today."""
    timeout: float = 7200.0
    """How long ranks wait for one that does not come before the run ends (seconds): longer than the slowest scorer may
    take. Where all compute alike, as in an update, 10 minutes at most, or as many as DEEPSPEED_TIMEOUT says."""

    def __post_init__(self) -> None:
        check_given(self)
        self.check()
        check_finite(self)

    def check(self) -> None:
        """Raise `InputError` for the first value, or combination of values, that cannot be honoured."""
        require(self.output_dir.strip() != "", "output_dir", self.output_dir, "a folder")
        require(0 <= self.seed < 2**32, "seed", self.seed, "a number from 0 to 4294967295")
        require(self.date is None or _is_day(self.date), "date", self.date, "a day as YYYY-MM-DD")
        # A year is longer than any wait, and what libraries can count.
        require(0 < self.timeout <= 31_536_000, "timeout", self.timeout, "seconds above 0, a year at most")


@dataclass(frozen=True)
class RunConfig(JobConfig):
    """What every job that trains has: when it stops, what it saves, how it computes."""

    resume: str | None = None
    """`auto`: go on from the newest complete checkpoint in `output_dir`, or start; or a checkpoint folder."""
    resume_changed_data: bool = False
    """Go on also where data files, or the folders of models, are no longer what the run started from."""
    stop_after: int | None = None
    """Stop with a checkpoint once this step is done (a step number of the whole run), leaving schedules alone."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def check(self) -> None:
        super().check()
        require_at_least(1, {"stop_after": self.stop_after})
        require_at_least(
            0,
            {
                "checkpoint.every": self.checkpoint.every,
                "checkpoint.keep": self.checkpoint.keep,
                "engine.parameter_persistence_threshold": self.engine.parameter_persistence_threshold,
            },
        )
        for name in ("offload_parameters", "offload_frozen"):
            if getattr(self.engine, name) and self.engine.zero_stage != 3:
                raise InputError(f"engine.{name} is true with engine.zero_stage {self.engine.zero_stage}, expected 3")


def _is_day(text: str) -> bool:
    try:
        # Other forms of the standard are read too.
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def check_sampling(key: str, sampling: SamplingConfig) -> None:
    """Raise `InputError` for a value of this section that cannot be."""
    require_at_least(1, {f"{key}.max_new_tokens": sampling.max_new_tokens, f"{key}.batch_size": sampling.batch_size})
    require(sampling.temperature > 0, f"{key}.temperature", sampling.temperature, "a number above 0")
    require(0 < sampling.top_p <= 1, f"{key}.top_p", sampling.top_p, "a number in (0, 1]")
    require("" not in sampling.stop, f"{key}.stop", list(sampling.stop), "texts that are not empty: one ends all")
    vllm = sampling.vllm
    if sampling.engine == "hf":
        check_unused(f"{key}.vllm", vllm, f"its default with {key}.engine 'hf'")
    coldest = _VLLM_COLDEST if sampling.engine == "vllm" else 0.0
    expected = f"at least {coldest} with {key}.engine 'vllm', which draws at that where less is asked for"
    require(sampling.temperature >= coldest, f"{key}.temperature", sampling.temperature, expected)
    require(0 < vllm.memory_share < 1, f"{key}.vllm.memory_share", vllm.memory_share, "a number in (0, 1)")
    require_at_least(1, {f"{key}.vllm.tensor_parallel": vllm.tensor_parallel})


def check_scorer(key: str, scorer: ScorerConfig) -> None:
    """Raise `InputError` for a value of this section that cannot be."""
    expected = "a callable `package.module:function`, a score-model folder, guard:FOLDER or judge:MODEL"
    require(scorer.path != "", f"{key}.path", scorer.path, expected)
    require_at_least(1, {f"{key}.max_tokens": scorer.max_tokens})
    for name in ("expect", "head"):
        if getattr(scorer, name) is not None and ":" in scorer.path:
            raise InputError(f"{key}.{name} is given with {scorer.path!r}, expected a score model")
    if scorer.quantize is not None and is_called(scorer.path):
        raise InputError(f"{key}.quantize is {scorer.quantize!r} with {scorer.path!r}, expected a score model or guard")
    _check_guard(f"{key}.guard", scorer)
    if not scorer.path.startswith(JUDGE):
        check_unused(f"{key}.judge", scorer.judge, f"its default with path {scorer.path!r}, which is no judge:MODEL")
        return
    require(scorer.path.removeprefix(JUDGE).strip() != "", f"{key}.path", scorer.path, "judge:MODEL")
    check_endpoint(f"{key}.judge", scorer.judge)
    require(scorer.judge.rubric.strip() != "", f"{key}.judge.rubric", scorer.judge.rubric, "what is rated, in words")


def is_called(path: str) -> bool:
    """Whether a scorer is called with texts, a function or a judge, and no model that computes here."""
    return ":" in path and not path.startswith(GUARD)


def _check_guard(key: str, scorer: ScorerConfig) -> None:
    guard = scorer.guard
    if not scorer.path.startswith(GUARD):
        check_unused(key, guard, f"its default with path {scorer.path!r}, which is no guard:FOLDER")
        return
    require(scorer.path != GUARD, key.removesuffix("guard") + "path", scorer.path, "guard:FOLDER")
    is_cost, path = key not in ("reward.guard", "evaluation.second_reward.guard"), key.removesuffix("guard") + "path"
    require(is_cost, path, scorer.path, "no guard: what it gives is a cost, higher is worse")
    require(scorer.template == "auto", key.removesuffix("guard") + "template", scorer.template, "auto with a guard")
    for name in ("safe", "unsafe"):
        words = getattr(guard, name)
        require(
            bool(words) or (words is None and guard.preset is not None), f"{key}.{name}", words, "words, or a preset"
        )
    if guard.category is not None and guard.preset is None:
        known = guard.categories or ()
        require(guard.category in known, f"{key}.category", guard.category, f"one of {key}.categories, {list(known)}")
    if guard.prompt is not None:
        for place in ("{prompt}", "{response}"):
            require(place in guard.prompt, f"{key}.prompt", guard.prompt, f"a text with {place} in it")
        require(not guard.template_arguments, f"{key}.template_arguments", guard.template_arguments, "none with prompt")


def check_optimizer(key: str, optimizer: OptimizerConfig) -> None:
    """Raise `InputError` for a value of this section that cannot be."""
    names = ("learning_rate", "weight_decay", "gradient_clip")
    require_at_least(0, {f"{key}.{name}": getattr(optimizer, name) for name in names})
    require(0 <= optimizer.warmup < 1, f"{key}.warmup", optimizer.warmup, "a share in [0, 1)")
    in_range = all(0 <= beta < 1 for beta in optimizer.betas)
    require(in_range, f"{key}.betas", optimizer.betas, "two numbers in [0, 1)")


def check_model(key: str, model: ModelConfig) -> None:
    """Raise `InputError` for a value of this section that cannot be."""
    require(model.path != "", f"{key}.path", model.path, "a Hugging Face folder or hub name")
    require_at_least(
        1, {f"{key}.trainable_layers": model.trainable_layers, f"{key}.pad_vocabulary_to": model.pad_vocabulary_to}
    )
    check_lora(f"{key}.lora", model.lora)
    check_quantize(key, model.quantize, model.lora)
    if model.lora.rank and model.trainable_layers is not None:
        raise InputError(
            f"{key}.trainable_layers is {model.trainable_layers} with {key}.lora.rank {model.lora.rank}, expected one "
            "of them: adapters train a frozen model"
        )


def check_lora(key: str, lora: LoraConfig) -> None:
    """Raise `InputError` for a value of this section that cannot be."""
    require_at_least(0, {f"{key}.rank": lora.rank})
    require(0 < lora.alpha < math.inf, f"{key}.alpha", lora.alpha, "a number above 0")
    if lora.rank:
        return
    for name, value, default in (("targets", list(lora.targets), []), ("alpha", lora.alpha, LoraConfig().alpha)):
        if value != default:
            raise InputError(f"{key}.{name} is {value} with {key}.rank 0, expected a rank of at least 1")


def check_quantize(key: str, quantize: str | None, lora: LoraConfig) -> None:
    """Raise `InputError` where a quantised model is to be trained itself."""
    if quantize is not None and not lora.rank:
        raise InputError(
            f"{key}.quantize is {quantize!r} with {key}.lora.rank 0, expected a rank of at least 1: 4-bit weights are "
            "not trained, adapters beside them are"
        )


def check_fields(key: str, fields: Mapping[str, str]) -> None:
    """Raise `InputError` for a column's role that there is not."""
    require(isinstance(fields, Mapping), key, fields, "columns with a role each")
    for column, role in fields.items():
        require(role in COLUMN_ROLES, f"{key}.{column}", role, f"one of {', '.join(COLUMN_ROLES)}")
