"""Every option of the trainer, once: typed dataclasses whose field docstrings are the help text, unit and meaning.

A run is a YAML file of these sections, chosen by name (`repo_fast/configs/`) or by path, with single values changed on
the command line: `--config tiny --rollout.temperature 0.8`. `parse` returns the resolved `TrainConfig` or raises
`InputError`; checks that need only the configuration are all made here, before anything is loaded.
"""

import dataclasses
import difflib
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from repo_fast.algorithm import ALGORITHMS
from repo_fast.errors import InputError

CONFIG_FOLDER = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class PolicyConfig:
    """The model that is trained, and the frozen copy of its start that serves as reference."""

    path: str = "world:tiny"
    """Hugging Face folder or hub name of a causal language model; `world:tiny`: the embedded one, made on first use."""
    trainable_layers: int | None = None
    """Train only this many last transformer layers and the final norm (layers). Null trains everything."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation. `auto`: flash_attention_2 on CUDA where flash-attn is installed, else sdpa."""


@dataclass(frozen=True)
class DataConfig:
    """Prompts to train on, prompts to evaluate on, and supervised text for the PTX loss."""

    prompts: str = "world:train"
    """Training prompts: a .jsonl, .json or .txt file, `world:train`, or a `datasets` hub name."""
    prompts_split: str = "train"
    """Split to read when `prompts` is a `datasets` name."""
    eval_prompts: str | None = "world:test"
    """Held-out prompts for the before/after table, in the same forms. Null: no evaluation."""
    eval_split: str = "test"
    """Split to read when `eval_prompts` is a `datasets` name."""
    template: Literal["auto", "chat", "safe-rlhf", "plain"] = "auto"
    """How a prompt is put to the policy. `auto`: the tokenizer's chat template, else Safe RLHF's."""
    max_prompt_tokens: int = 256
    """Longest templated prompt (tokens). Longer ones are dropped and counted."""
    ptx: str | None = None
    """Supervised demonstrations for the PTX loss: a file, `world:demonstrations`, or a `datasets` name."""
    ptx_split: str = "train"
    """Split to read when `ptx` is a `datasets` name."""
    ptx_max_tokens: int = 512
    """Longest demonstration, prompt and response together (tokens). Longer ones are dropped and counted."""


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are drawn."""

    prompts_per_step: int = 16
    """Prompts of one step (prompts, over all ranks)."""
    responses_per_prompt: int = 4
    """K, responses drawn for each prompt."""
    temperature: float = 1.0
    """Sampling temperature. The trainer's log-probabilities, and so the KL, are taken at it too."""
    top_p: float = 1.0
    """Nucleus mass kept when sampling, in (0, 1]. Below 1 the sampler and the trained policy differ; it is logged."""
    max_new_tokens: int = 256
    """Longest response (tokens)."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, besides the end-of-sequence token. The string stays part of the response."""
    batch_size: int = 64
    """Responses generated at once on a rank (responses)."""


@dataclass(frozen=True)
class ScorerConfig:
    """Where a score comes from."""

    path: str = ""
    """A Python callable `package.module:function` (`(prompts, responses) -> list[float]`), or a score-model folder."""
    template: Literal["auto", "chat", "safe-rlhf", "plain"] = "auto"
    """Template for score models whose tokenizer is not the policy's."""
    max_tokens: int = 2048
    """Longest text a score model is given (tokens)."""


