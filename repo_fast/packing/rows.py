"""Sequences one after the other in a single row, `position_ids` starting anew at each: no compute goes to padding.

Only the positions whose hidden state predicts a response token ever reach a head: `predictors`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from repo_fast.collectives import Ranks
from repo_fast.packing.bounds import Bounds


@dataclass(frozen=True)
class PackedBatch:
    """Some sequences in one row: `N` tokens, of which `T` are response tokens, of `S` sequences.

    Attributes:
        input_ids: int64 [1, N].
        position_ids: int64 [1, N], from 0 in each sequence; from the prompt's length where a sequence shares the prompt
            of the one before.
        predictors: int64 [T], the position in the row whose hidden state predicts each response token.
        targets: int64 [T], the response tokens; -100 in a batch that only keeps a rank in step.
        sequence_ids: int64 [T] in [0, S).
        last: int64 [S], the position of each sequence's last token.
        bounds: Those of `position_ids`. None: whoever needs them finds them, and waits for a GPU.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    predictors: torch.Tensor
    targets: torch.Tensor
    sequence_ids: torch.Tensor
    last: torch.Tensor
    bounds: Bounds | None = None

    @property
    def sequences(self) -> int:
        return self.last.numel()


def pack(
    prompts: Sequence[torch.Tensor], responses: Sequence[torch.Tensor], device: torch.device, share: bool = False
) -> PackedBatch:
    """Pack prompt-and-response sequences into one row.

    Args:
        prompts: int64 CPU tensors, at least one token each.
        responses: int64 CPU tensors, one for each prompt, at least one token each.
        device: Where the batch goes.
        share: A prompt that is also the one before is not repeated: its responses share it (`models/attention.py`).
    """
    tokens, positions, predictors, sequence_ids, last = [], [], [], [], []
    start, end_of_prompt, before = 0, 0, None
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if not (share and before is not None and torch.equal(prompt, before)):
            tokens.append(prompt)
            positions.append(torch.arange(prompt.numel()))
            start += prompt.numel()
            end_of_prompt, before = start - 1, prompt
        tokens.append(response)
        positions.append(torch.arange(prompt.numel(), prompt.numel() + response.numel()))
        own = torch.arange(start - 1, start + response.numel() - 1)
        own[0] = end_of_prompt
        predictors.append(own)
        sequence_ids.append(torch.full((response.numel(),), index))
        start += response.numel()
        last.append(start - 1)
    return _packed(
        device,
        torch.cat(tokens),
        positions,
        torch.cat(predictors),
        torch.cat(list(responses)),
        torch.cat(sequence_ids),
        torch.tensor(last),
    )


def pack_dialogues(dialogues: Sequence[Sequence[torch.Tensor]], device: torch.device) -> PackedBatch:
    """Pack dialogues of several responses into one row.

    Args:
        dialogues: Each int64 CPU tensors, at least one token each: in turn what is given and a response to it.
        device: Where the batch goes.
    """
    lengths = torch.tensor([sum(part.numel() for part in parts) for parts in dialogues])
    tokens = torch.cat([part for parts in dialogues for part in parts])
    is_response = torch.cat(
        [torch.full((part.numel(),), i % 2 == 1) for parts in dialogues for i, part in enumerate(parts)]
    )
    where = is_response.nonzero()[:, 0]
    positions = [torch.arange(length) for length in lengths.tolist()]
    sequence_ids = torch.arange(len(dialogues)).repeat_interleave(lengths)[where]
    return _packed(device, tokens, positions, where - 1, tokens[where], sequence_ids, lengths.cumsum(0) - 1)


def pack_whole(
    sequences: Sequence[torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Bounds]:
    """Pack sequences to be read at their last tokens: what a `ScoreModel` takes.

    Args:
        sequences: int64 CPU tensors, at least one token each.
        device: Where the row goes.

    Returns:
        int64 input_ids [1, N], position_ids [1, N] and the place of each sequence's last token [S]; the bounds.
    """
    position_ids = torch.cat([torch.arange(sequence.numel()) for sequence in sequences])[None]
    last = torch.tensor([sequence.numel() for sequence in sequences]).cumsum(0) - 1
    row = (sent(part, device) for part in (torch.cat(list(sequences))[None], position_ids, last))
    return *row, Bounds.of(position_ids).to(device)


def _packed(
    device: torch.device,
    tokens: torch.Tensor,
    positions: Sequence[torch.Tensor],
    predictors: torch.Tensor,
    targets: torch.Tensor,
    sequence_ids: torch.Tensor,
    last: torch.Tensor,
) -> PackedBatch:
    """The batch of CPU tensors on a device, with its bounds."""
    position_ids = torch.cat(list(positions))[None]
    parts = (tokens[None], position_ids, predictors, targets, sequence_ids, last)
    return PackedBatch(*(sent(part, device) for part in parts), Bounds.of(position_ids).to(device))


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on its way to a device, which torch does not wait for; CUDA's driver may, where it is large,
    for its memory is not pinned.
    """
    return tensor.to(device, non_blocking=True)


def idle_batch(device: torch.device) -> PackedBatch:
    """Two tokens with nothing to predict: what a rank runs, forward and backward, when the others have more batches."""
    token = torch.zeros(1, dtype=torch.int64)
    packed = pack([token], [token], device)
    return PackedBatch(**(vars(packed) | {"targets": torch.full_like(packed.targets, -100)}))


def in_step(rows: list[list], ranks: Ranks) -> list[list]:
    """The rows, followed by empty ones up to the number that the rank with most has."""
    return rows + [[]] * (ranks.max(len(rows)) - len(rows))


def with_last(items: Sequence[Any], after: Sequence[Any] = ()) -> Iterator[tuple[Any, bool]]:
    """Each item, and whether it is the step's last; with `after`, more will follow."""
    for index, item in enumerate(items):
        yield item, index == len(items) - 1 and not after
