"""Every public op on a device against `repo_fast.ops.reference` in float64, within the tolerances of the contract
(those of tests/ops/cases.py): over dtypes, shapes and options, and over the ways in which an op is called.

A check returns, for each quantity, how large its error is and how large it may be. The reference runs on the device as
well, since float64 products of this size take a CPU seconds; that it computes there what it computes on a CPU is the
first check.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.loss_head.chunks import chunks_of
from repo_fast.ops import (
    dispatch,
    fused_rectified_policy_loss,
    generalized_advantages,
    linear_log_probs,
    prompt_violations,
    rectified_policy_loss,
    reference,
)
from tests.ops.cases import (
    Case,
    error,
    head_options,
    loss_scale,
    make_case,
    relative_error,
    row_bound,
    with_streams,
    with_token_options,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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
    {"multiplier": 0.4, "logit_scale": 0.5, "softcap": 2.0, "entropy_coefficient": 0.2, "temperature": 0.7},
)
COLD = {"temperature": 1e-9}
CAPPED = {"temperature": 0.8, "logit_scale": 0.5, "softcap": 3.0}
FEW_ROWS = 64
LEAVES = ("hidden", "weight")

Errors = dict[str, tuple[float, float]]
"""By quantity: its error, and the largest one allowed."""
Checks = Iterator[tuple[str, Callable[[], Errors]]]
"""Names of checks, and functions that make them."""


def on(case: Case, device: torch.device) -> Case:
    return Case(**{name: value.to(device) for name, value in vars(case).items()})


def count(condition: Tensor) -> float:
    return float(condition.sum())


def largest(values: Tensor) -> float:
    return values.max().item() if values.numel() else 0.0


# ------------------------------------------------------------------------------------------------- exactness


def run(
    function: Callable[..., Any],
    case: Case,
    options: dict[str, Any],
    incoming: float = 1.0,
    wants: tuple[str, ...] = LEAVES,
) -> tuple[tuple[Tensor, ...], dict[str, Tensor | None]]:
    """(loss, log-probs, entropy, violations) of the fused op or its reference, and the gradients by leaf.

    Args:
        function: Either of them.
        case: Whose tensors it is given as they are, strides and all.
        options: As `tests.ops.cases` has them.
        incoming: The gradient of the loss.
        wants: Which leaves want a gradient.
    """
    case = replace(case, **{name: getattr(case, name).detach().requires_grad_(name in wants) for name in LEAVES})
    options = with_token_options(case, options)
    arguments = list(case.arguments())
    if options.pop("on_policy", False):
        arguments[3] = None
    result = function(*arguments, **options)
    (incoming * result[0]).backward()
    return tuple(x.detach() for x in result[:4]), {name: getattr(case, name).grad for name in LEAVES}


def fused_errors(
    case: Case,
    options: dict[str, Any],
    device: torch.device,
    *,
    incoming: float = 1.0,
    wants: tuple[str, ...] = LEAVES,
    prepare: Callable[[Case], Case] = lambda case: case,
    around: Callable[[], AbstractContextManager] = nullcontext,
) -> Errors:
    """Values and gradients of the fused op.

    Args:
        case, options, incoming, wants: As in `run`.
        device: Where it runs.
        prepare: The case -> the same numbers, as the op gets them.
        around: Opened around forward and backward of the op alone.
    """
    case = on(case, device)
    with around():
        ours, gradients = run(fused_rectified_policy_loss, prepare(case), options, incoming, wants)
    truth, true_gradients = run(reference.fused_rectified_policy_loss, case.wide(), options, incoming)
    plain, plain_gradients = run(reference.fused_rectified_policy_loss, case, options, incoming)
    scale = loss_scale(case, options)
    errors = _row_errors(case, ours[1:3], truth[1:3], plain[1:3], head_options(options))
    # Not of those that do not apply, -infinity in both.
    gaps = (ours[3] - truth[3]).masked_fill(ours[3] == truth[3], 0.0)
    errors["violations"] = largest(gaps.abs()), 1e-6 * (1 + largest(truth[3][truth[3].isfinite()].abs()))
    allowed = 1e-5 * scale
    if case.hidden.dtype != torch.float32:
        # A single number's error can be 0 by luck. So: twice what plain PyTorch's errors in log p and H can do to it.
        slack = largest((plain[1] - truth[1]).abs()) + largest((plain[2] - truth[2]).abs())
        allowed += 2 * scale * slack
    errors["loss"] = (ours[0] - truth[0]).abs().item(), allowed
    return errors | _gradient_errors(gradients, true_gradients, plain_gradients, wants)


def log_probs_errors(
    case: Case,
    head: dict[str, Any],
    device: torch.device,
    *,
    wants: tuple[str, ...] = LEAVES,
    prepare: Callable[[Case], Case] = lambda case: case,
    around: Callable[[], AbstractContextManager] = nullcontext,
) -> Errors:
    """Values and gradients of `linear_log_probs`, of both outputs at once.

    Args:
        case, device, wants, prepare, around: As in `fused_errors`.
        head: `temperature`, `logit_scale` and `softcap`, where they are not 1, 1 and None.
    """
    case = on(case, device)
    up = torch.randn(2, case.targets.numel(), generator=torch.Generator().manual_seed(0)).to(device)

    def compute(inputs: Case, function: Callable[..., tuple[Tensor, Tensor]], wants: tuple[str, ...] = LEAVES) -> Any:
        leaves = {name: getattr(inputs, name).detach().requires_grad_(name in wants) for name in LEAVES}
        outputs = function(*leaves.values(), inputs.targets, **head)
        torch.autograd.backward(outputs, tuple(up.to(outputs[0].dtype)))
        return [x.detach() for x in outputs], {name: leaf.grad for name, leaf in leaves.items()}

    with around():
        ours, gradients = compute(prepare(case), partial(linear_log_probs, return_entropy=True), wants)
    truth, true_gradients = compute(case.wide(), reference.linear_log_probs)
    plain, plain_gradients = compute(case, reference.linear_log_probs)
    return _row_errors(case, ours, truth, plain, head) | _gradient_errors(
        gradients, true_gradients, plain_gradients, wants
    )


def _row_errors(case: Case, ours: Any, truths: Any, plain: Any, head: dict[str, Any]) -> Errors:
    """Of log-probabilities and entropies [T]: row by row in float32, against plain PyTorch's in the other dtypes."""
    errors: Errors = {"log-probs above 0": (count(ours[0] > 0), 0.0)}
    bound = row_bound(case, **head)
    floors = {"log-probs": 0.0, "entropy": 1e-5}
    for (name, floor), value, truth, ordinary in zip(floors.items(), ours, truths, plain, strict=True):
        if case.hidden.dtype == torch.float32:
            errors[f"{name}, of a row's bound"] = largest((value - truth).abs() / bound), 1.0
        else:
            errors[name] = error(value, truth), max(2 * error(ordinary, truth), floor)
    return errors


