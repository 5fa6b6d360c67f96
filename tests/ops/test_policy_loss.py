"""The two policy losses against float64: every option, rows left out, NaN, clamps, and the returned statistics."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repo_fast.ops import (
    PolicyLoss,
    chunked,
    fused_rectified_policy_loss,
    linear_log_probs,
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
    run_reference,
    with_token_options,
)

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS: list[dict[str, Any]] = [
    {"multiplier": 1.0},
    {"multiplier": 0.0, "scope": "response", "threshold": 0.3},
    {"multiplier": 2.5, "scope": "batch", "rectify": False, "surrogate": "mixed", "threshold": -0.1},
    {"multiplier": 0.4, "surrogate": "mixed", "clip": (0.1, 0.3), "temperature": 0.7},
    {"multiplier": 0.4, "ref_log_probs": True, "kl_coefficient": 0.3},
    {"multiplier": 0.4, "entropy_coefficient": 0.2, "temperature": 1.3},
    {"multiplier": 3.0, "reduction": "token_mean", "importance_weights": True},
    {"multiplier": 3.0, "reduction": "token_mean", "denominator": 123.0},
    {"multiplier": 3.0, "reduction": "sequence_mean", "denominator": 17.0, "importance_weights": True},
    {"multiplier": 1.0, "reduction": "sum", "denominator": 5.0, "entropy_coefficient": 0.01},
    {"multiplier": 1.0, "on_policy": True, "ref_log_probs": True, "kl_coefficient": 0.1, "entropy_coefficient": 0.1},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options)))
def test_fused_is_exact(options: dict[str, Any], dtype: torch.dtype, chunks: str) -> None:
    assert_fused_is_exact(make_case(dtype=dtype), options)


@pytest.mark.parametrize("logits", ["flat", "peaked", "low"])
@pytest.mark.parametrize("V", [2, 31, 32001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_is_exact_on_any_vocabulary(dtype: torch.dtype, V: int, logits: str, chunks: str) -> None:
    assert_fused_is_exact(
        make_case(seed=1, V=V, dtype=dtype, logits=logits), {"multiplier": 1.0, "entropy_coefficient": 0.1}
    )


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    T=st.integers(0, 60),
    D=st.integers(1, 40),
    V=st.integers(1, 90),
    S=st.integers(1, 7),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    options=st.sampled_from(OPTIONS),
    logits=st.sampled_from(["flat", "peaked", "low"]),
    seed=st.integers(0, 1000),
)
def test_fused_is_exact_at_any_shape(
    T: int, D: int, V: int, S: int, ignored: float, options: dict[str, Any], logits: str, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "CPU_MIN_ROWS", 1 + seed % 7)
        patch.setattr(sweep, "CPU_CHUNK_ROWS", 1 + seed % 7)
        patch.setattr(chunked, "CPU_BLOCK_ELEMENTS", 2 * V)
        assert_fused_is_exact(make_case(seed, T, D, V, S, logits=logits, ignored=ignored), options)


@pytest.mark.parametrize("logits", ["flat", "peaked", "low"])
@pytest.mark.parametrize("V", [2, 31, 1031])
@pytest.mark.parametrize("dtype", DTYPES)
def test_entropies_that_are_left_out_change_nothing_else(dtype: torch.dtype, V: int, logits: str, chunks: str) -> None:
    case = make_case(seed=2, V=V, dtype=dtype, logits=logits)
    options = {"multiplier": 0.4, "temperature": 0.7, "ref_log_probs": True, "kl_coefficient": 0.3}
    asked, hidden, weight = run_fused(case, options)
    left_out, same_hidden, same_weight = run_fused(case, {**options, "entropy": False})
    assert left_out.entropy is None and asked.entropy is not None
    for name in set(PolicyLoss._fields) - {"entropy"}:
        assert torch.equal(getattr(left_out, name), getattr(asked, name)), name
    assert torch.equal(same_hidden, hidden) and torch.equal(same_weight, weight)


def test_entropies_cannot_be_left_out_of_a_loss_that_has_them() -> None:
    options = {"multiplier": 1.0, "entropy_coefficient": 0.1, "entropy": False}
    with pytest.raises(ValueError, match="entropy must be True with entropy_coefficient=0.1, got False"):
        fused_rectified_policy_loss(*make_case().arguments(), **options)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options)))
def test_rectified_is_exact(options: dict[str, Any]) -> None:
    """The same options on log-probabilities alone, against float64 and against the fused op."""
    options = {key: value for key, value in options.items() if key not in ("temperature", "entropy_coefficient")}
    case = make_case(T=50)
    fused, *_ = run_fused(case, options)
    options = with_token_options(case, options)
    scope = {key: options.pop(key) for key in ("scope", "threshold") if key in options}
    on_policy = options.pop("on_policy", False)

    def run(case: Case, log_probs: torch.Tensor, function: Any, violations: torch.Tensor) -> tuple[Any, torch.Tensor]:
        log_probs = log_probs.clone().requires_grad_()
        own = {key: getattr(case, key, value) for key, value in options.items()}
        result = function(
            log_probs,
            None if on_policy else case.old_log_probs,
            case.reward_advantages,
            case.cost_advantages,
            case.sequence_ids.masked_fill(case.targets == -100, -1),
            violations,
            **own,
        )
        loss = result if isinstance(result, torch.Tensor) else result.loss
        loss.backward()
        return result, log_probs.grad

    violations = prompt_violations(case.costs, case.prompt_ids, **scope)
    result, gradient = run(case, fused.log_probs, rectified_policy_loss, violations)
    truth, wide = run(case.wide(), fused.log_probs.double(), reference.rectified_policy_loss, violations.double())
    scale = loss_scale(case, {**options, **scope})
    assert abs(result.loss.item() - truth.item()) <= 1e-5 * scale
    assert relative_error(gradient, wide) <= 1e-5
    assert result.entropy is None
    assert torch.equal(result.log_probs, fused.log_probs) and torch.equal(result.violations, fused.violations)
    assert abs(result.loss.item() - fused.loss.item()) <= 1e-5 * scale
    for name in ("clip_fraction", "approx_kl", "unsafe_fraction"):
        assert getattr(result, name).item() == pytest.approx(getattr(fused, name).item(), rel=1e-6)


def small_loss(log_ratio: list[float], **options: Any) -> Any:
    """`rectified_policy_loss` on given log ρ, with A_r = 1, A_c = 2, one unsafe sequence, and λ = 1."""
    log_probs = torch.tensor(log_ratio, requires_grad=True)
    n = log_probs.numel()
    arguments = {
        "old_log_probs": torch.zeros(n),
        "reward_advantages": torch.ones(n),
        "cost_advantages": torch.full((n,), 2.0),
        "sequence_ids": torch.zeros(n, dtype=torch.long),
        "violations": torch.ones(1),
        "multiplier": 1.0,
        "reduction": "sum",
    } | options
    result = rectified_policy_loss(log_probs, **arguments)
    result.loss.backward()
    return result, log_probs.grad


def test_by_hand() -> None:
    # ρ = 2: the reward stream is clipped at 1.2; the cost stream, −2 < 0, is not: ℓ = −(0.5·1.2 + 0.5·2·(−2)) = 1.4.
    result, gradient = small_loss([math.log(2.0)])
    assert result.loss.item() == pytest.approx(1.4)
    assert gradient.item() == pytest.approx(2.0)  # only the cost stream: 0.5·2·ρ
    assert result.clip_fraction.item() == 1.0
    assert result.approx_kl.item() == pytest.approx(1 - math.log(2.0))
    # ρ = 1/2: the reward stream is not, the cost stream is clipped at 0.8: ℓ = −(0.5·0.5 − 0.5·2·0.8) = 0.55.
    result, gradient = small_loss([-math.log(2.0)])
    assert result.loss.item() == pytest.approx(0.55)
    assert gradient.item() == pytest.approx(-0.25)
    # Mixed: A = 0.5·1 − 0.5·2 = −0.5 < 0 and ρ = 2: −min(−1, −0.6) = 1.
    result, gradient = small_loss([math.log(2.0)], surrogate="mixed")
    assert result.loss.item() == pytest.approx(1.0) and gradient.item() == pytest.approx(1.0)
    assert result.clip_fraction.item() == 0.0


def test_safe_sequences_have_no_cost_stream_and_it_does_not_count_as_clipped() -> None:
    # ρ = 1/2 clips only the cost stream (−2·0.8 < −2·0.5), whose weight is 0 where v = 0.
    result, gradient = small_loss([-math.log(2.0)], violations=torch.zeros(1))
    assert result.loss.item() == pytest.approx(-0.5) and gradient.item() == pytest.approx(-0.5)
    assert result.clip_fraction.item() == 0.0 and result.unsafe_fraction.item() == 0.0


def test_log_ratio_is_clamped_without_gradient() -> None:
    result, gradient = small_loss([25.0, 20.0, -25.0], cost_advantages=torch.zeros(3), reward_advantages=-torch.ones(3))
    expected = 0.5 * (2 * math.exp(20.0) + 0.8)  # ρ = e²⁰ twice; at ρ = e⁻²⁰ the clipped branch, −0.8, is the smaller
    assert result.loss.item() == pytest.approx(expected, rel=1e-6)
    assert gradient.tolist() == pytest.approx([0.0, 0.5 * math.exp(20.0), 0.0], rel=1e-6)


def test_k3_penalty_by_hand() -> None:
    options = {"reward_advantages": torch.zeros(1), "cost_advantages": torch.zeros(1), "kl_coefficient": 0.5}
    result, gradient = small_loss([0.1], ref_log_probs=torch.tensor([0.4]), **options)
    assert result.loss.item() == pytest.approx(0.5 * (math.exp(0.3) - 0.3 - 1), rel=1e-5)
    assert gradient.item() == pytest.approx(0.5 * (1 - math.exp(0.3)), rel=1e-5)


def test_is_ppo_without_costs_and_multiplier() -> None:
    case = make_case(ignored=0.0)
    log_probs = linear_log_probs(case.hidden, case.weight, case.targets).requires_grad_()
    other = log_probs.detach().clone().requires_grad_()
    zeros = torch.zeros_like(case.cost_advantages)
    loss = rectified_policy_loss(
        log_probs, case.old_log_probs, case.reward_advantages, zeros, case.sequence_ids, case.costs, multiplier=0.0,
        reduction="token_mean",
    ).loss  # fmt: skip
    ratio = (other - case.old_log_probs).exp()
    ppo = -torch.minimum(ratio * case.reward_advantages, ratio.clamp(0.8, 1.2) * case.reward_advantages).mean()
    loss.backward()
    ppo.backward()
    torch.testing.assert_close(loss, ppo)
    torch.testing.assert_close(log_probs.grad, other.grad)


def test_sequence_mean_does_not_depend_on_how_tokens_are_packed() -> None:
    case = make_case(T=40, S=3)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    tokens = ("hidden", "targets", "old_log_probs", "reward_advantages", "cost_advantages", "sequence_ids")
    shuffled = Case(**{name: value[order] if name in tokens else value for name, value in vars(case).items()})
    one, two = run_fused(case, {"multiplier": 1.0})[0], run_fused(shuffled, {"multiplier": 1.0})[0]
    torch.testing.assert_close(one.loss, two.loss)
    assert torch.equal(one.log_probs[order] == 0, two.log_probs == 0)


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_global_denominators_make_micro_batches_add_up(reduction: str) -> None:
    case = make_case(T=40, S=4)
    valid = case.targets != -100
    count = float(valid.sum() if reduction == "token_mean" else case.sequence_ids[valid].unique().numel())
    whole = run_fused(case, {"multiplier": 1.0, "reduction": reduction})
    options = {"multiplier": 1.0, "reduction": reduction, "violations": whole[0].violations}
    parts = []
    for group in ([0, 2], [1, 3]):
        own = torch.isin(case.sequence_ids, torch.tensor(group))
        part = Case(**{name: value[own] if value.shape[:1] == (40,) else value for name, value in vars(case).items()})
        parts.append(run_fused(part, {**options, "denominator": torch.tensor(count)}))
    torch.testing.assert_close(parts[0][0].loss + parts[1][0].loss, whole[0].loss)
    torch.testing.assert_close(parts[0][2] + parts[1][2], whole[2])


@pytest.mark.parametrize("rectify, surrogate", list(itertools.product([True, False], ["separate", "mixed"])))
def test_nan_cost_is_not_safe(rectify: bool, surrogate: str) -> None:
    case = make_case(S=4, ignored=0.0)
    case.costs[2] = torch.nan
    result, *_ = run_fused(case, {"multiplier": 1.0, "rectify": rectify, "surrogate": surrogate})
    assert result.loss.isnan() and result.unsafe_fraction.isnan()
    assert torch.equal(result.violations.isnan(), case.prompt_ids == case.prompt_ids[2])
    assert small_loss([0.0], violations=torch.tensor([torch.nan]), rectify=rectify)[0].loss.isnan()


def test_stream_of_weight_zero_is_multiplied() -> None:
    nan = torch.tensor([torch.nan])
    assert small_loss([0.0], violations=-torch.ones(1), cost_advantages=nan)[0].loss.isnan()
    assert small_loss([0.0], multiplier=0.0, cost_advantages=nan)[0].loss.isnan()


def test_left_out_tokens_are_never_looked_at(chunks: str) -> None:
    case = make_case()
    out = case.targets == -100
    options = {"multiplier": 1.0, "ref_log_probs": True, "kl_coefficient": 0.1, "importance_weights": True}
    clean = run_fused(case, options)
    tokens = ("old_log_probs", "reward_advantages", "cost_advantages", "ref_log_probs", "importance_weights")
    poisoned = {name: getattr(case, name).masked_fill(out, torch.nan) for name in tokens}
    poisoned["hidden"] = case.hidden.masked_fill(out[:, None], torch.nan)
    poisoned["sequence_ids"] = case.sequence_ids.masked_fill(out, 10**9)
    dirty = run_fused(Case(**(vars(case) | poisoned)), options)
    for one, two in zip((*clean[0], *clean[1:]), (*dirty[0], *dirty[1:]), strict=True):
        assert torch.equal(one, two)
    log_probs = clean[0].log_probs.masked_fill(out, torch.nan).requires_grad_()
    result = rectified_policy_loss(
        log_probs, poisoned["old_log_probs"], poisoned["reward_advantages"], poisoned["cost_advantages"],
        case.sequence_ids.masked_fill(out, -1), clean[0].violations, multiplier=1.0,
        ref_log_probs=poisoned["ref_log_probs"], kl_coefficient=0.1, importance_weights=poisoned["importance_weights"],
    )  # fmt: skip
    result.loss.backward()
    torch.testing.assert_close(result.loss, clean[0].loss)
    assert not log_probs.grad[out].any() and log_probs.grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean", "sum"])
@pytest.mark.parametrize("T, S", [(0, 3), (0, 0), (6, 3)])
def test_no_valid_token_is_loss_zero_attached_to_the_graph(T: int, S: int, reduction: str) -> None:
    case = make_case(T=T, S=max(S, 1), ignored=1.0)
    if S == 0:
        case = Case(**(vars(case) | {"costs": torch.zeros(0), "prompt_ids": torch.zeros(0, dtype=torch.long)}))
    result, grad_hidden, grad_weight = run_fused(case, {"multiplier": 1.0, "reduction": reduction})
    assert result.loss.item() == 0 and result.clip_fraction.item() == 0 and result.approx_kl.item() == 0
    assert grad_hidden.shape == (T, 24) and not grad_hidden.any() and not grad_weight.any()
    log_probs = torch.zeros(T, requires_grad=True)
    zeros, ids = torch.zeros(T), torch.full((T,), -1)
    loss = rectified_policy_loss(
        log_probs, zeros, zeros, zeros, ids, torch.zeros(S), multiplier=1.0, reduction=reduction
    ).loss
    loss.backward()
    assert loss.item() == 0 and not log_probs.grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ratio_is_exactly_one_on_policy(dtype: torch.dtype, chunks: str) -> None:
    case = make_case(T=50, V=301, dtype=dtype)
    with torch.no_grad():
        old = linear_log_probs(case.hidden, case.weight, case.targets, temperature=0.9)
    case = Case(**(vars(case) | {"old_log_probs": old}))
    options = {"multiplier": 1.0, "temperature": 0.9, "clip": (0.0, 0.0)}
    result, grad_hidden, grad_weight = run_fused(case, options)
    assert torch.equal(result.log_probs, old)
    assert result.approx_kl.item() == 0 and result.clip_fraction.item() == 0
    implied, implied_hidden, implied_weight = run_fused(case, {**options, "on_policy": True})
    assert torch.equal(result.loss, implied.loss)
    assert torch.equal(grad_hidden, implied_hidden) and torch.equal(grad_weight, implied_weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_memory_held_before_is_never_used(dtype: torch.dtype, chunks: str) -> None:
    """With PyTorch's deterministic mode new memory is full of NaN: logits, the padding of their rows, gradients."""
    case = make_case(T=50, V=1031, dtype=dtype)
    options = {"multiplier": 1.0, "entropy_coefficient": 0.1}
    clean = run_fused(case, options)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        dirty = run_fused(case, options)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, two in zip((*clean[0], *clean[1:]), (*dirty[0], *dirty[1:]), strict=True):
        assert torch.equal(one, two)


