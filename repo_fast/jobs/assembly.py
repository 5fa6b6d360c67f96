"""Puts a run's models together: policy, reference, critics and scorers, each under an engine."""

import json
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from repo_fast.collectives import Ranks
from repo_fast.config import (
    SECOND_REWARD,
    EngineConfig,
    HeadConfig,
    LoraConfig,
    ModelConfig,
    RubricConfig,
    ScorerConfig,
    TrainConfig,
)
from repo_fast.data import PromptTemplate, load_tokenizer
from repo_fast.engine import Engine, resolve_dtype, sharded_loading
from repo_fast.errors import InputError, at, first_line
from repo_fast.jobs.inputs import Inputs, scorer_name
from repo_fast.learning.learner import Models
from repo_fast.models.adapters import Base, is_adapter, read_adapter
from repo_fast.models.attention import attention_candidates
from repo_fast.models.blocks import parameter_sizes
from repo_fast.models.critic import Critic
from repo_fast.models.lora import adapters_off, add_lora, describe
from repo_fast.models.model_config import load_config
from repo_fast.models.packing import settle_packing, state_before
from repo_fast.models.policy import Policy
from repo_fast.models.score_checkpoint import LAYOUTS, find_output, output_names
from repo_fast.models.score_model import ScoreModel
from repo_fast.models.sharing import SharedWeights, whole_bytes
from repo_fast.models.trunk import train_last_layers
from repo_fast.models.vocabulary import fit_vocabulary
from repo_fast.packing.rows import PackedBatch
from repo_fast.rollout import Sampler
from repo_fast.rollout.hf import HfSampler, stop_alike
from repo_fast.scoring import (
    ClassifierScorer,
    EncoderClassifier,
    FunctionScorer,
    Guard,
    GuardScorer,
    JudgedScorer,
    LastOutputs,
    ModelScorer,
    Scorer,
    ScorerSpec,
    check_expected_score,
    load_line,
    load_score_model,
    score_text,
)
from repo_fast.scoring.score_models import Role, reads_tokens_of

log = logging.getLogger(__name__)


def build_models(config: TrainConfig, inputs: Inputs, ranks: Ranks) -> tuple[Models, dict[str, Scorer]]:
    """Load every model of a run; under ZeRO-3 straight into shards. All ranks must call it.

    A critic starts from its stream's score model where that is a decoder with the policy's vocabulary, else from the
    policy's trunk with a zero head. Under LoRA the reference is the policy with its adapters off.

    Returns:
        The engines, and the scorers by the names of their columns.

    Raises:
        InputError: A model cannot be used.
    """
    attention = config.policy.attention
    loading = loading_options(attention, config.engine, ranks)
    steps = config.total_steps * config.update.epochs * config.update.minibatches
    policy = load_policy(inputs.policy_path, inputs.tokenizer, config.policy, config.engine, ranks)
    shared = shared_weights(config.engine)
    shared.take("the policy", policy.model)
    models = [spec.path for spec in inputs.scorers.values() if spec.kind == "model"]
    if config.policy.lora.rank and any(map(is_adapter, models)):
        shared.base = Base.of(inputs.policy_path).fingerprint, config.policy.quantize
    with sharded_loading(config.engine, ranks.device, frozen=True):
        reference = None
        if not config.policy.lora.rank:
            reference = Policy.from_pretrained(inputs.policy_path, **loading).requires_grad_(False)
            _fit_vocabulary(reference.model, inputs.tokenizer, config.policy)
            shared.take("the reference", reference.model)
        folder = Path(config.output_dir) / "judges"
        loader = ScorerLoader(config.engine, ranks, attention, config.update.micro_batch_tokens, folder, shared)
        scorers = {
            name: loader.load(name, spec, config.all_scorers[name])(inputs.template)
            for name, spec in inputs.scorers.items()
        }
    with sharded_loading(config.engine, ranks.device):
        critics = _critics(config, inputs, loading | {"quantize": config.critics.quantize}, shared)
    _say_what_is_shared(config, shared, ranks)
    policy_engine = Engine(policy, config.engine, ranks, config.policy_optimizer, steps)
    settle_policy("the policy", policy_engine, attention, ranks)
    frozen: Any = WithoutAdapters(policy_engine)
    if reference is not None:
        frozen = Engine(reference, config.engine, ranks)
        settle_policy("the reference", frozen, attention, ranks)
    critic_engines = {}
    for name, critic in critics.items():
        critic_engines[name] = Engine(critic, config.engine, ranks, config.critic_optimizer, steps)
        settle_scores(f"the critic of {name}", critic_engines[name], critic.head(critic.streams[0]), attention, ranks)
    return Models(policy_engine, frozen, critic_engines), scorers


