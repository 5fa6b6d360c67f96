"""What is special to the C++ backend: instruction sets, threads, rounding, and checks of the memory it is handed.

The other tests of the ops run it beside the other backends.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from repo_fast.ops import dispatch
from repo_fast.ops.sweep import add_product
from tests.ops.cases import assert_fused_is_exact, make_case, relative_error

_C = pytest.importorskip("repo_fast._C")

EPS = torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.bfloat16]
LOGITS = ["flat", "peaked", "low"]


@pytest.fixture(params=_C.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on each instruction set that this CPU has."""
    best = _C.instruction_set()
    _C.set_instruction_set(request.param)
    yield request.param
    _C.set_instruction_set(best)


def array(tensor: Tensor) -> np.ndarray:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class Rows:
    """Rows of logits in a buffer with NaN beyond V, their targets, and for bfloat16 the exact logits of the targets."""

    def __init__(self, logits: Tensor, targets: Tensor, target_logits: Tensor | None = None, padding: int = 5) -> None:
        R, V = logits.shape
        self.memory = torch.full((R, V + padding), torch.nan, dtype=logits.dtype)
        self.logits = self.memory[:, :V]
        self.logits.copy_(logits)
        self.targets = targets
        # Their dot products: of hidden states of one dimension, and a weight that is 1 for every token.
        narrow = logits.dtype == torch.bfloat16
        self.hidden = target_logits.bfloat16().unsqueeze(1) if narrow and target_logits is not None else None
        self.weight = torch.ones(V, 1, dtype=torch.bfloat16) if narrow else None
        self.exact = logits.double()
        if self.hidden is not None:
            self.exact.scatter_(1, targets.unsqueeze(1), self.hidden.double())

    def run(
        self,
        a: Tensor,
        b: Tensor | None,
        temperature: float = 1.0,
        threads: int = 1,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """log_probs [R], entropy [R] (without b: 0, not asked for), and the logits' gradient [R, V], given a and b."""
        R, V = self.logits.shape
        weight = None if self.weight is None else array(self.weight)
        hidden = None if self.hidden is None else array(self.hidden)
        linear = _C.LinearRows(self.targets.numpy(), None, weight, V, temperature, softcap, threads)
        before = self.logits.clone()
        log_probs, entropy = torch.zeros(R), torch.zeros(R)
        entropy_out, b_in = (None, None) if b is None else (entropy.numpy(), b.numpy())
        linear.log_probs(log_probs.numpy(), entropy_out, array(self.logits), hidden, 0)
        assert torch.equal(self.logits.isnan(), before.isnan())
        assert torch.equal(self.logits.nan_to_num(), before.nan_to_num())
        gradient = torch.empty_like(before)
        linear.backward(a.numpy(), b_in, array(gradient), hidden, 0, array(self.logits))
        linear.backward(a.numpy(), b_in, array(self.logits), hidden, 0)
        assert torch.equal(self.logits.nan_to_num(), gradient.nan_to_num())
        self.logits.copy_(before)
        return log_probs, entropy, gradient

    def naive(
        self, a: Tensor, b: Tensor, temperature: float, dtype: torch.dtype, softcap: float | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same by autograd, computed in `dtype` with the exact logits of the targets."""
        z = self.exact.to(dtype, copy=True).requires_grad_()
        logits = z if softcap is None else softcap * (z / softcap).tanh()
        distribution = (logits / temperature).log_softmax(1)
        log_probs = distribution.gather(1, self.targets.unsqueeze(1)).squeeze(1)
        entropy = -(distribution.exp() * distribution).sum(1)
        ((log_probs * a).sum() + (entropy * b).sum()).backward()
        return log_probs.detach(), entropy.detach(), z.grad


def make_rows(R: int, V: int, dtype: torch.dtype, kind: str = "flat", seed: int = 0) -> Rows:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(R, V, generator=g)
    targets = torch.randint(0, V, (R,), generator=g)
    if kind == "peaked":
        favourite = torch.where(torch.rand(R, generator=g) < 0.7, targets, torch.randint(0, V, (R,), generator=g))
        logits.scatter_add_(1, favourite.unsqueeze(1), torch.full((R, 1), 25.0))
    elif kind == "low":
        logits -= 40.0
    logits = logits.to(dtype)
    # In bfloat16 the product's value for the target is a little off; here by so much that using it would show.
    return Rows(logits, targets, logits.gather(1, targets.unsqueeze(1)).squeeze(1).float() * 1.02)


@pytest.mark.parametrize("softcap", [None, 30.0, 3.0])
@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("V", [1, 2, 15, 16, 17, 31, 1000, 32001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_pass_is_exact(instruction_set: str, dtype: torch.dtype, V: int, kind: str, softcap: float | None) -> None:
    R, temperature = 9, 0.7
    rows = make_rows(R, V, dtype, kind)
    a, b = torch.randn(2, R)
    log_probs, entropy, gradient = rows.run(a, b, temperature, softcap=softcap)
    truth = rows.naive(a, b, temperature, torch.float64, softcap)
    plain = rows.naive(a, b, temperature, torch.float32, softcap)
    bound = 1e-5 * (rows.exact.abs().amax(1) / temperature).clamp(min=1)
    assert (log_probs <= 0).all()
    assert ((log_probs - truth[0]).abs() <= bound).all()
    assert ((entropy - truth[1]).abs() <= bound).all()
    floor = 1e-5 if dtype == torch.float32 else 0.0
    assert relative_error(gradient, truth[2]) <= max(floor, 2 * relative_error(plain[2].to(dtype), truth[2]))
    assert rows.memory[:, V:].isnan().all()


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("V", [1, 17, 32001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_entropies_left_out_change_nothing_else(instruction_set: str, dtype: torch.dtype, V: int, kind: str) -> None:
    rows = make_rows(9, V, dtype, kind)
    a = torch.randn(9)
    asked, left_out = rows.run(a, torch.zeros(9), 0.7), rows.run(a, None, 0.7)
    assert torch.equal(left_out[0], asked[0]) and torch.equal(left_out[2], asked[2])


def test_a_slope_of_zero_is_no_other_arithmetic(instruction_set: str) -> None:
    """Rows whose entropy has no slope skip its part: a slope too small to count gives the same bits."""
    rows = make_rows(9, 1000, torch.float32)
    a = torch.randn(9)
    assert torch.equal(rows.run(a, torch.zeros(9))[2], rows.run(a, torch.full((9,), 1e-30))[2])


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_is_exact(instruction_set: str, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_AUTO_ORDER", {"cpu": ("cpp",)})
    case = make_case(V=1203, dtype=dtype, logits=kind)
    assert_fused_is_exact(case, {"multiplier": 1.0, "entropy_coefficient": 0.1, "temperature": 1.3})


def second_logit(x: Tensor) -> Tensor:
    """log p of a target whose logit is 0, beside one logit x and many of −∞: −log(1 + eˣ), so −eˣ for small eˣ."""
    logits = torch.full((x.numel(), 17), -torch.inf)
    logits[:, 3] = x
    logits[:, 8] = 0.0
    zeros = torch.zeros(x.numel())
    return Rows(logits, torch.full((x.numel(),), 8)).run(zeros, zeros)[0]


def test_exp_is_accurate_over_its_range(instruction_set: str) -> None:
    x = torch.linspace(-87.3, 0.0, 100_001)
    truth = torch.tensor([-math.log1p(math.exp(value)) for value in x.tolist()], dtype=torch.float64)
    # Half an ulp of the result's rounding, and one and a half of exp's.
    assert ((second_logit(x) - truth) / truth).abs().max() <= 2 * EPS


def test_exp_at_the_ends_of_its_range(instruction_set: str) -> None:
    result = second_logit(torch.tensor([0.0, -87.4, -1e4, -3e38, -torch.inf, torch.nan]))
    assert result[0].item() == pytest.approx(-math.log(2.0), rel=EPS)
    assert result[1:5].tolist() == [0.0] * 4
    assert result[5].isnan()


def test_not_finite_logits_show(instruction_set: str) -> None:
    for value in (torch.nan, torch.inf):
        for j in (0, 3, 16):  # the target, in a whole vector, in the rest
            logits = torch.zeros(1, 17)
            logits[0, j] = value
            log_probs, entropy, gradient = Rows(logits, torch.tensor([0])).run(torch.ones(1), torch.ones(1))
            assert log_probs.isnan().all() and entropy.isnan().all() and gradient.isnan().all()


def test_rounds_to_bfloat16_like_torch(instruction_set: str) -> None:
    """All bfloat16 numbers, with the lower halves at which rounding changes its mind.

    A target of probability 0 beside a sure token: their gradients are a and −a.
    """
    upper = torch.arange(1 << 16, dtype=torch.int64) << 16
    for lower in (0x0000, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        a = torch.from_numpy((upper + lower).numpy().astype(np.uint32).view(np.float32))
        rows = Rows(torch.zeros(1 << 16, 2).bfloat16(), torch.zeros(1 << 16).long(), torch.full((1 << 16,), -1000.0))
        gradient = rows.run(a, torch.zeros(1 << 16))[2]
        expected = torch.stack([a, -a], 1)
        if instruction_set == "avx512_bf16":  # its instruction takes numbers that are not normal for 0
            expected[expected.abs() < torch.finfo(torch.float32).tiny] = 0.0
        torch.testing.assert_close(gradient, expected.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bits(instruction_set: str, dtype: torch.dtype) -> None:
    R = 67
    rows = make_rows(R, 32001, dtype, "peaked")
    a, b = torch.randn(2, R)
    one = rows.run(a, b)
    for threads in (2, 3):
        for first, other in zip(one, rows.run(a, b, threads=threads), strict=True):
            assert torch.equal(first, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours(instruction_set: str, dtype: torch.dtype) -> None:
    rows = make_rows(5, 1000, dtype)
    a, b = torch.randn(2, 5)
    together = rows.run(a, b)
    own = slice(2, 3)
    hidden = None if rows.hidden is None else rows.hidden[own].squeeze(1).float()
    alone = Rows(rows.logits[own], rows.targets[own], hidden, padding=0).run(a[own], b[own])
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other[own])


def test_instruction_sets_agree() -> None:
    rows = make_rows(20, 1000, torch.float32, "peaked")
    a, b = torch.randn(2, 20)
    best = _C.instruction_set()
    results = []
    for name in _C.instruction_sets():
        _C.set_instruction_set(name)
        results.append(rows.run(a, b)[2])
    _C.set_instruction_set(best)
    assert best == _C.instruction_sets()[-1]
    assert all(relative_error(result, results[0].double()) <= 1e-5 for result in results)
    with pytest.raises(ValueError, match="one of baseline.* on this CPU, got sse9"):
        _C.set_instruction_set("sse9")


@pytest.mark.parametrize("size", [0, 1, 1003, 1 << 20])
def test_add_product(size: int) -> None:
    """A sum of 50 products: `high` is its rounded value, up to what 16 bits leave open, and it is that of PyTorch's."""
    high, low = torch.zeros(2, size).bfloat16().unbind()
    plain = high.clone(), low.clone()
    truth, magnitude = torch.zeros(2, size, dtype=torch.float64).unbind()
    for _ in range(50):
        product = torch.randn(size).bfloat16()
        _C.add_product(array(high), array(low), array(product), 2)
        add_product(*plain, product)
        truth += product.double()
        magnitude = torch.maximum(magnitude, truth.abs())
    assert torch.equal(high, plain[0]) and torch.equal(low, plain[1])
    # Each addition is off by at most half a unit of the last of 16 bits, of sums that were this large at their largest.
    assert ((high.double() + low.double() - truth).abs() <= 50 * 2.0**-17 * magnitude).all()


T, R, D, V, S = 4, 3, 6, 5, 2
TOKENS = {
    "rows": np.array([0, 1, 3]),
    "old_log_probs": None,
    "reward_advantages": np.zeros(T, np.float32),
    "cost_advantages": np.zeros(T, np.float32),
    "sequence_ids": np.array([0, 1, 9, 1]),
    "violations": np.zeros(S, np.float32),
    "multiplier": 1.0,
    "rectify": True,
    "mixed": False,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "ref_log_probs": None,
    "kl_coefficient": 0.0,
    "reduction": "sum",
    "denominator": None,
    "importance_weights": None,
}
LINEAR = {
    "targets": np.array([0, 4, -100, 1]),
    "rows": TOKENS["rows"],
    "weight": np.zeros((V, D), np.uint16),
    "V": V,
    "temperature": 1.0,
    "softcap": None,
    "threads": 1,
}
CHUNK = {
    "log_probs": np.zeros(T, np.float32),
    "entropy": None,
    "logits": np.zeros((R, V), np.uint16),
    "hidden": np.zeros((R, D), np.uint16),
    "start": 0,
}


def pass_over(**changes: Any) -> None:
    """The forward row pass on good arguments but for `changes`."""
    linear = _C.LinearRows(**{name: changes.get(name, value) for name, value in LINEAR.items()})
    linear.log_probs(**{name: changes.get(name, value) for name, value in CHUNK.items()})


def backward_pass_over(**changes: Any) -> None:
    own = {name: CHUNK[name] for name in ("logits", "hidden", "start")}
    grads = {"grad_log_probs": np.zeros(T, np.float32), "grad_entropy": None}
    _C.LinearRows(**LINEAR).backward(**grads, **own, **changes)


@pytest.mark.parametrize(
    "kept, raised, message",
    [
        (np.zeros((R, V), np.float32), TypeError, "kept must hold"),
        (np.zeros((R, V - 1), np.uint16), ValueError, "a row of kept must have 5 elements, got 4"),
        (np.zeros((R - 1, V), np.uint16), ValueError, "a column of kept must have 3 elements, got 2"),
        (np.zeros((V, R), np.uint16).T, ValueError, "kept must have unit stride"),
    ],
)
def test_kept_logits_are_checked(kept: np.ndarray, raised: type[Exception], message: str) -> None:
    backward_pass_over(kept=read_only())
    with pytest.raises(raised, match=message):
        backward_pass_over(kept=kept)


def policy_tokens(**changes: Any) -> Any:
    return _C.PolicyTokens(op="op", **(TOKENS | changes))


def read_only() -> np.ndarray:
    locked = np.zeros((R, V), np.uint16)
    locked.flags.writeable = False
    return locked


@pytest.mark.parametrize(
    "argument, value, raised, message",
    [
        ("targets", np.array([0, V, -100, 1]), ValueError, r"targets must be in \[0, V=5\), got 5"),
        ("targets", np.array([0, -1, -100, 1]), ValueError, r"targets must be in \[0, V=5\), got -1"),
        ("targets", np.zeros(T, np.int32), TypeError, "targets must hold"),
        ("targets", np.zeros(2 * T, np.int64)[::2], ValueError, "targets must be a contiguous vector"),
        ("rows", np.array([0, T]), ValueError, r"rows must be in \[0, T=4\), got 4"),
        ("rows", np.array([0, -1]), ValueError, r"rows must be in \[0, T=4\), got -1"),
        ("rows", np.array([[0, 1]]), ValueError, "rows must have 1 dimensions"),
        ("weight", np.zeros((V + 1, D), np.uint16), ValueError, "weight must have 5 elements, got 6"),
        ("weight", np.zeros((V, D), np.float32), TypeError, "weight must hold"),
        ("weight", np.zeros((D, V), np.uint16).T, ValueError, "weight must have unit stride"),
        ("weight", None, TypeError, "logits must hold"),
        ("logits", np.zeros((R, V), np.float32), TypeError, "logits must hold"),
        ("logits", np.zeros((R, V + 1), np.uint16), ValueError, "a row of logits must have 5 elements, got 6"),
        ("logits", np.zeros((R + 1, V), np.uint16), ValueError, r"valid rows in \[0, N=3\), got 4 from 0"),
        ("logits", np.zeros((V, R), np.uint16).T, ValueError, "logits must have unit stride"),
        ("logits", np.lib.stride_tricks.as_strided(np.zeros(99, np.uint16), (R, V), (2, 2)), ValueError, "overlap"),
        ("logits", np.zeros((R, V), np.uint16)[::-1], ValueError, "overlap"),
        ("logits", read_only(), ValueError, "read-only"),
        ("hidden", None, TypeError, "hidden must be given"),
        ("hidden", np.zeros((R, D + 1), np.uint16), ValueError, "a row of hidden must have 6 elements, got 7"),
        ("hidden", np.zeros((R - 1, D), np.uint16), ValueError, "a column of hidden must have 3 elements, got 2"),
        ("start", 1, ValueError, r"valid rows in \[0, N=3\), got 3 from 1"),
        ("start", -1, ValueError, r"valid rows in \[0, N=3\), got 3 from -1"),
        ("log_probs", np.zeros(T + 1, np.float32), ValueError, "log_probs must have 4 elements, got 5"),
        ("entropy", np.zeros(T, np.float64), TypeError, "entropy must hold"),
    ],
)
def test_row_pass_checks_what_it_reads(argument: str, value: Any, raised: type[Exception], message: str) -> None:
    pass_over()
    with pytest.raises(raised, match=message):
        pass_over(**{argument: value})


@pytest.mark.parametrize(
    "argument, value, raised, message",
    [
        ("sequence_ids", np.array([0, S, 0, 0]), ValueError, r"op: sequence_ids .* must be in \[0, S=2\), got 2"),
        ("sequence_ids", np.array([0, 0, 0, -1]), ValueError, r"op: sequence_ids .* must be in \[0, S=2\), got -1"),
        ("rows", np.array([T]), ValueError, r"rows must be in \[0, T=4\), got 4"),
        ("reward_advantages", np.zeros(T - 1, np.float32), ValueError, "reward_advantages must have 4 elements"),
        ("cost_advantages", np.zeros(T, np.float64), TypeError, "cost_advantages must hold"),
        ("importance_weights", np.zeros(2 * T, np.float32)[::2], ValueError, "importance_weights must be a contiguous"),
        ("violations", np.zeros((S, 1), np.float32), ValueError, "violations must have 1 dimensions"),
        ("reduction", "mean", ValueError, "reduction must be"),
    ],
)
def test_policy_tokens_check_what_they_read(argument: str, value: Any, raised: type[Exception], message: str) -> None:
    policy_tokens()
    with pytest.raises(raised, match=message):
        policy_tokens(**{argument: value})


def test_fused_loss_wants_the_same_rows() -> None:
    log_probs, entropy = np.zeros((2, T), np.float32)
    linear = _C.LinearRows(**LINEAR)
    _C.FusedPolicyLoss(linear, policy_tokens(), 0.0, True, log_probs, entropy)
    for rows in (np.array([0, 1]), np.array([1, 0, 3])):
        with pytest.raises(ValueError, match="made of the same rows"):
            _C.FusedPolicyLoss(linear, policy_tokens(rows=rows), 0.0, True, log_probs, entropy)
    with pytest.raises(ValueError, match="log_probs must have 4 elements, got 3"):
        _C.FusedPolicyLoss(linear, policy_tokens(), 0.0, True, log_probs[1:], entropy)
    _C.FusedPolicyLoss(linear, policy_tokens(), 0.0, True, log_probs, None)
    with pytest.raises(ValueError, match="entropy must be given with an entropy_coefficient > 0, got None"):
        _C.FusedPolicyLoss(linear, policy_tokens(), 0.1, True, log_probs, None)


def test_prompt_violations_check_what_they_read() -> None:
    costs, ids, out = np.zeros(S, np.float32), np.zeros(S, np.int64), np.zeros(S, np.float32)
    _C.prompt_violations(costs, ids, "prompt", 0.0, out)
    with pytest.raises(ValueError, match="prompt_ids must have 2 elements, got 1"):
        _C.prompt_violations(costs, ids[1:], "prompt", 0.0, out)
    with pytest.raises(ValueError, match="scope must be"):
        _C.prompt_violations(costs, ids, "prompts", 0.0, out)
