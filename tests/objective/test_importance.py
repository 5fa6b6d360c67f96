"""Importance weights by hand, against loops in float64, of all that can be drawn, and beyond what exp can hold."""

import itertools
import math

import pytest
import torch

from repo_fast.objective.importance import importance_metrics, importance_weights

BOUNDS = [
    {"cap": 1.2},
    {"mask": (0.8, 1.3)},
    {"mask": (0.0, 3.0)},
    {"cap": 1.1, "mask": (0.6, 1.5)},
]


def packed(*responses):
    """Log-ratios [T] of responses, given as ratios, and where these start and end."""
    ends = itertools.accumulate((len(ratios) for ratios in responses), initial=0)
    ratios = torch.tensor([ratio for ratios in responses for ratio in ratios], dtype=torch.float32)
    return ratios.log(), torch.tensor(list(ends), dtype=torch.int32)


def weigh(log_ratios, cu_seqlens, **options):
    weights, sums = importance_weights(log_ratios, cu_seqlens, **options)
    return weights, importance_metrics(sums)


def shares(metrics):
    return metrics["importance_capped_share"], metrics["importance_masked_share"]


def test_tokens_by_hand():
    responses = packed([0.5, 4.0], [1.0, 0.25])
    weights, metrics = weigh(*responses, level="token", cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([0.5, 2.0, 1.0, 0.25]))
    assert shares(metrics) == (0.25, 0)
    assert metrics["importance_mean"] == pytest.approx(3.75 / 4)
    assert metrics["importance_effective_share"] == pytest.approx(3.75**2 / (4 * 5.3125))
    weights, metrics = weigh(*responses, level="token", mask=(0.4, 3.0))
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.0, 1.0, 0.0]))
    assert shares(metrics) == (0, 0.5)
    assert metrics["importance_effective_share"] == pytest.approx(1.5**2 / (4 * 1.25))
    weights, metrics = weigh(*responses, level="token", cap=0.9, mask=(0.4, 3.0))
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.0, 0.9, 0.0]))
    assert shares(metrics) == (0.25, 0.5)


def test_responses_by_hand():
    """Products 2, 0.25 and 1.5; a token of 8 beside one of 0.25 is no outlier, as it is by itself."""
    responses = packed([0.25, 8.0], [0.5, 0.5], [1.5])
    weights, metrics = weigh(*responses, level="sequence", cap=1.75)
    torch.testing.assert_close(weights, torch.tensor([1.75, 1.75, 0.25, 0.25, 1.5]))
    assert shares(metrics) == pytest.approx((1 / 3, 0))
    # A response is one weight, however long it is.
    assert metrics["importance_mean"] == pytest.approx(3.5 / 3)
    weights, metrics = weigh(*responses, level="sequence", mask=(0.3, 2.5))
    torch.testing.assert_close(weights, torch.tensor([2.0, 2.0, 0.0, 0.0, 1.5]))
    assert shares(metrics) == pytest.approx((0, 1 / 3))
    weights, metrics = weigh(*responses, level="sequence", cap=1.75, mask=(0.3, 2.5))
    torch.testing.assert_close(weights, torch.tensor([1.75, 1.75, 0.0, 0.0, 1.5]))
    assert shares(metrics) == pytest.approx((1 / 3, 1 / 3))


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_and_sums_equal_loops_in_float64_and_add_up_over_ranks(level, bounds):
    torch.manual_seed(0)
    lengths = torch.randint(1, 30, (40,))
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    log_ratios = torch.randn(int(ends[-1])) * 0.2
    low, high = bounds.get("mask", (0.0, math.inf))
    expected, counted, capped, masked = [], [], 0, 0
    for start, end in itertools.pairwise(ends.tolist()):
        own = log_ratios[start:end].tolist()
        for logs in [own] if level == "sequence" else [[one] for one in own]:
            weight = math.prod(math.exp(one) for one in logs)
            outside = not low <= weight <= high
            masked += outside
            capped += not outside and weight > bounds.get("cap", math.inf)
            counted.append(0.0 if outside else min(weight, bounds.get("cap", math.inf)))
            expected += [counted[-1]] * len(logs)
    assert masked or "mask" not in bounds or bounds["mask"][0] == 0
    assert capped or "cap" not in bounds
    weights, sums = importance_weights(log_ratios, ends.int(), level=level, **bounds)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)
    squares = sum(one**2 for one in counted)
    expected_sums = torch.tensor([len(counted), capped, masked, sum(counted), squares], dtype=torch.float64)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-6, atol=0)
    # Two ranks, and a third without responses.
    half = int(ends[17])
    parts = [
        importance_weights(log_ratios[start:end], (own - own[0]).int(), level=level, **bounds)[1]
        for start, end, own in ((0, half, ends[:18]), (half, None, ends[17:]), (0, 0, ends[:1]))
    ]
    assert importance_metrics(sum(parts)) == pytest.approx(importance_metrics(sums), rel=1e-12)


