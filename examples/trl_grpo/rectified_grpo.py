"""TRL's GRPOTrainer with RePO's rectified loss, computed by `repo_fast.ops` without the [T, V] logits.

Written for trl 1.16.0, of which it overrides four private methods. Generation, scoring, logging, checkpoints and the
optimizer stay TRL's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import _ForwardRedirection

from repo_fast.ops import PolicyLoss, fused_rectified_policy_loss, linear_log_probs, prompt_violations

_REDUCTIONS = {"grpo": "sequence_mean", "bnpo": "token_mean", "dr_grpo": "token_mean", "dapo": "token_mean"}

# Settings that change the loss in a way the op does not know, each with the one value under which they do not.
_NEUTRAL = {
    "importance_sampling_level": "token",
    "delta": None,
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "off_policy_mask_threshold": None,
    "torch_compile": False,
}

# Settings by which a model changes its logits after the head, which the op would leave out.
_NEUTRAL_LOGITS = {
    "final_logit_softcapping": None,
    "logits_soft_cap": None,
    "output_logit_soft_cap": None,
    "logit_scale": 1,
    "logits_scaling": 1,
    "lm_head_multiplier": 1,
    "output_multiplier": 1,
}


class RectifiedGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose last reward function is a cost, and whose loss is RePO's (arXiv 2410.19933).

    A prompt is unsafe where the mean cost of its completions is above the threshold. Completions of safe prompts learn
    from the reward alone, those of unsafe ones from (reward − λ·cost)/(1 + λ), each stream clipped on its own.
    `multiplier=0` is GRPO as TRL has it.

    Args:
        *arguments: As of GRPOTrainer.
        multiplier: λ >= 0, constant.
        threshold: d, in units of cost.
        **options: As of GRPOTrainer. The last of `reward_funcs` returns costs; its reward weight must be 0, and
            `scale_rewards` "none", so that rewards and costs keep their units, unless the multiplier is 0.

    Raises:
        ValueError: A setting that this trainer cannot honour; or, while training, a cost that is None or NaN.
    """

    def __init__(self, *arguments: Any, multiplier: float, threshold: float = 0.0, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.multiplier = multiplier
        self.threshold = threshold
        self._check_settings(self.args)

    def _check_settings(self, args: GRPOConfig) -> None:
        def require(fine: bool, setting: str, expected: str) -> None:
            if not fine:
                raise ValueError(f"RectifiedGRPOTrainer: {setting} is not supported, expected {expected}")

        require(self.multiplier >= 0, f"multiplier={self.multiplier}", ">= 0")
        require(self.loss_type in _REDUCTIONS, f"loss_type={self.loss_type!r}", f"one of {list(_REDUCTIONS)}")
        for name, neutral in _NEUTRAL.items():
            value = getattr(args, name)
            require(value == neutral, f"{name}={value!r}", repr(neutral))
        weights = self.reward_weights.tolist()
        require(len(weights) > 1 and weights[-1] == 0, f"reward_weights={weights}", "0 for the last, the cost's")
        require(
            self.multiplier == 0 or self.scale_rewards == "none",
            f"scale_rewards={self.scale_rewards!r} with a multiplier",
            "'none': λ weighs costs against rewards in their own units",
        )
        require(
            self.multiplier == 0 or self.multi_objective_aggregation == "sum_then_normalize",
            f"multi_objective_aggregation={self.multi_objective_aggregation!r} with a multiplier",
            "'sum_then_normalize'",
        )
        require(self.beta == 0 or not args.use_bias_correction_kl, "use_bias_correction_kl=True with beta > 0", "False")
        # The op's factor is on all of a token's loss, TRL's leaves out the KL penalty.
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        require(
            not (corrected and self.beta > 0), "vllm_importance_sampling_correction with beta > 0", "one of the two"
        )
        require(not self.aux_loss_enabled, "a mixture of experts' auxiliary loss", "router_aux_loss_coef=0")
        require(not self._is_vlm, "a vision-language model", "a text model")
        # Where the weights are sharded, the LM head's is not whole outside of the head's own forward.
        require(not (self.is_fsdp_enabled or self.is_deepspeed_enabled), "FSDP or DeepSpeed", "one process or DDP")
        model = self.accelerator.unwrap_model(self.model)
        peft = getattr(model, "active_peft_config", None)
        require(peft is None or not peft.is_prompt_learning, "a prompt-learning adapter", "a LoRA-like one")
        head = model.get_output_embeddings()
        require(getattr(head, "bias", None) is None, "an LM head with a bias", "none")
        config = model.config.get_text_config()
        for name, neutral in _NEUTRAL_LOGITS.items():
            value = getattr(config, name, None)
            require(value in (None, neutral), f"a model with {name}={value}", repr(neutral))

    def _calculate_rewards(self, *arguments: Any) -> Tensor:
        scores = super()._calculate_rewards(*arguments)  # [completions of all ranks, reward functions]
        self._costs = scores[:, -1].clone()
        if self._costs.isnan().any():
            raise ValueError(f"{self.reward_func_names[-1]} returned None or NaN, expected a cost for every completion")
        # TRL leaves out completions that no function scored: a cost must not make them ones of reward 0.
        scores[scores[:, :-1].isnan().all(1), -1] = torch.nan
        return scores

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        generations = self.num_generations if self.model.training else self.num_generations_eval
        # Here, because a prompt's completions lie on several ranks, and are shuffled into several micro-batches.
        prompt_ids = torch.arange(len(self._costs), device=self._costs.device) // generations
        violations = prompt_violations(self._costs, prompt_ids, threshold=self.threshold)
        cost_advantages = self._costs - (violations + self.threshold)  # minus the prompt's mean
        first = self.accelerator.process_index * len(inputs)
        batch["violations"] = violations[first : first + len(inputs)]
        batch["cost_advantages"] = cost_advantages[first : first + len(inputs)]
        return batch

    def _at_head(
        self,
        function: Callable[[Tensor, Tensor, Tensor], Any],
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        targets: Tensor,
    ) -> Any:
        """function(hidden [T, D], weight [V, D], targets [T]) for the states that predict `targets`, [B, L]: T = B·L.

        It runs inside of the forward of what wraps the model, which DistributedDataParallel needs.
        """
        causal_lm = self.accelerator.unwrap_model(model)
        causal_lm = getattr(causal_lm, "get_base_model", lambda: causal_lm)()  # of a PeftModel; its layers are in place

        def run(input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
            with self.accelerator.autocast():
                hidden = causal_lm.base_model(input_ids, attention_mask, use_cache=False).last_hidden_state
            hidden = hidden[:, -targets.shape[1] - 1 : -1].flatten(0, 1)
            weight = causal_lm.get_output_embeddings().weight
            # In mixed precision the head is one more layer that runs in the narrow type, unless it was cast.
            mixed = self.accelerator.mixed_precision != "no" and not self.args.cast_lm_head_to_fp32
            dtype = torch.get_autocast_dtype(hidden.device.type) if mixed else weight.dtype
            return function(hidden.to(dtype), weight.to(dtype), targets.flatten())

        return _ForwardRedirection()(model, causal_lm, run, input_ids=input_ids, attention_mask=attention_mask)

    # Old and reference log-probabilities by the loss's own arithmetic, so that the head alone never moves a ratio.
    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **no_images: Any,
    ) -> tuple[Tensor, None, None]:
        rows = batch_size or len(input_ids)
        targets = input_ids.masked_fill(attention_mask == 0, -100)[:, -logits_to_keep:]
        log_probs = partial(linear_log_probs, temperature=self.temperature)
        batches = zip(input_ids.split(rows), attention_mask.split(rows), targets.split(rows), strict=True)
        parts = [self._at_head(log_probs, model, *batch) for batch in batches]
        return torch.cat(parts).view(targets.shape), None, None

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        completion_ids, completion_mask = inputs["completion_ids"], inputs["completion_mask"]
        mask = completion_mask * inputs.get("tool_mask", 1)
        B, L = mask.shape

        def per_token(name: str) -> Tensor | None:  # [B], [B, 1] or [B, L] -> [T]
            return inputs[name].reshape(B, -1).expand(B, L).flatten() if name in inputs else None

        loss = partial(
            fused_rectified_policy_loss,
            old_log_probs=per_token("old_per_token_logps"),
            reward_advantages=per_token("advantages"),
            cost_advantages=per_token("cost_advantages"),
            sequence_ids=torch.arange(B, device=mask.device).repeat_interleave(L),
            costs=None,
            prompt_ids=None,
            violations=inputs["violations"],
            multiplier=self.multiplier,
            clip=(self.epsilon_low, self.epsilon_high),
            temperature=self.temperature,
            ref_log_probs=per_token("ref_per_token_logps"),
            kl_coefficient=self.beta,
            reduction=_REDUCTIONS[self.loss_type],
            denominator=self._denominator(inputs, mask),
            importance_weights=per_token("importance_sampling_ratio"),
        )
        result = self._at_head(
            loss,
            model,
            torch.cat([inputs["prompt_ids"], completion_ids], 1),
            torch.cat([inputs["prompt_mask"], completion_mask], 1),
            completion_ids.masked_fill(mask == 0, -100),
        )
        self._log_loss(result, mask, inputs)
        return result.loss

    def _denominator(self, inputs: dict[str, Any], mask: Tensor) -> float | Tensor:
        """What TRL divides the sum of the token losses by ("grpo": of the sequences' means), accumulation included."""
        training = self.model.training
        accumulation = self.current_gradient_accumulation_steps if training else 1
        if self.loss_type == "grpo":
            return len(mask) * accumulation
        if self.loss_type == "bnpo":
            return mask.sum().clamp(min=1) * accumulation
        if self.loss_type == "dr_grpo":
            return len(mask) * self.max_completion_length * accumulation
        # dapo: `num_items_in_batch` counts all that was generated, for `steps_per_generation` micro-batches a rank.
        share = accumulation / self.args.steps_per_generation if training else 1
        return inputs["num_items_in_batch"].clamp(min=1) * (share / self.accelerator.num_processes)

    def _log_loss(self, result: PolicyLoss, mask: Tensor, inputs: dict[str, Any]) -> None:
        """TRL's metrics of a loss, means over each rank's tokens; and the share of completions of unsafe prompts."""
        tokens = mask.sum().clamp(min=1)
        metrics = {
            "entropy": result.entropy.sum() / tokens,
            "clip_ratio/region_mean": result.clip_fraction,
            "unsafe_fraction": result.unsafe_fraction,
        }
        if self.beta > 0:
            log_ratio = inputs["ref_per_token_logps"] - result.log_probs.view(mask.shape)
            metrics["kl"] = ((log_ratio.exp() - log_ratio - 1) * mask).sum() / tokens
        for name, value in metrics.items():
            mode = "train" if self.model.training else "eval"
            self._metrics[mode][name].append(self.accelerator.gather(value).mean().item())
