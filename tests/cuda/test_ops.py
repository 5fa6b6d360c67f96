"""The host's side of the ops on CUDA: what is launched and allocated, and how often the host waits."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from repo_fast.ops import (
    fused_rectified_policy_loss,
    generalized_advantages,
    linear_log_probs,
    prompt_violations,
    rectified_policy_loss,
    sweep,
)
from repo_fast.ops.sweep import logits_to_keep
from repo_fast.ops.triton import scale_gradient
from tests.cuda.fake import FakeCuda, needs_graph
from tests.ops.cases import Case, make_case
from tests.ops.test_registration import fused_inputs

OPS = torch.ops.repo_fast
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# More rows than a chunk has, so that sums go on over several.
SIZES = {"small": (37, 31), "several chunks": (2 * sweep.GPU_CHUNK_ROWS + 9, 32001)}


@pytest.fixture(params=["triton", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[0, 3], ids=["all rows", "some rows"])
def fake(request: pytest.FixtureRequest) -> FakeCuda:
    return FakeCuda(ignored=request.param)


def case_on(fake: FakeCuda, size: str, dtype: torch.dtype = torch.float32) -> Case:
    """The inputs of `make_case`, without its values."""
    T, V = SIZES[size]
    small = fake.on_cuda(make_case(dtype=dtype))
    with fake.fake:
        sized = {name: value.new_empty(T) for name, value in vars(small).items() if value.shape == (37,)}
        case = replace(small, **sized, hidden=small.hidden.new_empty(T, 24), weight=small.weight.new_empty(V, 24))
    for operand in (case.hidden, case.weight):
        operand.requires_grad_(torch.version.cuda is None)
    return case


def check_gradients(case: Case) -> None:
    for operand in (case.hidden, case.weight):
        assert operand.grad.shape == operand.shape and operand.grad.dtype == operand.dtype
        assert operand.grad.device == operand.device


@needs_graph
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_log_probs_wait_once_in_each_direction(
    fake: FakeCuda, dtype: torch.dtype, size: str, backend: str
) -> None:
    case = case_on(fake, size, dtype)
    with fake:
        log_probs, entropy = linear_log_probs(
            case.hidden, case.weight, case.targets, temperature=0.7, return_entropy=True, backend=backend
        )
        assert fake.waits == ["nonzero"]
        (log_probs.sum() + entropy.sum()).backward()
        assert fake.waits == ["nonzero"] * 2
    check_gradients(case)
    if backend == "triton":
        chunks = len(fake.launches) // 2
        assert (chunks > 1) == (size == "several chunks")
        assert fake.launches == ["_log_probs_kernel"] * chunks + ["_gradient_kernel"] * chunks


@needs_graph
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["costs", "violations"])
def test_the_fused_op_waits_once(fake: FakeCuda, dtype: torch.dtype, size: str, given: bool, backend: str) -> None:
    case = case_on(fake, size, dtype)
    options: dict[str, Any] = {"multiplier": fake.on_cuda(torch.tensor(0.5)), "backend": backend}
    if given:
        options |= {
            "violations": case.costs,
            "ref_log_probs": case.ref_log_probs,
            "kl_coefficient": 0.1,
            "entropy_coefficient": 0.1,
            "importance_weights": case.importance_weights,
            "surrogate": "mixed",
            "reduction": "token_mean",
            "denominator": fake.on_cuda(torch.tensor(3.0)),
        }
    with fake:
        fused_rectified_policy_loss(*case.arguments(), **options).loss.backward()
    assert fake.waits == ["nonzero"]
    check_gradients(case)
    if backend == "triton":
        assert fake.launches.count("_violations_kernel") == (not given)
        assert fake.launches.count("_policy_kernel") >= 1 and fake.launches.count("_count_kernel") == 1


@needs_graph
@pytest.mark.parametrize("size", SIZES)
def test_several_constraints_cost_a_launch_and_no_wait(fake: FakeCuda, size: str, backend: str) -> None:
    case = case_on(fake, size)
    with fake.fake:
        T = case.targets.numel()
        case = replace(case, costs=case.costs.new_empty(3, 5), cost_advantages=case.costs.new_empty(3, T))
    multiplier = fake.on_cuda(torch.ones(3))
    with fake:
        fused_rectified_policy_loss(
            *case.arguments(), multiplier=multiplier, rectify=[True, False, True], backend=backend
        ).loss.backward()
    assert fake.waits == ["nonzero"]
    check_gradients(case)
    if backend == "triton":
        assert fake.launches.count("_violations_kernel") == 3 and fake.launches.count("_streams_kernel") == 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_formed_without_a_graph(fake: FakeCuda, dtype: torch.dtype, size: str, backend: str) -> None:
    """Registered op by registered op: so far a CUDA build goes too, with its own checks of the products."""
    case = case_on(fake, size, dtype)
    *inputs, _ = fake.on_cuda(fused_inputs(case, False, backend))
    with fake, torch.no_grad():
        slopes = case.old_log_probs
        operands = (case.hidden, case.weight, case.targets)
        kept = logits_to_keep(case.hidden, case.weight, 0)
        OPS.linear_log_probs_backward(slopes, slopes, *operands, kept, 0.7, None, True, True, backend)
        OPS.fused_rectified_policy_loss_and_gradients(*inputs, True, True, backend)
    assert fake.waits == ["nonzero"] * 2


def test_gradients_are_scaled_without_a_wait(fake: FakeCuda) -> None:
    """Fake tensors take a tracer's way through the backward of the fused op; this is a GPU's."""
    with fake:
        for dtype in (torch.float32, torch.bfloat16):
            scale_gradient(*fake.on_cuda((torch.empty(37, 24, dtype=dtype), torch.empty(()))))
    assert fake.waits == [] and fake.launches == ["_scale_kernel"] * 2


def small_ops(case: Case, offsets: torch.Tensor, backend: str) -> dict[str, Callable[[], Any]]:
    streams = torch.stack([case.old_log_probs] * 2)
    ids, costs, multiplier = case.sequence_ids, case.costs, case.costs[0]
    rest = (case.old_log_probs, case.reward_advantages, case.cost_advantages, ids, costs)
    return {
        "prompt_violations": lambda: [
            prompt_violations(costs, case.prompt_ids, scope=scope, backend=backend)
            for scope in ("prompt", "response", "batch")
        ],
        "generalized_advantages": lambda: generalized_advantages(streams, streams, offsets, backend=backend),
        "rectified_policy_loss": lambda: (
            rectified_policy_loss(case.ref_log_probs, *rest, multiplier=multiplier, backend=backend).loss
        ),
    }


# Of the ops without a product: Triton's count on the device.
WAITS = {("torch", "rectified_policy_loss"): ["nonzero"]}


@pytest.mark.parametrize("op", ["prompt_violations", "generalized_advantages", "rectified_policy_loss"])
def test_small_ops_wait_only_where_rows_are_compacted(fake: FakeCuda, op: str, backend: str) -> None:
    case = case_on(fake, "small")
    offsets = fake.on_cuda(torch.tensor([0, 5, 37], dtype=torch.int32))
    with fake:
        small_ops(case, offsets, backend)[op]()
    assert fake.waits == WAITS.get((backend, op), [])


def test_what_waits_is_kept_out_of_cuda_graphs() -> None:
    """On any backend: whether an op can be captured is settled before a backend is chosen."""
    unsafe = {"linear_log_probs", "linear_log_probs_backward", "rectified_policy_loss", "fused_rectified_policy_loss"}
    unsafe.add("fused_rectified_policy_loss_and_gradients")
    for name in (*unsafe, "prompt_violations", "generalized_advantages"):
        tagged = torch.Tag.cudagraph_unsafe in getattr(OPS, name).default.tags
        assert tagged == (name in unsafe), name


def test_tensors_of_two_devices_are_an_error(fake: FakeCuda, backend: str) -> None:
    """The fake device is one: what forgets to move a tensor is found."""
    case = case_on(fake, "small")
    with fake, pytest.raises(ValueError, match="targets"):
        linear_log_probs(case.hidden, case.weight, torch.empty(37, dtype=torch.int64), backend=backend)
