"""The example inside TRL: without costs it is TRL's own loss, with costs it is RePO's. Models are tiny and random."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="needs examples/trl_grpo/requirements.txt")

from peft import LoraConfig, get_peft_model  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from examples.trl_grpo import train as example  # noqa: E402
from examples.trl_grpo.rectified_grpo import RectifiedGRPOTrainer  # noqa: E402
from repo_fast.ops import rectified_policy_loss  # noqa: E402
from tests.groups import in_group  # noqa: E402

FLOAT32 = 1e-5  # the contract's bound on losses and, norm-wise, on gradients
B, P, L = 6, 3, 7  # completions of a micro-batch, prompt tokens, completion tokens
GENERATIONS = 2


def arguments(folder: Any, **settings: Any) -> GRPOConfig:
    defaults = dict(
        output_dir=str(folder),
        reward_weights=[1.0, 0.0],
        scale_rewards="none",
        num_generations=GENERATIONS,
        per_device_train_batch_size=B,
        per_device_eval_batch_size=B,
        max_completion_length=L + 2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    return GRPOConfig(**{**defaults, **settings})


def make_policy(seed: int = 0) -> torch.nn.Module:
    """Logits of order 1, so that distributions are far from uniform."""
    torch.manual_seed(seed)
    policy = example.make_policy(example.make_tokenizer())
    with torch.no_grad():
        policy.lm_head.weight.mul_(10)
    return policy


def make_trainer(
    folder: Any, policy: Any = None, kind: type[GRPOTrainer] = RectifiedGRPOTrainer, multiplier: float = 0.0, **settings
) -> GRPOTrainer:
    own = {"multiplier": multiplier, "threshold": example.THRESHOLD} if kind is RectifiedGRPOTrainer else {}
    trainer = kind(
        copy.deepcopy(policy) if policy is not None else make_policy(),
        [example.helpfulness, example.harm],
        arguments(folder, **settings),
        train_dataset=example.make_prompts(12),
        processing_class=example.make_tokenizer(),
        **own,
    )
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps  # train() sets it
    trainer.model.train()
    return trainer


def make_batch(trainer: GRPOTrainer, seed: int = 1) -> dict[str, Tensor]:
    """A micro-batch as TRL hands it to the loss: padded on both sides, one completion wholly masked."""
    g = torch.Generator().manual_seed(seed)
    words = len(trainer.processing_class)
    lengths = torch.tensor([L, 1, 4, L, 0, 3])
    return {
        "prompt_ids": torch.randint(3, words, (B, P), generator=g),
        "prompt_mask": (torch.arange(P) >= torch.tensor([0, 1, 0, 2, 0, 1])[:, None]).long(),
        "completion_ids": torch.randint(3, words, (B, L), generator=g),
        "completion_mask": (torch.arange(L) < lengths[:, None]).long(),
        "advantages": torch.randn(B, generator=g),
        "cost_advantages": torch.randn(B, generator=g),
        "violations": torch.tensor([0.3, 0.3, -0.2, -0.2, 0.1, 0.1]),
        "num_items_in_batch": torch.tensor(2 * lengths.sum().item() + 5),
    }


def off_policy(trainer: GRPOTrainer, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with old log-probabilities from which the policy has moved, some of it out of the clip range."""
    g = torch.Generator().manual_seed(2)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        log_probs, _, _ = GRPOTrainer._get_per_token_logps_and_entropies(trainer, trainer.model, ids, mask, L)
    return {**batch, "old_per_token_logps": log_probs + 0.3 * torch.randn(B, L, generator=g)}


