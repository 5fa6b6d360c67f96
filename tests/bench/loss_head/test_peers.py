"""Every implementation that is measured computes what it says, and the check that guards the tables can fail."""

import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bench.loss_head.cases import COMPUTATIONS, make_case
from bench.loss_head.check import check
from bench.loss_head.peers import PEERS, PRODUCTS
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
    for computation in peer.computations:
        task = peer.task(computation, case)
        check(peer, computation, case, task.run(*task.setup()))


def test_a_peer_is_not_asked_for_what_it_has_not():
    assert PEERS["liger_ce"].why_not("log_probs_backward", torch.device("cuda")) == "liger_ce has no log_probs_backward"
    for name in ("trl", "liger_scaled"):
        assert set(PEERS[name].computations) == set(COMPUTATIONS)


@pytest.mark.parametrize("name", ["liger_ce", "quack"])
def test_what_is_for_gpus_alone_says_so(name):
    assert "for GPUs alone" in PEERS[name].why_not("policy_loss", CPU)


def test_quack_is_called_as_its_source_has_it(monkeypatch):
    """Stand-ins with its signatures: chunks where 8 divides all sizes, else all logits; the mean cross-entropy."""
    quack, chunked = types.ModuleType("quack.linear_cross_entropy"), []

    def linear_cross_entropy_func(x, weight, bias, target, ignore_index=-100, reduction="mean", inplace_backward=False):
        return F.cross_entropy(F.linear(x, weight, bias), target, ignore_index=ignore_index, reduction=reduction)

    def chunked_linear_cross_entropy(x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean"):
        chunked.append(chunk_size)
        return linear_cross_entropy_func(x, weight, None, target, ignore_index, reduction)

    quack.linear_cross_entropy_func = linear_cross_entropy_func
    quack.chunked_linear_cross_entropy = chunked_linear_cross_entropy
    monkeypatch.setitem(sys.modules, "quack", types.ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.linear_cross_entropy", quack)
    peer = PEERS["quack"]
    assert peer.unavailable(torch.device("cuda")) is None
    for V, chunks in ((1031, []), (1032, [4096])):
        case = make_case(64, 24, V, torch.float32, CPU, ignored=0.25)
        for computation in COMPUTATIONS:
            task = peer.task(computation, case)
            check(peer, computation, case, task.run(*task.setup()))
        assert chunked == chunks


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