def test_given_violations_override_costs() -> None:
    case = make_case()
    violations = torch.linspace(-1, 1, 5)
    options = {"multiplier": 1.0, "violations": violations}
    truth = run_reference(case.wide(), {"multiplier": 1.0, "violations": violations.double()})[0][0]
    given, *_ = run_fused(case, options)
    assert torch.equal(given.violations, violations) and given.violations.data_ptr() != violations.data_ptr()
    assert given.loss.item() == pytest.approx(truth.item(), rel=1e-5)
    without = Case(**(vars(case) | {"costs": None, "prompt_ids": None}))
    assert torch.equal(run_fused(without, options)[0].loss, given.loss)


def test_multiplier_tensor_and_number_are_the_same() -> None:
    case = make_case()
    number, *_ = run_fused(case, {"multiplier": 0.3, "denominator": 7.0})
    tensor, *_ = run_fused(case, {"multiplier": torch.tensor(0.3), "denominator": torch.tensor(7.0)})
    assert torch.equal(number.loss, tensor.loss)


def test_any_chunk_size_gives_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(T=200, V=301, D=40)
    options = {"multiplier": 1.0, "entropy_coefficient": 0.1}
    scale = loss_scale(case, options)
    whole = run_fused(case, options)
    for rows, elements in ((1, 1), (7, 1000), (64, 10**6), (199, 301)):
        monkeypatch.setattr(sweep, "CPU_MIN_ROWS", rows)
        monkeypatch.setattr(sweep, "CPU_CHUNK_ROWS", rows)
        monkeypatch.setattr(chunked, "CPU_BLOCK_ELEMENTS", elements)
        split = run_fused(case, options)
        assert abs(split[0].loss.item() - whole[0].loss.item()) <= 1e-6 * scale
        assert relative_error(split[2], whole[2].double()) <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_inputs_give_the_same_bits(dtype: torch.dtype, chunks: str) -> None:
    case = make_case(T=60, V=301, dtype=dtype)
    one, two = (run_fused(case, {"multiplier": 1.0, "entropy_coefficient": 0.1}) for _ in range(2))
    for first, second in zip((*one[0], *one[1:]), (*two[0], *two[1:]), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES)
