"""Work evened out over ranks and micro-batches: nothing is lost, nothing doubled, and no part has much more."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repo_fast.collectives import Ranks
from repo_fast.packing.balance import by_prompt, deal, micro_batches, share_out, split_by_tokens, within_budget

LENGTHS = st.lists(st.integers(1, 40), max_size=40)


@given(LENGTHS, st.integers(1, 100), st.sampled_from([None, 1, 2]))
@settings(max_examples=200, deadline=None)
def test_split_keeps_every_sequence_once_within_the_budget(lengths, budget, power):
    rows = split_by_tokens(lengths, budget, None if power is None else [length**power for length in lengths])
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(row and row == sorted(row) for row in rows)
    assert all(sum(lengths[i] for i in row) <= budget or len(row) == 1 for row in rows)
    if power is None:
        # What finds no room in any row is at most half a budget, and all rows are then more than half full; or they
        # hold one of the large ones each.
        large = sum(2 * length > budget for length in lengths)
        assert len(rows) <= max(2 * sum(lengths) / budget, large) + 1


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 30)), max_size=30), st.integers(10, 80), st.booleans())
@settings(max_examples=200, deadline=None)
def test_micro_batches_count_a_shared_prompt_once(pairs, budget, share):
    prompt_ids, responses = [prompt for prompt, _ in pairs], [length for _, length in pairs]
    prompts = [3 + prompt for prompt in prompt_ids]
    rows = micro_batches(prompts, responses, budget, lambda length: length**2, prompt_ids if share else None)
    assert sorted(index for row in rows for index in row) == list(range(len(pairs)))
    for row in rows:
        before = [None, *(prompt_ids[i] for i in row)] if share else [None] * len(row)
        repeated = sum(prompts[i] for i, last in zip(row, before, strict=False) if prompt_ids[i] == last)
        tokens = sum(prompts[i] + responses[i] for i in row) - repeated
        assert tokens <= budget or len(row) == 1


def test_what_shares_a_prompt_fits_a_row_that_the_same_apart_does_not():
    lengths = ([10, 10], [5, 5], 20, lambda length: length)
    assert micro_batches(*lengths, [7, 7]) == [[0, 1]]
    assert micro_batches(*lengths) == [[0], [1]]


@given(st.lists(st.integers(1, 100), max_size=20), st.integers(1, 4))
def test_ranks_share_out_what_all_of_them_have(items, size):
    device = torch.device("cpu")
    shares = [share_out(items, lambda item: item**2, Ranks(rank, size, device)) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == sorted(items)
    work = [sum(item**2 for item in share) for share in shares]
    assert max(work) - min(work) <= max(items, default=0) ** 2


@given(st.lists(st.integers(1, 10**6), max_size=60), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_no_part_has_much_more_than_its_share(work, parts):
    dealt = deal(work, parts)
    assert len(dealt) == parts and sorted(index for part in dealt for index in part) == list(range(len(work)))
    totals = [sum(work[i] for i in part) for part in dealt]
    # Whoever has most got its smallest when it had least.
    assert max(totals) <= sum(work) / parts + max(work, default=0)
    assert max(totals) - min(totals) <= max(work, default=0)


def test_long_sequences_count_by_their_square():
    # By tokens, 8 goes with nothing and the four 2s together; by squares, 64 against 16.
    assert deal([8, 2, 2, 2, 2], 2) == [[0], [1, 2, 3, 4]]
    assert split_by_tokens([6, 6, 3, 3, 3, 3], 100, [36, 36, 9, 9, 9, 9]) == [[0, 1, 2, 3, 4, 5]]
    # Three of 6 and six of 1 in rows of 12 tokens at most: a 6 for each row, whatever the small ones are.
    rows = split_by_tokens([6, 6, 6, 1, 1, 1, 1, 1, 1], 8, [36, 36, 36, 1, 1, 1, 1, 1, 1])
    assert sorted(len([i for i in row if i < 3]) for row in rows) == [1, 1, 1]


def test_responses_of_a_prompt_are_grouped_and_cut_to_what_fits() -> None:
    assert by_prompt([7, 3, 7, 7, 3]) == [[0, 2, 3], [1, 4]] and by_prompt([]) == []
    responses = [4, 9, 2, 3, 50]
    assert within_budget([0, 2, 3], 5, responses, 14) == [[0, 2, 3]]
    assert within_budget([0, 2, 3], 5, responses, 13) == [[0, 2], [3]]
    # One that is too long by itself has a row of its own, as without sharing.
    assert within_budget([0, 4, 2], 5, responses, 12) == [[0], [4], [2]]
