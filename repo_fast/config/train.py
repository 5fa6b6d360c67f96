"""The configuration of `repo_fast.train`: reinforcement learning of a policy with rewards and costs."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from repo_fast.config.checks import require, require_at_least
from repo_fast.config.constraints import (
    ONLY,
    SECOND_REWARD,
    ConstraintConfig,
    by_column,
    check_constraints,
    check_costs,
    section_of,
)
from repo_fast.config.sections import (
    CheckpointConfig,
    CriticConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SamplingConfig,
    ScorerConfig,
    VllmConfig,
    check_fields,
    check_lora,
    check_model,
    check_optimizer,
    check_quantize,
    check_sampling,
    check_scorer,
    is_called,
)
from repo_fast.errors import InputError
from repo_fast.objective.algorithm import ALGORITHMS
from repo_fast.report.best import measures_to_keep


@dataclass(frozen=True)
class DataConfig:
    """Prompts to train on, prompts to evaluate on, and supervised text for the PTX loss."""

    prompts: str = "world:train"
    """Training prompts: a file (.jsonl, .json, .txt or .csv, also as .gz, or .parquet) or a folder of such,
    `world:train`, or a `datasets` hub name."""
    prompts_split: str = "train"
    """Split to read when `prompts` is a `datasets` name, or a folder with several."""
    eval_prompts: str | None = "world:test"
    """Held-out prompts for the before/after table, in the same forms. Null: no evaluation."""
    eval_split: str = "test"
    """Split to read when `eval_prompts` is a `datasets` name, or a folder with several."""
    template: Literal["auto", "chat", "safe-rlhf", "plain"] = "auto"
    """How a prompt is put to the policy. `auto`: the tokenizer's chat template, else Safe RLHF's."""
    max_prompt_tokens: int = 256
    """Longest templated prompt (tokens). Longer ones are dropped and counted."""
    ptx: str | None = None
    """Supervised demonstrations for the PTX loss: a file or folder, `world:demonstrations`, or a `datasets` name."""
    ptx_split: str = "train"
    """Split to read when `ptx` is a `datasets` name, or a folder with several."""
    ptx_max_tokens: int = 512
    """Longest demonstration, prompt and response together (tokens). Longer ones are dropped and counted."""
    train_on: Literal["last", "all"] = "all"
    """Which answers of a chat in `ptx` are learned: its last, or all, those in `history` too, but for those in a chat
    that is given as the `prompt` of a response."""
    fields: dict[str, str] = field(default_factory=dict)
    """What columns of the data are, where their names do not say it or they contradict each other: `prompt`,
    `response`, `history`, `system` or `ignore`, as `--data.fields.COLUMN ROLE`; for all sources of this section."""


@dataclass(frozen=True)
class RolloutVllmConfig(VllmConfig):
    """vLLM beside the trainer, on the same devices."""

    memory_share: float = 0.35
    """Of the device's memory, for weights and cache while it draws; in (0, 1). On CPU the environment variable
    VLLM_CPU_KVCACHE_SPACE (GiB) says how large the cache is."""
    sleep: bool = True
    """On CUDA, give weights and cache back between steps."""
    lora: Literal["merged", "adapter"] = "merged"
    """What is handed over of a policy with LoRA: the merged weights; or the adapter alone, far less to hand over, but
    slower to decode with, and while vLLM sleeps the base weights wait in host memory."""


@dataclass(frozen=True)
class RolloutConfig(SamplingConfig):
    """What is drawn in a step, and how."""

    prompts_per_step: int = 16
    """Prompts of one step (prompts, over all ranks)."""
    responses_per_prompt: int = 4
    """K, responses drawn for each prompt."""
    engine: Literal["hf", "vllm"] = "hf"
    """What draws: `hf`, the policy's own module; or vLLM in the same process, with the weights handed over before each
    step (`pip install repo_fast[vllm]`), and verified: a mean gap of its log-probabilities to the trainer's above 0.001
    nats in float32, or 0.1 in bfloat16, ends the run. Evaluations are drawn by it too."""
    vllm: RolloutVllmConfig = field(default_factory=RolloutVllmConfig)
    score_early: bool = False
    """Call scoring functions on responses that are done while others are still drawn: with `hf` after each batch of
    `batch_size`, with `vllm` as they end. A function is then called several times a step, and not in the main thread
    (where alone Python sets signal handlers); a run can be repeated only if none draws from global random states."""


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
    advantage_scale: Literal["joint", "separate", "none"] | None = None
    """`grpo`: what a prompt's advantages are divided by. `joint`: the standard deviation of the weighted sum of the
    streams; `separate`: each stream by that of its scores, the KL penalty by nothing; `none`: nothing. Null: joint,
    with several constraints too, where none was shown to be better (experiments/constraints)."""
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
    confidence: Literal["z", "t"] = "z"
    """`hc_lag`: `confidence_z` standard errors, or as many as Student's t has for the same level with a window of n
    costs, whose spread is an estimate too."""
    shaping_weight: float = 1.0
    """`reward_shaping`: w of R - w C."""
    kl_coefficient: float = 0.01
    """beta of the KL penalty inside rewards and costs. Each stream carries the full beta, with opposite sign."""
    reward_cap: float | None = None
    """Training takes min(reward, this): pressure on the reward ends where it is reached (units of the reward).
    Evaluations take the reward as it is. Null: no cap."""
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
    importance_level: Literal["token", "sequence"] = "token"
    """What has an importance weight pi_old / pi_sampler, the two as computed by the trainer and by what drew the
    response: each `token`, or the response, the product of its tokens' (`repo_fast/objective/importance.py`)."""
    importance_cap: float | None = None
    """Truncated importance weights (Ionides 2008): a token's policy loss counts min(weight, this), the weight
    being that of `importance_level`. Null: no cap; with no mask either, every token counts 1."""
    importance_mask: tuple[float, float] | None = None
    """Masked importance weights: those outside [low, high], 0 <= low < 1 < high, count 0. Denominators, baselines,
    multiplier and critics take all. Null: no mask."""
    reduction: Literal["sequence_mean", "token_mean", "sum"] = "sequence_mean"
    """How token losses become one number; denominators are those of the whole global batch."""
    ptx_coefficient: float = 0.0
    """Weight of the supervised cross-entropy on `data.ptx` (token mean over the global batch)."""

    @property
    def importance(self) -> dict[str, Any]:
        """The options of `importance_weights`; empty where every token counts 1."""
        if self.importance_cap is None and self.importance_mask is None:
            return {}
        return {"level": self.importance_level, "cap": self.importance_cap, "mask": self.importance_mask}