def shared_weights(engine: EngineConfig) -> SharedWeights:
    """Where the models of a job keep the frozen weights that they have alike, as `engine.share_base` says."""
    return SharedWeights(required=engine.share_base is True, apart=engine.share_base is False or engine.zero_stage == 3)


def _merges(path: str, quantize: str | None, shared: SharedWeights) -> bool:
    """Whether a score model's adapters are merged into their base: they are not where the policy has it, frozen."""
    return shared.base is None or not is_adapter(path) or shared.base != (read_adapter(path).base.fingerprint, quantize)


def _say_what_is_shared(config: TrainConfig, shared: SharedWeights, ranks: Ranks) -> None:
    stage, (size,) = config.engine.zero_stage, ranks.sum(torch.tensor([sum(shared.spared.values())])).tolist()
    models = ", ".join(name for name, spared in shared.spared.items() if spared)
    if size and not shared.apart:
        log.info(
            "one copy of the weights that %s have frozen: %.3g GB saved on each rank", models, size / ranks.size / 1e9
        )
    if size and stage == 3 and config.engine.share_base:
        said = (
            "engine.zero_stage 3 keeps copies of frozen weights (%s): %.3g GB over all ranks that 1 and 2 would share"
        )
        log.info(said, models, size / 1e9)
    if config.policy.lora.rank and config.engine.share_base:
        for name, weight in shared.unlike.items():
            said = "%s has a base of its own: its %s is unlike the policy's (in a merged folder or other bits it is)"
            log.info(said, name, weight)


def build_sampler(config: TrainConfig, inputs: Inputs, policy: Engine, ranks: Ranks) -> Sampler:
    """What draws the responses from the policy that `build_models` made. All ranks must call it.

    Raises:
        InputError: vLLM cannot draw from this policy, or is not installed.
    """
    pad_is_new = config.policy.pad_token is not None
    if config.rollout.engine == "hf":
        return HfSampler(inputs.tokenizer, config.rollout, ranks, pad_is_new=pad_is_new)
    from repo_fast.rollout.vllm_sampler import VllmSampler

    return VllmSampler(
        inputs.policy_path,
        policy,
        inputs.tokenizer,
        config.rollout,
        ranks,
        dtype=resolve_dtype(config.engine.dtype, ranks.device),
        longest=config.data.max_prompt_tokens + config.rollout.max_new_tokens,
        seed=config.seed,
        pad_is_new=pad_is_new,
    )


