"""Batches come in the same order on every rank and after every resume."""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repo_fast.data import PromptSampler
from repo_fast.errors import InputError


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 20), data=st.data())
def test_each_prompt_comes_once_an_epoch_and_once_a_batch(n, data):
    size = data.draw(st.integers(1, n))
    sampler = PromptSampler(n, size, seed=data.draw(st.integers(0, 3)))
    batches = [sampler.next() for _ in range(3 * n)]
    assert all(len(set(batch)) == size for batch in batches)
    drawn = [i for batch in batches for i in batch]
    for start in range(0, len(drawn), n):
        epoch = drawn[start : start + n]
        assert len(set(epoch)) == len(epoch)
    assert set(drawn) == set(range(n))


def test_the_order_depends_on_the_seed_alone():
    first = PromptSampler(50, 7, seed=3)
    expected = [first.next() for _ in range(20)]
    random.seed(1)
    torch.manual_seed(1)
    again, other = PromptSampler(50, 7, seed=3), PromptSampler(50, 7, seed=4)
    assert [again.next() for _ in range(20)] == expected
    assert [other.next() for _ in range(20)] != expected
    # Two epochs are not in the same order.
    flat = [i for batch in expected for i in batch]
    assert flat[:50] != flat[50:100]


@pytest.mark.parametrize("steps", range(12))
def test_a_resumed_sampler_goes_on_exactly(steps):
    whole = PromptSampler(10, 4, seed=0)
    expected = [whole.next() for _ in range(30)]
    first = PromptSampler(10, 4, seed=0)
    for _ in range(steps):
        first.next()
    state = json.loads(json.dumps(first.state_dict()))
    second = PromptSampler(10, 4, seed=0)
    second.next()
    second.load_state_dict(state)
    assert [second.next() for _ in range(30 - steps)] == expected[steps:]


def test_bad_sizes_and_states():
    with pytest.raises(InputError, match="prompts_per_step is 5.*number of prompts, which is 4"):
        PromptSampler(4, 5, seed=0)
    with pytest.raises(InputError, match="prompts_per_step is 0"):
        PromptSampler(4, 0, seed=0)
    state = PromptSampler(4, 2, seed=0).state_dict()
    with pytest.raises(InputError, match="n_prompts 4, this run has 6"):
        PromptSampler(6, 2, seed=0).load_state_dict(state)
    with pytest.raises(InputError, match="seed 0, this run has 1"):
        PromptSampler(4, 2, seed=1).load_state_dict(state)