@dataclass(frozen=True)
class UpdateConfig:
    """How a rollout becomes optimizer steps."""

    epochs: int = 1
    """Passes over a rollout."""
    minibatches: int = 1
    """Optimizer steps in a pass; the rollout's responses are dealt over them anew in each pass."""
    micro_batch_tokens: int = 8192
    """Largest packed micro-batch on a rank, prompts included (tokens). A longer sequence gets one of its own."""
    share_prompts: bool = False
    """A prompt's responses share it in a micro-batch: it is computed once for all of them. Needs `policy.attention`
    packed (`auto` without flash-attn)."""
    ptx_batch_size: int = 16
    """Demonstrations joined to each optimizer step when there is a PTX loss (demonstrations, over all ranks)."""
    old_log_probs: Literal["trainer", "sampler"] = "trainer"
    """What log pi_old is. `sampler`: as recorded while drawing, for the KL; and the ratio is 1 exactly. It spares a
    forward of the policy, and needs one optimizer step a rollout."""
    max_skipped_steps: int = 5
    """The run stops when this many optimizer steps in a row had a non-finite loss or gradient and were skipped."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluations on `data.eval_prompts`: before and after, and while training; and warnings."""

    every: int | None = None
    """Steps between evaluations of the policy in training, into `evaluations.jsonl`, with a checkpoint before each. No
    number of the training changes by them. Null: only before and after."""
    samples_per_prompt: int = 4
    """Responses drawn for each held-out prompt."""
    prompts: int | None = None
    """Use only the first so many held-out prompts. Null: all."""
    well_formed: str | None = None
    """Python callable `package.module:function` (`(prompts, responses) -> list[bool]`) whose share is reported too."""
    second_reward: ScorerConfig = field(default_factory=ScorerConfig)
    """A reward that nothing is trained on, reported too: where it falls while the reward rises, the reward is being
    exploited, which is warned of. Without a path: none."""
    kl_bound: float = 50.0
    """A KL to the reference above this is warned of (nats a response)."""
    stop_on: tuple[Literal["kl", "entropy", "length", "exploitation", "multiplier"], ...] = ()
    """Warnings that end the run, with a checkpoint and the exit status 5 (`repo_fast/report/warning_rules.py`)."""


