"""Times the ops, forward and backward, against plain PyTorch that holds the [T, V] logits.

    make bench        or: pytest bench/

Each group of the printed table is one computation; the number in brackets beside a time is its ratio to the fastest of
the group. The sizes are small enough for any machine; what is held in memory shows at larger ones.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from repo_fast.ops import fused_rectified_policy_loss, linear_log_probs

TOKENS, HIDDEN, VOCABULARY, RESPONSES = 1024, 256, 8192, 16
MULTIPLIER, CLIP = 0.7, 0.2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_batch() -> dict[str, Tensor]:
    """A batch near the policy that drew it: ratios around 1, some of them clipped."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    batch = {
        "hidden": draw(TOKENS, HIDDEN),
        "weight": draw(VOCABULARY, HIDDEN) / HIDDEN**0.5,
        "targets": torch.randint(VOCABULARY, (TOKENS,), generator=generator),
        "reward_advantages": draw(TOKENS),
        "cost_advantages": draw(TOKENS),
        "sequence_ids": torch.arange(RESPONSES).repeat_interleave(TOKENS // RESPONSES),
        "costs": draw(RESPONSES),
        "prompt_ids": torch.arange(RESPONSES) // 4,
    }
    batch["old_log_probs"] = plain_log_probs(batch) + 0.2 * draw(TOKENS)
    batch = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
    for name in ("hidden", "weight"):
        batch[name].requires_grad_()
    return batch


def plain_log_probs(batch: dict[str, Tensor]) -> Tensor:
    return -F.cross_entropy(batch["hidden"] @ batch["weight"].T, batch["targets"], reduction="none")


def op_log_probs(batch: dict[str, Tensor]) -> Tensor:
    return linear_log_probs(batch["hidden"], batch["weight"], batch["targets"], backend="torch")


def plain_policy_loss(batch: dict[str, Tensor]) -> Tensor:
    """RePO's loss as one writes it down, for prompts of four responses of equal length."""
    ratio = (plain_log_probs(batch) - batch["old_log_probs"]).exp()
    unsafe = (batch["costs"].view(-1, 4).mean(1).repeat_interleave(4) > 0)[batch["sequence_ids"]]
    reward_weight = torch.where(unsafe, 1 / (1 + MULTIPLIER), 1.0)
    cost_weight = torch.where(unsafe, MULTIPLIER / (1 + MULTIPLIER), 0.0)

    def surrogate(advantages: Tensor) -> Tensor:
        return torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)

    gain = reward_weight * surrogate(batch["reward_advantages"]) + cost_weight * surrogate(-batch["cost_advantages"])
    return -gain.mean()


def op_policy_loss(batch: dict[str, Tensor]) -> Tensor:
    return fused_rectified_policy_loss(**batch, multiplier=MULTIPLIER, clip=(CLIP, CLIP), backend="torch").loss


COMPUTATIONS = {
    "linear_log_probs": (plain_log_probs, op_log_probs),
    "fused_rectified_policy_loss": (plain_policy_loss, op_policy_loss),
}


def gradients(compute: Callable[[dict[str, Tensor]], Tensor], batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    result = torch.autograd.grad(compute(batch).sum(), (batch["hidden"], batch["weight"]))
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return result


@pytest.mark.parametrize("implementation", ["plain", "torch"])
@pytest.mark.parametrize("computation", COMPUTATIONS)
def test_forward_and_backward(benchmark, computation, implementation):
    benchmark.group = (
        f"{computation}, T={TOKENS} D={HIDDEN} V={VOCABULARY}, {DEVICE}, {torch.get_num_threads()} threads"
    )
    batch = make_batch()
    plain, op = COMPUTATIONS[computation]
    timed = benchmark(gradients, plain if implementation == "plain" else op, batch)
    for gradient, expected in zip(timed, gradients(plain, batch), strict=True):
        assert (gradient - expected).norm() <= 1e-4 * expected.norm()