class WithoutAdapters:
    """A frozen model inside one with LoRA adapters: called like it, computed by the base weights alone."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(self, *args: Any) -> Any:
        with adapters_off(self._engine.module):
            return self._engine(*args)


def load_policy(
    path: str, tokenizer: PreTrainedTokenizerBase, settings: ModelConfig, engine: EngineConfig, ranks: Ranks
) -> Policy:
    """A causal language model to train; under ZeRO-3 as shards. All ranks must call it.

    Args:
        path: Folder or hub name.
        tokenizer: Its own; gets the pad token that the settings ask for.
        settings: What of it is trained, and how large its vocabulary is.
        engine: Stage, dtype, activation checkpointing.
        ranks: This process among all.

    Raises:
        InputError: The model cannot be used.
    """
    with sharded_loading(engine, ranks.device):
        loading = loading_options(settings.attention, engine, ranks, settings.quantize)
        policy = Policy.from_pretrained(path, **loading)
        _fit_vocabulary(policy.model, tokenizer, settings)
    stop_alike(policy.model, tokenizer)
    with at(f"what is trained of {path!r}"):
        prepare_training(policy.model, settings.trainable_layers, settings.lora, engine)
    _say_what_is_trained(path, policy)
    return policy


def settle_policy(name: str, policy: Engine, attention: str, ranks: Ranks) -> str:
    """Settle how a policy runs packed sequences, and say so. All ranks must call it.

    Args:
        name: For messages.
        policy: An engine around a `Policy`.
        attention: `ModelConfig.attention`.
        ranks: This process among all.

    Returns:
        What is said.

    Raises:
        InputError: No way that the choice allows is right, or the policy changes its logits as the loss head does not.
    """

    def last_state(input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        last = torch.tensor([input_ids.numel() - 1], device=input_ids.device)
        batch = PackedBatch(input_ids, position_ids, predictors=last, targets=last, sequence_ids=last * 0, last=last)
        return policy(batch, lambda hidden, projection, _: hidden[0])

    try:
        said = settle_packing(name, policy.module.model, last_state, attention, ranks.device)
        _check_logits(name, policy, ranks.device)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        # What an architecture makes of being called as a decoder is not known before.
        kind = type(policy.module.model).__name__
        raise InputError(f"{name} ({kind}) cannot be run as a policy: {first_line(error)}") from error
    log.info("attention of %s: %s", name, said)
    return said


@torch.no_grad()
def _check_logits(name: str, policy: Engine, device: torch.device) -> None:
    """Raise `InputError` where transformers' logits are not those that a loss makes of the head's products."""
    ids = torch.arange(8, device=device)[None] % 4
    everywhere = torch.arange(8, device=device)
    batch = PackedBatch(ids, everywhere[None], everywhere, everywhere, everywhere * 0, everywhere[-1:])
    own = policy(batch, lambda hidden, projection, _: projection.logits(hidden)).log_softmax(-1)
    logits = policy(batch, None)[0]
    kind = type(policy.module.model).__name__
    if logits.shape != own.shape:
        raise InputError(f"{name} ({kind}) has logits {list(logits.shape)}, expected {list(own.shape)} as of its head")
    gaps = (logits.float().log_softmax(-1) - own).abs()
    # Logits up to 32 in bfloat16 are rounded to multiples of 1/8.
    most, mean = (1e-3, 1e-4) if logits.dtype == torch.float32 else (0.5, 0.1)
    if not (gaps.max() <= most and gaps.mean() <= mean):
        raise InputError(
            f"{name} ({kind}) changes its logits after the head (log-probabilities differ by up to "
            f"{float(gaps.max()):.3g} nats) as the loss head does not know, expected no more than a scale and a cap "
            "that the configuration names"
        )


def settle_scores(name: str, engine: Engine, head: nn.Module, attention: str, ranks: Ranks) -> None:
    """The same for an engine around a `ScoreModel` or a `Critic`, and one of its heads."""
    last_state = state_before(head, engine.frozen_module)
    said = settle_packing(name, engine.module.trunk, last_state, attention, ranks.device)
    log.info("attention of %s: %s", name, said)


def load_trained_score_model(
    path: str,
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: ModelConfig,
    engine: EngineConfig,
    ranks: Ranks,
    heads: tuple[str, ...] = (),
) -> ScoreModel:
    """A score model to train: one that is gone on with, or the trunk of a language model with a zero head.

    Args:
        path: Folder or hub name.
        kind: `reward` or `cost`.
        tokenizer, settings, engine, ranks: As for `load_policy`.
        heads: The names of several outputs; a model that is gone on with has the same (`check_heads_of`).

    Raises:
        InputError: The model cannot be used; it is a score model of the other kind, or an encoder.
    """
    loading = loading_options(settings.attention, engine, ranks, settings.quantize)
    with sharded_loading(engine, ranks.device):
        if is_score_model(path):
            model = load_score_model(path, role=kind, **loading)  # type: ignore[arg-type]
            if not isinstance(model, ScoreModel):
                raise InputError(f"model.path {path!r} is an encoder, expected a decoder: packed rows need one")
        else:
            model = ScoreModel.from_policy(path, names=heads, **loading)
        _fit_vocabulary(model.trunk, tokenizer, settings)
    # DeepSpeed trains parameters of one dtype; it keeps float32 masters, and the head computes in float32 anyway.
    model.score_head.to(loading["dtype"])
    with at(f"what is trained of {path!r}"):
        prepare_training(model.trunk, settings.trainable_layers, settings.lora, engine)
    _say_what_is_trained(path, model)
    return model


def is_score_model(path: str) -> bool:
    """Whether a model folder's architecture is one with a scalar head."""
    return (load_config(path).architectures or [""])[0].endswith(("ForScore", "ForSequenceClassification"))