@dataclass(frozen=True)
class TrainCheckpointConfig(CheckpointConfig):
    """When the state of the run is saved, and what is kept of it."""

    keep_best: str | None = None
    """Measure of `evaluations.jsonl`, such as strict_violation (of several constraints their sum) or mean_reward: the
    checkpoint of the best evaluation is kept whatever `keep` says, and its policy is in `best_policy`."""


@dataclass(frozen=True)
class TrainLogConfig(LogConfig):
    """What is written down while training."""

    samples_every: int = 10
    """Steps between dumps of all the step's responses to `samples.jsonl`; the first step is always dumped."""


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Train a policy with RePO, or with a baseline of its table, end to end."""

    PROGRAM: ClassVar[str] = "repo-fast train"
    FOLDER: ClassVar[str] = ""

    output_dir: str = "outputs/train"
    """Folder for everything the run writes."""
    total_steps: int = 60
    """Rollout-and-update steps of the whole run; schedules end there."""
    policy: ModelConfig = field(default_factory=ModelConfig)
    critics: CriticConfig = field(default_factory=CriticConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: ScorerConfig = field(default_factory=ScorerConfig)
    cost: ScorerConfig = field(default_factory=ScorerConfig)
    constraints: dict[str, ConstraintConfig] = field(default_factory=dict)
    """Several constraints by name, instead of `cost` and the threshold, margin and multiplier of `algorithm`."""
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    policy_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic_optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=5e-6, schedule="constant", warmup=0.0, weight_decay=0.0)
    )
    update: UpdateConfig = field(default_factory=UpdateConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    profile: int | None = None
    """The step that torch's profiler traces: `profile/trace-rank-N.json.gz`, and `profile/timeline.png` of its phases
    (a step number of the whole run)."""
    checkpoint: TrainCheckpointConfig = field(default_factory=TrainCheckpointConfig)
    log: TrainLogConfig = field(default_factory=TrainLogConfig)

    @property
    def costs(self) -> dict[str, ConstraintConfig]:
        """Every constraint by its name, in whichever form it is written; nothing of them is null but `pid`.

        A single one is called `cost`.
        """
        row, common = ALGORITHMS[self.algorithm.name], self.algorithm
        costs = self.constraints or {ONLY: ConstraintConfig(**vars(self.cost), threshold=common.threshold)}
        if not self.constraints:
            costs[ONLY] = replace(costs[ONLY], margin=common.margin)
        resolved = {}
        for name, own in costs.items():
            left = {key for key, value in vars(own).items() if value is None} & vars(common).keys() - {"scope"}
            values = {key: getattr(common, key) for key in left}
            resolved[name] = replace(own, scope=own.scope or common.scope or row.scope, **values)
        return by_column(resolved)

    @property
    def scorers(self) -> dict[str, ScorerConfig]:
        """Where the rewards and the costs come from, by the names of their columns."""
        return {"reward": self.reward, **self.costs}

    @property
    def all_scorers(self) -> dict[str, ScorerConfig]:
        """Those, and the second reward where there is one."""
        second = self.evaluation.second_reward
        return self.scorers | ({SECOND_REWARD: second} if second != ScorerConfig() else {})

    @property
    def controlled(self) -> dict[str, ConstraintConfig]:
        """The constraints whose multipliers are learned, by name."""
        learned = ALGORITHMS[self.algorithm.name].constraint is not None
        return {name: cost for name, cost in self.costs.items() if learned and cost.controller != "fixed"}

    def section_of(self, column: str) -> str:
        """The section that a column's scorer is written in."""
        return section_of(column, self.constraints)

    @property
    def critic_streams(self) -> list[tuple[str, ...]]:
        """The streams of scores that each critic values."""
        if self.algorithm.advantage != "gae":
            return []
        costs = self.costs if ALGORITHMS[self.algorithm.name].has_cost_stream else ()
        streams, shared = ("reward", *costs), self.critics.shared_trunk
        # Beyond a second one, trunks of a policy's size are to be asked for.
        together = len(streams) > 2 if shared is None else shared
        return [streams] if together else [(stream,) for stream in streams]

    def check(self) -> None:
        super().check()
        rollout, algorithm, update, row = self.rollout, self.algorithm, self.update, ALGORITHMS[self.algorithm.name]
        check_model("policy", self.policy)
        check_lora("critics.lora", self.critics.lora)
        check_quantize("critics", self.critics.quantize, self.critics.lora)
        check_optimizer("policy_optimizer", self.policy_optimizer)
        check_optimizer("critic_optimizer", self.critic_optimizer)
        require_at_least(
            1,
            {
                "total_steps": self.total_steps,
                "profile": self.profile,
                "rollout.prompts_per_step": rollout.prompts_per_step,
                "rollout.responses_per_prompt": rollout.responses_per_prompt,
                "data.max_prompt_tokens": self.data.max_prompt_tokens,
                "data.ptx_max_tokens": self.data.ptx_max_tokens,
                "algorithm.cost_window": algorithm.cost_window,
                "update.epochs": update.epochs,
                "update.minibatches": update.minibatches,
                "update.micro_batch_tokens": update.micro_batch_tokens,
                "update.ptx_batch_size": update.ptx_batch_size,
                "update.max_skipped_steps": update.max_skipped_steps,
                "evaluation.every": self.evaluation.every,
                "evaluation.samples_per_prompt": self.evaluation.samples_per_prompt,
                "evaluation.prompts": self.evaluation.prompts,
                "log.samples_every": self.log.samples_every,
            },
        )
        names = ("margin", "kl_coefficient", "multiplier_learning_rate", "entropy_coefficient", "ptx_coefficient")
        require_at_least(0, {f"algorithm.{name}": getattr(algorithm, name) for name in (*names, "shaping_weight")})
        for key in ("multiplier_init", "multiplier_max", "score_clamp", "value_clip"):
            require(getattr(algorithm, key) > 0, f"algorithm.{key}", getattr(algorithm, key), "a number above 0")
        for key in ("gamma", "gae_lambda"):
            require(
                0 <= getattr(algorithm, key) <= 1, f"algorithm.{key}", getattr(algorithm, key), "a number in [0, 1]"
            )
        require(0 <= algorithm.clip_low < 1, "algorithm.clip_low", algorithm.clip_low, "a number in [0, 1)")
        require(algorithm.clip_high >= 0, "algorithm.clip_high", algorithm.clip_high, "a number of at least 0")
        require(
            algorithm.multiplier_init <= algorithm.multiplier_max,
            "algorithm.multiplier_init",
            algorithm.multiplier_init,
            f"at most algorithm.multiplier_max ({algorithm.multiplier_max})",
        )
        traced = self.profile is None or self.profile <= self.total_steps
        require(traced, "profile", self.profile, f"a step of the run, at most total_steps ({self.total_steps})")
        check_fields("data.fields", self.data.fields)
        check_sampling("rollout", rollout)
        _check_importance(self)
        _check_old_log_probs(self)
        _check_vllm(self)
        check_scorer("reward", self.reward)
        _check_costs(self)
        _check_evaluation(self)
        adapters, functions = self.policy.lora.rank > 0, all(is_called(s.path) for s in self.all_scorers.values())
        if self.engine.offload_frozen and adapters and functions:
            raise InputError(
                f"engine.offload_frozen is true with policy.lora.rank {self.policy.lora.rank} and scoring functions, "
                "expected false: no model is frozen"
            )
        _check_share_base(self)
        if rollout.score_early and not any(is_called(scorer.path) for scorer in self.scorers.values()):
            paths = [f"{name}.path {scorer.path!r}" for name, scorer in self.scorers.items()]
            raise InputError(
                f"rollout.score_early is true with {' and '.join(paths)}, "
                "expected a function for one of them: only functions and judges are called while responses are drawn"
            )
        if algorithm.scope is not None and not row.rectify:
            raise InputError(
                f"algorithm.scope is {algorithm.scope!r} with algorithm.name {algorithm.name!r}, which is not "
                "rectified and has no scope to choose; leave it null or take algorithm.name repo"
            )
        if algorithm.advantage != "gae" and rollout.responses_per_prompt < 2:
            raise InputError(
                f"rollout.responses_per_prompt is {rollout.responses_per_prompt} with algorithm.advantage "
                f"{algorithm.advantage!r}, expected at least 2: the other responses of a prompt are the baseline"
            )
        if algorithm.advantage_scale is not None and algorithm.advantage != "grpo":
            raise InputError(
                f"algorithm.advantage_scale is {algorithm.advantage_scale!r} with algorithm.advantage "
                f"{algorithm.advantage!r}, which divides by nothing; leave it null or take algorithm.advantage grpo"
            )
        if algorithm.advantage_scale == "separate" and algorithm.whiten:
            raise InputError(
                "algorithm.whiten is true with algorithm.advantage_scale 'separate', expected false: whitening divides "
                "all streams by one scale"
            )
        if algorithm.confidence != "z" and row.constraint != "upper":
            raise InputError(
                f"algorithm.confidence is {algorithm.confidence!r} with algorithm.name {algorithm.name!r}, which takes "
                "no confidence bound; leave it z or take algorithm.name hc_lag"
            )
        if (algorithm.ptx_coefficient > 0) != (self.data.ptx is not None):
            raise InputError(
                f"algorithm.ptx_coefficient is {algorithm.ptx_coefficient} and data.ptx is {self.data.ptx!r}: "
                "a PTX loss needs both a coefficient above 0 and data, expected both or neither"
            )
        responses = rollout.prompts_per_step * rollout.responses_per_prompt
        require(
            update.minibatches <= responses,
            "update.minibatches",
            update.minibatches,
            f"at most the {responses} responses of a step",
        )
        if self.critics.shared_trunk and (algorithm.advantage != "gae" or not row.has_cost_stream):
            raise InputError(
                f"critics.shared_trunk is true with algorithm.name {algorithm.name!r} and algorithm.advantage "
                f"{algorithm.advantage!r}, which have not two critics; expected gae and an algorithm with a cost stream"
            )
        if self.critics.lora.rank and algorithm.advantage != "gae":
            raise InputError(
                f"critics.lora.rank is {self.critics.lora.rank} with algorithm.advantage {algorithm.advantage!r}, "
                "which has no critics; expected 0"
            )


