"""The supervised loss through the head, against full logits in float64."""

import pytest
import torch
import torch.nn.functional as F

from repo_fast.models.loss_head import summed_cross_entropy


@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])
def test_summed_cross_entropy(backend: str, ignored: float) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(23, 16, generator=g), torch.randn(31, 16, generator=g)
    targets = torch.randint(31, (23,), generator=g)
    targets[torch.rand(23, generator=g) < ignored] = -100
    ours = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    wide = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss = summed_cross_entropy(*ours, targets, backend=backend)
    truth = F.cross_entropy(wide[0] @ wide[1].T, targets, reduction="sum")
    assert abs(loss.item() - truth.item()) <= 1e-5 * max(truth.item(), 1.0)
    for value, expected in zip(torch.autograd.grad(3 * loss, ours), torch.autograd.grad(3 * truth, wide), strict=True):
        assert (value - expected).norm() <= 1e-5 * expected.norm()
