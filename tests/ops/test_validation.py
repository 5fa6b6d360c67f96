"""Every bad argument gives one clear error that names it, before anything runs."""

from typing import Any

import pytest
import torch

from repo_fast import ops
from repo_fast.ops import dispatch
from tests.ops.cases import make_case

NAN = float("nan")
T, D, V, S = 6, 4, 9, 3
CASE = make_case(T=T, D=D, V=V, S=S, ignored=0.0)
LINEAR = {name: getattr(CASE, name) for name in ("hidden", "weight", "targets")}
TOKENS = {
    name: getattr(CASE, name) for name in ("old_log_probs", "reward_advantages", "cost_advantages", "sequence_ids")
}
GOOD: dict[str, dict[str, Any]] = {
    "linear_log_probs": LINEAR,
    "prompt_violations": {"costs": CASE.costs, "prompt_ids": CASE.prompt_ids},
    "generalized_advantages": {
        "rewards": torch.zeros(T),
        "values": torch.zeros(T),
        "cu_seqlens": torch.tensor([0, 2, T], dtype=torch.int32),
    },
    "rectified_policy_loss": {
        "log_probs": CASE.old_log_probs,
        **TOKENS,
        "violations": CASE.costs,
        "multiplier": 1.0,
    },
    "fused_rectified_policy_loss": {
        **LINEAR,
        **TOKENS,
        "costs": CASE.costs,
        "prompt_ids": CASE.prompt_ids,
        "multiplier": 1.0,
    },
}
LINEAR_OPS = ["linear_log_probs", "fused_rectified_policy_loss"]
LOSSES = ["rectified_policy_loss", "fused_rectified_policy_loss"]
OTHER_DEVICE = torch.device("meta")


def bad(ops_: list[str], argument: str, values: list[Any], error: type[Exception]) -> list[Any]:
    return [
        pytest.param(op, argument, value, error, id=f"{op}-{argument}-{i}")
        for op in ops_
        for i, value in enumerate(values)
    ]


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


