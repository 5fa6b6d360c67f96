"""Several cost streams in the policy losses: against float64 loops over them, and one of one against the plain form."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repo_fast.ops import (
    PolicyLoss,
    chunked,
    fused_rectified_policy_loss,
    prompt_violations,
    rectified_policy_loss,
    reference,
    sweep,
)
from tests.ops.cases import (
    Case,
    assert_fused_is_exact,
    loss_scale,
    make_case,
    relative_error,
    run_fused,
    with_streams,
)

pytestmark = pytest.mark.usefixtures("backend")

INF, NAN = torch.inf, torch.nan
OPS = torch.ops.repo_fast


def options_of(K: int) -> list[dict[str, Any]]:
    multiplier = torch.linspace(0.3, 2.5, K)
    scopes = ["prompt", "response", "batch", "prompt"][:K]
    thresholds = [0.1 * k - 0.1 for k in range(K)]
    return [
        {"multiplier": multiplier.tolist()},
        {"multiplier": 0.7, "scope": "response", "threshold": 0.2},
        {"multiplier": multiplier, "scope": scopes, "threshold": thresholds, "rectify": [k % 2 == 0 for k in range(K)]},
        {"multiplier": multiplier, "scope": scopes, "surrogate": "mixed", "rectify": [k % 2 == 1 for k in range(K)]},
        {"multiplier": torch.tensor(1.5), "rectify": False, "surrogate": "mixed", "scope": "batch", "clip": (0.1, 0.3)},
        {"multiplier": multiplier, "ref_log_probs": True, "kl_coefficient": 0.3, "entropy_coefficient": 0.2},
        {"multiplier": multiplier, "reduction": "token_mean", "importance_weights": True, "temperature": 0.7},
        {"multiplier": multiplier, "on_policy": True, "reduction": "sum"},
        {"multiplier": torch.zeros(K), "softcap": 3.0, "denominator": 17.0},
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_fused_is_exact(K: int, dtype: torch.dtype) -> None:
    for seed, options in enumerate(options_of(K)):
        assert_fused_is_exact(with_streams(make_case(seed, dtype=dtype), K, seed), options)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    T=st.integers(0, 60),
    V=st.integers(1, 60),
    S=st.integers(1, 7),
    K=st.integers(1, 5),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    option=st.integers(0, 8),
    logits=st.sampled_from(["flat", "peaked"]),
    seed=st.integers(0, 1000),
)
def test_fused_is_exact_at_any_shape(
    T: int, V: int, S: int, K: int, ignored: float, option: int, logits: str, seed: int
) -> None:
    options = dict(options_of(K)[option])
    if isinstance(options.get("scope"), list):
        options["scope"] = (options["scope"] * 2)[:K]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "CPU_MIN_ROWS", 1 + seed % 7)
        patch.setattr(sweep, "CPU_CHUNK_ROWS", 1 + seed % 7)
        patch.setattr(chunked, "CPU_BLOCK_ELEMENTS", 2 * V)
        case = make_case(seed, T, 12, V, S, logits=logits, ignored=ignored)
        assert_fused_is_exact(with_streams(case, K, seed), options)


def rectified(case: Case, violations: torch.Tensor, function: Any = rectified_policy_loss, **options: Any) -> Any:
    """(result, gradient) of the loss of given log-probabilities."""
    log_probs = (case.old_log_probs + case.reward_advantages.sign() * 0.3).requires_grad_()
    ids = case.sequence_ids.masked_fill(case.targets == -100, -1)
    advantages = case.reward_advantages, case.cost_advantages
    result = function(log_probs, case.old_log_probs, *advantages, ids, violations, **options)
    (result if isinstance(result, torch.Tensor) else result.loss).backward()
    return result, log_probs.grad


@pytest.mark.parametrize("surrogate", ["separate", "mixed"])
@pytest.mark.parametrize("rectify", [True, False, [True, False, True]])
def test_rectified_is_exact(rectify: Any, surrogate: str) -> None:
    case = with_streams(make_case(T=70, S=9), 3)
    violations = case.costs
    options = {"multiplier": torch.tensor([0.5, 1.2, 2.0]), "rectify": rectify, "surrogate": surrogate}
    result, gradient = rectified(case, violations, **options)
    truth, wide = rectified(case.wide(), violations.double(), reference.rectified_policy_loss, **options)
    assert abs(result.loss.item() - truth.item()) <= 1e-5 * loss_scale(case, {**options, "violations": violations})
    assert relative_error(gradient, wide) <= 1e-5
    assert torch.equal(result.violations, violations)


@pytest.mark.parametrize("surrogate", ["separate", "mixed"])
@pytest.mark.parametrize("rectify", [True, False])
def test_one_of_one_is_the_plain_form_to_the_bit(rectify: bool, surrogate: str) -> None:
    case = make_case(T=70, S=9)
    lists = replace(case, costs=case.costs[None], cost_advantages=case.cost_advantages[None])
    options: dict[str, Any] = {"surrogate": surrogate, "entropy_coefficient": 0.1}
    plain = run_fused(case, {**options, "multiplier": 0.7, "rectify": rectify, "threshold": 0.1})
    for multiplier in (0.7, torch.tensor([0.7])):
        one = run_fused(lists, {**options, "multiplier": multiplier, "rectify": [rectify], "threshold": [0.1]})
        for name, ours, theirs in zip(PolicyLoss._fields, one[0], plain[0], strict=True):
            squeezed = ours[0] if name in ("violations", "unsafe_fraction") else ours
            assert torch.equal(squeezed, theirs), name
        assert torch.equal(one[1], plain[1]) and torch.equal(one[2], plain[2])
    options = {"multiplier": 0.7, "rectify": rectify, "surrogate": surrogate}
    plain = rectified(case, case.costs, **options)
    one = rectified(lists, case.costs[None], **options)
    assert torch.equal(one[0].loss, plain[0].loss) and torch.equal(one[1], plain[1])


@pytest.mark.parametrize("rectify", [True, False])
def test_where_the_one_constraint_does_not_apply_the_reward_is_alone(rectify: bool) -> None:
    """In the plain form too: -infinity has no weight, whatever `rectify`."""
    case = make_case(T=50, S=6)
    violations = torch.tensor([1.0, -INF, -2.0, -INF, 0.5, -INF])
    exempt = violations[case.sequence_ids] == -INF
    result, gradient = rectified(case, violations, multiplier=2.0, rectify=rectify)
    other = replace(case, cost_advantages=torch.where(exempt, 7.0, case.cost_advantages))
    same, same_gradient = rectified(other, violations, multiplier=2.0, rectify=rectify)
    assert torch.equal(result.loss, same.loss) and torch.equal(gradient, same_gradient)
    truth, wide = rectified(
        case.wide(), violations.double(), reference.rectified_policy_loss, multiplier=2.0, rectify=rectify
    )
    assert abs(result.loss.item() - truth.item()) <= 1e-5
    assert relative_error(gradient, wide) <= 1e-5
    assert result.unsafe_fraction.item() == pytest.approx(2 / 3)


def test_statistics_are_of_every_stream() -> None:
    case = with_streams(make_case(T=200, S=9, ignored=0.2), 3, seed=5)
    multiplier = [0.5, 0.0, 2.0]
    result, *_ = run_fused(case, {"multiplier": torch.tensor(multiplier), "scope": "response"})
    applies, unsafe = case.costs != -INF, case.costs > 0
    torch.testing.assert_close(result.unsafe_fraction, unsafe.sum(1) / applies.sum(1))
    assert result.violations.shape == (3, 9)
    clipped = valid = 0
    for t in range(200):
        if case.targets[t] == -100:
            continue
        valid += 1
        ratio = (result.log_probs[t] - case.old_log_probs[t]).exp().item()
        i = int(case.sequence_ids[t])
        signs = [case.reward_advantages[t].item()]
        signs += [-case.cost_advantages[k, t].item() for k in range(3) if unsafe[k, i] and multiplier[k] > 0]
        clipped += any(ratio > 1.2 if sign > 0 else ratio < 0.8 for sign in signs)
    assert result.clip_fraction.item() == pytest.approx(clipped / valid)


def test_a_constraint_that_applies_to_nobody_has_no_unsafe_responses() -> None:
    case = with_streams(make_case(), 2)
    case.costs[1] = -INF
    result, *_ = run_fused(case, {"multiplier": 1.0})
    assert result.unsafe_fraction[1] == 0 and (result.violations[1] == -INF).all()


@pytest.mark.parametrize("surrogate", ["separate", "mixed"])
def test_nan_shows(surrogate: str) -> None:
    case = with_streams(make_case(), 2, exempt=False)
    sequence = int(case.sequence_ids[case.targets != -100][0])
    token = int((case.targets != -100).nonzero()[0])

    def loss(**changed: Any) -> float:
        options = {"multiplier": torch.tensor([1.0, 0.0]), "surrogate": surrogate, "scope": "response"}
        return run_fused(replace(case, **changed), options)[0].loss.item()

    assert loss() == loss()
    costs = case.costs.clone()
    costs[1, sequence] = NAN
    assert loss(costs=costs) != loss(costs=costs)
    advantages = case.cost_advantages.clone()
    advantages[1, token] = NAN  # its weight is 0
    assert loss(cost_advantages=advantages) != loss(cost_advantages=advantages)
    # But not those of tokens that are left out.
    left_out = case.cost_advantages.masked_fill(case.targets == -100, NAN)
    assert loss(cost_advantages=left_out) == loss()


# --------------------------------------------------------------------------------------------------------- violations


def test_violations_of_several_are_those_of_each() -> None:
    g = torch.Generator().manual_seed(0)
    costs = torch.randn(3, 40, generator=g)
    costs[1, ::3] = -INF
    costs[2, 5] = NAN
    ids = torch.randint(0, 9, (40,), generator=g)
    scopes, thresholds = ["prompt", "response", "batch"], [0.1, -0.2, 0.0]
    found = prompt_violations(costs, ids, scope=scopes, threshold=thresholds)
    for row, stream, scope, threshold in zip(found, costs, scopes, thresholds, strict=True):
        own = prompt_violations(stream, ids, scope=scope, threshold=threshold)
        torch.testing.assert_close(row, own, atol=0, rtol=0, equal_nan=True)
    same = prompt_violations(costs, ids, scope="prompt", threshold=0.5)
    truth = reference.prompt_violations(costs.double(), ids, threshold=0.5)
    torch.testing.assert_close(same.double(), truth, atol=1e-6, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("scope", ["prompt", "response", "batch"])
def test_costs_that_do_not_apply_do_not_count(scope: str) -> None:
    costs = torch.tensor([1.0, -INF, 4.0, -INF, -INF, NAN])
    ids = torch.tensor([0, 0, 0, 1, 2, 2])
    expected = {
        "prompt": [2.5, -INF, 2.5, -INF, NAN, NAN],
        "response": [1.0, -INF, 4.0, -INF, -INF, NAN],
        "batch": [NAN] * 6,
    }[scope]
    found = prompt_violations(costs, ids, scope=scope)
    torch.testing.assert_close(found, torch.tensor(expected), equal_nan=True)
    if scope == "batch":
        found = prompt_violations(costs[:5], ids[:5], scope=scope)
        torch.testing.assert_close(found, torch.tensor([2.5, -INF, 2.5, -INF, -INF]))


# --------------------------------------------------------------------------------------------- what PyTorch expects


def test_opcheck(backend: str) -> None:
    case = with_streams(make_case(), 3)
    for mixed in (False, True):
        torch.library.opcheck(
            OPS.rectified_policy_loss_streams.default,
            (case.reward_advantages, case.cost_advantages, case.sequence_ids, case.costs, torch.rand(3),
             [True, False, True], mixed, backend),
        )  # fmt: skip


@torch.compiler.config.patch(force_disable_caches=True)
def test_compiles_without_graph_breaks() -> None:
    torch.compiler.reset()
    case = with_streams(make_case(), 2).copy()

    def both(hidden: torch.Tensor, multiplier: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fused = fused_rectified_policy_loss(hidden, *case.arguments()[1:], multiplier=multiplier, rectify=[True, False])
        ids = case.sequence_ids.masked_fill(case.targets == -100, -1)
        violations = prompt_violations(case.costs, case.prompt_ids)
        advantages = case.reward_advantages, case.cost_advantages
        plain = rectified_policy_loss(
            hidden.sum(1), case.old_log_probs, *advantages, ids, violations, multiplier=multiplier
        )
        return fused.loss + plain.loss, fused.unsafe_fraction

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for multiplier in (torch.tensor([0.5, 2.0]), torch.tensor([1.5, 0.0])):
        expected, unsafe = both(case.hidden, multiplier)
        wanted = torch.autograd.grad(expected, (case.hidden, case.weight))
        loss, same = compiled(case.hidden, multiplier)
        gradients = torch.autograd.grad(loss, (case.hidden, case.weight))
        torch.testing.assert_close((loss, same, *gradients), (expected, unsafe, *wanted))


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({"costs": torch.zeros(3, 5)}, {}, r"costs must have shape \[K=2, S\] like cost_advantages, got \[3, 5\]"),
        ({"costs": torch.zeros(5)}, {}, r"cost_advantages and costs must be .*, got \[2, 37\] and \[5\]"),
        ({"cost_advantages": torch.zeros(37)}, {}, r"cost_advantages and costs must be .*, got \[37\] and \[2, 5\]"),
        ({"cost_advantages": torch.zeros(2, 9)}, {}, r"cost_advantages must have shape \[K, 37\], got \[2, 9\]"),
        (
            {"costs": torch.zeros(0, 5), "cost_advantages": torch.zeros(0, 37)},
            {},
            "cost_advantages must have 1 to 31 streams, got 0",
        ),
        ({}, {"multiplier": torch.ones(3)}, r"multiplier must be .* tensor \[\] or \[K=2\], got torch.float32 \[3\]"),
        ({}, {"multiplier": torch.ones(2).bool()}, r"multiplier must be .*, got torch.bool \[2\]"),
        ({}, {"multiplier": [1.0, NAN]}, r"multiplier\[1\] must be finite and >= 0, got nan"),
        ({}, {"multiplier": -1.0}, "multiplier must be finite and >= 0, got -1.0"),
        ({}, {"rectify": [True]}, r"rectify must be one value or K=2 of them, got 1"),
        ({}, {"rectify": [True, 1]}, r"rectify\[1\] must be True or False, got 1"),
        ({}, {"scope": ["prompt", "x"]}, r"scope\[1\] must be one of \('prompt', 'response', 'batch'\), got 'x'"),
        ({}, {"threshold": [0.0, NAN]}, r"threshold\[1\] must be finite, got nan"),
        ({}, {"threshold": [0.0, 1.0, 2.0]}, "threshold must be one value or K=2 of them, got 3"),
    ],
)
def test_what_is_wrong_is_said(changed: dict[str, Any], options: dict[str, Any], message: str) -> None:
    case = replace(with_streams(make_case(), 2), **changed)
    with pytest.raises((TypeError, ValueError), match="^fused_rectified_policy_loss: " + message):
        fused_rectified_policy_loss(*case.arguments(), **{"multiplier": 1.0, **options})


def test_one_constraint_has_one_setting() -> None:
    case = make_case()
    with pytest.raises(ValueError, match=r"threshold must be one value, not a list, for costs \[S\], got 2"):
        prompt_violations(case.costs, case.prompt_ids, threshold=[0.0, 1.0])
    with pytest.raises(TypeError, match=r"multiplier must be a number or a real 0-d tensor, got torch.float32 \[1\]"):
        fused_rectified_policy_loss(*case.arguments(), multiplier=torch.ones(1))


def test_a_sequence_that_is_out_of_range_is_an_error() -> None:
    case = with_streams(make_case(ignored=0.0), 2)
    with pytest.raises(ValueError, match=r"sequence_ids of the valid tokens must be in \[0, S=5\), got 5"):
        run_fused(replace(case, sequence_ids=case.sequence_ids + 1), {"multiplier": 1.0})