@dataclass(frozen=True)
class AlgorithmConfig:
    """The objective (design: Peng et al. 2024, arXiv 2410.19933, and Safe RLHF, arXiv 2310.12773)."""

    name: Literal["repo", "ppo_lag", "hc_lag", "reward_shaping", "ppo"] = "repo"
    """Row of the algorithm table, which sets scope, rectification and surrogate."""
    scope: Literal["prompt", "response"] | None = None
    """`repo` only: whether the prompt's mean cost or each response's cost must be safe. Null: prompt."""
    surrogate: Literal["separate", "mixed"] | None = None
    """Clip reward and cost streams separately (RePO) or their weighted sum (Safe RLHF). Null: the algorithm's own."""
    advantage: Literal["gae", "rloo", "grpo"] = "gae"
    """Advantages: `gae` with critics, or critic-free `rloo` and `grpo` (K >= 2)."""
    threshold: float = 0.0
    """d: a cost above it is unsafe (units of the cost)."""
    margin: float = 0.0
    """m >= 0: training uses the threshold d - m, evaluation always d (units of the cost)."""
    multiplier_init: float = 1.0
    """lambda at the start, > 0."""
    multiplier_learning_rate: float = 0.1
    """eta of the multiplier's ascent in log space."""
    multiplier_max: float = 5.0
    """Largest lambda."""
    cost_window: int = 128
    """`ppo_lag`, `hc_lag`: costs, over all ranks, that the average constraint is estimated from (responses)."""
    confidence_z: float = 1.645
    """`hc_lag`: standard errors added to the mean cost."""
    shaping_weight: float = 1.0
    """`reward_shaping`: w of R - w C."""
    kl_coefficient: float = 0.01
    """beta of the KL penalty inside rewards and costs. Each stream carries the full beta, with opposite sign."""
    score_clamp: float = 50.0
    """Token rewards and costs (critic-free: the scores) are clamped to +- this."""
    gamma: float = 1.0
    """Discount of GAE per token."""
    gae_lambda: float = 0.95
    """lambda of GAE."""
    whiten: bool = False
    """Centre both advantage streams and divide both by one scale, that of their weighted sum."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - this."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + this."""
    value_clip: float = 5.0
    """A value's step from its old value is clipped to +- this in the critic loss."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus (nats a token)."""
    reduction: Literal["sequence_mean", "token_mean", "sum"] = "sequence_mean"
    """How token losses become one number; denominators are those of the whole global batch."""
    ptx_coefficient: float = 0.0
    """Weight of the supervised cross-entropy on `data.ptx` (token mean over the global batch)."""


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
class UpdateConfig:
    """How a rollout becomes optimizer steps."""

    epochs: int = 1
    """Passes over a rollout."""
    minibatches: int = 1
    """Optimizer steps in a pass; the rollout's responses are dealt over them anew in each pass."""
    micro_batch_tokens: int = 8192
    """Largest packed micro-batch on a rank, prompts included (tokens). A longer sequence gets one of its own."""
    ptx_batch_size: int = 16
    """Demonstrations joined to each optimizer step when there is a PTX loss (demonstrations, over all ranks)."""
    max_skipped_steps: int = 5
    """The run stops when this many optimizer steps in a row had a non-finite loss or gradient and were skipped."""


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
    activation_checkpointing: bool = False
    """Recompute activations in the backward instead of keeping them."""
    parameter_persistence_threshold: int = 10_000
    """ZeRO stage 3: parameters smaller than this stay on every rank (elements)."""
    ops_backend: Literal["auto", "torch", "cpp", "triton"] = "auto"
    """Backend of `repo_fast.ops`."""


@dataclass(frozen=True)
class EvaluationConfig:
    """The before/after table on `data.eval_prompts`."""

    samples_per_prompt: int = 4
    """Responses drawn for each held-out prompt."""
    prompts: int | None = None
    """Use only the first so many held-out prompts. Null: all."""
    well_formed: str | None = None
    """Python callable `package.module:function` (`(prompts, responses) -> list[bool]`) whose share is reported too."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state of the run is saved."""

    every: int = 100
    """Steps between checkpoints; the last step is always saved. 0: only the last."""
    keep: int = 2
    """Newest checkpoints kept; older ones go once a newer one is complete. 0: keep all."""


