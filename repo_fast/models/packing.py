"""Which way of running several sequences at once is right for an architecture, found by trying.

Packed rows are fastest, but only trunks that attend by position keep their sequences apart: not those with ALiBi or a
recurrent state, nor those that count positions themselves. What an architecture does is not in its configuration, so
the model itself is run: a value of a sequence must be the same alone and behind whatever company.

`auto` goes from the fastest attention to the slowest until one is right; where none keeps packed sequences apart, each
gets a row of its own, padded. `python -m bench.trainer.architectures` prints what that gives for some sixty of them.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from repo_fast.errors import InputError
from repo_fast.models.attention import MASKED, PACKED, PADDED, attention_candidates
from repo_fast.models.on_paper import PASSED_OVER, said

# Maps input_ids and position_ids, int64 [1, N] each, to the hidden state [D] at the last position.
LastState = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Of a hidden state's norm. Rounding differs where sequences have company; in half precision, of mixtures of experts, so
# does what an expert gets at once.
_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4}
_HALF_TOLERANCE = 5e-2
_COMPANY, _OWN = 24, 8


def settle_packing(
    name: str, transformer: PreTrainedModel, last_state: LastState, choice: str, device: torch.device
) -> str:
    """Find how a model runs several sequences at once, and leave it so. All ranks must call it.

    Args:
        name: Of the model, for messages.
        transformer: The Hugging Face model or trunk inside.
        last_state: Runs the whole model, in the mode that it will be in.
        choice: The attention asked for; only `auto` has more than one way.
        device: Of the activations.

    Returns:
        What was chosen and why, for the user.

    Raises:
        InputError: No way that the choice allows gives a sequence the same values whatever its company. The model draws
            random numbers in its forward, or its values are not finite.
    """
    dtype = next(p.dtype for p in transformer.parameters() if p.is_floating_point())
    first = transformer.config._attn_implementation
    candidates = attention_candidates(choice, device, dtype)
    reasons = list(getattr(transformer, PASSED_OVER, ()))
    for way in () if choice == PADDED else candidates[candidates.index(first) :]:
        if way != first and not _switched(transformer, way):
            continue
        if (fault := _fault(name, transformer, last_state, device, dtype)) is None:
            return "; ".join([said(way), *reasons])
        reasons.append(f"{said(way)}: {fault}")
    if choice in ("auto", PADDED):
        masked = next((way for way in (first, *MASKED) if way != PACKED and _switched(transformer, way)), first)
        setattr(transformer.base_model, PADDED, True)
        if (fault := _fault(name, transformer, last_state, device, dtype)) is None:
            return "; ".join([f"{PADDED} rows, {masked}", *reasons])
        reasons.append(f"{PADDED}: {fault}")
    raise InputError(
        f"{name} ({type(transformer).__name__}) cannot be run packed, expected another attention or architecture: "
        + "; ".join(reasons)
    )


def state_before(head: nn.Module, module: nn.Module) -> LastState:
    """The state that a score head reads at the last position, for models called like `ScoreModel`.

    A new head is zero, and a score one number: neither shows all that moves.
    """

    def run(input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            module(input_ids, position_ids, torch.tensor([input_ids.numel() - 1], device=input_ids.device))
        finally:
            hook.remove()
        return seen[0][0]

    return run


def _switched(transformer: PreTrainedModel, attention: str) -> bool:
    """Whether a model that is built has now, or had before, this attention."""
    if transformer.config._attn_implementation != attention and transformer._can_set_attn_implementation():
        # An architecture without it raises.
        with contextlib.suppress(ValueError, ImportError):
            transformer.set_attn_implementation(attention)
    return transformer.config._attn_implementation == attention


@torch.no_grad()
def _fault(name: str, model: nn.Module, last_state: LastState, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with how sequences are run together; None where nothing is. On every rank alike."""
    own = [(3 * i + 1) % 4 for i in range(_OWN)]

    def behind(company: list[int]) -> torch.Tensor:
        positions = [*range(len(company)), *range(_OWN)]
        row = (torch.tensor([[*company, *own]], device=device), torch.tensor([positions], device=device))
        return last_state(*row).double().cpu()

    def moved(other: torch.Tensor) -> bool:
        return bool((first - other).norm() > tolerance * first.norm())

    tolerance = _TOLERANCES.get(dtype, _HALF_TOLERANCE)
    company = [(7 * i + i // 3) % 4 for i in range(_COMPANY)]
    before, trains = _random_state(device), model.training
    first = behind(company)
    if not first.isfinite().all():
        raise InputError(
            f"{name} ({model.config.name_or_path!r}) gives hidden states that are not finite, expected numbers: look "
            "at its weights"
        )
    draws = not all(torch.equal(*pair) for pair in zip(before, _random_state(device), strict=True))
    # Where layers are dropped with probability 0, that is drawn all the same.
    drops_layers = any(hasattr(module, "layerdrop") for module in model.modules())
    if (draws and not drops_layers) or moved(behind(company)):
        raise InputError(
            f"{name} ({type(model).__name__}) draws random numbers in training, such as for the choice of experts, "
            "which cannot be switched off: expected an architecture whose forward is always the same"
        )
    if trains:
        model.eval()
        drawing = behind(company)
        model.train()
        if moved(drawing):
            raise InputError(
                f"{name} ({type(model).__name__}) computes something else in training than where responses are drawn, "
                "expected an architecture whose forward is always the same"
            )
    if moved(behind([i % 2 for i in range(_COMPANY)])):
        return "sequences of a row see each other"
    if moved(behind([])):
        return "positions do not start anew with each sequence of a row"
    return None


def _random_state(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