def test_incoming_gradient_is_applied(dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype)
    for factor in (1.0, 3.0, 1e-3):
        scaled = case.copy()
        (factor * fused_rectified_policy_loss(*scaled.arguments(), multiplier=1.0).loss).backward()
        plain = case.copy()
        (factor * reference.fused_rectified_policy_loss(*plain.arguments(), multiplier=1.0)[0]).backward()
        wide = case.wide().copy()
        (factor * reference.fused_rectified_policy_loss(*wide.arguments(), multiplier=1.0)[0]).backward()
        for name in ("hidden", "weight"):
            ours, ordinary, truth = (getattr(inputs, name).grad for inputs in (scaled, plain, wide))
            assert relative_error(ours, truth) <= max(1e-5, 2 * relative_error(ordinary, truth))


def test_float16_gradients_survive_a_large_vocabulary_and_denominator() -> None:
    """p/(V·T) is below float16's smallest number; a loss scale, as float16 training uses, brings it back."""
    case = make_case(T=16, D=32, V=5000, dtype=torch.float16)
    options = {"multiplier": 1.0, "reduction": "token_mean", "denominator": 1e6}
    wide, ours = case.wide().copy(), case.copy()
    (1e6 * reference.fused_rectified_policy_loss(*wide.arguments(), **options)[0]).backward()
    (1e6 * fused_rectified_policy_loss(*ours.arguments(), **options).loss).backward()
    half = torch.finfo(torch.float16).eps
    assert relative_error(ours.hidden.grad, wide.hidden.grad) <= half
    assert relative_error(ours.weight.grad, wide.weight.grad) <= half
    ours = case.copy()
    up = torch.full((16,), 1e-8)
    log_probs = linear_log_probs(ours.hidden, ours.weight, ours.targets)
    gradient = torch.autograd.grad((log_probs * up).sum() * 1e8, ours.hidden)[0]
    assert gradient.any()