@dataclass(frozen=True)
class LogConfig:
    """What is written down while training."""

    loggers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Besides `metrics.jsonl`, which is always written."""
    samples_every: int = 10
    """Steps between dumps of all the step's responses to `samples.jsonl`; the first step is always dumped."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a policy with RePO, or with a baseline of its table, end to end."""

    output_dir: str = "outputs/train"
    """Folder for everything the run writes."""
    seed: int = 0
    """Of sampling, data order and initialisation; each rank derives its own."""
    total_steps: int = 60
    """Rollout-and-update steps of the whole run; schedules end there."""
    resume: str | None = None
    """`auto`: go on from the newest complete checkpoint in `output_dir`, or start; or a checkpoint folder."""
    stop_after: int | None = None
    """Stop with a checkpoint once this step is done (a step number of the whole run), leaving schedules alone."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: ScorerConfig = field(default_factory=ScorerConfig)
    cost: ScorerConfig = field(default_factory=ScorerConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    policy_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic_optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=5e-6, schedule="constant", warmup=0.0, weight_decay=0.0)
    )
    update: UpdateConfig = field(default_factory=UpdateConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        check(self)


def _require(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise InputError(f"{key} is {value!r}, expected {expected}")


def check(config: TrainConfig) -> None:
    """Raise `InputError` for the first value, or combination of values, that cannot be honoured."""
    rollout, algorithm, update, row = config.rollout, config.algorithm, config.update, ALGORITHMS[config.algorithm.name]
    positive = {
        "total_steps": config.total_steps,
        "rollout.prompts_per_step": rollout.prompts_per_step,
        "rollout.responses_per_prompt": rollout.responses_per_prompt,
        "rollout.max_new_tokens": rollout.max_new_tokens,
        "rollout.batch_size": rollout.batch_size,
        "data.max_prompt_tokens": config.data.max_prompt_tokens,
        "data.ptx_max_tokens": config.data.ptx_max_tokens,
        "reward.max_tokens": config.reward.max_tokens,
        "cost.max_tokens": config.cost.max_tokens,
        "algorithm.cost_window": algorithm.cost_window,
        "update.epochs": update.epochs,
        "update.minibatches": update.minibatches,
        "update.micro_batch_tokens": update.micro_batch_tokens,
        "update.ptx_batch_size": update.ptx_batch_size,
        "update.max_skipped_steps": update.max_skipped_steps,
        "evaluation.samples_per_prompt": config.evaluation.samples_per_prompt,
        "log.samples_every": config.log.samples_every,
    }
    optional = {
        "stop_after": config.stop_after,
        "policy.trainable_layers": config.policy.trainable_layers,
        "evaluation.prompts": config.evaluation.prompts,
    }
    for key, value in (positive | {key: value for key, value in optional.items() if value is not None}).items():
        _require(value >= 1, key, value, "a whole number of at least 1")
    not_negative = {
        "seed": config.seed,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
        "algorithm.margin": algorithm.margin,
        "algorithm.kl_coefficient": algorithm.kl_coefficient,
        "algorithm.multiplier_learning_rate": algorithm.multiplier_learning_rate,
        "algorithm.entropy_coefficient": algorithm.entropy_coefficient,
        "algorithm.ptx_coefficient": algorithm.ptx_coefficient,
        "algorithm.shaping_weight": algorithm.shaping_weight,
        "engine.parameter_persistence_threshold": config.engine.parameter_persistence_threshold,
    }
    for name, optimizer in (("policy", config.policy_optimizer), ("critic", config.critic_optimizer)):
        not_negative |= {
            f"{name}_optimizer.learning_rate": optimizer.learning_rate,
            f"{name}_optimizer.weight_decay": optimizer.weight_decay,
            f"{name}_optimizer.gradient_clip": optimizer.gradient_clip,
        }
        _require(0 <= optimizer.warmup < 1, f"{name}_optimizer.warmup", optimizer.warmup, "a share in [0, 1)")
        in_range = all(0 <= beta < 1 for beta in optimizer.betas)
        _require(in_range, f"{name}_optimizer.betas", optimizer.betas, "two numbers in [0, 1)")
    for key, value in not_negative.items():
        _require(value >= 0, key, value, "a number of at least 0")
    for key in ("multiplier_init", "multiplier_max", "score_clamp", "value_clip"):
        _require(getattr(algorithm, key) > 0, f"algorithm.{key}", getattr(algorithm, key), "a number above 0")
    for key in ("gamma", "gae_lambda"):
        _require(0 <= getattr(algorithm, key) <= 1, f"algorithm.{key}", getattr(algorithm, key), "a number in [0, 1]")
    _require(0 <= algorithm.clip_low < 1, "algorithm.clip_low", algorithm.clip_low, "a number in [0, 1)")
    _require(algorithm.clip_high >= 0, "algorithm.clip_high", algorithm.clip_high, "a number of at least 0")
    _require(rollout.temperature > 0, "rollout.temperature", rollout.temperature, "a number above 0")
    _require(0 < rollout.top_p <= 1, "rollout.top_p", rollout.top_p, "a number in (0, 1]")
    _require(
        algorithm.multiplier_init <= algorithm.multiplier_max,
        "algorithm.multiplier_init",
        algorithm.multiplier_init,
        f"at most algorithm.multiplier_max ({algorithm.multiplier_max})",
    )
    for name in ("reward", "cost"):
        path = getattr(config, name).path
        _require(path != "", f"{name}.path", path, "a callable `package.module:function` or a score-model folder")
    if algorithm.scope is not None and not row.rectify:
        raise InputError(
            f"algorithm.scope is {algorithm.scope!r} with algorithm.name {algorithm.name!r}, which is not rectified "
            "and has no scope to choose; leave it null or take algorithm.name repo"
        )
    if algorithm.advantage != "gae" and rollout.responses_per_prompt < 2:
        raise InputError(
            f"rollout.responses_per_prompt is {rollout.responses_per_prompt} with algorithm.advantage "
            f"{algorithm.advantage!r}, expected at least 2: the other responses of a prompt are the baseline"
        )
    if (algorithm.ptx_coefficient > 0) != (config.data.ptx is not None):
        raise InputError(
            f"algorithm.ptx_coefficient is {algorithm.ptx_coefficient} and data.ptx is {config.data.ptx!r}: "
            "a PTX loss needs both a coefficient above 0 and data, expected both or neither"
        )
    responses = rollout.prompts_per_step * rollout.responses_per_prompt
    _require(
        update.minibatches <= responses,
        "update.minibatches",
        update.minibatches,
        f"at most the {responses} responses of a step",
    )
    engine = config.engine
    if engine.offload_parameters and engine.zero_stage != 3:
        raise InputError(f"engine.offload_parameters is true with engine.zero_stage {engine.zero_stage}, expected 3")


def known_keys(section: type = TrainConfig, prefix: str = "") -> list[str]:
    """The dotted names of every option and section."""
    keys = []
    for entry in dataclasses.fields(section):
        keys.append(prefix + entry.name)
        if dataclasses.is_dataclass(entry.type):
            keys += known_keys(typing.cast(type, entry.type), f"{prefix}{entry.name}.")
    return keys


def _reject_unknown(keys: list[str], where: str) -> None:
    known = known_keys()
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise InputError(f"unknown option {key!r} in {where}, the nearest valid name is {near!r}")


def _dotted(mapping: dict, prefix: str = "") -> list[str]:
    keys = []
    for key, value in mapping.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += _dotted(value, f"{prefix}{key}.")
    return keys


def find_config(name: str) -> Path:
    """The file of a packaged configuration's name, or the path itself."""
    packaged = CONFIG_FOLDER / f"{name}.yaml"
    if packaged.is_file():
        return packaged
    if Path(name).is_file():
        return Path(name)
    names = ", ".join(sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml")))
    raise InputError(f"--config {name!r} is neither a file nor one of the packaged configurations: {names}")


def read_config_file(path: Path) -> dict:
    """The mapping of a YAML file, with unknown keys rejected.

    Raises:
        InputError: The file is not YAML, not a mapping, or has an unknown key.
    """
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(mapping, dict):
        raise InputError(f"{path} holds a {type(mapping).__name__}, expected a mapping of options")
    _reject_unknown(_dotted(mapping), str(path))
    for entry in dataclasses.fields(TrainConfig):
        value = mapping.get(entry.name, {})
        if dataclasses.is_dataclass(entry.type) and not isinstance(value, dict):
            raise InputError(f"{path}: {entry.name} is {value!r}, expected a mapping of options")
    return mapping


def _parser():
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="torchrun -m repo_fast.train",
        description="Train a policy with RePO, or with a baseline of its table, end to end.",
        exit_on_error=False,
    )
    parser.add_argument("--config", default="tiny", help="Packaged configuration by name, or a YAML file.")
    parser.add_argument("--print_config", action="store_true", help="Print the resolved configuration and exit.")
    parser.add_class_arguments(TrainConfig)
    return parser


