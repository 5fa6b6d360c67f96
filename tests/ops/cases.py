"""Inputs for the tests of the ops, and the tolerances of the contract.

The oracle is `repo_fast.ops.reference` in float64 (itself checked in test_reference.py); plain PyTorch is the same code
in the dtype of the inputs, with a float32 softmax.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from repo_fast.ops import PolicyLoss, fused_rectified_policy_loss, linear_log_probs, reference

# log ρ, all far from where the clip range (0.2, 0.2) ends, so that rounding does not decide which branch is taken.
LOG_RATIOS = torch.tensor([-0.6, -0.05, 0.05, 0.6])


@dataclass(frozen=True)
class Case:
    """Inputs of the fused op. T tokens, of which some are ignored and some sequences have none at all."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    old_log_probs: Tensor
    reward_advantages: Tensor
    cost_advantages: Tensor
    sequence_ids: Tensor
    costs: Tensor
    prompt_ids: Tensor
    ref_log_probs: Tensor
    importance_weights: Tensor

    def wide(self) -> "Case":
        """The same numbers in float64."""
        fields = {name: value.detach().double() for name, value in vars(self).items() if value.is_floating_point()}
        return replace(self, **fields)

    def copy(self) -> "Case":
        """The same numbers, with leaves that want gradients."""
        leaves = {name: getattr(self, name).detach().clone().requires_grad_() for name in ("hidden", "weight")}
        return replace(self, **leaves)

    def arguments(self) -> tuple[Tensor, ...]:
        return (
            self.hidden,
            self.weight,
            self.targets,
            self.old_log_probs,
            self.reward_advantages,
            self.cost_advantages,
            self.sequence_ids,
            self.costs,
            self.prompt_ids,
        )


