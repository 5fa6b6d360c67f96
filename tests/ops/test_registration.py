"""What PyTorch expects of registered ops: opcheck, torch.compile, one backward; and the work and memory they take."""

import itertools
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from repo_fast.ops import (
    fused_rectified_policy_loss,
    generalized_advantages,
    linear_log_probs,
    prompt_violations,
    rectified_policy_loss,
    sweep,
)
from repo_fast.ops.arguments import FusedArguments
from repo_fast.ops.dispatch import implementation
from tests.ops.cases import Case, make_case

pytestmark = pytest.mark.usefixtures("backend")

OPS = torch.ops.repo_fast
MULTIPLIER = torch.tensor(0.5)


def fused_inputs(
    case: Case, given_violations: bool, backend: str, entropy: bool = True, softcap: float | None = None
) -> tuple[Any, ...]:
    return (
        case.hidden, case.weight, case.targets, case.old_log_probs, case.reward_advantages, case.cost_advantages,
        case.sequence_ids, None if given_violations else case.costs, None if given_violations else case.prompt_ids,
        MULTIPLIER, "prompt", 0.0, True, "separate", 0.2, 0.2, 1.0, softcap, case.ref_log_probs, 0.1,
        0.1 if entropy else 0.0, entropy, "sequence_mean", torch.tensor(3.0), case.costs if given_violations else None,
        case.importance_weights, backend,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_opcheck_linear_ops(dtype: torch.dtype, backend: str) -> None:
    case = make_case(dtype=dtype).copy()
    for entropy in (False, True):
        for budget, softcap in ((0, None), (1 << 20, 2.0)):
            torch.library.opcheck(
                OPS.linear_log_probs.default,
                (case.hidden, case.weight, case.targets, 0.9, softcap, entropy, budget, backend),
            )
    for entropy in (False, True):
        torch.library.opcheck(OPS.fused_rectified_policy_loss.default, fused_inputs(case, False, backend, entropy))
    plain = make_case(dtype=dtype)
    torch.library.opcheck(OPS.fused_rectified_policy_loss.default, fused_inputs(plain, True, backend, softcap=2.0))
    for need_hidden, need_weight in ((True, True), (False, True)):
        torch.library.opcheck(
            OPS.fused_rectified_policy_loss_and_gradients.default,
            (*fused_inputs(plain, False, backend)[:-1], need_hidden, need_weight, backend),
        )
    up, inputs = torch.randn(37), (plain.hidden, plain.weight, plain.targets)
    for budget in (0, 1 << 20):
        kept = OPS.linear_log_probs(*inputs, 0.9, 2.0, True, budget, backend)[2]
        torch.library.opcheck(
            OPS.linear_log_probs_backward.default, (up, up, *inputs, kept, 0.9, 2.0, True, False, backend)
        )


def test_opcheck_others(backend: str) -> None:
    case = make_case()
    log_probs = case.old_log_probs.clone().requires_grad_()
    torch.library.opcheck(
        OPS.rectified_policy_loss.default,
        (log_probs, None, case.reward_advantages, case.cost_advantages, case.sequence_ids, case.costs, MULTIPLIER,
         True, "mixed", 0.2, 0.2, case.ref_log_probs, 0.1, "token_mean", None, case.importance_weights, backend),
    )  # fmt: skip
    for scope in ("prompt", "response", "batch"):
        torch.library.opcheck(OPS.prompt_violations.default, (case.costs, case.prompt_ids, scope, 0.0, backend))
    offsets = torch.tensor([0, 5, 37], dtype=torch.int32)
    torch.library.opcheck(
        OPS.generalized_advantages.default, (case.ref_log_probs, case.old_log_probs, offsets, 1.0, 0.9, backend)
    )


def everything(hidden: torch.Tensor, weight: torch.Tensor, case: Case, multiplier: Any) -> tuple[torch.Tensor, ...]:
    log_probs, entropy = linear_log_probs(hidden, weight, case.targets, return_entropy=True)
    violations = prompt_violations(case.costs, case.prompt_ids)
    advantages, _ = generalized_advantages(
        case.reward_advantages, case.ref_log_probs, torch.tensor([0, 5, 37], dtype=torch.int32)
    )
    ids = case.sequence_ids.masked_fill(case.targets == -100, -1)
    loss = rectified_policy_loss(
        log_probs, case.old_log_probs, advantages, case.cost_advantages, ids, violations, multiplier=multiplier
    ).loss
    fused = fused_rectified_policy_loss(2 * hidden, weight, *case.arguments()[2:], multiplier=multiplier)
    plain = fused_rectified_policy_loss(hidden, weight, *case.arguments()[2:], multiplier=multiplier, entropy=False)
    assert plain.entropy is None
    head = {"logit_scale": 2.0 * float(multiplier), "softcap": 3.0} if isinstance(multiplier, float) else {}
    kept = linear_log_probs(hidden, weight, case.targets, logits_budget=1 << 20, **head).sum()
    return loss + 3 * fused.loss + plain.loss + entropy.sum() + 2 * kept, fused.log_probs


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.compiler.config.patch(force_disable_caches=True)  # their keys know op names, not what ops do in this version
def test_compiles_without_graph_breaks(compiler: str) -> None:
    torch.compiler.reset()  # each backend is one more recompilation of the same function
    case = make_case().copy()
    compiled = torch.compile(everything, fullgraph=True, backend=compiler)
    for multiplier in (0.5, 0.7, torch.tensor(0.9)):
        expected, log_probs = everything(case.hidden, case.weight, case, multiplier)
        wanted = torch.autograd.grad(expected, (case.hidden, case.weight))
        loss, same = compiled(case.hidden, case.weight, case, multiplier)
        gradients = torch.autograd.grad(loss, (case.hidden, case.weight))
        torch.testing.assert_close((loss, same, *gradients), (expected, log_probs, *wanted))


def test_values_are_checked_in_compiled_code_too() -> None:
    case = make_case(ignored=0.0)
    compiled = torch.compile(linear_log_probs, fullgraph=True, backend="aot_eager")
    compiled(case.hidden, case.weight, case.targets)
    with pytest.raises(ValueError, match="targets"):
        compiled(case.hidden, case.weight, case.targets + 31)


def test_second_backward_raises() -> None:
    case = make_case().copy()
    loss = fused_rectified_policy_loss(*case.arguments(), multiplier=1.0).loss
    loss.backward(retain_graph=True)
    first = case.hidden.grad.clone()
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()
    assert torch.equal(case.hidden.grad, first)


def test_second_derivatives_raise() -> None:
    """They would be 0 in silence: the gradients are formed in the forward."""
    case = make_case().copy()
    log_probs = case.old_log_probs.clone().requires_grad_()
    rectified = rectified_policy_loss(log_probs, None, *case.arguments()[4:8], multiplier=1.0).loss
    fused = fused_rectified_policy_loss(*case.arguments(), multiplier=1.0).loss
    own = linear_log_probs(case.hidden, case.weight, case.targets).sum()
    for loss, leaf in ((rectified, log_probs), (2 * fused, case.hidden), (own, case.weight)):
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative|no autograd formula"):
            gradient.square().sum().backward()
        # Not used, it does no harm.
        assert gradient.isfinite().all()


def test_only_the_loss_carries_a_gradient() -> None:
    case = make_case().copy()
    result = fused_rectified_policy_loss(*case.arguments(), multiplier=1.0)
    assert [value.requires_grad for value in result] == [True] + [False] * 6
    log_probs = case.old_log_probs.requires_grad_()
    result = rectified_policy_loss(log_probs, None, *case.arguments()[4:8], multiplier=1.0)
    assert [value is not None and value.requires_grad for value in result] == [True] + [False] * 6


def test_autocast_does_not_reach_inside() -> None:
    case = make_case().copy()
    outside = fused_rectified_policy_loss(*case.arguments(), multiplier=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fused_rectified_policy_loss(*case.arguments(), multiplier=1.0)
        assert torch.equal(linear_log_probs(*case.arguments()[:3]), outside.log_probs)
    assert torch.equal(inside.loss, outside.loss)


def test_inference_mode_and_checkpointing() -> None:
    case = make_case().copy()

    def loss() -> torch.Tensor:
        return fused_rectified_policy_loss(*case.arguments(), multiplier=1.0).loss

    wanted = torch.autograd.grad(loss(), (case.hidden, case.weight))
    with torch.inference_mode():
        value = loss()
    for reentrant in (False, True):
        again = checkpoint(lambda x: loss() + 0 * x, torch.zeros((), requires_grad=True), use_reentrant=reentrant)
        assert torch.equal(again, value)
        case.hidden.grad = case.weight.grad = None
        again.backward()
        assert torch.equal(case.hidden.grad, wanted[0]) and torch.equal(case.weight.grad, wanted[1])


class Watch(TorchDispatchMode):
    """Counts matrix products and remembers the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_")
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.untyped_storage().nbytes() // result.element_size())
        return result


def watch_fused(case: Case, backend: str, need_hidden: bool, need_weight: bool) -> Watch:
    *inputs, backend = fused_inputs(case, False, backend)
    with Watch() as watch:
        implementation("fused_rectified_policy_loss_and_gradients", backend)(
            FusedArguments(*inputs, need_hidden, need_weight)
        )
    return watch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_products_that_are_needed(dtype: torch.dtype, backend: str) -> None:
    case = make_case(dtype=dtype)
    for need_hidden, need_weight, products in ((0, 0, 1), (1, 0, 2), (0, 1, 2), (1, 1, 3)):
        assert watch_fused(case, backend, bool(need_hidden), bool(need_weight)).products == products
    up, inputs = torch.ones(37), (case.hidden, case.weight, case.targets)
    with Watch() as watch:
        *_, nothing = implementation("linear_log_probs", backend)(*inputs, 1.0, None, True, 0)
    assert watch.products == 1 and nothing.numel() == 0
    *_, kept = implementation("linear_log_probs", backend)(*inputs, 1.0, None, True, 1 << 20)
    for need_hidden, need_weight, products in ((1, 0, 2), (0, 1, 2), (1, 1, 3)):
        with Watch() as watch:
            implementation("linear_log_probs_backward", backend)(
                up, up, *inputs, nothing, 1.0, None, bool(need_hidden), bool(need_weight)
            )
        assert watch.products == products
        with Watch() as watch:
            implementation("linear_log_probs_backward", backend)(
                up, up, *inputs, kept, 1.0, None, bool(need_hidden), bool(need_weight)
            )
        assert watch.products == products - 1


def test_a_frozen_operand_gets_no_gradient() -> None:
    case = make_case()
    for trained in ("hidden", "weight"):
        leaf = getattr(case, trained).clone().requires_grad_()
        inputs = Case(**(vars(case) | {trained: leaf}))
        both = case.copy()
        fused_rectified_policy_loss(*inputs.arguments(), multiplier=1.0).loss.backward()
        fused_rectified_policy_loss(*both.arguments(), multiplier=1.0).loss.backward()
        assert torch.equal(leaf.grad, getattr(both, trained).grad)
        (gradient,) = torch.autograd.grad(linear_log_probs(*inputs.arguments()[:3]).sum(), leaf)
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_logits_never_exist(dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    V, rows = 5000, 16
    monkeypatch.setattr(sweep, "CPU_MIN_ROWS", rows)
    monkeypatch.setattr(sweep, "CPU_CHUNK_ROWS", rows)
    few, many = (
        watch_fused(make_case(T=T, V=V, D=4, dtype=dtype, ignored=0.0), backend, True, True).largest for T in (32, 128)
    )
    assert few == many
    # A CPU without bfloat16 products widens.
    logits = rows * sweep.row_pitch(V, sweep.product_dtype(torch.empty(V, 4, dtype=dtype)))
    assert few == logits or backend == "triton"  # whose interpreter makes copies of its own


def test_rows_that_are_ignored_cost_no_product(backend: str) -> None:
    case = make_case(T=40, ignored=0.5)
    rows = []

    class Rows(Watch):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._schema.name == "aten::mm":
                rows.append(args[0].shape[0])
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Rows():
        implementation("linear_log_probs", backend)(case.hidden, case.weight, case.targets, 1.0, None, False, 0)
    assert rows == [int((case.targets != -100).sum())]


def test_more_logits_than_32_bit_can_count(backend: str) -> None:
    """T·V > 2³¹ with a hidden size of 1; the first and last rows against their closed form."""
    T, V = 66_000, 32_768
    assert T * V > 2**31
    weight = torch.zeros(V, 1)
    weight[V - 1] = 3.0
    hidden = torch.ones(T, 1)
    targets = torch.full((T,), V - 1)
    if backend != "cpp":  # the others would take minutes for all rows
        targets[1 : T - 1] = -100
    log_probs = linear_log_probs(hidden, weight, targets)
    truth = 3.0 - torch.tensor(3.0, dtype=torch.float64).exp().add(V - 1).log().item()
    assert log_probs[[0, T - 1]].tolist() == pytest.approx([truth, truth], rel=1e-6)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("V", [1, 31, 32001, 128256, 1 << 20])
def test_offsets_within_a_chunk_fit_32_bits(V: int, device: str) -> None:
    for dtype, N in itertools.product((torch.float32, torch.bfloat16), (1, 500, 16384, 10**6)):
        rows = sweep.chunk_rows(torch.device(device), dtype, N, V, 8192)
        assert 0 < rows <= N and rows * sweep.row_pitch(V, dtype) < 2**31


@pytest.mark.parametrize(("V", "tall", "alone"), [(32001, 8192, 16384), (131072, 4096, 12288), (1 << 20, 512, 2047)])
def test_rows_are_one_chunk_where_that_takes_no_more_scratch_than_a_sum(V: int, tall: int, alone: int) -> None:
    rows = partial(sweep.chunk_rows, torch.device("cuda"), torch.bfloat16, V=V, D=4096)
    assert rows(N=alone) == alone and rows(N=alone + 1) == tall
    assert 2 * alone * V <= 2 * tall * V + 4 * V * 4096
    # In float32 a sum takes no memory beside the result.
    assert sweep.chunk_rows(torch.device("cuda"), torch.float32, tall + 1, V, 4096) == tall


def test_importing_the_ops_brings_no_trainer() -> None:
    code = (
        "import sys, repo_fast.ops\n"
        "heavy = {'transformers', 'deepspeed', 'datasets', 'triton', 'jsonargparse'} & set(sys.modules)\n"
        "own = {m.split('.')[1] for m in sys.modules if m.startswith('repo_fast.')} - {'ops', '_C'}\n"
        "assert not heavy and not own, (heavy, own)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