TABLE = [
    *bad(LINEAR_OPS, "hidden", [None, CASE.hidden.double(), CASE.hidden.long(), CASE.hidden.bfloat16()], TypeError),
    *bad(LINEAR_OPS, "hidden", [CASE.hidden[0], CASE.hidden[None], CASE.hidden[:, 1:]], ValueError),
    *bad(LINEAR_OPS, "weight", [CASE.weight.half(), CASE.weight.double(), [1.0]], TypeError),
    *bad(LINEAR_OPS, "weight", [CASE.weight[:, 1:], CASE.weight[:0], CASE.weight.to(OTHER_DEVICE)], ValueError),
    *bad(LINEAR_OPS, "targets", [CASE.targets.int(), CASE.targets.float(), None], TypeError),
    *bad(LINEAR_OPS, "targets", [CASE.targets[1:], CASE.targets[None], CASE.targets.to(OTHER_DEVICE)], ValueError),
    *bad(LINEAR_OPS, "targets", [integers(0, 1, 2, 3, 4, V), integers(0, -1, 2, 3, 4, 5)], ValueError),
    *bad(LINEAR_OPS, "temperature", ["1", None, torch.tensor(1.0), True], TypeError),
    *bad(LINEAR_OPS, "temperature", [0.0, -1.0, NAN, float("inf")], ValueError),
    *bad(LINEAR_OPS, "temperature", [1e-39, 1e39], ValueError),
    *bad(LINEAR_OPS, "logit_scale", ["1", None, torch.tensor(1.0), True], TypeError),
    *bad(LINEAR_OPS, "logit_scale", [0.0, -1.0, NAN, float("inf"), 1e-39, 1e39], ValueError),
    *bad(LINEAR_OPS, "softcap", ["30", torch.tensor(30.0), True], TypeError),
    *bad(LINEAR_OPS, "softcap", [0.0, -30.0, NAN, float("inf"), 2.0**25, 1e-39], ValueError),
    *bad(["linear_log_probs"], "return_entropy", [1, None], TypeError),
    *bad(["linear_log_probs"], "logits_budget", [1e9, True, None, "1 GB"], TypeError),
    *bad(["linear_log_probs"], "logits_budget", [-1, 1 << 63], ValueError),
    *bad(["prompt_violations", "fused_rectified_policy_loss"], "costs", [CASE.costs.half(), None], TypeError),
    *bad(["prompt_violations"], "costs", [CASE.costs[None, None], torch.zeros(0, S)], ValueError),
    *bad(["fused_rectified_policy_loss"], "costs", [CASE.costs[None], CASE.costs[None, None]], ValueError),
    *bad(["prompt_violations", "fused_rectified_policy_loss"], "prompt_ids", [CASE.prompt_ids.int(), None], TypeError),
    *bad(["prompt_violations", "fused_rectified_policy_loss"], "prompt_ids", [CASE.prompt_ids[1:]], ValueError),
    *bad(["prompt_violations", "fused_rectified_policy_loss"], "scope", ["prompts", None], ValueError),
    *bad(["prompt_violations", "fused_rectified_policy_loss"], "threshold", [NAN, float("inf")], ValueError),
    *bad(["prompt_violations", "fused_rectified_policy_loss"], "threshold", ["0", torch.tensor(0.0)], TypeError),
    *bad(["prompt_violations"], "group", ["world", 2], TypeError),
    *bad(["generalized_advantages"], "rewards", [torch.zeros(T, dtype=torch.float64)], TypeError),
    *bad(["generalized_advantages"], "rewards", [torch.zeros(2, T)], ValueError),
    *bad(["generalized_advantages"], "values", [torch.zeros(T + 1), torch.zeros(T, device="meta")], ValueError),
    *bad(["generalized_advantages"], "cu_seqlens", [integers(0, T), [0, T]], TypeError),
    *bad(
        ["generalized_advantages"],
        "cu_seqlens",
        [integers(*values).int() for values in ((), (1, T), (0, T - 1), (0, T + 1), (0, 4, 3, T), (0, 9, T), (0,))],
        ValueError,
    ),
    *bad(["generalized_advantages"], "gamma", [1.5, -0.1, NAN], ValueError),
    *bad(["generalized_advantages"], "lam", [1.5, -0.1, NAN], ValueError),
    *bad(["rectified_policy_loss"], "log_probs", [CASE.old_log_probs.double(), None], TypeError),
    *bad(LOSSES, "old_log_probs", [CASE.old_log_probs.bfloat16(), 0.0], TypeError),
    *bad(LOSSES, "old_log_probs", [CASE.old_log_probs[1:], CASE.old_log_probs.to(OTHER_DEVICE)], ValueError),
    *bad(LOSSES, "reward_advantages", [CASE.reward_advantages.double()], TypeError),
    *bad(LOSSES, "reward_advantages", [CASE.reward_advantages[:, None]], ValueError),
    *bad(LOSSES, "cost_advantages", [CASE.cost_advantages.half()], TypeError),
    *bad(LOSSES, "cost_advantages", [CASE.cost_advantages[1:]], ValueError),
    *bad(LOSSES, "sequence_ids", [CASE.sequence_ids.int(), None], TypeError),
    *bad(LOSSES, "sequence_ids", [CASE.sequence_ids[1:], integers(0, 0, 0, 0, 0, S)], ValueError),
    *bad(["fused_rectified_policy_loss"], "sequence_ids", [integers(0, 0, 0, 0, 0, -1)], ValueError),
    *bad(["rectified_policy_loss"], "sequence_ids", [integers(0, 0, 0, 0, 0, -2)], ValueError),
    *bad(LOSSES, "violations", [CASE.costs.double()], TypeError),
    *bad(LOSSES, "violations", [CASE.costs[None], CASE.costs.to(OTHER_DEVICE)], ValueError),
    *bad(LOSSES, "multiplier", ["1", None, torch.tensor([1.0]), torch.tensor(True)], TypeError),
    *bad(LOSSES, "multiplier", [-0.1, NAN, float("inf")], ValueError),
    *bad(LOSSES, "rectify", [1, None, "yes"], TypeError),
    *bad(LOSSES, "surrogate", ["split", None], ValueError),
    *bad(LOSSES, "clip", [0.2, (0.2,), "0.2", ("0", 0.2)], TypeError),
    *bad(LOSSES, "clip", [(-0.1, 0.2), (0.2, NAN)], ValueError),
    *bad(LOSSES, "ref_log_probs", [CASE.ref_log_probs.double()], TypeError),
    *bad(LOSSES, "ref_log_probs", [CASE.ref_log_probs[1:]], ValueError),
    *bad(LOSSES, "kl_coefficient", ["0", None], TypeError),
    *bad(LOSSES, "kl_coefficient", [-1.0, NAN, 0.1], ValueError),
    *bad(["fused_rectified_policy_loss"], "entropy_coefficient", [-1.0, NAN], ValueError),
    *bad(["fused_rectified_policy_loss"], "entropy", [1, None], TypeError),
    *bad(LOSSES, "reduction", ["mean", None], ValueError),
    *bad(LOSSES, "denominator", ["1", torch.ones(2)], TypeError),
    *bad(LOSSES, "denominator", [0.0, -1.0, NAN], ValueError),
    *bad(LOSSES, "importance_weights", [CASE.importance_weights.double()], TypeError),
    *bad(LOSSES, "importance_weights", [CASE.importance_weights[1:]], ValueError),
    *bad(list(GOOD), "backend", ["cuda", None, "triton"], ValueError),
]


@pytest.mark.parametrize("op, argument, value, error", TABLE)
def test_bad_argument(
    op: str, argument: str, value: Any, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(error) as raised:
        getattr(ops, op)(**(GOOD[op] | {argument: value}))
    message = str(raised.value)
    assert message.startswith(f"{op}: ") and "\n" not in message
    # A lone change of `hidden` or `rewards` may show as another argument's mismatch with it.
    names = {"hidden": ("hidden", "weight", "targets"), "rewards": ("rewards", "values")}.get(argument, (argument,))
    assert any(name in message for name in names)


@pytest.mark.parametrize("op", GOOD)
def test_good_arguments(op: str) -> None:
    getattr(ops, op)(**GOOD[op])


def test_numbers_may_be_integers_and_clip_a_list() -> None:
    result = ops.rectified_policy_loss(**GOOD["rectified_policy_loss"] | {"multiplier": 1, "clip": [0, 1]})
    assert result.loss.isfinite()
    counted = ops.rectified_policy_loss(**GOOD["rectified_policy_loss"], denominator=torch.tensor(4))
    assert torch.equal(counted.loss, ops.rectified_policy_loss(**GOOD["rectified_policy_loss"], denominator=4).loss)


def test_a_missing_reference_is_named() -> None:
    with pytest.raises(ValueError, match="kl_coefficient=0.1 needs ref_log_probs"):
        ops.rectified_policy_loss(**GOOD["rectified_policy_loss"], kl_coefficient=0.1)