def check_heads_of(path: str, heads: Mapping[str, HeadConfig]) -> None:
    """Raise `InputError` where a score model to go on with has other outputs than are to be trained, in another order,
    or, as far as it says so, trained to call other things unsafe."""
    names = output_names(path)
    # A single output may have a name that nobody asked for: Hugging Face's label.
    is_label = len(names) == 1 and load_config(path).architectures[0].endswith(
        LAYOUTS["sequence-classification"].suffix
    )
    if names != tuple(heads) and (heads or not is_label):
        raise InputError(
            f"heads has {', '.join(heads) or 'none'} with model.path {path!r}, whose outputs are "
            f"{', '.join(names) or 'one without a name'}; expected the same, in that order"
        )
    trained = getattr(load_config(path), "score_heads", None) or {}
    for name, head in heads.items():
        ours = json.loads(json.dumps(asdict(head)))
        if trained.get(name, ours) != ours:
            raise InputError(
                f"heads.{name} is {ours} with model.path {path!r}, which was trained with {trained[name]}; expected "
                "the same, or another name and model"
            )


def loading_options(attention: str, engine: EngineConfig, ranks: Ranks, quantize: str | None = None) -> dict[str, Any]:
    """The dtype and the attention implementations that a model is loaded with, and whether it is quantised.

    Raises:
        InputError: The attention implementation cannot run here.
    """
    dtype = resolve_dtype(engine.dtype, ranks.device)
    candidates = attention_candidates(attention, ranks.device, dtype)
    return {"dtype": dtype, "attention": candidates, "quantize": quantize}


def _fit_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: ModelConfig) -> None:
    fit_vocabulary(model, tokenizer, pad_token=settings.pad_token, multiple=settings.pad_vocabulary_to)


