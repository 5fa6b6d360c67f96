"""What the ops promise beside exact numbers, and what only a GPU can show: waiting for the device, ids that are out of
range and yet not read through, addresses beyond 32 bits.
"""

import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.correctness import CAPPED, DEFAULTS, DTYPES, FEW_ROWS, Checks, Errors, count, on
from bench.loss_head.chunks import chunks_of
from repo_fast.ops import (
    fused_rectified_policy_loss,
    generalized_advantages,
    linear_log_probs,
    prompt_violations,
    rectified_policy_loss,
)
from tests.ops.cases import Case, loss_scale, make_case, relative_error, run_fused


def bits_that_differ(one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> float:
    """Elements that are not equal; NaN is equal to nothing."""
    return sum(count(a != b) for a, b in zip(one, two, strict=True))


def run_bits(case: Case, options: dict[str, Any]) -> tuple[Tensor, ...]:
    """Everything that the two linear ops compute of a case."""
    result, *gradients = run_fused(case, options)
    leaves = case.copy()
    log_probs, entropy = linear_log_probs(leaves.hidden, leaves.weight, leaves.targets, return_entropy=True)
    (log_probs.sum() + entropy.sum()).backward()
    own = (result.loss, result.log_probs, result.entropy, log_probs, entropy, leaves.hidden.grad, leaves.weight.grad)
    return tuple(x.detach() for x in (*own, *gradients))


def same_bits_twice(case: Case, device: torch.device) -> Errors:
    case = on(case, device)
    first = run_bits(case, DEFAULTS)
    return {"bits that differ": (bits_that_differ(first, run_bits(case, DEFAULTS)), 0.0)}


def any_chunk_size(case: Case, device: torch.device) -> Errors:
    """The float32 loss does not depend on the chunk."""
    losses = []
    for rows in (1 << 20, FEW_ROWS, 7):
        with chunks_of(rows):
            losses.append(run_fused(on(case, device), DEFAULTS)[0].loss.item())
    return {"loss": (max(losses) - min(losses), 1e-6 * loss_scale(case, DEFAULTS))}


def ratio_is_one(case: Case, device: torch.device, **head: Any) -> Errors:
    """On-policy, `linear_log_probs` and the fused op give the same bits, with the clip range (0, 0)."""
    case = on(case, device)
    with torch.no_grad():
        old = linear_log_probs(case.hidden, case.weight, case.targets, **head)
    options = DEFAULTS | head | {"clip": (0.0, 0.0)}
    result, *_ = run_fused(replace(case, old_log_probs=old), options)
    return {
        "log-probs that differ": (bits_that_differ((old,), (result.log_probs,)), 0.0),
        "approximate KL": (result.approx_kl.abs().item(), 0.0),
        "clip fraction": (result.clip_fraction.item(), 0.0),
    }


def uninitialised_memory(case: Case, device: torch.device) -> Errors:
    """With every `torch.empty` full of NaN, nothing becomes NaN."""
    was, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # this mode fills them
    try:
        with warnings.catch_warnings(), chunks_of(FEW_ROWS):
            warnings.simplefilter("ignore")
            results = run_bits(on(case, device), DEFAULTS)
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warn_only)
    return {"NaN": (sum(count(x.isnan()) for x in results), 0.0)}


def no_number(case: Case, device: torch.device) -> Errors:
    """A logit that is infinite or none at all, not the target's, makes its row's log-probability and entropy NaN."""
    case, errors = on(case, device), {}
    hidden, targets = case.hidden[:1], torch.zeros_like(case.targets[:1])
    for wrong, temperature in itertools.product((torch.inf, torch.nan), (1.0, 1e-9)):
        weight = case.weight.clone()
        weight[-1] = hidden[0].sign() * wrong
        outputs = linear_log_probs(hidden, weight, targets, temperature=temperature, return_entropy=True)
        errors[f"missed, {wrong}, temperature {temperature}"] = sum(count(~x.isnan()) for x in outputs), 0.0
    return errors