def parse(arguments: list[str] | None = None) -> TrainConfig:
    """Resolve the command line.

    Args:
        arguments: Command-line words; `sys.argv[1:]` by default.

    Returns:
        The resolved configuration. `--help` and `--print_config` print and exit with status 0.

    Raises:
        InputError: An unknown option (with the nearest valid name), a value of the wrong type, or a combination that
            cannot be honoured.
    """
    import jsonargparse

    arguments = sys.argv[1:] if arguments is None else arguments
    options = [word.split("=")[0][2:] for word in arguments if word.startswith("--")]
    _reject_unknown([o for o in options if o not in ("config", "print_config", "help")], "the command line")
    parser = _parser()
    try:
        chosen = parser.parse_args([word for word in arguments if word in ("--help", "-h")] or _config_words(arguments))
        base = read_config_file(find_config(chosen.config))
        # Through the parser, which checks types, as for the command line; defaults it would take as they are.
        namespace = parser.parse_object(base)
        namespace = parser.parse_args([word for word in arguments if word != "--print_config"], namespace=namespace)
        built = parser.instantiate_classes(namespace)
    except (jsonargparse.ArgumentError, TypeError, KeyError) as error:
        raise InputError(_one_line(error)) from error
    # By item: a section's name may also be that of one of the namespace's methods.
    config = TrainConfig(**{entry.name: built[entry.name] for entry in dataclasses.fields(TrainConfig)})
    if "--print_config" in arguments:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def _config_words(arguments: list[str]) -> list[str]:
    """Only the `--config` words of a command line; the last ones, as with every option given twice."""
    words: list[str] = []
    for index, word in enumerate(arguments):
        if word.startswith("--config="):
            words = [word]
        elif word == "--config":
            words = arguments[index : index + 2]
    return words


def _one_line(error: Exception) -> str:
    return " ".join(str(error).replace('Parser key "', '"--').split())


def to_dict(config: TrainConfig) -> dict:
    """The configuration as plain mappings, lists and scalars."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        return [plain(entry) for entry in value] if isinstance(value, (tuple, list)) else value

    return plain(dataclasses.asdict(config))


def to_yaml(config: TrainConfig) -> str:
    """The configuration as YAML that `--config` reads back to an equal one."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)