def _check_share_base(config: TrainConfig) -> None:
    """Raise `InputError` where all models are to share the policy's base and one cannot, whatever its weights are."""
    if config.engine.share_base is not True:
        return
    said, stage = "engine.share_base is true", config.engine.zero_stage
    if stage == 3:
        raise InputError(f"{said} with engine.zero_stage 3, which shards each model by itself; expected 1 or 2")
    sections = {"policy": config.policy} | ({"critics": config.critics} if config.critic_streams else {})
    for name, section in sections.items():
        if not section.lora.rank:
            raise InputError(f"{said} with {name}.lora.rank 0, expected adapters: what is trained whole is not shared")


def _check_costs(config: TrainConfig) -> None:
    check_costs(config.cost, config.constraints)
    check_constraints(config.constraints, config.algorithm)
    for name, own in config.constraints.items():
        if own.multiplier_init == "dual" and config.data.eval_prompts is None:
            raise InputError(
                f"constraints.{name}.multiplier_init is 'dual' with data.eval_prompts null, expected held-out prompts: "
                "it is found from the scores of the reference's responses to them"
            )
        if own.multiplier_init == "dual" and config.algorithm.kl_coefficient == 0:
            raise InputError(
                f"constraints.{name}.multiplier_init is 'dual' with algorithm.kl_coefficient 0, expected a number "
                "above 0: what is near the reference is found with it"
            )