def out_of_range(case: Case, device: torch.device) -> Errors:
    """Ids that are out of range make the loss NaN on a GPU, and raise on a CPU."""
    good, T = on(case, device), case.targets.numel()
    V, S = case.weight.shape[0], case.costs.numel()
    wrong = {
        **{f"target {id_}": replace(good, targets=_with_last(good.targets, id_)) for id_ in (V, 2**40, -7)},
        **{f"sequence id {id_}": replace(good, sequence_ids=_with_last(good.sequence_ids, id_)) for id_ in (S, -9)},
    }
    errors: Errors = {}
    for name, bad in wrong.items():
        errors[f"{name} is missed"] = _missed(lambda bad=bad: run_fused(bad, DEFAULTS)[0].loss, device), 0.0
    advantages = good.reward_advantages
    for offsets in ([0, T + 5], [3, T], [0, T, T - 1, T]):
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=device)
        scan = partial(generalized_advantages, advantages, advantages, cu_seqlens)
        errors[f"cu_seqlens {offsets} are missed"] = _missed(lambda scan=scan: scan()[0].sum(), device), 0.0
    torch.empty(1, device=device).fill_(0).item()  # an illegal access would show here
    return errors


def _with_last(ids: Tensor, value: int) -> Tensor:
    return torch.cat([ids[:-1], ids.new_tensor([value])])


def _missed(compute: Callable[[], Tensor], device: torch.device) -> float:
    try:
        value = compute()
    except ValueError:
        return float(device.type != "cpu")
    return float(device.type == "cpu" or not value.isnan().item())


