"""The oracle of the other tests, checked by hand-worked numbers, scalar loops and finite differences."""

import math

import pytest
import torch

from repo_fast.ops import reference
from tests.ops.cases import make_case


def test_log_probs_and_entropy_by_hand() -> None:
    # logits (0, log 3): probabilities 1/4 and 3/4.
    hidden = torch.tensor([[1.0], [1.0], [1.0]], dtype=torch.float64)
    weight = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    log_probs, entropy = reference.linear_log_probs(hidden, weight, torch.tensor([0, 1, -100]))
    assert log_probs.tolist() == pytest.approx([math.log(0.25), math.log(0.75), 0.0])
    nats = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert entropy.tolist() == pytest.approx([nats, nats, 0.0])


def test_violations_by_hand() -> None:
    costs = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    ids = torch.tensor([9, 4, 9, 4])
    expected = {"response": [0.5, -2.5, 2.5, 0.0], "prompt": [1.5, -1.25, 1.5, -1.25], "batch": [0.125] * 4}
    for scope, violations in expected.items():
        assert reference.prompt_violations(costs, ids, scope=scope, threshold=0.5).tolist() == violations


def test_advantages_by_hand() -> None:
    # γ = 0.5, λ = 0.5. First response: δ = (1 + 0.5·2 − 4, 3 − 2) = (−2, 1), A = (−2 + 0.25·1, 1).
    rewards = torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64)
    values = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    advantages, returns = reference.generalized_advantages(rewards, values, cu_seqlens, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [-1.75, 1.0, 4.0]
    assert returns.tolist() == [2.25, 3.0, 5.0]


def scalar_loss(case, multiplier, rectify, surrogate, clip, kl, entropy_coefficient, reduction, denominator):  # noqa: ANN001
    """The definition, one token at a time, in Python floats."""
    log_probs, entropy = reference.linear_log_probs(case.hidden, case.weight, case.targets)
    cost, ids = case.costs.tolist(), case.prompt_ids.tolist()
    per_sequence: dict[int, list[float]] = {}
    for t in range(case.targets.numel()):
        if case.targets[t] == -100:
            continue
        i = int(case.sequence_ids[t])
        same = [c for c, prompt in zip(cost, ids, strict=True) if prompt == ids[i]]
        unsafe = sum(same) / len(same) > 0
        w_r, w_c = (1 / (1 + multiplier), multiplier / (1 + multiplier)) if unsafe or not rectify else (1.0, 0.0)
        ratio = math.exp(min(20.0, max(-20.0, float(log_probs[t]) - float(case.old_log_probs[t]))))
        low, high = 1 - clip[0], 1 + clip[1]

        def s(a: float, ratio: float = ratio, low: float = low, high: float = high) -> float:
            return min(ratio * a, min(max(ratio, low), high) * a)

        a_r, a_c = float(case.reward_advantages[t]), float(case.cost_advantages[t])
        loss = -(w_r * s(a_r) + w_c * s(-a_c)) if surrogate == "separate" else -s(w_r * a_r - w_c * a_c)
        d = float(case.ref_log_probs[t]) - float(log_probs[t])
        loss += kl * (math.exp(d) - d - 1) - entropy_coefficient * float(entropy[t])
        per_sequence.setdefault(i, []).append(loss * float(case.importance_weights[t]))
    tokens = [loss for losses in per_sequence.values() for loss in losses]
    if reduction == "sum":
        return sum(tokens)
    if reduction == "token_mean":
        return sum(tokens) / (denominator or len(tokens))
    return sum(sum(losses) / len(losses) for losses in per_sequence.values()) / (denominator or len(per_sequence))


@pytest.mark.parametrize("reduction, denominator", [("sum", None), ("token_mean", 50.0), ("sequence_mean", None)])
@pytest.mark.parametrize("surrogate", ["separate", "mixed"])
@pytest.mark.parametrize("rectify", [True, False])
def test_loss_is_its_definition(rectify: bool, surrogate: str, reduction: str, denominator: float | None) -> None:
    case = make_case(T=25, S=6).wide()
    assert case.costs.min() < 0 < case.costs.max()
    expected = scalar_loss(case, 0.7, rectify, surrogate, (0.2, 0.3), 0.1, 0.05, reduction, denominator)
    loss = reference.fused_rectified_policy_loss(
        *case.arguments(),
        multiplier=0.7,
        rectify=rectify,
        surrogate=surrogate,
        clip=(0.2, 0.3),
        ref_log_probs=case.ref_log_probs,
        kl_coefficient=0.1,
        entropy_coefficient=0.05,
        importance_weights=case.importance_weights,
        reduction=reduction,
        denominator=denominator,
    )[0]
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_gradients_are_finite_differences() -> None:
    case = make_case(T=7, D=3, V=5, S=2).wide().copy()

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        arguments = (hidden, weight, *case.arguments()[2:])
        return reference.fused_rectified_policy_loss(
            *arguments, multiplier=2.0, entropy_coefficient=0.1, ref_log_probs=case.ref_log_probs, kl_coefficient=0.2
        )[0]

    assert torch.autograd.gradcheck(loss, (case.hidden, case.weight))