def _gradient_errors(
    ours: dict[str, Tensor | None],
    truths: dict[str, Tensor],
    plain: dict[str, Tensor],
    wants: tuple[str, ...] = LEAVES,
) -> Errors:
    errors = {}
    for name, value in ours.items():
        if name not in wants or value is None:
            errors[f"grad {name} is there or not, as asked"] = float((value is not None) != (name in wants)), 0.0
            continue
        floor = 1e-5 if value.dtype == torch.float32 else 0.0
        ordinary = relative_error(plain[name], truths[name])
        errors[f"grad {name}"] = relative_error(value, truths[name]), max(floor, 2 * ordinary)
    return errors


def reference_errors(device: torch.device) -> Errors:
    """The reference in float64 on the device against the same on the CPU, whose libraries are other ones."""
    case = make_case(T=301, D=129, V=1031, S=17).wide()
    here, gradients = run(reference.fused_rectified_policy_loss, on(case, device), OPTIONS[1])
    there, true_gradients = run(reference.fused_rectified_policy_loss, case, OPTIONS[1])
    names = ("loss", "log-probs", "entropy", "violations", *(f"grad {name}" for name in LEAVES))
    pairs = zip((*here, *gradients.values()), (*there, *true_gradients.values()), strict=True)
    return {
        name: (relative_error(value.cpu(), truth), 1e-12) for name, (value, truth) in zip(names, pairs, strict=True)
    }