def test_tokens_with_a_cap_are_the_bits_that_they_were():
    torch.manual_seed(0)
    new, old = -3 * torch.rand(2, 1000)
    cu_seqlens = torch.tensor([0, 400, 1000], dtype=torch.int32)
    for cap in (0.5, 1.0, 2.0):
        weights, sums = importance_weights(new - old, cu_seqlens, level="token", cap=cap)
        before = (new - old).exp()
        assert torch.equal(weights, before.clamp(max=cap))
        assert importance_metrics(sums)["importance_capped_share"] == float((before > cap).sum()) / 1000


def test_sequence_weights_give_the_mean_under_the_policy_exactly():
    """Of every response that two samplers can draw, two tokens and an end: neither tokens' weights nor a mean do."""
    torch.manual_seed(0)
    policy, sampler = torch.randn(2, 3, 3, dtype=torch.float64).log_softmax(-1)  # [position, token], token 2 ends
    drawn = [(2,)]
    drawn += [(a, 2) for a in (0, 1)] + [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1, 2)]
    value = dict(zip(drawn, torch.randn(len(drawn)).tolist(), strict=True))

    def of(model, y):
        return torch.stack([model[t, token] for t, token in enumerate(y)])

    def mean(weight):
        return sum(math.exp(of(sampler, y).sum()) * weight(y) * value[y] for y in drawn)

    def ours(level):
        def weight(y):
            logs = (of(policy, y) - of(sampler, y)).float()
            ends = torch.tensor([0, len(y)], dtype=torch.int32)
            # Of the last token, as a loss of that token would be weighed.
            return float(importance_weights(logs, ends, level=level, mask=(0.0, 1e9))[0][-1])

        return weight

    assert sum(math.exp(of(policy, y).sum()) for y in drawn) == pytest.approx(1)
    expected = sum(math.exp(of(policy, y).sum()) * value[y] for y in drawn)
    assert mean(ours("sequence")) == pytest.approx(expected, rel=1e-5)
    assert abs(mean(ours("token")) - expected) > 0.05
    assert abs(mean(lambda y: math.exp((of(policy, y) - of(sampler, y)).mean())) - expected) > 0.05


@pytest.mark.parametrize("nats", [1.0, -1.0])
def test_what_exp_cannot_hold_is_bounded(nats):
    """A product of e^3000 or e^-3000: infinite or 0 even in float64."""
    logs, ends = torch.full((3000,), nats), torch.tensor([0, 3000], dtype=torch.int32)
    weights, metrics = weigh(logs, ends, level="sequence", cap=2.0)
    assert weights.unique().tolist() == [2.0 if nats > 0 else 0.0] and shares(metrics) == (nats > 0, 0)
    weights, metrics = weigh(logs, ends, level="sequence", mask=(0.5, 2.0))
    assert weights.unique().tolist() == [0.0] and shares(metrics) == (0, 1)
    assert metrics["importance_mean"] == metrics["importance_effective_share"] == 0
    # Token by token, float32 overflows at e^89.
    weights, metrics = weigh(100 * logs[:2], torch.tensor([0, 2], dtype=torch.int32), level="token", mask=(0.5, 2.0))
    assert weights.tolist() == [0.0, 0.0] and shares(metrics) == (0, 1)


def test_a_long_response_is_summed_in_float64():
    """Beside a sum of 4096, float32 would lose each 1e-4, and two outliers would not cancel as products."""
    logs = torch.cat([torch.tensor([4096.0]), torch.full((5000,), 1e-4), torch.tensor([-4096.0])])
    weights, _ = importance_weights(logs, torch.tensor([0, 5002], dtype=torch.int32), level="sequence", cap=2.0)
    torch.testing.assert_close(weights, torch.full_like(logs, math.exp(0.5)))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bounds", BOUNDS)
def test_what_is_not_finite_is_neither_capped_nor_masked(broken, bounds):
    logs, ends = torch.tensor([0.0, broken, 0.0]), torch.tensor([0, 2, 3], dtype=torch.int32)
    for level, expected in (("token", [False, True, False]), ("sequence", [True, True, False])):
        weights, metrics = weigh(logs, ends, level=level, **bounds)
        assert weights.isnan().tolist() == expected and weights[2] == 1
        assert shares(metrics) == (0, 0) and math.isnan(metrics["importance_mean"])