def _check_evaluation(config: TrainConfig) -> None:
    evaluation, best = config.evaluation, config.checkpoint.keep_best
    require(evaluation.kl_bound > 0, "evaluation.kl_bound", evaluation.kl_bound, "a number above 0")
    if SECOND_REWARD in config.all_scorers:
        check_scorer(f"evaluation.{SECOND_REWARD}", evaluation.second_reward)
    asked = {
        "evaluation.every": evaluation.every,
        f"evaluation.{SECOND_REWARD}.path": evaluation.second_reward.path or None,
    }
    for key, value in asked.items():
        if value is not None and config.data.eval_prompts is None:
            raise InputError(f"{key} is {value!r} with data.eval_prompts null, expected held-out prompts")
    if evaluation.every is not None:
        most = f"at most total_steps ({config.total_steps})"
        require(evaluation.every <= config.total_steps, "evaluation.every", evaluation.every, most)
    if "multiplier" in evaluation.stop_on and not config.controlled:
        raise InputError(
            f"evaluation.stop_on has 'multiplier' with algorithm.name {config.algorithm.name!r} and no multiplier that "
            "is learned, expected other rules: its warning cannot come"
        )
    if "exploitation" in evaluation.stop_on and evaluation.every is None:
        raise InputError(
            "evaluation.stop_on has 'exploitation' with evaluation.every null, expected a number of steps: it is seen "
            "in evaluations alone"
        )
    if "exploitation" in evaluation.stop_on and not (evaluation.well_formed or evaluation.second_reward.path):
        raise InputError(
            "evaluation.stop_on has 'exploitation' without evaluation.second_reward or evaluation.well_formed, "
            "expected one of them: what the reward rises at the expense of"
        )
    if best is None:
        return
    if evaluation.every is None:
        raise InputError(
            f"checkpoint.keep_best is {best!r} with evaluation.every null, expected a number of steps: it is chosen "
            "among evaluations"
        )
    names = measures_to_keep(() if ONLY in config.costs else config.costs)
    require(best in names, "checkpoint.keep_best", best, f"one of {', '.join(names)}")
    needed = {"well_formed": evaluation.well_formed, f"mean_{SECOND_REWARD}": evaluation.second_reward.path or None}
    if needed.get(best, "") is None:
        section = best.removeprefix("mean_")
        raise InputError(f"checkpoint.keep_best is {best!r} without evaluation.{section}, expected that, or another")


