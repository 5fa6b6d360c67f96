"""The row passes at the ends of what floating point holds, and what they leave in memory."""

from dataclasses import replace

import pytest
import torch

from repo_fast.kernels.linear_log_probs import gradient_rows, log_prob_rows
from repo_fast.ops import linear_log_probs
from repo_fast.ops.sweep import row_pitch
from tests.ops.cases import assert_fused_is_exact, assert_log_probs_are_exact, make_case

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("size", [1e-20, 1e4, 1e8, 1e12, 1e30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_any_size_are_exact(size: float, dtype: torch.dtype, backend: str) -> None:
    case = make_case(seed=5, T=12, D=3, V=1100, dtype=dtype, ignored=0.0)
    logits = case.hidden.double() @ case.weight.double().T
    case = replace(case, hidden=(case.hidden.double() * (size / logits.abs().max())).to(dtype))
    assert_log_probs_are_exact(case, 1.0)
    assert_fused_is_exact(case, {"multiplier": 0.7, "on_policy": True, "entropy_coefficient": 0.1})


@pytest.mark.parametrize("temperature", [1e-12, 1e12, 1e30, 1e38])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_temperature_is_exact(temperature: float, dtype: torch.dtype, backend: str) -> None:
    assert_log_probs_are_exact(make_case(seed=6, T=12, D=8, V=1100, dtype=dtype, ignored=0.0), temperature)


@pytest.mark.parametrize("size", [1e10, 1e26, 1e35])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_that_are_all_far_below_zero_are_exact(size: float, dtype: torch.dtype, backend: str) -> None:
    case = make_case(seed=9, T=6, D=2, V=1100, dtype=dtype, ignored=0.0)
    case = replace(case, hidden=torch.tensor([[-1.0, 0.0]] * 6, dtype=dtype), weight=case.weight.abs())
    case.weight[:, 0] = size
    case.weight[::7, 0] = 1.25 * size
    assert_log_probs_are_exact(case, 1.0)


@pytest.mark.parametrize("temperature", [1e-4, 1e-5, 1e-6])
def test_near_ties_of_large_logits_are_exact(temperature: float, backend: str) -> None:
    """Many logits within the rounding of the largest one's product with the inverse of the temperature."""
    case = make_case(seed=10, T=8, D=2, V=1100, ignored=0.0)
    weight = torch.zeros_like(case.weight)
    weight[:, 0] = 1.0
    weight[:50, 0] = 1.37 + 4e-7 * torch.arange(50).remainder(3)
    hidden = torch.rand(8, 1, generator=torch.Generator().manual_seed(0)) + 1.0
    case = replace(case, hidden=torch.cat([hidden, torch.zeros(8, 1)], 1), weight=weight)
    case.targets[:] = torch.arange(8) * 9
    assert_log_probs_are_exact(case, temperature)


@pytest.mark.parametrize("wrong", [torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinite_logit_or_none_at_all_makes_nan(wrong: float, dtype: torch.dtype, backend: str) -> None:
    case = make_case(seed=8, T=4, D=3, V=1100, dtype=dtype, ignored=0.0)
    case.targets[:] = 5
    weight = case.weight.clone()
    weight[7] = wrong * torch.ones(3) if wrong != wrong else case.hidden[0].sign() * wrong
    for temperature in (1.0, 1e-9):
        outputs = linear_log_probs(
            case.hidden[:1], weight, case.targets[:1], temperature=temperature, return_entropy=True
        )
        assert all(output.isnan().all() for output in outputs)


@pytest.mark.parametrize("target", [0, 5])
@pytest.mark.parametrize("temperature", [0.25, 1.0])
def test_a_logit_as_low_as_there_are_has_no_part_in_the_row(temperature: float, target: int, backend: str) -> None:
    """Such as a bias of the lowest number makes: over temperature, or in units of log 2, it is -infinity."""
    hidden, weight = torch.ones(1, 1).requires_grad_(), torch.zeros(8, 1)
    weight[5] = -3e38
    log_probs, entropy = linear_log_probs(
        hidden, weight.requires_grad_(), torch.tensor([target]), temperature=temperature, return_entropy=True
    )
    assert entropy.item() == pytest.approx(torch.tensor(7.0).log().item(), rel=1e-6)
    assert target == 5 or log_probs.item() == pytest.approx(-entropy.item(), rel=1e-6)
    entropy.sum().backward()
    torch.testing.assert_close(weight.grad, torch.zeros(8, 1), atol=1e-6, rtol=0)


def test_no_hidden_dimensions_make_uniform_rows(backend: str) -> None:
    for dtype in DTYPES:
        log_probs = linear_log_probs(torch.ones(3, 0, dtype=dtype), torch.ones(1031, 0, dtype=dtype), torch.arange(3))
        assert log_probs.tolist() == pytest.approx([-torch.tensor(1031.0).log().item()] * 3, rel=1e-6)


@pytest.mark.parametrize("size", [1.0, 1e10])
@pytest.mark.parametrize("V", [31, 500, 1100, 33000])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_forward_leaves_the_logits_for_a_backward(V: int, size: float, softcap: float | None) -> None:
    case = make_case(seed=7, T=5, D=8, V=V, ignored=0.0)
    buffer = torch.full((5, row_pitch(V, torch.float32)), torch.nan)
    z = buffer[:, :V].copy_(size * (case.hidden @ case.weight.T))
    before = z.clone()
    log_probs, entropies, unused = torch.zeros(5), torch.zeros(5), torch.zeros(5)
    chunk = z, case.hidden, case.weight, case.targets, None, 0, 1.0, softcap
    log_prob_rows(*chunk, log_probs, entropies)
    assert torch.equal(z, before)
    log_prob_rows(*chunk, unused, None)
    assert torch.equal(z, before) and torch.equal(unused, log_probs)
    leaf = before.double().requires_grad_()
    truth = (leaf if softcap is None else softcap * (leaf / softcap).tanh()).log_softmax(1)
    truth.gather(1, case.targets[:, None]).sum().backward()
    truth = truth.detach()
    torch.testing.assert_close(log_probs.double(), truth.gather(1, case.targets[:, None])[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies.double(), -(truth.exp() * truth).sum(1), atol=1e-5, rtol=1e-5)
    gradient_rows(*chunk, torch.ones(5), None)
    torch.testing.assert_close(z.double(), leaf.grad, atol=1e-6, rtol=1e-5)
    assert not buffer[:, V:].any(), "products may run over what lies between V and the pitch"
