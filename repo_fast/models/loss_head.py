"""The language-model head that computes a loss where its weight is.

Under ZeRO-3 a parameter is whole only while the module that owns it runs. So whatever needs the LM head's weight, and
must not build the [T, V] logits, has to run inside the head's own forward: DeepSpeed then gathers the weight before,
and the gradient hook fires after. A loaded model's head becomes a `LossHead` by assigning `__class__`, which keeps its
parameters, its place in the model, and its being tied to the embedding.

What a model makes of the products of hidden states and head (a scale, a cap, a bias) is part of its log-probabilities:
a loss is handed a `Projection`, which says so.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig

from repo_fast.errors import InputError
from repo_fast.ops import fused_rectified_policy_loss

# By transformers' names.
_FACTORS = ("logit_scale", "lm_head_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Divides, in all architectures (Granite's) but these.
_SCALING = "logits_scaling"
_SCALING_MULTIPLIES = ("hyperclovax",)
# Columns that a bias takes, of which all but one are zero: so many keep rows of the weight aligned.
_BIAS_COLUMNS = 8
# The ops take caps of up to 2**24 temperatures.
_HIGHEST = 1e4


class LogitSettings(NamedTuple):
    """What becomes of the products z = h·Wᵀ: `logit_scale`·z, and of that softcap·tanh(that / softcap)."""

    logit_scale: float = 1.0
    softcap: float | None = None


class Projection(NamedTuple):
    """From hidden states to logits, as the ops take it.

    Attributes:
        weight: [V, D].
        settings: What becomes of the products.
    """

    weight: torch.Tensor
    settings: LogitSettings = LogitSettings()

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the linear ops."""
        return self.settings._asdict()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, V] float32 of hidden states [T, D]: for a few, where all of them are wanted."""
        logits = self.settings.logit_scale * (hidden.float() @ self.weight.float().T)
        cap = self.settings.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def logit_settings(path: str, config: PretrainedConfig, kind: type) -> LogitSettings:
    """What a causal language model makes of its logits, as its configuration says.

    A configuration may have settings that its class does not look at, of which transformers makes nothing. Whether the
    model then does what was found is for `settle_policy` to see.

    Args:
        path: Folder or hub name, for the message.
        config: Its configuration.
        kind: The model's class.

    Raises:
        InputError: A setting is not a number above 0, or above 1e4.
    """
    text = config.get_text_config()
    own = [base for base in kind.__mro__ if base.__module__.startswith("transformers.models.")]
    source = "".join(inspect.getsource(base) for base in own)
    names = (*_FACTORS, _SCALING, *_CAPS)
    found = {name: getattr(text, name, None) if name in source else None for name in names}
    for name, value in found.items():
        if value is not None and not (isinstance(value, int | float) and 0 < value <= _HIGHEST):
            raise InputError(f"{path!r} has {name} = {value!r}, expected a number above 0, at most {_HIGHEST:g}")
    scale, cap = 1.0, None
    for name in _FACTORS:
        scale *= 1.0 if found[name] is None else found[name]
    if (scaling := found[_SCALING]) is not None:
        scale *= scaling if text.model_type in _SCALING_MULTIPLIES else 1 / scaling
    for name in _CAPS:
        cap = cap if found[name] is None else float(found[name])
    return LogitSettings(scale, cap)


class LossHead(nn.Linear):
    """`nn.Linear` that can hand its weight to a loss instead of multiplying by it.

    Attributes:
        settings: What the model makes of the products; of those that it gets without a loss it does so itself.
    """

    settings = LogitSettings()

    def forward(self, hidden: torch.Tensor, loss: Callable[[torch.Tensor, Projection], Any] | None = None) -> Any:
        """Products, or what a loss makes of hidden states and weight.

        Args:
            hidden: [..., D] without `loss`; [T, D] with one.
            loss: Called as `loss(hidden, projection)` with the weight whole. A bias is columns of it, which hidden
                states have ones for: for the time of the loss, and of its backward, that is a copy of the weight.

        Returns:
            [..., V], or the loss's own return value.
        """
        if loss is None:
            return super().forward(hidden)
        weight = self.weight
        if self.bias is not None:
            columns = hidden.new_zeros(hidden.shape[0], _BIAS_COLUMNS)
            columns[:, 0] = 1.0
            hidden = torch.cat([hidden, columns], 1)
            weight = torch.cat([weight, F.pad(self.bias.unsqueeze(1), (0, _BIAS_COLUMNS - 1))], 1)
        return loss(hidden, Projection(weight, self.settings))


def summed_cross_entropy(
    hidden: torch.Tensor, projection: Projection, targets: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    """The negative log-likelihood of the targets, summed: what supervised losses need, at three matrix products.

    -sum log p has the gradient of the policy loss, on-policy, where every reward advantage is 1: the fused op knows it
    in its forward, where a cross-entropy made of `linear_log_probs` would have to compute the logits again.

    Args:
        hidden: [T, D].
        projection: Its weight in the dtype of `hidden`.
        targets: [T] int64; -100 is ignored.
        backend: Of the op.

    Returns:
        Scalar, float32, in nats, with gradients to `hidden` and the weight; one backward.
    """
    T = targets.shape[0]
    result = fused_rectified_policy_loss(
        hidden,
        projection.weight,
        targets,
        old_log_probs=None,
        reward_advantages=hidden.new_ones(T, dtype=torch.float32),
        cost_advantages=hidden.new_zeros(T, dtype=torch.float32),
        sequence_ids=torch.zeros_like(targets),
        costs=None,
        prompt_ids=None,
        violations=hidden.new_zeros(1, dtype=torch.float32),
        multiplier=0.0,
        entropy=False,
        reduction="sum",
        backend=backend,
        **projection.options,
    )
    # The op's loss is the sum of -ratio = -1; its gradient is what is wanted of it.
    return (result.loss - result.loss.detach()) - result.log_probs.sum()