def _check_importance(config: TrainConfig) -> None:
    algorithm, top_p = config.algorithm, config.rollout.top_p
    cap, mask = algorithm.importance_cap, algorithm.importance_mask
    if cap is not None:
        require(0 < cap < math.inf, "algorithm.importance_cap", cap, "a finite number above 0")
    if mask is not None:
        low, high = mask
        known = 0 <= low < 1 < high < math.inf
        require(known, "algorithm.importance_mask", mask, "finite numbers [low, high] with 0 <= low < 1 < high")
        between = cap is None or low < cap < high
        require(between, "algorithm.importance_cap", cap, f"a number inside algorithm.importance_mask {mask}, or null")
    if algorithm.importance_level == "sequence" and not algorithm.importance:
        raise InputError(
            "algorithm.importance_level is 'sequence' with algorithm.importance_cap and algorithm.importance_mask "
            "null, expected one of them: without, every token counts 1"
        )
    if algorithm.importance_level == "sequence" and top_p < 1:
        raise InputError(
            f"rollout.top_p is {top_p} with algorithm.importance_level 'sequence', expected 1.0: a token's weight is "
            "then the probability that top_p keeps, and the product over a long response vanishes"
        )


def _check_old_log_probs(config: TrainConfig) -> None:
    if config.update.old_log_probs == "trainer":
        return
    for key, value, neutral in (
        ("update.epochs", config.update.epochs, 1),
        ("update.minibatches", config.update.minibatches, 1),
        ("rollout.top_p", config.rollout.top_p, 1.0),
        ("algorithm.importance_cap", config.algorithm.importance_cap, None),
        ("algorithm.importance_mask", config.algorithm.importance_mask, None),
    ):
        require(value == neutral, key, value, f"{neutral} with update.old_log_probs 'sampler'")


def _check_vllm(config: TrainConfig) -> None:
    if config.rollout.vllm.lora == "adapter" and not config.policy.lora.rank:
        raise InputError(
            "rollout.vllm.lora is 'adapter' with policy.lora.rank 0, expected merged: the policy has no adapter"
        )