def without_graph_breaks(case: Case, device: torch.device, tiny: bool) -> Errors:
    """Under `torch.compile(fullgraph=True)`: all ops in one graph, the same bits as without."""
    case = on(case, device)
    cu_seqlens = torch.tensor([0, case.targets.numel()], dtype=torch.int32, device=device)
    ids = case.sequence_ids.masked_fill(case.targets == -100, -1)

    def everything(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        log_probs, entropy = linear_log_probs(hidden, weight, case.targets, return_entropy=True)
        violations = prompt_violations(case.costs, case.prompt_ids)
        advantages, _ = generalized_advantages(case.reward_advantages, case.ref_log_probs, cu_seqlens)
        loss = rectified_policy_loss(
            log_probs, case.old_log_probs, advantages, case.cost_advantages, ids, violations, multiplier=0.7
        ).loss
        fused = fused_rectified_policy_loss(hidden, weight, *case.arguments()[2:], multiplier=0.7)
        return loss, fused.loss, fused.log_probs, entropy

    def run(function: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        leaves = case.copy()
        outputs = function(leaves.hidden, leaves.weight)
        (outputs[0] + outputs[1]).backward()
        return tuple(x.detach() for x in (*outputs, leaves.hidden.grad, leaves.weight.grad))

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager" if tiny else "inductor")
    errors: Errors = {}
    names = ("loss", "fused loss", "fused log-probs", "entropy", "grad hidden", "grad weight")
    for name, value, eager in zip(names, run(compiled), run(everything), strict=True):
        # What surrounds the ops, a sum of two, may be fused and rounded otherwise.
        errors[name] = relative_error(value, eager.double()), 2 * torch.finfo(torch.float32).eps
    return errors


def waits_for_the_device(case: Case, device: torch.device) -> Errors:
    """How often an op makes the host wait: once for the count of valid rows, where it needs that."""
    case = on(case, device).copy()
    violations = prompt_violations(case.costs, case.prompt_ids)
    ids = case.sequence_ids.masked_fill(case.targets == -100, -1)
    cu_seqlens = torch.tensor([0, case.targets.numel()], dtype=torch.int32, device=device)
    multiplier = torch.tensor(0.7, device=device)
    outputs: dict[str, Tensor] = {}

    def forward(name: str, compute: Callable[[], Tensor]) -> None:
        outputs[name] = compute()

    def fused() -> Tensor:
        return fused_rectified_policy_loss(*case.arguments(), multiplier=multiplier).loss

    def log_probs() -> Tensor:
        return linear_log_probs(case.hidden, case.weight, case.targets).sum()

    advantages = case.reward_advantages
    steps: dict[str, tuple[Callable[[], Any], int]] = {
        "fused": (lambda: forward("fused", fused), 1),
        "fused, backward": (lambda: outputs["fused"].backward(), 0),
        "log-probs": (lambda: forward("log-probs", log_probs), 1),
        "log-probs, backward": (lambda: outputs["log-probs"].backward(), 1),
        "violations": (lambda: prompt_violations(case.costs, case.prompt_ids), 0),
        "advantages": (lambda: generalized_advantages(advantages, advantages, cu_seqlens), 0),
        "rectified": (
            lambda: rectified_policy_loss(
                case.old_log_probs, None, advantages, advantages, ids, violations, multiplier=multiplier
            ),
            1,
        ),
    }
    for step, _ in steps.values():
        step()  # compiles the kernels
    return {f"waits, {name}": (count_waits(step), float(allowed)) for name, (step, allowed) in steps.items()}


def count_waits(step: Callable[[], Any]) -> float:
    """How often `step` makes the host wait for the GPU."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return float(sum("synchronizing CUDA operation" in str(warning.message) for warning in caught))


def far_addresses(T: int, D: int, V: int, dtype: torch.dtype, device: torch.device) -> Errors:
    """Against a closed form: weight and hidden are 0 but for their last column, and of that weight but for its end."""
    weight = torch.zeros(V, D, dtype=dtype, device=device)
    weight[V - 1, D - 1] = 4.0
    hidden = torch.zeros(T, D, dtype=dtype, device=device)
    hidden[:, D - 1] = 1.0
    targets = torch.full((T,), V - 1, device=device)
    log_probs = linear_log_probs(hidden, weight, targets).cpu()
    truth = 4.0 - torch.tensor(4.0, dtype=torch.float64).exp().add(V - 1).log()
    return {"log-probs": ((log_probs - truth).abs().max().item(), 1e-5 * 4.0)}


def promises(tiny: bool, device: torch.device) -> Checks:
    """What is promised of the linear ops for any input."""
    V = 301 if tiny else 32001
    for kind, dtype in DTYPES.items():
        for logits in ("flat", "peaked"):
            case = partial(make_case, seed=3, T=307, D=72, V=V, dtype=dtype, logits=logits)
            for check in (same_bits_twice, ratio_is_one, uninitialised_memory):
                name = f"{check.__name__.replace('_', ' ')}, {kind}, {logits} logits"
                yield name, lambda case=case, check=check: check(case(), device)
            name = f"ratio is one, {kind}, {logits} logits"
            yield f"{name}, temperature 0.7", lambda case=case: ratio_is_one(case(), device, temperature=0.7)
            yield f"{name}, capped", lambda case=case: ratio_is_one(case(), device, **CAPPED)
        first = partial(make_case, T=67, D=72, V=V, dtype=dtype, ignored=0.0)
        yield f"no number, {kind}", lambda case=first: no_number(case(), device)
    yield "any chunk size", lambda: any_chunk_size(make_case(T=307, D=72, V=V), device)
    if device.type == "cuda":
        yield "waits for the device", lambda: waits_for_the_device(make_case(T=307, D=72, V=V), device)


def compiled(tiny: bool, device: torch.device) -> Checks:
    """What a compiler of PyTorch makes of the ops; it takes its time."""
    yield "without graph breaks", lambda: without_graph_breaks(make_case(T=67, D=24, V=301), device, tiny)


def limits(tiny: bool, device: torch.device) -> Checks:
    """What an access out of bounds would make the last thing that the process does with the device."""
    yield "out of range", lambda: out_of_range(make_case(T=67, D=24, V=301, ignored=0.0), device)
    far = {"T·V": (600, 4, 301), "T·D": (4000, 30, 31), "V·D": (9, 30, 4000)}
    if not tiny:
        far = {"T·V": (70_001, 64, 32_001), "T·D": (600_001, 3_600, 31), "V·D": (65, 16_385, 131_073)}
    for name, (T, D, V) in far.items():
        yield f"far addresses, {name}", partial(far_addresses, T, D, V, torch.bfloat16, device)
