"""Packed attention on a device beside each sequence alone, in hidden states and gradients, and how often it makes the
host wait: a small Llama, rows as the trainer packs them.
"""

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig

from bench.gpu.correctness import Checks, Errors
from bench.gpu.promises import count_waits
from repo_fast.models.attention import PACKED, attention_candidates, run_packed
from repo_fast.packing.rows import PackedBatch, pack
from tests.ops.cases import relative_error

WIDTH, HEADS, VOCABULARY = 128, 4, 61
# Tokens of the prompts, and of the responses to each.
PROMPTS = (30, 1, 71)
RESPONSES = ((20, 1, 65), (9, 40), (3,))


def make_trunk(groups: int, device: torch.device) -> nn.Module:
    """A trunk with packed attention, `groups` query heads to a key head, in the dtype in which the trainer runs it.

    Raises:
        InputError: Packed attention cannot run on the device.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    (implementation,) = attention_candidates("packed", device, dtype)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=192,
        num_hidden_layers=2,
        vocab_size=VOCABULARY,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // groups,
        attn_implementation=implementation,
    )
    return AutoModel.from_config(config).to(device, dtype)


def make_sequences() -> tuple[list[Tensor], list[Tensor]]:
    """Prompts and responses, one of each a sequence, int64 on the CPU."""
    g = torch.Generator().manual_seed(0)

    def draw(length: int) -> Tensor:
        return torch.randint(VOCABULARY, (length,), generator=g)

    drawn = [(draw(length), [draw(own) for own in lengths]) for length, lengths in zip(PROMPTS, RESPONSES, strict=True)]
    pairs = [(prompt, response) for prompt, responses in drawn for response in responses]
    return [prompt for prompt, _ in pairs], [response for _, response in pairs]


def hidden_of_row(trunk: nn.Module, row: PackedBatch) -> Tensor:
    """Hidden states [1, N, D] of a packed row."""
    return run_packed(trunk, row.input_ids, row.position_ids, row.bounds)


def hidden_alone(trunk: nn.Module, prompts: Sequence[Tensor], responses: Sequence[Tensor]) -> Tensor:
    """The states [T, D] that predict the responses, of sequences that are run one by one."""
    device = trunk.get_input_embeddings().weight.device
    states = []
    for prompt, response in zip(prompts, responses, strict=True):
        hidden = trunk(input_ids=torch.cat([prompt, response])[None].to(device), use_cache=False).last_hidden_state
        states.append(hidden[0, prompt.numel() - 1 : -1])
    return torch.cat(states)


def packed_errors(groups: int, share: bool, device: torch.device) -> Errors:
    """The states that predict the responses and the gradients of all weights, beside sequences alone in float64.

    As much error is allowed as sequences alone have in the same dtype, twice.
    """
    prompts, responses = make_sequences()
    trunk = make_trunk(groups, device)
    alone = copy.deepcopy(trunk)
    alone.set_attn_implementation("sdpa")
    wide = copy.deepcopy(alone).double()
    row = pack(prompts, responses, device, share)
    ours = hidden_of_row(trunk, row)[0, row.predictors]
    plain, truth = (hidden_alone(model, prompts, responses) for model in (alone, wide))
    up = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1)).to(device)
    gradients = []
    for model, hidden in ((trunk, ours), (alone, plain), (wide, truth)):
        hidden.backward(up.to(hidden.dtype))
        gradients.append(torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()]))
    floor = 1e-5 if ours.dtype == torch.float32 else 0.0
    errors: Errors = {}
    for name, (own, ordinary, true) in {"hidden": (ours, plain, truth), "gradients": tuple(gradients)}.items():
        errors[name] = relative_error(own, true), max(floor, 2 * relative_error(ordinary, true))
    return errors


def packed_waits(device: torch.device) -> Errors:
    """How often a packed row's forward and backward make the host wait."""
    trunk = make_trunk(2, device)
    errors: Errors = {}
    for share in (False, True):
        row = pack(*make_sequences(), device, share)
        name = "prompts shared" if share else "prompts repeated"
        hidden_of_row(trunk, row).sum().backward()  # loads the kernels
        outputs: list[Tensor] = []
        errors[f"waits, forward, {name}"] = (
            count_waits(lambda row=row, outputs=outputs: outputs.append(hidden_of_row(trunk, row))),
            0.0,
        )
        loss = outputs[0].sum()
        errors[f"waits, backward, {name}"] = count_waits(loss.backward), 0.0
    return errors


def checks(device: torch.device) -> Checks:
    for groups in (1, 2):
        for share in (False, True):
            name = "packed attention" + ", grouped heads" * (groups > 1) + ", prompts shared" * share
            yield name, partial(packed_errors, groups, share, device)
    if device.type == "cuda":
        yield f"waits for the device, {PACKED}", partial(packed_waits, device)
