"""Logits that are scaled and capped after the head, as Granite, Cohere and Gemma 2 have them, against float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repo_fast.ops import chunked, fused_rectified_policy_loss, linear_log_probs, sweep
from tests.ops.cases import assert_fused_is_exact, assert_log_probs_are_exact, make_case, run_fused

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COHERE, GEMMA2 = {"logit_scale": 0.0625}, {"softcap": 30.0}
# Logits of 25, the peaked ones, lie far beyond this cap.
BEYOND = {"logit_scale": 1.5, "softcap": 4.0}
HEADS = [COHERE, GEMMA2, BEYOND]


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("logits", ["flat", "peaked", "low"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact(dtype: torch.dtype, logits: str, head: dict[str, Any], chunks: str) -> None:
    assert_both_are_exact(head, dtype=dtype, logits=logits)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_in_several_tiles(dtype: torch.dtype, head: dict[str, Any]) -> None:
    assert_both_are_exact(head, T=12, V=4099, dtype=dtype, logits="peaked")


def assert_both_are_exact(head: dict[str, Any], **kind: Any) -> None:
    head = {"temperature": 0.8, **head}
    case = make_case(**kind, **head)
    assert_log_probs_are_exact(case, **head)
    assert_fused_is_exact(case, {"multiplier": 0.4, "entropy_coefficient": 0.1, **head})


@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    T=st.integers(0, 60),
    D=st.integers(1, 40),
    V=st.integers(1, 90),
    temperature=st.sampled_from([1.0, 0.5, 1.7]),
    logit_scale=st.sampled_from([0.0625, 1.0, 3.0]),
    softcap=st.sampled_from([None, 0.5, 5.0, 30.0, 1e4]),
    logits=st.sampled_from(["flat", "peaked", "low"]),
    seed=st.integers(0, 1000),
)
def test_exact_at_any_shape(
    T: int, D: int, V: int, temperature: float, logit_scale: float, softcap: float | None, logits: str, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "CPU_MIN_ROWS", 1 + seed % 7)
        patch.setattr(sweep, "CPU_CHUNK_ROWS", 1 + seed % 7)
        patch.setattr(chunked, "CPU_BLOCK_ELEMENTS", 2 * V)
        case = make_case(seed, T, D, V, logits=logits)
        assert_log_probs_are_exact(case, temperature, logit_scale=logit_scale, softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_is_a_temperature_upside_down(dtype: torch.dtype) -> None:
    case = make_case(V=1031, dtype=dtype)
    scaled = linear_log_probs(case.hidden, case.weight, case.targets, logit_scale=4.0)
    assert torch.equal(scaled, linear_log_probs(case.hidden, case.weight, case.targets, temperature=0.25))


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ratio_is_one_on_policy(dtype: torch.dtype, head: dict[str, Any]) -> None:
    case = make_case(V=1031, dtype=dtype, logits="peaked")
    old = linear_log_probs(case.hidden, case.weight, case.targets, **head)
    result, *_ = run_fused(replace(case, old_log_probs=old), {"multiplier": 1.0, "clip": (0.0, 0.0), **head})
    assert torch.equal(result.log_probs, old)
    assert result.clip_fraction == 0 and result.approx_kl == 0


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_kept_logits_change_no_bit(dtype: torch.dtype) -> None:
    gradients = []
    for budget in (0, 1 << 20):
        case = make_case(V=1031, dtype=dtype, logits="peaked").copy()
        log_probs, entropy = linear_log_probs(
            case.hidden, case.weight, case.targets, return_entropy=True, logits_budget=budget, **BEYOND
        )
        (log_probs.square().sum() + entropy.sum()).backward()
        gradients.append((case.hidden.grad, case.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("size", [0.01, 1.0, 5.0, 12.0, 30.0])
def test_derivatives_keep_their_digits_however_near_the_cap(size: float) -> None:
    """1 − tanh² computed from a float32 tanh has none left beyond 9 caps."""
    V, softcap = 40, 2.0
    x = softcap * size * torch.linspace(-1, 1, V, dtype=torch.float64).unsqueeze(1)
    hidden, weight = torch.ones(1, 1), x.float().requires_grad_()
    linear_log_probs(hidden, weight, torch.tensor([3]), softcap=softcap).sum().backward()
    y = weight.detach().double() / softcap
    expected = -(softcap * y.tanh()).softmax(0)
    expected[3] += 1
    expected /= y.cosh().square()
    torch.testing.assert_close(weight.grad.double(), expected, atol=1e-38, rtol=2e-5)


def test_small_logits_keep_their_digits_under_a_large_cap() -> None:
    """tanh(y) from 1 − exp(−2y) has an error of 1e-7, times the cap."""
    case = make_case(V=500)
    case = replace(case, hidden=case.hidden * 1e-2)
    assert_log_probs_are_exact(case, 1.0, softcap=1e6)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_infinite_logits_are_capped_and_nan_stays(dtype: torch.dtype) -> None:
    V = 1100
    hidden, weight = torch.ones(1, 1, dtype=dtype), torch.zeros(V, 1, dtype=dtype)
    weight[7], weight[9] = torch.inf, -torch.inf
    truth = torch.zeros(V, dtype=torch.float64)
    truth[7], truth[9] = 2.0, -2.0
    for target in (0, 7, 9, V - 1):
        log_probs, entropy = linear_log_probs(hidden, weight, torch.tensor([target]), softcap=2.0, return_entropy=True)
        expected = truth.log_softmax(0)
        assert log_probs.item() == pytest.approx(expected[target].item(), rel=1e-5)
        assert entropy.item() == pytest.approx(-(expected.exp() * expected).sum().item(), rel=1e-5)
    lowest = linear_log_probs(hidden, weight.fill_(-torch.inf), torch.tensor([5]), softcap=2.0)
    assert lowest.item() == pytest.approx(-torch.tensor(float(V)).log().item(), rel=1e-5)
    weight.zero_()[11] = torch.nan
    for target in (0, 11):
        outputs = linear_log_probs(hidden, weight, torch.tensor([target]), softcap=2.0, return_entropy=True)
        assert all(output.isnan().all() for output in outputs)


@pytest.mark.parametrize("value", [2.0**25, 1e-39])
def test_what_float32_cannot_tell_apart_is_refused(value: float) -> None:
    case = make_case()
    with pytest.raises(ValueError, match="linear_log_probs: softcap must be .*, got"):
        linear_log_probs(case.hidden, case.weight, case.targets, softcap=value)
    with pytest.raises(ValueError, match=r"temperature over logit_scale=1e\+38 must be 1e-38 to 1e\+38, got 0.5"):
        fused_rectified_policy_loss(*case.arguments(), multiplier=1.0, temperature=0.5, logit_scale=1e38)
