"""The checks of the GPU suite, on the CPU: each can fail."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench import gpu_suite
from bench.gpu import attention as gpu_attention
from bench.gpu import correctness, promises
from repo_fast.models import attention
from repo_fast.ops import fused_rectified_policy_loss, linear_log_probs, reference
from tests.ops.cases import make_case

CPU = torch.device("cpu")
KINDS = pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])


def failed(unit: str) -> list[str]:
    """The quantities of a check that are further off than allowed."""
    result = dict(gpu_suite.correctness_units(CPU, True, 1.0))[unit]()
    wrong = [quantity for quantity, (error, bound) in result["errors"].items() if not error <= bound]
    assert result["passed"] == (not wrong)
    return wrong


Change = Callable[[Any], None]
"""Puts something wrong in the place of the fused op, of `linear_log_probs`, or of both."""


@pytest.fixture
def fused_is(monkeypatch: pytest.MonkeyPatch) -> Change:
    return lambda function: monkeypatch.setattr(correctness, "fused_rectified_policy_loss", function)


@pytest.fixture
def log_probs_are(monkeypatch: pytest.MonkeyPatch) -> Change:
    def change(function: Any) -> None:
        for module in (correctness, promises):
            monkeypatch.setattr(module, "linear_log_probs", function)

    return change


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_wrong_log_probs_are_found(kind: str, log_probs_are: Change) -> None:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = linear_log_probs(*args, **kwargs)
        return (0.99 * result[0], result[1]) if isinstance(result, tuple) else 0.99 * result

    unit = f"log-probs, {kind}, flat logits, V 301"
    assert failed(unit) == [] and failed(f"ratio is one, {kind}, flat logits") == []
    log_probs_are(wrong)
    assert any(quantity.startswith("log-probs") for quantity in failed(unit))
    assert "log-probs that differ" in failed(f"ratio is one, {kind}, flat logits")


def test_a_temperature_that_one_op_forgets_is_found(log_probs_are: Change) -> None:
    unit = "ratio is one, bfloat16, peaked logits, temperature 0.7"
    assert failed(unit) == []
    log_probs_are(lambda *args, temperature: linear_log_probs(*args))
    assert failed(unit) == ["log-probs that differ", "approximate KL", "clip fraction"]


def test_nan_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promises, "run_bits", lambda case, options: (case.hidden * torch.nan,))
    assert failed("uninitialised memory, float32, flat logits") == ["NaN"]
    assert failed("same bits twice, float32, flat logits") == ["bits that differ"]


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_logit_that_is_no_number_and_does_not_show_is_found(kind: str, log_probs_are: Change) -> None:
    assert failed(f"no number, {kind}") == []
    log_probs_are(lambda *args, **kwargs: [x.nan_to_num() for x in linear_log_probs(*args, **kwargs)])
    assert len(failed(f"no number, {kind}")) == 4


def test_a_reference_that_the_device_computes_otherwise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert failed("the reference") == []
    calls, true = [], reference.fused_rectified_policy_loss

    def drifting(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        loss, *others = true(*args, **kwargs)
        return (1 + 1e-9 * len(calls)) * loss, *others

    monkeypatch.setattr(correctness.reference, "fused_rectified_policy_loss", drifting)
    assert failed("the reference") == ["loss", "grad hidden", "grad weight"]


@KINDS
@pytest.mark.parametrize("incoming", [3.7, 1024.0])
def test_an_incoming_gradient_that_is_ignored_is_found(kind: str, incoming: float, fused_is: Change) -> None:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = fused_rectified_policy_loss(*args, **kwargs)
        if result.loss.requires_grad and args[0].dtype != torch.float64:
            result.loss.register_hook(torch.ones_like)
        return result

    unit = f"fused, {kind}, incoming gradient {incoming}"
    assert failed(unit) == []
    fused_is(wrong)
    assert failed(unit) == ["grad hidden", "grad weight"]


@KINDS
@pytest.mark.parametrize("few", ["no token", "all ignored"])
def test_nan_where_there_is_nothing_is_found(kind: str, few: str, fused_is: Change, log_probs_are: Change) -> None:
    def mean_of_nothing(hidden: Tensor, weight: Tensor, targets: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = fused_rectified_policy_loss(hidden, weight, targets, *args, **kwargs)
        valid = (targets != -100).sum()
        return result._replace(loss=result.loss * valid / valid)

    def ignored_ones_have_one(hidden: Tensor, weight: Tensor, targets: Tensor, **kwargs: Any) -> Any:
        log_probs, entropy = linear_log_probs(hidden, weight, targets, **kwargs)
        return log_probs - 0.5 * (targets == -100) + 0 * weight.sum() / targets.numel(), entropy

    units = f"fused, {kind}, {few}", f"log-probs, {kind}, {few}"
    assert failed(units[0]) == [] and failed(units[1]) == []
    fused_is(mean_of_nothing)
    assert {"loss", "grad weight"} <= set(failed(units[0]))
    if few == "all ignored":
        log_probs_are(ignored_ones_have_one)
        assert [name.partition(",")[0] for name in failed(units[1])] == ["log-probs"]


@KINDS
def test_strides_that_are_not_looked_at_are_found(kind: str, fused_is: Change, log_probs_are: Change) -> None:
    def packed(x: Any) -> Any:
        """The first elements of the memory, as if `x` were contiguous."""
        if not isinstance(x, Tensor) or x.is_contiguous():
            return x
        return x.as_strided(x.shape, torch.empty(x.shape).stride(), x.storage_offset())

    case = make_case(T=7, D=4, V=3)
    for name, value in vars(correctness.strided(case)).items():
        assert torch.equal(value, getattr(case, name)) and not value.is_contiguous()
    for units in (f"fused, {kind}, strided inputs", f"log-probs, {kind}, strided inputs"):
        assert failed(units) == []
    log_probs_are(lambda hidden, *args, **kwargs: linear_log_probs(packed(hidden), *args, **kwargs))
    assert failed(f"log-probs, {kind}, strided inputs")
    for argument in (0, 1, 4, 5):  # hidden, weight, and the advantages: apart, and an expanded view

        def wrong(*args: Any, argument: int = argument, **kwargs: Any) -> Any:
            changed = args[argument]
            if not changed.is_contiguous():
                spread = changed.stride() == (0,)
                changed = torch.full_like(changed, torch.nan) if spread else packed(changed)
            return fused_rectified_policy_loss(*args[:argument], changed, *args[argument + 1 :], **kwargs)

        fused_is(wrong)
        assert failed(f"fused, {kind}, strided inputs")


@KINDS
@pytest.mark.parametrize(("leaf", "other"), [("hidden", "weight"), ("weight", "hidden")])
def test_a_gradient_that_needs_the_other_is_found(kind: str, leaf: str, other: str, fused_is: Change) -> None:
    """Wrong where it is alone; and one that nobody asked for."""

    def wrong(hidden: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = fused_rectified_policy_loss(hidden, weight, *args, **kwargs)
        alone = hidden.requires_grad != weight.requires_grad
        return result._replace(loss=result.loss * 2 - result.loss.detach()) if alone else result

    unit = f"fused, {kind}, gradient to {leaf} alone"
    assert failed(unit) == []
    fused_is(wrong)
    assert failed(unit) == [f"grad {leaf}"]
    there = {name: torch.ones(1) for name in correctness.LEAVES}
    errors = correctness._gradient_errors(there, there, there, wants=(leaf,))
    assert [name for name, (error, bound) in errors.items() if error > bound] == [
        f"grad {other} is there or not, as asked"
    ]


def test_an_op_that_autocast_reaches_into_is_found(fused_is: Change, log_probs_are: Change) -> None:
    units = "fused, float32, under autocast", "log-probs, float32, under autocast"
    assert failed(units[0]) == [] and failed(units[1]) == []
    fused_is(reference.fused_rectified_policy_loss)
    log_probs_are(lambda *args, return_entropy, **kwargs: reference.linear_log_probs(*args, **kwargs))
    for unit in units:
        assert {"grad hidden", "grad weight", "log-probs, of a row's bound"} <= set(failed(unit))


def test_a_side_stream_waits_for_what_was_launched_and_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = "side" if isinstance(name, torch.device) else name

        def wait_stream(self, other: "Stream") -> None:
            log.append(f"{self.name} waits for {other.name}")

    def enter(stream: Stream) -> Any:
        log.append(f"in {stream.name}")
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("current"))
    monkeypatch.setattr(torch.cuda, "stream", enter)
    with correctness.on_a_side_stream(torch.device("cuda")):
        log.append("op")
    assert log == ["side waits for current", "in side", "op", "current waits for side"]


def test_what_is_wrong_on_a_side_stream_alone_is_found(monkeypatch: pytest.MonkeyPatch, fused_is: Change) -> None:
    inside: list[bool] = []

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = fused_rectified_policy_loss(*args, **kwargs)
        return result._replace(log_probs=2 * result.log_probs) if inside else result

    class Entered(nullcontext):
        def __init__(self, device: torch.device) -> None:
            super().__init__()

        def __enter__(self) -> None:
            inside.append(True)

        def __exit__(self, *unused: object) -> None:
            inside.clear()

    fused_is(wrong)
    assert failed("fused, float32, on a side stream") == []
    monkeypatch.setattr(correctness, "on_a_side_stream", Entered)
    assert failed("fused, float32, on a side stream") == ["log-probs, of a row's bound"]


# ------------------------------------------------------------------------------------------------- packed attention

PACKED_UNITS = [
    "packed attention" + heads + share for heads in ("", ", grouped heads") for share in ("", ", prompts shared")
]


@pytest.mark.parametrize("unit", PACKED_UNITS)
def test_sequences_that_see_each_other_are_found(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert failed(unit) == []

    def one_sequence(query: Tensor, key: Tensor, value: Tensor, scale: float, *unused: Any) -> Tensor:
        count, keys = query.shape[2], key.shape[2]
        mask = torch.ones(count, keys, dtype=torch.bool).tril(keys - count)
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)

    monkeypatch.setattr(attention, "_one_by_one", one_sequence)
    assert failed(unit) == ["hidden", "gradients"]


def test_heads_that_are_grouped_wrongly_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "repeat_kv", lambda x, groups: x.repeat(1, groups, 1, 1))
    assert failed("packed attention") == []
    assert failed("packed attention, grouped heads") == ["hidden", "gradients"]


def test_waits_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch tells of them, in the mode in which it does."""
    modes: list[str] = []

    def wait(times: int = 1) -> None:
        for _ in range(times if modes[-1:] == ["warn"] else 0):
            warnings.warn("called a synchronizing CUDA operation (function set_sync_debug_mode)", stacklevel=1)
        if modes[-1:] == ["warn"]:
            warnings.warn("something else", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    assert promises.count_waits(lambda: wait(3)) == 3 and modes == ["warn", "default"]
    with pytest.raises(ZeroDivisionError):
        promises.count_waits(lambda: 1 / 0)
    assert modes[-1] == "default"
    # A forward that waits once more than it may, and a backward that waits at all.
    forward = gpu_attention.hidden_of_row

    def waits(*args: Any) -> Tensor:
        hidden = forward(*args)
        wait(1)
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: wait())
        return hidden

    errors = gpu_attention.packed_waits(CPU)
    assert all(error <= bound for error, bound in errors.values()) and len(errors) == 4
    monkeypatch.setattr(gpu_attention, "hidden_of_row", waits)
    assert all(error == bound + 1 for error, bound in gpu_attention.packed_waits(CPU).values())
