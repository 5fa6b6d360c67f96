"""Every public op on a device against `repo_fast.ops.reference` in float64 on the CPU, within the tolerances of the
contract (those of tests/ops/cases.py), and what only a GPU can show: waiting for the device, ids that are out of range
and yet not read through, addresses beyond 32 bits.

A check returns, for each quantity, how large its error is and how large it may be.
"""

import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from repo_fast.ops import (
    dispatch,
    fused_rectified_policy_loss,
    generalized_advantages,
    linear_log_probs,
    prompt_violations,
    rectified_policy_loss,
    reference,
    sweep,
)
from tests.ops.cases import (
    Case,
    error,
    loss_scale,
    make_case,
    relative_error,
    row_bound,
    run_fused,
    run_reference,
    with_token_options,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEFAULTS: dict[str, Any] = {"multiplier": 0.7}
OPTIONS: tuple[dict[str, Any], ...] = (
    {
        "multiplier": 2.5,
        "scope": "batch",
        "rectify": False,
        "surrogate": "mixed",
        "threshold": -0.1,
        "clip": (0.1, 0.3),
    },
    {"multiplier": 0.4, "ref_log_probs": True, "kl_coefficient": 0.3, "entropy_coefficient": 0.2, "temperature": 0.7},
    {"multiplier": 3.0, "reduction": "token_mean", "denominator": 123.0, "importance_weights": True},
    {"multiplier": 1.0, "on_policy": True, "reduction": "sum", "scope": "response"},
)
FEW_ROWS = 64

Errors = dict[str, tuple[float, float]]
"""By quantity: its error, and the largest one allowed."""


def on(case: Case, device: torch.device) -> Case:
    return Case(**{name: value.to(device) for name, value in vars(case).items()})


def off(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()


def chunks_of(rows: int) -> AbstractContextManager:
    """While this is open, the linear ops take so many rows of logits at a time."""
    return mock.patch.multiple(sweep, GPU_CHUNK_ROWS=rows, CPU_CHUNK_ROWS=rows, CPU_MIN_ROWS=1)


def count(condition: Tensor) -> float:
    return float(condition.sum())


def bits_that_differ(one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> float:
    """Elements that are not equal; NaN is equal to nothing."""
    return sum(count(a != b) for a, b in zip(one, two, strict=True))


# ------------------------------------------------------------------------------------------------- exactness


def fused_errors(case: Case, options: dict[str, Any], device: torch.device) -> Errors:
    """Values and gradients of the fused op."""
    result, *gradients = run_fused(on(case, device), options)
    (loss, log_probs, entropy, violations), *truths = run_reference(case.wide(), options)
    plain, *plain_gradients = run_reference(on(case, device), options)
    scale = loss_scale(case, options)
    ours, ordinary = [off(x) for x in result[:4]], [off(x) for x in plain[:3]]
    errors = _row_errors(case, ours[1:3], (log_probs, entropy), ordinary[1:3], options.get("temperature", 1.0))
    errors["violations"] = (ours[3] - violations).abs().max().item(), 1e-6 * (1 + violations.abs().max().item())
    allowed = 1e-5 * scale
    if case.hidden.dtype != torch.float32:
        # A single number's error can be 0 by luck. So: twice what plain PyTorch's errors in log p and H can do to it.
        slack = (ordinary[1] - log_probs).abs().max() + (ordinary[2] - entropy).abs().max()
        allowed += 2 * scale * slack.item()
    errors["loss"] = abs(ours[0].item() - loss.item()), allowed
    return errors | _gradient_errors(gradients, truths, plain_gradients)


def log_probs_errors(case: Case, temperature: float, device: torch.device) -> Errors:
    """Values and gradients of `linear_log_probs`, of both outputs at once."""
    up = torch.randn(2, case.targets.numel(), generator=torch.Generator().manual_seed(0))

    def run(inputs: Case, function: Callable[..., tuple[Tensor, Tensor]], up: Tensor) -> list[Tensor]:
        inputs = inputs.copy()
        outputs = function(inputs.hidden, inputs.weight, inputs.targets, temperature=temperature)
        torch.autograd.backward(outputs, tuple(up.to(outputs[0].dtype)))
        return [off(x) for x in (*outputs, inputs.hidden.grad, inputs.weight.grad)]

    ours = run(on(case, device), partial(linear_log_probs, return_entropy=True), up.to(device))
    truth = run(case.wide(), reference.linear_log_probs, up)
    plain = run(on(case, device), reference.linear_log_probs, up.to(device))
    return _row_errors(case, ours[:2], truth[:2], plain[:2], temperature) | _gradient_errors(
        ours[2:], truth[2:], plain[2:]
    )


def _row_errors(case: Case, ours: Any, truths: Any, plain: Any, temperature: float) -> Errors:
    """Of log-probabilities and entropies [T]: row by row in float32, against plain PyTorch's in the other dtypes."""
    errors: Errors = {"log-probs above 0": (count(ours[0] > 0), 0.0)}
    bound = row_bound(case, temperature)
    floors = {"log-probs": 0.0, "entropy": 1e-5}
    for (name, floor), value, truth, ordinary in zip(floors.items(), ours, truths, plain, strict=True):
        if case.hidden.dtype == torch.float32:
            errors[f"{name}, of a row's bound"] = ((value - truth).abs() / bound).max().item(), 1.0
        else:
            errors[name] = error(value, truth), max(2 * error(ordinary, truth), floor)
    return errors


def _gradient_errors(ours: Any, truths: Any, plain: Any) -> Errors:
    errors = {}
    for name, value, truth, ordinary in zip(("grad hidden", "grad weight"), ours, truths, plain, strict=True):
        floor = 1e-5 if value.dtype == torch.float32 else 0.0
        errors[name] = relative_error(off(value), truth), max(floor, 2 * relative_error(off(ordinary), truth))
    return errors


def rectified_errors(case: Case, options: dict[str, Any], device: torch.device) -> Errors:
    """Loss and gradient of `rectified_policy_loss` from the log-probabilities of the reference."""
    log_probs, _ = reference.linear_log_probs(case.hidden.double(), case.weight.double(), case.targets)
    violations = reference.prompt_violations(case.costs, case.prompt_ids)

    def run(inputs: Case, function: Callable[..., Any], leaf: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        leaf = leaf.detach().clone().requires_grad_()
        result = function(
            leaf,
            inputs.old_log_probs,
            inputs.reward_advantages,
            inputs.cost_advantages,
            inputs.sequence_ids.masked_fill(inputs.targets == -100, -1),
            v,
            **with_token_options(inputs, options),
        )
        loss = result if isinstance(result, Tensor) else result.loss
        loss.backward()
        return off(loss), off(leaf.grad)

    loss, gradient = run(on(case, device), rectified_policy_loss, log_probs.float().to(device), violations.to(device))
    truth, wide = run(case.wide(), reference.rectified_policy_loss, log_probs.float().double(), violations.double())
    return {
        "loss": (abs(loss.item() - truth.item()), 1e-5 * loss_scale(case, options)),
        "gradient": (relative_error(gradient, wide), 1e-5),
    }


def violations_errors(S: int, scope: str, device: torch.device) -> Errors:
    g = torch.Generator().manual_seed(S)
    costs = torch.randn(S, generator=g)
    prompt_ids = torch.randint(-(S // 4) - 1, S // 4 + 1, (S,), generator=g) * 2**40
    ours = off(prompt_violations(costs.to(device), prompt_ids.to(device), scope=scope, threshold=0.25))
    truth = reference.prompt_violations(costs.double(), prompt_ids, scope=scope, threshold=0.25)
    return {"violations": ((ours - truth).abs().max().item(), 1e-6 * (1 + truth.abs().max().item()))}


def advantages_errors(responses: int, longest: int, device: torch.device) -> Errors:
    """Two streams at once."""
    g = torch.Generator().manual_seed(responses)
    lengths = torch.randint(0, longest + 1, (responses,), generator=g)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    rewards, values = torch.randn(2, 2, int(cu_seqlens[-1]), generator=g)
    ours = generalized_advantages(rewards.to(device), values.to(device), cu_seqlens.to(device))
    streams = zip(rewards.double(), values.double(), strict=True)
    truths = zip(*(reference.generalized_advantages(*stream, cu_seqlens) for stream in streams), strict=True)
    errors: Errors = {}
    for name, value, truth in zip(("advantages", "returns"), ours, map(torch.stack, truths), strict=True):
        errors[name] = (off(value) - truth).abs().max().item(), 1e-5 * truth.abs().max().item()
    return errors


def exactness(tiny: bool, device: torch.device) -> Iterator[tuple[str, Callable[[], Errors]]]:
    large = {"T": 67, "D": 33, "V": 1500} if tiny else {"T": 515, "D": 1024, "V": 32001}
    vocabularies = (301, 31) if tiny else (128256, 32001, 31)
    kinds = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}
    for dtype, kind in kinds.items():
        for ignored in (0.0, 0.5):
            case = partial(make_case, seed=2, S=40, dtype=dtype, ignored=ignored, **large)
            name = f"fused, {kind}, {', '.join(f'{key} {value}' for key, value in large.items())}, ignored {ignored}"
            yield name, lambda case=case: fused_errors(case(), DEFAULTS, device)
            yield f"{name}, chunks of {FEW_ROWS} rows", lambda case=case: _in_chunks(fused_errors, case(), device)
        for options in OPTIONS:
            case = partial(make_case, seed=1, T=301, D=129, V=1031, S=17, dtype=dtype)
            name = ", ".join(f"{key} {value}" for key, value in options.items())
            yield f"fused, {kind}, {name}", lambda case=case, o=options: fused_errors(case(), o, device)
        yield f"fused, {kind}, torch backend", partial(_on_torch, dtype, device)
    yield "rectified", lambda: rectified_errors(make_case(T=5003, V=31, S=301), OPTIONS[2], device)
    for S, scope in ((1, "prompt"), (997, "prompt"), (997, "batch"), (997, "response")):
        yield f"violations, {S} responses, {scope}", partial(violations_errors, S, scope, device)
    for responses, longest in ((1, 1), (7, 40), (31, 900)):
        name = f"advantages, {responses} responses of up to {longest} tokens"
        yield name, partial(advantages_errors, responses, longest, device)
    for V, (dtype, kind), logits in itertools.product(vocabularies, kinds.items(), ("flat", "peaked", "low")):
        case = partial(make_case, T=67, D=72, V=V, dtype=dtype, logits=logits)
        name = f"{kind}, {logits} logits, V {V}"
        yield f"fused, {name}", lambda case=case: fused_errors(case(), DEFAULTS, device)
        yield f"log-probs, {name}", lambda case=case: log_probs_errors(case(), 0.8, device)


def _in_chunks(errors: Callable[..., Errors], case: Case, device: torch.device) -> Errors:
    with chunks_of(FEW_ROWS):
        return errors(case, DEFAULTS, device)


def _on_torch(dtype: torch.dtype, device: torch.device) -> Errors:
    with mock.patch.dict(dispatch._AUTO_ORDER, {device.type: ("torch",)}):
        return fused_errors(make_case(T=301, D=129, V=1031, S=17, dtype=dtype), OPTIONS[1], device)


# ---------------------------------------------------------------------------------------------- other promises


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


def ratio_is_one(case: Case, device: torch.device) -> Errors:
    """On-policy, `linear_log_probs` and the fused op give the same bits, with the clip range (0, 0)."""
    case = on(case, device)
    with torch.no_grad():
        old = linear_log_probs(case.hidden, case.weight, case.targets)
    result, *_ = run_fused(replace(case, old_log_probs=old), DEFAULTS | {"clip": (0.0, 0.0)})
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
    return {f"waits, {name}": (_count_waits(step), float(allowed)) for name, (step, allowed) in steps.items()}


def _count_waits(step: Callable[[], Any]) -> float:
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
    log_probs = off(linear_log_probs(hidden, weight, targets))
    truth = 4.0 - torch.tensor(4.0, dtype=torch.float64).exp().add(V - 1).log()
    return {"log-probs": ((log_probs - truth).abs().max().item(), 1e-5 * 4.0)}


def promises(tiny: bool, device: torch.device) -> Iterator[tuple[str, Callable[[], Errors]]]:
    V = 301 if tiny else 32001
    for dtype in DTYPES:
        kind = str(dtype).removeprefix("torch.")
        for logits in ("flat", "peaked"):
            case = partial(make_case, seed=3, T=307, D=72, V=V, dtype=dtype, logits=logits)
            for check in (same_bits_twice, ratio_is_one, uninitialised_memory):
                name = f"{check.__name__.replace('_', ' ')}, {kind}, {logits} logits"
                yield name, lambda case=case, check=check: check(case(), device)
    yield "any chunk size", lambda: any_chunk_size(make_case(T=307, D=72, V=V), device)
    yield "without graph breaks", lambda: without_graph_breaks(make_case(T=67, D=24, V=V), device, tiny)
    if device.type == "cuda":
        yield "waits for the device", lambda: waits_for_the_device(make_case(T=307, D=72, V=V), device)


def limits(tiny: bool, device: torch.device) -> Iterator[tuple[str, Callable[[], Errors]]]:
    yield "out of range", lambda: out_of_range(make_case(T=67, D=24, V=301, ignored=0.0), device)
    far = {"T·V": (600, 4, 301), "T·D": (4000, 30, 31), "V·D": (9, 30, 4000)}
    if not tiny:
        far = {"T·V": (70_001, 64, 32_001), "T·D": (600_001, 3_600, 31), "V·D": (65, 16_385, 131_073)}
    for name, (T, D, V) in far.items():
        yield f"far addresses, {name}", partial(far_addresses, T, D, V, torch.bfloat16, device)


# ------------------------------------------------------------------------------------------------------- units


def units(device: torch.device, tiny: bool, budget_s: float) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The checks one after the other: their names, and functions that run them and return `passed` and `errors`.

    Args:
        device: Where the ops run.
        tiny: Small sizes, for a test.
        budget_s: For timed rounds, of which there are none.
    """
    for checks in (promises, exactness):
        for name, check in checks(tiny, device):
            yield name, partial(_judge, check)


def limit_units(
    device: torch.device, tiny: bool, budget_s: float
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """As `units`, the checks that a wrong address would fail for good."""
    for name, check in limits(tiny, device):
        yield name, partial(_judge, check)


def _judge(check: Callable[[], Errors]) -> dict[str, Any]:
    errors = check()
    return {"passed": all(error <= bound for error, bound in errors.values()), "errors": errors}
