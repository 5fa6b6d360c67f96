"""`linear_log_probs` against float64: values, gradients, rows left out, memory layout."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from repo_fast.ops import chunked, linear_log_probs, reference, sweep
from tests.ops.cases import Case, assert_fused_is_exact, assert_log_probs_are_exact, make_case, relative_error
from tests.ops.conftest import split_finely

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("logits", ["flat", "peaked", "low"])
@pytest.mark.parametrize("V", [2, 31, 32001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact(dtype: torch.dtype, V: int, logits: str, chunks: str) -> None:
    assert_log_probs_are_exact(make_case(V=V, dtype=dtype, logits=logits), temperature=0.8)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    T=st.integers(0, 60),
    D=st.integers(1, 40),
    V=st.integers(1, 90),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    temperature=st.sampled_from([1.0, 0.5, 1.7]),
    logits=st.sampled_from(["flat", "peaked", "low"]),
    seed=st.integers(0, 1000),
)
def test_exact_at_any_shape(T: int, D: int, V: int, ignored: float, temperature: float, logits: str, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "CPU_MIN_ROWS", 1 + seed % 7)
        patch.setattr(sweep, "CPU_CHUNK_ROWS", 1 + seed % 7)
        patch.setattr(chunked, "CPU_BLOCK_ELEMENTS", 2 * V)
        assert_log_probs_are_exact(make_case(seed, T, D, V, logits=logits, ignored=ignored), temperature)


def test_entropy_is_optional_and_changes_nothing() -> None:
    case = make_case()
    log_probs, _ = linear_log_probs(case.hidden, case.weight, case.targets, return_entropy=True)
    assert torch.equal(log_probs, linear_log_probs(case.hidden, case.weight, case.targets))


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_of_one_output(output: int) -> None:
    case, other = make_case().copy(), make_case().copy()
    linear_log_probs(case.hidden, case.weight, case.targets, return_entropy=True)[output].sum().backward()
    distribution = (other.hidden @ other.weight.T).log_softmax(1)
    naive = (
        distribution.gather(1, other.targets.clamp(min=0)[:, None])[:, 0],
        -(distribution.exp() * distribution).sum(1),
    )
    naive[output][other.targets != -100].sum().backward()
    torch.testing.assert_close(case.hidden.grad, other.hidden.grad)
    torch.testing.assert_close(case.weight.grad, other.weight.grad)


def test_ignored_rows_are_zero_and_never_looked_at(chunks: str) -> None:
    case = make_case().copy()
    left_out = case.targets == -100
    poisoned = case.hidden.detach().masked_fill(left_out[:, None], torch.nan).requires_grad_()
    log_probs, entropy = linear_log_probs(poisoned, case.weight, case.targets, return_entropy=True)
    assert not log_probs[left_out].any() and not entropy[left_out].any()
    (log_probs.sum() + entropy.sum()).backward()
    assert not poisoned.grad[left_out].any()
    assert poisoned.grad.isfinite().all() and case.weight.grad.isfinite().all()


@pytest.mark.parametrize("T", [0, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_do(T: int, dtype: torch.dtype) -> None:
    case = make_case(T=T, ignored=1.0, dtype=dtype).copy()
    log_probs, entropy = linear_log_probs(case.hidden, case.weight, case.targets, return_entropy=True)
    assert log_probs.shape == entropy.shape == (T,) and not log_probs.any() and not entropy.any()
    (log_probs.sum() + entropy.sum()).backward()
    assert case.hidden.grad.shape == (T, 24) and not case.hidden.grad.any() and not case.weight.grad.any()


def test_strided_and_expanded_inputs(chunks: str) -> None:
    case = make_case(T=12, D=9, ignored=0.2)
    hidden = torch.randn(9, 24).T[::2].requires_grad_()
    weight = torch.randn(9, 62).T[::2].requires_grad_()
    one_row = torch.randn(1, 9, requires_grad=True)
    for h in (hidden, one_row.expand(12, 9)):
        grads = []
        for a, b, t in ((h, weight, case.targets), (h.contiguous(), weight.contiguous(), case.targets.clone())):
            loss = linear_log_probs(a, b, t.repeat_interleave(2)[::2]).sum()
            leaf = hidden if h is hidden else one_row
            grads.append((loss, *torch.autograd.grad(loss, (leaf, weight))))
        torch.testing.assert_close(grads[0], grads[1])


def test_hidden_and_weight_twice_in_one_graph() -> None:
    case, other = make_case(ignored=0.0).copy(), make_case(ignored=0.0).copy()
    flipped = case.targets.flip(0)
    loss = linear_log_probs(case.hidden, case.weight, case.targets).sum()
    (loss + 2 * linear_log_probs(case.hidden, case.weight, flipped, temperature=0.5).sum()).backward()
    logits = other.hidden @ other.weight.T
    naive = logits.log_softmax(1).gather(1, case.targets[:, None]).sum()
    (naive + 2 * (2 * logits).log_softmax(1).gather(1, flipped[:, None]).sum()).backward()
    torch.testing.assert_close(case.hidden.grad, other.hidden.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(case.weight.grad, other.weight.grad, atol=1e-5, rtol=1e-5)


def test_gradients_of_nearly_certain_rows_keep_their_digits() -> None:
    """Where p = 1 − 1e-7, 1 − p has no digits left in float32 unless it is summed from the other tokens."""
    hidden = torch.tensor([[20.0, 1.0]], dtype=torch.float64)
    weight = torch.tensor([[1.0, 0.0], [0.1, 0.5], [0.2, -0.3]], dtype=torch.float64)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        op = linear_log_probs if dtype == torch.float32 else lambda *x: reference.linear_log_probs(*x)[0]
        gradients.append(torch.autograd.grad(op(h, w, torch.tensor([0])).sum(), (h, w)))
    for value, truth in zip(*gradients, strict=True):
        assert 1e-8 < truth.norm() < 1e-4 and relative_error(value, truth) <= 1e-5


def test_inference_mode_and_checkpointing() -> None:
    case = make_case().copy()
    with torch.inference_mode():
        log_probs = linear_log_probs(case.hidden, case.weight, case.targets)
    again = checkpoint(linear_log_probs, case.hidden, case.weight, case.targets, use_reentrant=False)
    assert torch.equal(again, log_probs)
    wanted = torch.autograd.grad(linear_log_probs(case.hidden, case.weight, case.targets).sum(), case.weight)[0]
    assert torch.equal(torch.autograd.grad(again.sum(), case.weight)[0], wanted)


def test_rows_near_certainty_are_not_positive() -> None:
    # bfloat16 rounds logits of 16 to 32 in steps of 1/8: the target's exact logit may exceed the rounded maximum.
    hidden = torch.randn(300, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight = torch.zeros(sweep.BFLOAT16_MIN_VOCABULARY, 64, dtype=torch.bfloat16)
    weight[:10] = hidden[:10] / 2.3
    targets = (hidden @ weight.T).argmax(1)
    log_probs = linear_log_probs(hidden, weight, targets)
    assert (log_probs <= 0).all() and (log_probs > -1e-3).any()


def gradients(case: Case, hooks: Any = nullcontext, **options: Any) -> tuple[torch.Tensor, ...]:
    """Outputs and gradients of both, given fixed incoming ones."""
    up = torch.linspace(-1, 1, 2 * case.targets.numel()).view(2, -1)
    inputs = case.copy()
    with hooks():
        outputs = linear_log_probs(
            inputs.hidden, inputs.weight, inputs.targets, temperature=0.8, return_entropy=True, **options
        )
    return *outputs, *torch.autograd.grad(outputs, (inputs.hidden, inputs.weight), tuple(up))


@pytest.mark.parametrize("logits", ["flat", "peaked"])
@pytest.mark.parametrize("V", [31, 1031])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_logits_change_no_bit(dtype: torch.dtype, V: int, logits: str, chunks: str) -> None:
    case = make_case(V=V, dtype=dtype, logits=logits)
    again = gradients(case)
    row = sweep.row_pitch(V, product := sweep.product_dtype(case.weight)) * product.itemsize
    for rows in (1, 20, 37, 1000):  # of 37, of which some are ignored
        for one, other in zip(again, gradients(case, logits_budget=rows * row), strict=True):
            assert torch.equal(one, other)


def test_the_budget_bounds_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    split_finely(monkeypatch, rows=8)
    case = make_case(V=31)
    row = sweep.row_pitch(31, torch.float32) * 4
    for budget, rows in ((0, 0), (8 * row - 1, 0), (8 * row, 8), (36 * row, 32), (37 * row, 37), (1 << 62, 37)):
        saved = []

        def remember(tensor: torch.Tensor, saved: list[torch.Tensor] = saved) -> torch.Tensor:
            saved.append(tensor)
            return tensor

        gradients(case, partial(saved_tensors_hooks, remember, lambda tensor: tensor), logits_budget=budget)
        assert saved[-1].untyped_storage().nbytes() == rows * row <= budget


def test_kept_logits_outlive_a_backward_and_their_own_memory() -> None:
    """A graph that is retained gives the same again, as does one whose saved tensors were moved elsewhere."""
    case = make_case(V=1031, dtype=torch.bfloat16).copy()
    leaves = case.hidden, case.weight
    log_probs = linear_log_probs(*leaves, case.targets, logits_budget=1 << 30)
    first = torch.autograd.grad(log_probs.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(log_probs.sum(), leaves)
    moved = gradients(case, partial(saved_tensors_hooks, torch.clone, torch.clone), logits_budget=1 << 30)
    for one, other in ((first, second), (moved, gradients(case))):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_nothing_is_kept_where_no_gradient_is_recorded() -> None:
    budgets = []

    class Budgets(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.repo_fast.linear_log_probs.default:
                budgets.append(args[6])
            return func(*args, **(kwargs or {}))

    case = make_case()
    leaf = case.weight.clone().requires_grad_()
    with Budgets():
        linear_log_probs(case.hidden, case.weight, case.targets, logits_budget=1 << 20)
        with torch.no_grad():
            linear_log_probs(case.hidden, leaf, case.targets, logits_budget=1 << 20)
        linear_log_probs(case.hidden, leaf, case.targets, logits_budget=1 << 20)
    assert budgets == [0, 0, 1 << 20]


def test_kept_memory_is_the_same_every_time(backend: str) -> None:
    case = make_case(T=40, ignored=0.5)
    torch.use_deterministic_algorithms(True)  # new memory is full of NaN
    try:
        *_, kept = torch.ops.repo_fast.linear_log_probs(*case.arguments()[:3], 1.0, None, False, 1 << 20, backend)
    finally:
        torch.use_deterministic_algorithms(False)
    rows = case.targets != -100
    torch.testing.assert_close(kept[: rows.sum()], case.hidden[rows] @ case.weight.T)
    assert kept.shape == (40, 31) and not kept[rows.sum() :].any()


def test_bfloat16_is_widened_where_a_cpu_cannot_multiply_it(monkeypatch: pytest.MonkeyPatch, chunks: str) -> None:
    case = make_case(V=1031, dtype=torch.bfloat16)
    assert sweep.product_dtype(case.weight) == torch.bfloat16 or not sweep.cpu_multiplies_bfloat16()
    monkeypatch.setattr(sweep, "cpu_multiplies_bfloat16", lambda: False)
    assert sweep.product_dtype(case.weight) == torch.float32
    assert sweep.product_dtype(case.weight.to("meta")) == torch.bfloat16
    assert_log_probs_are_exact(case, temperature=0.8)
    assert_fused_is_exact(case, {"multiplier": 1.0, "entropy_coefficient": 0.1})
    for one, other in zip(gradients(case), gradients(case, logits_budget=1 << 30), strict=True):
        assert torch.equal(one, other)
