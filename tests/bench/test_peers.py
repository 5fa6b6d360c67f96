"""Every implementation that is measured computes what it says, and the check that guards the tables can fail."""

from dataclasses import replace

import pytest
import torch

from bench.cases import COMPUTATIONS, make_case
from bench.check import check
from bench.peers import PEERS, PRODUCTS
from repo_fast.ops import reference

CPU = torch.device("cpu")


def small_case(dtype=torch.float32, ignored=0.0):
    return make_case(64, 24, 1031, dtype, CPU, ignored=ignored, seed=1)


COMPILED = ("compile", "cce")  # seconds for each computation
NAMES = [
    pytest.param(name, marks=pytest.mark.slow if name in COMPILED else ()) for name in PEERS if name != PRODUCTS.name
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dtype", "ignored"), [(torch.float32, 0.0), (torch.bfloat16, 0.5)], ids=["float32", "bfloat16, half ignored"]
)
def test_peers_compute_what_they_say(name, dtype, ignored):
    peer, case = PEERS[name], small_case(dtype, ignored)
    why_not = peer.unavailable(CPU)
    if why_not is not None:
        pytest.skip(why_not)
    for computation in COMPUTATIONS:
        task = peer.task(computation, case)
        check(peer, computation, case, task.run(*task.setup()))


def test_the_check_is_the_reference():
    case = small_case(ignored=0.25)
    leaves = [leaf.detach().double().requires_grad_() for leaf in case.leaves]
    loss, log_probs, _, _ = reference.fused_rectified_policy_loss(
        *leaves,
        case.targets,
        case.old_log_probs,
        case.reward_advantages,
        case.cost_advantages,
        case.sequence_ids,
        case.costs,
        case.prompt_ids,
        multiplier=0.7,
        reduction="token_mean",
    )
    check(PEERS["plain"], "log_probs", case, log_probs.detach())
    check(PEERS["plain"], "policy_loss", case, torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("computation", COMPUTATIONS)
def test_a_wrong_result_is_found(computation):
    case = small_case()
    wrong = replace(case, targets=case.targets.roll(1))
    task = PEERS["plain"].task(computation, wrong)
    with pytest.raises(AssertionError, match=f"plain, {computation}"):
        check(PEERS["plain"], computation, case, task.run(*task.setup()))


@pytest.mark.parametrize(("computation", "products"), COMPUTATIONS.items())
def test_the_floor_is_the_products_over_the_valid_rows(computation, products):
    case = small_case(ignored=0.5)
    task = PRODUCTS.task(computation, case)
    with torch.profiler.profile(record_shapes=True, with_flops=True) as profiler:
        task.run()
    flop = products * 2 * 32 * 24 * 1031
    assert case.flop(computation) == flop
    assert sum(event.flops for event in profiler.key_averages()) in (
        flop,
        flop // 1031 * 1056,
    )  # the faster of V and V padded