def prepare_training(
    transformer: nn.Module, trainable_layers: int | None, lora: LoraConfig, engine: EngineConfig
) -> None:
    """Freeze what is not trained, add adapters, and set up the recomputation of activations."""
    if trainable_layers is not None:
        train_last_layers(transformer, trainable_layers)
    if lora.rank:
        add_lora(transformer, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
    if engine.activation_checkpointing:
        # Re-entrant: the other kind compares shapes with those of the first forward, and ZeRO-3 has released them.
        transformer.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        transformer.enable_input_require_grads()
        # Said of every forward that needs no gradient: the reference, and the probabilities of before an update.
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True", UserWarning)


def _say_what_is_trained(path: str, module: nn.Module) -> None:
    if not all(parameter.requires_grad for parameter in module.parameters()):
        log.info("%s: %s", path, describe(module))


def _critics(config: TrainConfig, inputs: Inputs, loading: dict, shared: SharedWeights) -> dict[str, Critic]:
    """By name: one for each stream, or one for all."""
    critics = {}
    for group in config.critic_streams:
        model, outputs = _critic_start(group, config, inputs, loading, shared)
        critic = critics["_".join(group)] = Critic(model, group, loading["dtype"], outputs)
        with at("critics.lora"):
            prepare_training(critic.trunk, None, config.critics.lora, config.engine)
        shared.take(f"the critic of {' and '.join(group)}", critic.trunk)
        _say_what_is_trained(f"critic of {' and '.join(group)}", critic)
        if len(group) > 1:
            log.info("%s", _saved_by_sharing(critic, shared))
    return critics


def _saved_by_sharing(critic: Critic, shared: SharedWeights) -> str:
    """What further trunks would take over all ranks: weights, and where they are trained DeepSpeed's copies. Frozen
    weights would be shared among them, unless models are kept apart."""
    # In float32, also beside weights of that type: a master, a gradient, and Adam's two moments.
    trained = 16
    sizes = list(parameter_sizes(critic.trunk))
    spared = len(critic.streams) - 1
    size = spared * sum(
        whole_bytes(parameter) + trained * getattr(parameter, "ds_numel", parameter.numel()) * parameter.requires_grad
        for parameter in critic.trunk.parameters()
        if parameter.requires_grad or shared.apart
    )
    passes = "a forward and backward" if spared == 1 else f"{spared} forwards and backwards"
    return (
        f"the critics share one trunk of {sum(count for count, _ in sizes):,} parameters: {size / 1e9:.3g} GB saved "
        f"over all ranks (weights, gradients, optimizer), and {passes} an update"
    )


def _critic_start(
    group: tuple[str, ...], config: TrainConfig, inputs: Inputs, loading: dict, shared: SharedWeights
) -> tuple[ScoreModel, dict[str, int]]:
    """The model of a critic's first stream, and which of its outputs its streams start from."""
    stream = group[0]
    spec = inputs.scorers[stream]
    if spec.kind == "model":
        reason = "its tokens are not the policy's"
        if reads_tokens_of(load_tokenizer(spec.path, must_end=False), inputs.template.tokenizer):
            # What is trained whole is merged.
            merge = not config.critics.lora.rank or _merges(spec.path, config.critics.quantize, shared)
            with at("critics"):
                model = load_score_model(spec.path, merge=merge, **loading)
            if isinstance(model, ScoreModel):
                heads = {name: config.scorers[name].head for name in group if inputs.scorers[name] == spec}
                # Where it has one output, those of further streams start at zero.
                named = {name: head for name, head in heads.items() if name == stream or head is not None}
                return model, {name: find_output(spec.path, head, f"{name}.head") for name, head in named.items()}
            reason = "it is an encoder"
        log.info("the %s critic cannot start from %s (%s): it starts from the policy", stream, spec.path, reason)
    return ScoreModel.from_policy(inputs.policy_path, **loading), {stream: 0}


@dataclass(frozen=True)
class _Loaded:
    """A score model, and what it gave the last rollout by how it read it: template and longest text."""

    model: ScoreModel | EncoderClassifier
    module: nn.Module
    tokenizer: PreTrainedTokenizerBase
    last: dict[tuple[str, int], LastOutputs] = field(default_factory=dict)


@dataclass(frozen=True)
class ScorerLoader:
    """Loads where rewards and costs come from; the folder of a score model once, however many scorers read it.

    Attributes:
        engine: Stage and dtype of a score model.
        ranks: This process among all.
        attention: As for a policy.
        token_budget: Largest packed row or padded batch (tokens).
        folder: For the answers of a judge.
        shared: The frozen weights of the job's models.
    """

    engine: EngineConfig
    ranks: Ranks
    attention: str
    token_budget: int
    folder: Path
    shared: SharedWeights = field(default_factory=SharedWeights)
    # All of one dtype: the path, and whether they are quantised, tells them apart.
    _models: dict[tuple[str, str | None], _Loaded] = field(default_factory=dict)

    def load(self, name: str, spec: ScorerSpec, settings: ScorerConfig) -> Callable[[PromptTemplate], Scorer]:
        """Load one. All ranks must call it.

        Args:
            name: Of its column: `reward`, `cost`, or that of one of several costs.
            spec, settings: What and how.

        Returns:
            Makes the scorer for the rollouts of a policy from the policy's template. The model is loaded once.

        Raises:
            InputError: There is no such function or head, the model cannot be used, or does not give the score expected
                of it.
        """
        column, name = name, scorer_name(name)
        if spec.kind == "function":
            function = FunctionScorer(spec.path, name)
            return lambda _: function
        if spec.kind == "judge":
            judge = _judge(column, spec.path, settings.judge, self.ranks, self.folder)
            return lambda _: judge
        common: dict[str, Any] = {
            "name": name,
            "max_tokens": settings.max_tokens,
            "token_budget": self.token_budget,
            "device": self.ranks.device,
        }
        if self.engine.zero_stage == 3:
            # Sharded, every call is a collective; whole, a rank runs on its own.
            common["agree_on_count"] = self.ranks.max
        if spec.kind == "guard":
            return self._guard(spec, settings, common)
        return self._score_model(column, spec, settings, common)

    def _guard(
        self, spec: ScorerSpec, settings: ScorerConfig, common: dict[str, Any]
    ) -> Callable[[PromptTemplate], Scorer]:
        name = common["name"]
        loading = loading_options(self.attention, self.engine, self.ranks, settings.quantize)
        model = Policy.from_pretrained(spec.path, **loading).requires_grad_(False)
        self.shared.take(f"the {name} guard", model.model)
        guarding = Engine(model, self.engine, self.ranks)
        settle_policy(f"the {name} guard", guarding, self.attention, self.ranks)
        tokenizer, backend = load_tokenizer(spec.path, must_end=False), self.engine.ops_backend

        def guard_scorer(policy: PromptTemplate) -> Scorer:
            guard = Guard(tokenizer, settings.guard, name, policy.date)
            return GuardScorer(guarding.frozen_module, guard, backend=backend, **common)

        return guard_scorer

    def _score_model(
        self, column: str, spec: ScorerSpec, settings: ScorerConfig, common: dict[str, Any]
    ) -> Callable[[PromptTemplate], Scorer]:
        name, role = common["name"], "reward" if column in ("reward", SECOND_REWARD) else "cost"
        output = find_output(spec.path, settings.head, f"the head of the {name}")
        key = (spec.path, settings.quantize)
        if key in self._models:
            log.info("%s", load_line(spec.path, role))
        else:
            self._models[key] = self._load(*key, role, name)
        loaded = self._models[key]
        module, tokenizer = loaded.module, loaded.tokenizer
        if settings.expect is not None:
            text, expected = settings.expect
            device = self.ranks.device
            check_expected_score(lambda text: score_text(module, tokenizer, text, device, output), text, expected, name)
        reads = (settings.template, settings.max_tokens)
        last = loaded.last.setdefault(reads, LastOutputs(max(1, len(output_names(spec.path)))))
        common |= {"output": output, "last": last}
        if isinstance(loaded.model, EncoderClassifier):
            classifier = ClassifierScorer(module, tokenizer, **common)
            return lambda _: classifier

        def scorer(policy: PromptTemplate) -> Scorer:
            return ModelScorer(module, PromptTemplate(tokenizer, settings.template, policy.date), policy, **common)

        return scorer

    def _load(self, path: str, quantize: str | None, role: Role, name: str) -> _Loaded:
        loading = loading_options(self.attention, self.engine, self.ranks, quantize)
        model = load_score_model(path, role=role, merge=_merges(path, quantize, self.shared), **loading)
        tokenizer = load_tokenizer(path, must_end=not isinstance(model, EncoderClassifier))
        if isinstance(model, ScoreModel):
            self.shared.take(f"the {name} model", model.requires_grad_(False).trunk)
        frozen = Engine(model, self.engine, self.ranks)
        if isinstance(model, ScoreModel):
            settle_scores(f"the {name} model", frozen, model.score_head, self.attention, self.ranks)
        return _Loaded(model, frozen.frozen_module, tokenizer)


def _judge(column: str, model: str, settings: RubricConfig, ranks: Ranks, folder: Path) -> JudgedScorer:
    """A rank's own, with its share of the budget; the first rank's is tried.

    A run that goes on may have had more ranks, or fewer: the answers of all count.
    """
    file = folder / f"{column}-rank{ranks.rank}.jsonl"
    with ranks.together("the answers of a judge"):
        share = None if settings.budget is None else settings.budget / ranks.size
        own = replace(settings, budget=share)
        others = sorted(other for other in folder.glob(f"{column}-rank*.jsonl") if other != file)
        judge = JudgedScorer(model, own, scorer_name(column), file, others, ranks.size)
    # All have read what there was.
    with ranks.together("the judge"):
        if ranks.is_first:
            judge.probe()
    return judge