def loss_and_gradients(trainer: GRPOTrainer, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def assert_same(ours: tuple[float, dict[str, Tensor]], theirs: tuple[float, dict[str, Tensor]], scale: float) -> None:
    """Losses within the contract's bound on `scale`, the mean |ℓ_t|; gradients norm-wise, over all parameters."""
    assert abs(ours[0] - theirs[0]) <= FLOAT32 * scale
    assert ours[1].keys() == theirs[1].keys()
    flat, flat_theirs = (torch.cat([grads[name].flatten() for name in theirs[1]]) for grads in (ours[1], theirs[1]))
    assert flat_theirs.norm() > 0
    assert (flat - flat_theirs).norm() <= FLOAT32 * flat_theirs.norm()


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("variant", ["on_policy", "off_policy", "tools", "sampler", "evaluation"])
def test_without_multiplier_it_is_trls_own_loss(tmp_path, loss_type, variant):
    settings = dict(loss_type=loss_type, gradient_accumulation_steps=3, epsilon=0.1, epsilon_high=0.3, temperature=0.7)
    settings |= dict(steps_per_generation=6)
    policy = make_policy()
    ours = make_trainer(tmp_path, policy, **settings)
    theirs = make_trainer(tmp_path, policy, GRPOTrainer, **settings)
    batch = make_batch(ours)
    if variant == "off_policy":
        batch = off_policy(theirs, batch)
    elif variant == "tools":
        batch["tool_mask"] = (torch.arange(L) % 3 != 1).long().expand(B, L)
    elif variant == "sampler":
        batch["importance_sampling_ratio"] = torch.linspace(0.5, 2, B)[:, None]
        ours.use_vllm = theirs.use_vllm = True
        theirs.vllm_importance_sampling_correction = True
    elif variant == "evaluation":
        ours.model.eval()
        theirs.model.eval()
    ours.model.lm_head.register_forward_hook(lambda *_: pytest.fail("the [T, V] logits were made"))
    scale = batch["advantages"].abs().mean().item()
    assert_same(loss_and_gradients(ours, batch), loss_and_gradients(theirs, batch), scale)
    mode = "eval" if variant == "evaluation" else "train"
    for name in ("entropy", "clip_ratio/region_mean"):
        assert ours._metrics[mode][name] == pytest.approx(theirs._metrics[mode][name], rel=FLOAT32)
    if variant == "off_policy":
        assert ours._metrics[mode]["clip_ratio/region_mean"][0] > 0


def test_in_mixed_precision_it_is_as_exact_as_trl(tmp_path):
    """bfloat16: at most twice the error that TRL's loss in that dtype has against float32, as the contract says."""
    policy = make_policy()

    def gradients(kind: type[GRPOTrainer], bf16: bool) -> Tensor:
        trainer = make_trainer(tmp_path, policy, kind, bf16=bf16)
        _, by_name = loss_and_gradients(trainer, make_batch(trainer))
        return torch.cat([gradient.flatten() for gradient in by_name.values()])

    truth = gradients(GRPOTrainer, bf16=False)
    ours, theirs = ((gradients(kind, bf16=True) - truth).norm() for kind in (RectifiedGRPOTrainer, GRPOTrainer))
    assert 0 < ours <= 2 * theirs


def test_kl_penalty_is_trls(tmp_path):
    make_policy(seed=3).save_pretrained(tmp_path / "reference")
    policy = type(make_policy()).from_pretrained(tmp_path / "reference")  # TRL's reference is read from its folder
    settings = dict(beta=0.2, use_bias_correction_kl=False)
    ours = make_trainer(tmp_path, policy, **settings)
    theirs = make_trainer(tmp_path, policy, GRPOTrainer, **settings)
    batch = off_policy(theirs, make_batch(ours))
    batch["ref_per_token_logps"] = batch["old_per_token_logps"] + 0.1
    assert_same(loss_and_gradients(ours, batch), loss_and_gradients(theirs, batch), scale=1)
    assert ours._metrics["train"]["kl"] == pytest.approx(theirs._metrics["train"]["kl"], rel=FLOAT32)


def _gradients_of_a_rank(rank: int, folder: Path) -> None:
    trainer = make_trainer(folder, multiplier=1.0, loss_type="bnpo")
    wrapped = torch.nn.parallel.DistributedDataParallel(trainer.model)
    trainer._compute_loss(wrapped, make_batch(trainer, seed=rank)).backward()
    torch.save({name: p.grad for name, p in trainer.model.named_parameters()}, folder / f"{rank}.pt")


@pytest.mark.slow
def test_distributed_data_parallel_averages_the_gradients(tmp_path):
    in_group(2, _gradients_of_a_rank, tmp_path)
    trainer = make_trainer(tmp_path, multiplier=1.0, loss_type="bnpo")
    parts = [loss_and_gradients(trainer, make_batch(trainer, seed=rank))[1] for rank in range(2)]
    mean = {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
    for rank in range(2):
        assert_same((0.0, torch.load(tmp_path / f"{rank}.pt")), (0.0, mean), scale=1)


def test_lora_on_a_frozen_head_is_trls(tmp_path):
    policy = get_peft_model(make_policy(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # LoRA starts as the base model, with no gradient to lora_A
    ours, theirs = (make_trainer(tmp_path, policy, kind) for kind in (RectifiedGRPOTrainer, GRPOTrainer))
    batch = off_policy(theirs, make_batch(ours))
    gradients = loss_and_gradients(ours, batch)
    assert gradients[1] and all("lora" in name for name in gradients[1])
    assert_same(gradients, loss_and_gradients(theirs, batch), scale=batch["advantages"].abs().mean().item())


def test_log_probs_are_trls_and_those_of_the_loss(tmp_path):
    trainer = make_trainer(tmp_path, multiplier=1.0)
    batch = make_batch(trainer)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        ours, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, L, batch_size=4)
        whole, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, L)
        theirs, _, _ = GRPOTrainer._get_per_token_logps_and_entropies(trainer, trainer.model, ids, mask, L)
    torch.testing.assert_close(ours, theirs, atol=FLOAT32, rtol=FLOAT32)
    assert loss_and_gradients(trainer, {**batch, "old_per_token_logps": whole})[0] == pytest.approx(
        loss_and_gradients(trainer, batch)[0], abs=FLOAT32
    )
    assert trainer._metrics["train"]["clip_ratio/region_mean"] == [0.0, 0.0]


def test_on_policy_the_rectified_gradient_is_that_of_combined_advantages(tmp_path):
    """At ρ = 1 nothing is clipped, and RePO's two streams have the gradient of w_r·A_r − w_c·A_c."""
    multiplier, policy = 2.0, make_policy()
    ours = make_trainer(tmp_path, policy, multiplier=multiplier)
    theirs = make_trainer(tmp_path, policy, GRPOTrainer)
    batch = make_batch(ours)
    unsafe = batch["violations"] > 0
    combined = (batch["advantages"] - multiplier * batch["cost_advantages"]) / (1 + multiplier)
    expected = {**batch, "advantages": torch.where(unsafe, combined, batch["advantages"])}
    assert_same(loss_and_gradients(ours, batch), loss_and_gradients(theirs, expected), scale=1)
    assert ours._metrics["train"]["unsafe_fraction"] == [pytest.approx(unsafe.float().mean().item())]


def test_off_policy_the_two_streams_are_clipped_each_on_its_own(tmp_path):
    trainer = make_trainer(tmp_path, multiplier=2.0, loss_type="bnpo")
    batch = off_policy(trainer, make_batch(trainer))
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        log_probs, _, _ = GRPOTrainer._get_per_token_logps_and_entropies(trainer, trainer.model, ids, mask, L)
    expected = rectified_policy_loss(
        log_probs.flatten(),
        batch["old_per_token_logps"].flatten(),
        batch["advantages"].repeat_interleave(L),
        batch["cost_advantages"].repeat_interleave(L),
        torch.arange(B).repeat_interleave(L).masked_fill(batch["completion_mask"].flatten() == 0, -1),
        batch["violations"],
        multiplier=2.0,
        reduction="token_mean",
        backend="torch",
    )
    assert expected.clip_fraction > 0
    assert loss_and_gradients(trainer, batch)[0] == pytest.approx(expected.loss.item(), abs=FLOAT32)


def test_every_completion_gets_its_prompts_violation(tmp_path):
    trainer = make_trainer(tmp_path, multiplier=1.0)
    prompts = trainer.train_dataset["prompt"][: B // GENERATIONS]
    batch = trainer._generate_and_score_completions([{"prompt": p} for p in prompts for _ in range(GENERATIONS)])
    words = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    costs = torch.tensor(example.harm(words)).view(-1, GENERATIONS)
    mean = costs.mean(1, keepdim=True).expand_as(costs)
    assert costs.any()
    torch.testing.assert_close(batch["violations"], (mean - example.THRESHOLD).flatten())
    torch.testing.assert_close(batch["cost_advantages"], (costs - mean).flatten())
    rewards = torch.tensor(example.helpfulness(words)).view(-1, GENERATIONS)  # the cost is no part of the reward
    torch.testing.assert_close(batch["advantages"], (rewards - rewards.mean(1, keepdim=True)).flatten())


def test_a_cost_does_not_stand_in_for_a_missing_reward(tmp_path):
    trainer = make_trainer(tmp_path, multiplier=1.0)
    trainer.reward_funcs[0] = lambda completions, **_: [None, *[1.0] * (len(completions) - 1)]
    batch = trainer._generate_and_score_completions([{"prompt": "how do i"}] * GENERATIONS * 2)
    assert batch["advantages"].tolist() == [0.0] * GENERATIONS * 2


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_missing_cost_is_an_error(tmp_path, missing):
    trainer = make_trainer(tmp_path, multiplier=1.0)
    trainer.reward_funcs[1] = lambda completions, **_: [missing, *[0.0] * (len(completions) - 1)]
    with pytest.raises(ValueError, match="harm returned None or NaN"):
        trainer._generate_and_score_completions([{"prompt": "how do i"}] * GENERATIONS)


@pytest.mark.parametrize(
    "settings",
    [
        dict(loss_type="cispo"),
        dict(importance_sampling_level="sequence"),
        dict(delta=1.5),
        dict(top_entropy_quantile=0.2),
        dict(entropy_coef=0.01),
        dict(off_policy_mask_threshold=0.5),
        dict(scale_rewards="group"),
        dict(multi_objective_aggregation="normalize_then_sum"),
        dict(reward_weights=[1.0, 1.0]),
        dict(reward_weights=None),
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_it_cannot_honour_is_an_error(tmp_path, settings):
    with pytest.raises(ValueError, match=f"RectifiedGRPOTrainer: {next(iter(settings))}=.* is not supported"):
        make_trainer(tmp_path, multiplier=1.0, **settings)


def test_a_model_that_changes_its_logits_is_an_error(tmp_path):
    policy = make_policy()
    policy.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping=30.0 is not supported"):
        make_trainer(tmp_path, policy, multiplier=1.0)


def test_reward_scaling_is_fine_without_a_multiplier(tmp_path):
    make_trainer(tmp_path, multiplier=0.0, scale_rewards="group")


def test_training_makes_useful_completions_that_are_safe(tmp_path):
    """The example itself: with λ the cost stays about the threshold, without it is several times that."""
    rectified, rewarded = (example.train(40, multiplier, str(tmp_path)) for multiplier in (5.0, 0.0))
    last = {name: sum(row[f"rewards/{name}/mean"] for row in rectified[-5:]) / 5 for name in ("helpfulness", "harm")}
    assert last["helpfulness"] > 1.2 * rectified[0]["rewards/helpfulness/mean"]
    assert last["harm"] < 1.5 * example.THRESHOLD
    assert rewarded[-1]["rewards/harm/mean"] > 3 * example.THRESHOLD
    assert rectified[0]["rewards/harm/mean"] == rewarded[0]["rewards/harm/mean"]  # the same start
