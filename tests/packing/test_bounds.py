"""Where the sequences of a packed row start and end, and what they see."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModel, LlamaConfig

from repo_fast.models.attention import PACKED, PADDED, run_packed
from repo_fast.packing.bounds import Bounds
from repo_fast.packing.rows import idle_batch, pack, pack_dialogues, pack_whole

CPU = torch.device("cpu")


def positions(*pieces: tuple[int, int]) -> torch.Tensor:
    return torch.cat([torch.arange(start, stop) for start, stop in pieces])[None]


def test_sequences_of_their_own() -> None:
    bounds = Bounds.of(positions((0, 3), (0, 1), (0, 1), (0, 4)))
    assert bounds.own.tolist() == bounds.seen.tolist() == [0, 3, 4, 5, 9]
    assert bounds.own.dtype == bounds.seen.dtype == torch.int32 and bounds.key_index is None
    assert (bounds.longest, bounds.tokens, bounds.sequences) == (4, 9, 4)


def test_sequences_that_go_on_from_another() -> None:
    """Two go on from two tokens of the first; the last from one token of the fourth."""
    bounds = Bounds.of(positions((0, 4), (2, 3), (2, 5), (0, 2), (1, 3)))
    assert bounds.own.tolist() == [0, 4, 5, 8, 10, 12] and bounds.seen.tolist() == [0, 4, 7, 12, 14, 17]
    expected = [[0, 1, 2, 3], [0, 1, 4], [0, 1, 5, 6, 7], [8, 9], [8, 10, 11]]
    assert bounds.key_index.tolist() == sum(expected, []) and bounds.key_index.dtype == torch.int64
    assert (bounds.longest, bounds.tokens) == (5, 12)


@pytest.mark.parametrize("pieces", [[(2, 5)], [(0, 2), (3, 5)], [(0, 3), (-1, 2)]], ids=str)
def test_a_sequence_that_goes_on_from_nothing_is_an_error(pieces: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="position_ids restart at"):
        Bounds.of(positions(*pieces))


def test_rows_come_with_their_bounds() -> None:
    prompts, responses = [torch.arange(3)] * 2 + [torch.arange(1)], [torch.arange(count) for count in (2, 4, 1)]
    batches = [pack(prompts, responses, CPU, share) for share in (False, True)]
    batches += [pack_dialogues([(prompts[0], responses[0], prompts[2], responses[1])], CPU), idle_batch(CPU)]
    for batch in batches:
        batch.bounds.check(batch.position_ids)
    input_ids, position_ids, last, bounds = pack_whole(responses, CPU)
    bounds.check(position_ids)
    assert input_ids.tolist() == [[0, 1, 0, 1, 2, 3, 0]] and last.tolist() == [1, 5, 6]
    assert position_ids.tolist() == input_ids.tolist()


def trunk(attention: str) -> torch.nn.Module:
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=9, num_attention_heads=2)
    return AutoModel.from_config(config, attn_implementation=attention)


@pytest.mark.parametrize("attention", [PACKED, "sdpa"])
def test_bounds_of_another_row_are_an_error(attention: str) -> None:
    row = positions((0, 3), (0, 2), (0, 4))
    right, ids = Bounds.of(row), torch.zeros(1, 9, dtype=torch.int64)
    run_packed(trunk(attention), ids, row, right)
    shifted = right.own.clone()
    shifted[1] += 1
    wrong = [
        replace(right, own=shifted),
        replace(right, seen=shifted),
        replace(right, longest=5),
        replace(right, key_index=torch.arange(9)),
        Bounds.of(positions((0, 3), (0, 2))),
    ]
    for bounds in wrong:
        with pytest.raises(ValueError, match="bounds are of another row of"):
            run_packed(trunk(attention), ids, row, bounds)


@pytest.mark.parametrize("attention", ["sdpa", "eager", PADDED])
def test_only_packed_attention_shares(attention: str) -> None:
    """transformers would keep what goes on apart from what it goes on from, and say nothing."""
    model = trunk("sdpa" if attention == PADDED else attention)
    setattr(model, PADDED, attention == PADDED)
    with pytest.raises(ValueError, match=f"restart above 0 with attention '{attention}', expected 'packed'"):
        run_packed(model, torch.zeros(1, 6, dtype=torch.int64), positions((0, 4), (2, 4)))
