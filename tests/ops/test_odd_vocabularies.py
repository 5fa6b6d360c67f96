"""Vocabularies for which a GPU has no fast products: every backend makes the products here as it would on a GPU."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from repo_fast.ops import linear_log_probs, sweep
from repo_fast.ops.dispatch import implementation
from tests.ops.cases import assert_fused_is_exact, assert_log_probs_are_exact, make_case

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
product_columns = sweep.product_columns

pytestmark = pytest.mark.usefixtures("backend")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(sweep, "product_columns", lambda device, dtype, V: product_columns(gpu, dtype, V))


class Products(TorchDispatchMode):
    """Remembers the operands' shapes of all matrix products, with the dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.dtype, list[int]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            left, right = args[-2:]
            self.seen.append((left.dtype, [*left.shape, *right.shape]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("logits", ["flat", "peaked", "low"])
@pytest.mark.parametrize("V", [1, 31, 65, 1031, 1089])
@pytest.mark.parametrize("dtype", DTYPES)
def test_they_are_exact(dtype: torch.dtype, V: int, logits: str, chunks: str) -> None:
    case = make_case(V=V, dtype=dtype, logits=logits)
    assert_log_probs_are_exact(case, temperature=0.8)
    assert_fused_is_exact(case, {"multiplier": 0.7, "entropy_coefficient": 0.1})


@pytest.mark.parametrize(("dtype", "V"), [(torch.float32, 31), (torch.bfloat16, 1031), (torch.float16, 1031)])
def test_a_gpu_is_given_products_that_it_has_fast_kernels_for(dtype: torch.dtype, V: int, backend: str) -> None:
    T, D = 48, 64
    case, ones = make_case(T=T, D=D, V=V, dtype=dtype, ignored=0.0), torch.ones(T)
    inputs = case.hidden, case.weight, case.targets
    with Products() as products:
        *_, kept = implementation("linear_log_probs", backend)(*inputs, 1.0, None, True, 0)
        gradients = implementation("linear_log_probs_backward", backend)(
            ones, ones, *inputs, kept, 1.0, None, True, True
        )
    assert len(products.seen) >= 4
    for product, shape in products.seen:
        assert all(side * product.itemsize % sweep.VECTOR_BYTES == 0 for side in shape)
    assert [gradient.shape for gradient in gradients] == [(T, D), (V, D)]
    assert all(gradient.is_contiguous() for gradient in gradients)


def test_what_lies_beyond_the_vocabulary_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept logits leave the memory of their gradient unwritten there."""
    empty = torch.empty

    def spoiled(*shape: Any, **options: Any) -> torch.Tensor:
        made = empty(*shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(sweep.torch, "empty", spoiled)
    case = make_case(V=31).copy()
    for budget in (0, 1 << 20):
        log_probs, entropy = linear_log_probs(
            case.hidden, case.weight, case.targets, return_entropy=True, logits_budget=budget
        )
        gradients = torch.autograd.grad((log_probs.sum(), entropy.sum()), (case.hidden, case.weight))
        assert all(gradient.isfinite().all() for gradient in gradients)
