"""`generalized_advantages` on every backend that can run here, against a loop in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repo_fast.ops import available_backends, generalized_advantages, reference

BACKENDS = available_backends("generalized_advantages")


def lengths_to_offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=8),
    gamma=st.sampled_from([1.0, 0.9, 0.0]),
    lam=st.sampled_from([0.95, 1.0, 0.0]),
    seed=st.integers(0, 1000),
)
def test_exact(backend: str, lengths: list[int], gamma: float, lam: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    rewards, values = torch.randn(T, generator=g), torch.randn(T, generator=g)
    offsets = lengths_to_offsets(lengths)
    ours = generalized_advantages(rewards, values, offsets, gamma=gamma, lam=lam, backend=backend)
    truth = reference.generalized_advantages(rewards.double(), values.double(), offsets, gamma=gamma, lam=lam)
    for value, wide in zip(ours, truth, strict=True):
        assert value.dtype == torch.float32
        # Sums of up to 40 terms of size |δ| <= ~8: 1e-5 of the largest value.
        assert T == 0 or (value - wide).abs().max() <= 1e-5 * max(1.0, wide.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_response(backend: str) -> None:
    rewards, values = torch.ones(5000), torch.zeros(5000)
    advantages, _ = generalized_advantages(
        rewards, values, torch.tensor([0, 5000], dtype=torch.int32), lam=1.0, backend=backend
    )
    assert torch.equal(advantages, torch.arange(5000, 0, -1, dtype=torch.float32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_crosses_a_boundary(backend: str) -> None:
    rewards, values = torch.randn(10), torch.randn(10)
    offsets = torch.tensor([0, 4, 10], dtype=torch.int32)
    before, _ = generalized_advantages(rewards, values, offsets, backend=backend)
    rewards[4:] = torch.nan
    values[4:] = torch.nan
    after, _ = generalized_advantages(rewards, values, offsets, backend=backend)
    assert torch.equal(before[:4], after[:4]) and after[4:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_no_gradient(backend: str) -> None:
    rewards, values = torch.randn(20), torch.randn(20, requires_grad=True)
    offsets = torch.tensor([0, 9, 3, 9, 10, 9], dtype=torch.int32)[::2]
    one = generalized_advantages(rewards[::2], values[::2], offsets, backend=backend)
    two = generalized_advantages(rewards[::2].clone(), values[::2].clone(), offsets.clone(), backend=backend)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert not one[0].requires_grad and not one[1].requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_streams_of_one_call_are_those_of_calls_of_their_own(backend: str) -> None:
    rewards, values = torch.randn(2, 30).T[::2].T, torch.randn(15, 2).T
    offsets = torch.tensor([0, 4, 4, 15], dtype=torch.int32)
    both = generalized_advantages(rewards, values, offsets, backend=backend)
    for stream in range(2):
        one = generalized_advantages(rewards[stream], values[stream], offsets, backend=backend)
        assert torch.equal(both[0][stream], one[0]) and torch.equal(both[1][stream], one[1])


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the C++ extension is not built")
def test_extension_checks_what_it_reads() -> None:
    from repo_fast import _C

    f, i = torch.zeros(4).numpy(), torch.tensor([0, 4], dtype=torch.int32).numpy()
    _C.generalized_advantages(f, f, i, 1.0, 0.9, f.copy(), f.copy())
    wrong = [
        (f.astype("float64"), f, i, f, f),
        (f, f[:3], i, f, f),
        (f, f, i.astype("int64"), f, f),
        (f, f, i[:1], f, f),
        (f, f, torch.tensor([0, 5], dtype=torch.int32).numpy(), f, f),
        (f, f, torch.tensor([0, 5, 4], dtype=torch.int32).numpy(), f, f),
        (f, f, i, f, f[:2]),
        (f, torch.zeros(8).numpy()[::2], i, f, f),
    ]
    for rewards, values, offsets, advantages, returns in wrong:
        with pytest.raises((TypeError, ValueError)):
            _C.generalized_advantages(rewards, values, offsets, 1.0, 0.9, advantages, returns)
