"""Puts a run's models together: policy, reference, critics and scorers, each under an engine."""

import torch

from repo_fast.algorithm import ALGORITHMS
from repo_fast.collectives import Ranks
from repo_fast.config import ScorerConfig, TrainConfig
from repo_fast.data import PromptTemplate
from repo_fast.engine import Engine, resolve_dtype, sharded_loading
from repo_fast.experience import PackedBatch
from repo_fast.inputs import Inputs, load_tokenizer
from repo_fast.learner import Models
from repo_fast.models.policy import Policy
from repo_fast.models.score_model import ScoreModel
from repo_fast.models.trunk import attention_implementation, check_packing
from repo_fast.scoring import (
    ClassifierScorer,
    EncoderClassifier,
    FunctionScorer,
    ModelScorer,
    Scorer,
    ScorerSpec,
    load_score_model,
)
from repo_fast.scoring.score_models import same_tokens


def build_models(config: TrainConfig, inputs: Inputs, ranks: Ranks) -> tuple[Models, dict[str, Scorer]]:
    """Load every model of a run; under ZeRO-3 straight into shards. All ranks must call it.

    A critic starts from its stream's score model where that is a decoder with the policy's vocabulary, else from the
    policy's trunk with a zero head.

    Returns:
        The engines, and the scorers `reward` and `cost`.

    Raises:
        InputError: A model cannot be used.
    """
    dtype = resolve_dtype(config.engine, ranks.device)
    loading = {"dtype": dtype, "attention": attention_implementation(config.policy.attention, ranks.device, dtype)}
    steps = config.total_steps * config.update.epochs * config.update.minibatches
    specs = {"reward": inputs.reward, "cost": inputs.cost}
    settings = {"reward": config.reward, "cost": config.cost}
    streams = ("reward", "cost") if ALGORITHMS[config.algorithm.name].has_cost_stream else ("reward",)
    with sharded_loading(config.engine, ranks.device):
        policy = Policy.from_pretrained(inputs.policy_path, **loading)
        reference = Policy.from_pretrained(inputs.policy_path, **loading)
        scorers = {name: _scorer(name, specs[name], settings[name], config, inputs, ranks, loading) for name in specs}
        critics = {}
        if config.algorithm.advantage == "gae":
            critics = {stream: _critic(specs[stream], inputs, loading) for stream in streams}
    for critic in critics.values():
        # DeepSpeed trains parameters of one dtype; it keeps float32 masters, and the head computes in float32 anyway.
        critic.score_head.to(dtype)
    if config.policy.trainable_layers is not None:
        policy.train_last_layers(config.policy.trainable_layers)
    if config.engine.activation_checkpointing:
        for module in (policy.model, *(critic.trunk for critic in critics.values())):
            # Re-entrant: the other kind compares shapes with those of the first forward, and ZeRO-3 has released them.
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            module.enable_input_require_grads()
    models = Models(
        policy=Engine(policy, config.engine, ranks, config.policy_optimizer, steps),
        reference=Engine(reference, config.engine, ranks),
        critics={
            stream: Engine(critic, config.engine, ranks, config.critic_optimizer, steps)
            for stream, critic in critics.items()
        },
    )
    check_packing(lambda ids, positions: _last_state(models.policy, ids, positions), "the policy", ranks.device)
    return models, scorers


def _last_state(policy: Engine, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """One number of the state that would predict a token after the row."""
    last = torch.tensor([input_ids.numel() - 1], device=input_ids.device)
    batch = PackedBatch(input_ids, position_ids, predictors=last, targets=last, sequence_ids=last * 0, last=last)
    return policy(batch, lambda hidden, weight, _: hidden[0, 0].float())


def _critic(spec: ScorerSpec, inputs: Inputs, loading: dict) -> ScoreModel:
    if spec.kind == "model" and same_tokens(load_tokenizer(spec.path), inputs.tokenizer):
        model = load_score_model(spec.path, **loading)
        if isinstance(model, ScoreModel):
            return model
    return ScoreModel.from_policy(inputs.policy_path, **loading)


def _scorer(
    name: str,
    spec: ScorerSpec,
    settings: ScorerConfig,
    config: TrainConfig,
    inputs: Inputs,
    ranks: Ranks,
    loading: dict[str, torch.dtype | str],
) -> Scorer:
    if spec.kind == "function":
        return FunctionScorer(spec.path, name)
    model = load_score_model(spec.path, **loading)
    tokenizer = load_tokenizer(spec.path)
    common = {
        "name": name,
        "max_tokens": settings.max_tokens,
        "token_budget": config.update.micro_batch_tokens,
        "device": ranks.device,
        "agree_on_count": ranks.max,
    }
    module = Engine(model, config.engine, ranks).frozen_module
    if isinstance(model, EncoderClassifier):
        return ClassifierScorer(module, tokenizer, **common)
    return ModelScorer(module, PromptTemplate(tokenizer, settings.template), inputs.template, **common)
