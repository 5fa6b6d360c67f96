"""`prompt_violations` against loops over prompts, alone and over two processes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from repo_fast.ops import prompt_violations, reference
from tests.groups import in_group

pytestmark = pytest.mark.usefixtures("backend")

SCOPES = ["prompt", "response", "batch"]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    costs=st.lists(st.floats(-100, 100, width=32), max_size=12),
    ids=st.lists(st.sampled_from([-(2**62), -1, 0, 3, 2**62]), min_size=12, max_size=12),
    threshold=st.sampled_from([0.0, 0.25, -3.0]),
    scope=st.sampled_from(SCOPES),
)
def test_is_the_mean_over_a_prompts_responses(costs: list[float], ids: list[int], threshold: float, scope: str) -> None:
    cost, prompt = torch.tensor(costs, dtype=torch.float32), torch.tensor(ids[: len(costs)], dtype=torch.int64)
    violations = prompt_violations(cost, prompt, scope=scope, threshold=threshold)
    truth = reference.prompt_violations(cost.double(), prompt, scope=scope, threshold=threshold)
    assert violations.dtype == torch.float32 and violations.shape == cost.shape
    torch.testing.assert_close(violations.double(), truth, atol=1e-4, rtol=1e-6)


def test_one_response_a_prompt_is_scope_response() -> None:
    costs = torch.randn(7)
    ids = torch.arange(7).flip(0)
    assert torch.equal(prompt_violations(costs, ids), prompt_violations(costs, ids, scope="response"))


def test_nan_reaches_its_own_prompt_only() -> None:
    costs = torch.tensor([1.0, torch.nan, 2.0, 3.0])
    ids = torch.tensor([5, 8, 8, 5])
    assert prompt_violations(costs, ids).isnan().tolist() == [False, True, True, False]
    assert prompt_violations(costs, ids, scope="batch").isnan().all()


def test_strided_inputs_same_bits_and_no_gradient() -> None:
    costs = torch.randn(40, requires_grad=True)
    ids = torch.randint(0, 6, (40,))
    one = prompt_violations(costs[::2], ids[::2])
    assert torch.equal(one, prompt_violations(costs[::2].contiguous(), ids[::2].contiguous()))
    assert not one.requires_grad


# Rank 0 and rank 1 share prompts 1 and 2; the sizes differ; the third round leaves rank 1 with nothing.
ROUNDS = [
    ([1.0, 2.0, 4.0], [1, 2, 3], [5.0, -2.0], [2, 1]),
    ([torch.nan, 0.5], [1, 2], [5.0, -2.0, 1.0], [2, 1, 7]),
    ([1.0, 3.0], [4, 4], [], []),
    ([], [], [], []),
]


def _one_rank(rank: int, folder: Path) -> None:
    group = dist.group.WORLD
    results = []
    for costs_0, ids_0, costs_1, ids_1 in ROUNDS:
        costs, ids = ((costs_0, ids_0), (costs_1, ids_1))[rank]
        for scope in SCOPES:
            results.append(
                prompt_violations(
                    torch.tensor(costs, dtype=torch.float32),
                    torch.tensor(ids, dtype=torch.int64),
                    scope=scope,
                    threshold=0.5,
                    group=group,
                )
            )
    torch.save(results, folder / f"rank{rank}.pt")


def test_means_are_over_all_ranks_of_the_group(tmp_path: Path) -> None:
    in_group(2, _one_rank, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    i = 0
    for costs_0, ids_0, costs_1, ids_1 in ROUNDS:
        costs = torch.tensor(costs_0 + costs_1, dtype=torch.float64)
        ids = torch.tensor(ids_0 + ids_1, dtype=torch.int64)
        for scope in SCOPES:
            truth = reference.prompt_violations(costs, ids, scope=scope, threshold=0.5)
            assert ranks[0][i].shape == (len(costs_0),) and ranks[1][i].shape == (len(costs_1),)
            together = torch.cat([ranks[0][i], ranks[1][i]])
            torch.testing.assert_close(together.double(), truth, equal_nan=True)
            i += 1
        # The same prompt has the same bits on both ranks.
        prompts = {}
        for rank, own in enumerate((ids_0, ids_1)):
            for prompt, value in zip(own, ranks[rank][i - 3].tolist(), strict=True):
                assert prompts.setdefault(prompt, value) == pytest.approx(value, rel=0, abs=0, nan_ok=True)