def make_case(
    seed: int = 0,
    T: int = 37,
    D: int = 24,
    V: int = 31,
    S: int = 5,
    dtype: torch.dtype = torch.float32,
    logits: str = "flat",
    ignored: float = 0.3,
    **head: Any,
) -> Case:
    """Random inputs with prompts interleaved. `head`: temperature and so on, of which the old log-probabilities are.

    `logits`: "flat", of order 1; "peaked", where one token has nearly all of the probability, often the target; "low",
    all near −40, where a vocabulary padded with zeros would win every row.
    """
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, V, (T,), generator=g)
    hidden = torch.randn(T, D, generator=g)
    weight = torch.randn(V, D, generator=g) / D**0.5
    if logits == "peaked":
        favourite = torch.where(torch.rand(T, generator=g) < 0.7, targets, torch.randint(0, V, (T,), generator=g))
        direction = weight[favourite]
        hidden = hidden + 25 * direction / direction.square().sum(1, keepdim=True)
    elif logits == "low" and D > 1:  # with one dimension all logits would be equal, and the gradient to hidden 0
        weight[:, 0] = 2.0
        hidden[:, 0] = -20.0
    targets[torch.rand(T, generator=g) < ignored] = -100
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    log_probs, _ = reference.linear_log_probs(hidden.double(), weight.double(), targets, **head)
    shift = LOG_RATIOS[torch.randint(0, 4, (T,), generator=g)]
    return Case(
        hidden=hidden,
        weight=weight,
        targets=targets,
        old_log_probs=(log_probs - shift).float(),
        reward_advantages=torch.randn(T, generator=g),
        cost_advantages=torch.randn(T, generator=g),
        sequence_ids=torch.randint(0, S, (T,), generator=g),
        costs=torch.randn(S, generator=g),
        prompt_ids=torch.randint(0, max(S // 2, 1), (S,), generator=g) * 7 - 3,
        ref_log_probs=(log_probs + 0.3 * torch.randn(T, generator=g)).float(),
        importance_weights=0.5 + torch.rand(T, generator=g),
    )


def with_streams(case: Case, K: int, seed: int = 0, exempt: bool = True) -> Case:
    """The case with K cost streams, which do not apply to some responses where `exempt`."""
    g = torch.Generator().manual_seed(seed)
    costs = torch.randn(K, case.costs.numel(), generator=g)
    if exempt:
        costs[torch.rand(costs.shape, generator=g) < 0.25] = -torch.inf
    return replace(case, costs=costs, cost_advantages=torch.randn(K, case.targets.numel(), generator=g))


def with_token_options(case: Case, options: dict[str, Any]) -> dict[str, Any]:
    """`options`, where True for a [T] tensor stands for the case's own."""
    own = {name: getattr(case, name) for name in ("ref_log_probs", "importance_weights") if options.get(name) is True}
    return {**options, **own}


def relative_error(value: Tensor, truth: Tensor) -> float:
    """‖value − truth‖ / ‖truth‖; 0 where both are 0."""
    error, size = (value.double() - truth).norm().item(), truth.norm().item()
    return error / size if size > 0 else error


def error(value: Tensor, truth: Tensor) -> float:
    return (value.double() - truth).norm().item()


def rounding(truth: Tensor) -> float:
    """The error of float32 numbers that are each one unit in the last place off.

    Where a cap makes all logits of a row one number, no rounding of 16 bits is left, and plain PyTorch's error is this.
    """
    return torch.finfo(torch.float32).eps * truth.norm().item()


def head_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those of `linear_log_probs`: what becomes of the products."""
    return {name: options[name] for name in ("temperature", "logit_scale", "softcap") if name in options}


def row_bound(case: Case, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """The contract's bound on a float32 log-probability's error: 1e-5·max(1, max_j |z_j|), [T]."""
    logits = logit_scale * (case.hidden.double() @ case.weight.double().T)
    logits = (logits if softcap is None else softcap * (logits / softcap).tanh()) / temperature
    return 1e-5 * logits.abs().amax(1).clamp(min=1) if logits.numel() else logits.new_zeros(logits.shape[0])


def run_reference(case: Case, options: dict[str, Any]) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """(loss, log_probs, entropy, violations), and the gradients to hidden and weight, in the case's dtype."""
    case = case.copy()
    options = with_token_options(case, options)
    arguments = list(case.arguments())
    if options.pop("on_policy", False):
        arguments[3] = None
    results = reference.fused_rectified_policy_loss(*arguments, **options)
    results[0].backward()
    return results, case.hidden.grad, case.weight.grad


def run_fused(case: Case, options: dict[str, Any]) -> tuple[PolicyLoss, Tensor, Tensor]:
    case = case.copy()
    options = with_token_options(case, options)
    arguments = list(case.arguments())
    if options.pop("on_policy", False):
        arguments[3] = None
    result = fused_rectified_policy_loss(*arguments, **options)
    result.loss.backward()
    return result, case.hidden.grad, case.weight.grad


def loss_scale(case: Case, options: dict[str, Any]) -> float:
    """The mean |ℓ_t| in the weights of the reduction (the sum, for "sum").

    The loss is linear in the importance weights, so its derivative with respect to them is each token's part of it.
    """
    wide = case.wide()
    options = with_token_options(wide, options)
    weights = options.get("importance_weights", torch.ones_like(wide.old_log_probs)).clone().requires_grad_()
    arguments = list(wide.arguments())
    if options.pop("on_policy", False):
        arguments[3] = None
    loss = reference.fused_rectified_policy_loss(*arguments, **{**options, "importance_weights": weights})[0]
    if not loss.requires_grad:  # no valid token
        return 0.0
    (parts,) = torch.autograd.grad(loss, weights)
    return (parts * weights).abs().sum().item()


def assert_fused_is_exact(case: Case, options: dict[str, Any]) -> None:
    """Values and gradients of the fused op against float64, within the tolerances of the contract."""
    result, grad_hidden, grad_weight = run_fused(case, options)
    (loss, log_probs, entropy, violations), wide_hidden, wide_weight = run_reference(case.wide(), options)
    plain, plain_hidden, plain_weight = run_reference(case, options)
    assert (result.log_probs <= 0).all()
    torch.testing.assert_close(result.violations.double(), violations.double(), atol=1e-6, rtol=1e-6)
    scale = loss_scale(case, options)
    if case.hidden.dtype == torch.float32:
        bound = row_bound(case, **head_options(options))
        assert ((result.log_probs - log_probs).abs() <= bound).all()
        assert ((result.entropy - entropy).abs() <= bound).all()
        assert abs(result.loss.item() - loss.item()) <= 1e-5 * scale
        floor = 1e-5
    else:
        assert error(result.log_probs, log_probs) <= max(2 * error(plain[1], log_probs), rounding(log_probs))
        assert error(result.entropy, entropy) <= max(2 * error(plain[2], entropy), 1e-5)
        # A single number's error can be 0 by luck. So: twice what plain PyTorch's errors in log p and H can do to it.
        slack = (plain[1] - log_probs).abs().max() + (plain[2] - entropy).abs().max()
        assert abs(result.loss.item() - loss.item()) <= 2 * scale * slack.item() + 1e-5 * scale
        floor = 0.0
    for value, truth, ordinary in (
        (grad_hidden, wide_hidden, plain_hidden),
        (grad_weight, wide_weight, plain_weight),
    ):
        assert value.dtype == case.hidden.dtype
        assert relative_error(value, truth) <= max(floor, 2 * relative_error(ordinary, truth))


def assert_log_probs_are_exact(case: Case, temperature: float, seed: int = 0, **head: Any) -> None:
    """Values and gradients of `linear_log_probs` against float64, within the tolerances of the contract.

    Args:
        case, temperature: What it is given.
        seed: Of the incoming gradients.
        head: `logit_scale` and `softcap`.
    """
    head = {"temperature": temperature, **head}
    g = torch.Generator().manual_seed(seed)
    T = case.targets.numel()
    up = torch.randn(2, T, generator=g)

    def gradients(inputs: Case, function: Any) -> tuple[Tensor, ...]:
        inputs = inputs.copy()
        log_probs, entropy = function(inputs.hidden, inputs.weight, inputs.targets)
        ((log_probs * up[0]).sum() + (entropy * up[1]).sum()).backward()
        return log_probs.detach(), entropy.detach(), inputs.hidden.grad, inputs.weight.grad

    def naive(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        return reference.linear_log_probs(*arguments, **head)

    ours = gradients(case, lambda *x: linear_log_probs(*x, **head, return_entropy=True))
    truth = gradients(case.wide(), naive)
    plain = gradients(case, naive)
    assert (ours[0] <= 0).all()
    if case.hidden.dtype == torch.float32:
        bound = row_bound(case, **head)
        assert ((ours[0] - truth[0]).abs() <= bound).all()
        assert ((ours[1] - truth[1]).abs() <= bound).all()
        floor = 1e-5
    else:
        assert error(ours[0], truth[0]) <= max(2 * error(plain[0], truth[0]), rounding(truth[0]))
        assert error(ours[1], truth[1]) <= max(2 * error(plain[1], truth[1]), 1e-5)
        floor = 0.0
    for value, wide, ordinary in zip(ours[2:], truth[2:], plain[2:], strict=True):
        assert relative_error(value, wide) <= max(floor, 2 * relative_error(ordinary, wide))