def rectified_errors(case: Case, options: dict[str, Any], device: torch.device) -> Errors:
    """Loss and gradient of `rectified_policy_loss` from the log-probabilities of the reference."""
    log_probs, _ = reference.linear_log_probs(case.hidden.double(), case.weight.double(), case.targets)
    violations = reference.prompt_violations(case.costs, case.prompt_ids)

    def compute(inputs: Case, function: Callable[..., Any], leaf: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
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
        return loss.detach().cpu(), leaf.grad.cpu()

    loss, gradient = compute(
        on(case, device), rectified_policy_loss, log_probs.float().to(device), violations.to(device)
    )
    truth, wide = compute(case.wide(), reference.rectified_policy_loss, log_probs.float().double(), violations.double())
    return {
        "loss": (abs(loss.item() - truth.item()), 1e-5 * loss_scale(case, options)),
        "gradient": (relative_error(gradient, wide), 1e-5),
    }


def violations_errors(S: int, scope: str, device: torch.device) -> Errors:
    g = torch.Generator().manual_seed(S)
    costs = torch.randn(S, generator=g)
    prompt_ids = torch.randint(-(S // 4) - 1, S // 4 + 1, (S,), generator=g) * 2**40
    ours = prompt_violations(costs.to(device), prompt_ids.to(device), scope=scope, threshold=0.25).cpu()
    truth = reference.prompt_violations(costs.double(), prompt_ids, scope=scope, threshold=0.25)
    return {"violations": (largest((ours - truth).abs()), 1e-6 * (1 + largest(truth.abs())))}


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
        errors[name] = largest((value.cpu() - truth).abs()), 1e-5 * largest(truth.abs())
    return errors


def exactness(tiny: bool, device: torch.device) -> Checks:
    """The ops as they are mostly called."""
    large = {"T": 67, "D": 33, "V": 1500} if tiny else {"T": 515, "D": 1024, "V": 32001}
    vocabularies = (301, 31) if tiny else (128256, 32001, 31)
    for kind, dtype in DTYPES.items():
        for ignored in (0.0, 0.5):
            case = cache(partial(make_case, seed=2, S=40, dtype=dtype, ignored=ignored, **large))
            name = f"fused, {kind}, {', '.join(f'{key} {value}' for key, value in large.items())}, ignored {ignored}"
            for suffix, around in (("", nullcontext), (f", chunks of {FEW_ROWS} rows", partial(chunks_of, FEW_ROWS))):
                check = partial(fused_errors, options=DEFAULTS, device=device, around=around)
                yield f"{name}{suffix}", lambda case=case, check=check: check(case())
        # In float16 rows are those of float32: one that has all terms will do.
        for options in OPTIONS if kind != "float16" else OPTIONS[1:2]:
            case = partial(make_case, seed=1, T=301, D=129, V=1031, S=17, dtype=dtype)
            name = ", ".join(f"{key} {value}" for key, value in options.items())
            yield f"fused, {kind}, {name}", lambda case=case, o=options: fused_errors(case(), o, device)
        yield f"fused, {kind}, torch backend", partial(_on_torch, dtype, device)
    for surrogate, K in (("separate", 2), ("mixed", 3), ("separate", 8)):
        streams = {
            "multiplier": torch.linspace(0.3, 2.5, K),
            "surrogate": surrogate,
            "scope": "response",
        }
        several = partial(with_streams, make_case(T=301, D=129, V=1031, S=17), K)
        yield f"fused, {K} constraints, {surrogate}", lambda case=several, o=streams: fused_errors(case(), o, device)
    yield "rectified", lambda: rectified_errors(make_case(T=5003, V=31, S=301), OPTIONS[2], device)
    for S, scope in ((1, "prompt"), (997, "prompt"), (997, "batch"), (997, "response")):
        yield f"violations, {S} responses, {scope}", partial(violations_errors, S, scope, device)
    for responses, longest in ((1, 1), (7, 40), (31, 900)):
        name = f"advantages, {responses} responses of up to {longest} tokens"
        yield name, partial(advantages_errors, responses, longest, device)
    for V, (kind, dtype), logits in itertools.product(vocabularies, DTYPES.items(), ("flat", "peaked", "low")):
        case = partial(make_case, T=67, D=72, V=V, dtype=dtype, logits=logits)
        name = f"{kind}, {logits} logits, V {V}"
        yield f"fused, {name}", lambda case=case: fused_errors(case(), DEFAULTS, device)
        yield f"log-probs, {name}", lambda case=case: log_probs_errors(case(), {"temperature": 0.8}, device)
        yield f"log-probs, {name}, capped", lambda case=case: log_probs_errors(case(), CAPPED, device)
        if logits == "peaked" and kind != "float16":  # which cannot hold the gradients
            # That makes logits beyond 1e9, which the row passes in Triton take in another way.
            yield f"log-probs, {name}, temperature 1e-9", lambda case=case: log_probs_errors(case(), COLD, device)


def _on_torch(dtype: torch.dtype, device: torch.device) -> Errors:
    with mock.patch.dict(dispatch._AUTO_ORDER, {device.type: ("torch",)}):
        return fused_errors(make_case(T=301, D=129, V=1031, S=17, dtype=dtype), OPTIONS[1], device)


# ------------------------------------------------------------------------------------ other ways to call an op


def strided(case: Case) -> Case:
    """The same numbers in tensors that are not contiguous, surrounded by NaN or by ids out of range.

    Hidden states and what there is of each token or response are every other column, the weight is a transpose, and the
    advantages, where they are all one number, are an expanded view.
    """

    def apart(x: Tensor) -> Tensor:
        around = x.new_full((*x.shape, 2), torch.nan if x.is_floating_point() else 2**40)
        around[..., 0] = x
        return around[..., 0]

    def alike(x: Tensor) -> Tensor:
        return x[:1].expand(x.shape) if bool((x == x[:1]).all()) else apart(x)

    fields = {name: alike(value) if "advantages" in name else apart(value) for name, value in vars(case).items()}
    return Case(**fields | {"weight": case.weight.t().contiguous().t()})


@contextmanager
def on_a_side_stream(device: torch.device) -> Iterator[None]:
    """While this is open, a GPU's work goes to a stream that is not the default one, after what was launched before."""
    if device.type != "cuda":
        yield
        return
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)


def ways(tiny: bool, device: torch.device) -> Checks:
    """The two linear ops as they may be called besides."""
    T, D = (67, 24) if tiny else (301, 129)  # as in `exactness`: no kernel is compiled for these alone
    for kind, dtype in DTYPES.items():
        case = cache(partial(make_case, seed=4, T=T, D=D, V=1031, S=17, dtype=dtype))

        def fused(make: Callable[[], Case], **options: Any) -> Callable[[], Errors]:
            return lambda: fused_errors(make(), OPTIONS[1], device, **options)

        def log_probs(make: Callable[[], Case], **options: Any) -> Callable[[], Errors]:
            return lambda: log_probs_errors(make(), {"temperature": 0.8}, device, **options)

        # 1024: a scaled loss, in float16 a usual one.
        for incoming in (3.7, 1024.0):
            yield f"fused, {kind}, incoming gradient {incoming}", fused(case, incoming=incoming)
        for name, few in (("no token", {"T": 0}), ("all ignored", {"ignored": 1.0})):
            none = partial(make_case, **({"T": 37, "D": 24, "V": 1031, "dtype": dtype} | few))
            yield f"fused, {kind}, {name}", fused(none)
            yield f"log-probs, {kind}, {name}", log_probs(none)
        alike = cache(partial(_with_one_advantage, case))
        yield f"fused, {kind}, strided inputs", fused(alike, prepare=strided)
        yield f"log-probs, {kind}, strided inputs", log_probs(case, prepare=strided)
        for leaf in LEAVES:
            yield f"fused, {kind}, gradient to {leaf} alone", fused(case, wants=(leaf,))
            yield f"log-probs, {kind}, gradient to {leaf} alone", log_probs(case, wants=(leaf,))
        autocast = partial(torch.autocast, device.type, dtype=torch.bfloat16)
        side_stream = partial(on_a_side_stream, device)
        for name, around in (("under autocast", autocast), ("on a side stream", side_stream)):
            yield f"fused, {kind}, {name}", fused(case, around=around)
            yield f"log-probs, {kind}, {name}", log_probs(case, around=around)


def _with_one_advantage(make: Callable[[], Case]) -> Case:
    case = make()
    return replace(case, reward_advantages=torch.full_like(case.reward_advantages, 0.6))


def checks(tiny: bool, device: torch.device) -> Checks:
    """All of them, those of most consequence first."""
    yield "the reference", partial(reference_errors, device)
    yield from exactness(tiny, device)
    yield from ways(tiny, device)