def test_hidden_and_weight_twice_in_one_graph() -> None:
    case, other, wide = make_case().copy(), make_case().copy(), make_case().wide().copy()
    for inputs, op in (
        (case, lambda *x, **y: fused_rectified_policy_loss(*x, **y).loss),
        (other, lambda *x, **y: reference.fused_rectified_policy_loss(*x, **y)[0]),
        (wide, lambda *x, **y: reference.fused_rectified_policy_loss(*x, **y)[0]),
    ):
        twice = Case(**(vars(inputs) | {"hidden": 2 * inputs.hidden, "weight": inputs.weight.flip(0)}))
        (op(*inputs.arguments(), multiplier=1.0) - 3 * op(*twice.arguments(), multiplier=0.2)).backward()
    for name in ("hidden", "weight"):
        ours, plain, truth = (getattr(inputs, name).grad for inputs in (case, other, wide))
        assert relative_error(ours, truth) <= max(1e-5, 2 * relative_error(plain, truth))


def test_one_token_and_expanded_inputs() -> None:
    assert_fused_is_exact(make_case(T=1, S=1, ignored=0.0), {"multiplier": 1.0})
    case = make_case(T=9, ignored=0.0)
    expanded = Case(
        **(vars(case) | {
            "hidden": case.hidden[:1].expand(9, -1),
            "weight": torch.randn(24, 62).T[::2],
            "old_log_probs": torch.tensor([-3.0]).expand(9),
            "reward_advantages": torch.randn(18)[::2],
            "sequence_ids": torch.tensor([1]).expand(9),
            "costs": torch.tensor([0.5]).expand(5),
        })
    )  # fmt: skip
    solid = Case(**{name: value.contiguous() for name, value in vars(expanded).items()})

    def run(case: Case) -> tuple[torch.Tensor, ...]:
        hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
        loss = fused_rectified_policy_loss(*case.arguments(), multiplier=1.0).loss
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    torch.testing.assert_close(run(expanded), run(solid))
