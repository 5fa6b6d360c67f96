"""Attention in packed rows: equal to each sequence alone, forward and backward, and nothing sees its neighbour."""

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModel, LlamaConfig, MistralConfig, Qwen2Config

from repo_fast.errors import InputError
from repo_fast.models import attention
from repo_fast.models.attention import PACKED, attention_candidates, run_packed
from repo_fast.packing.rows import pack

CPU = torch.device("cpu")
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=4),
    "grouped heads": LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2),
    "biases": Qwen2Config(**SMALL, num_attention_heads=4, num_key_value_heads=1),
    "sliding window": MistralConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, sliding_window=5),
}


def trunk_of(name: str, implementation: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModel.from_config(CONFIGS[name], attn_implementation=implementation).to(dtype)


def row_of(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    return torch.randint(61, position_ids.shape), position_ids


@pytest.mark.parametrize("lengths", [[1], [7], [1, 1], [3, 1, 8], [13, 2, 1, 29, 6]], ids=str)
@pytest.mark.parametrize("implementation", [PACKED, "sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_row_is_its_sequences_alone(name: str, implementation: str, lengths: list[int]) -> None:
    """The trap: with a cache, or with a mask of two dimensions, transformers lets them see each other silently."""
    packed, alone = trunk_of(name, implementation), trunk_of(name, "sdpa")
    input_ids, position_ids = row_of(lengths)
    upstream = torch.randn(1, sum(lengths), 32, dtype=torch.float64)
    hidden = run_packed(packed, input_ids, position_ids)
    (hidden * upstream).sum().backward()
    expected = torch.cat(
        [alone(input_ids=part, use_cache=False).last_hidden_state for part in input_ids.split(lengths, dim=1)], dim=1
    )
    (expected * upstream).sum().backward()
    # The eager one takes its softmax in float32.
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if implementation == "eager" else {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(hidden, expected, **tolerance)
    for (parameter, ours), theirs in zip(packed.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, **tolerance, msg=parameter)


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_of_a_neighbour_reaches_a_sequence(name: str) -> None:
    """Not only equal to rounding: no gradient flows to another sequence, and another neighbour changes no bit."""
    trunk = trunk_of(name, PACKED, torch.float32)
    input_ids, position_ids = row_of([4, 9, 6])
    embedded = trunk.get_input_embeddings()
    seen = {}
    embedded.register_forward_hook(lambda module, inputs, output: seen.update(output=output.detach().requires_grad_()))
    embedded.register_forward_hook(lambda module, inputs, output: seen["output"])
    hidden = run_packed(trunk, input_ids, position_ids)
    hidden[0, 4:13].square().sum().backward()
    reached = seen["output"].grad[0].abs().sum(-1) > 0
    assert reached[4:13].all() and not reached[:4].any() and not reached[13:].any()
    others = input_ids.clone()
    others[0, :4], others[0, 13:] = 7, 8
    assert torch.equal(run_packed(trunk, others, position_ids)[0, 4:13], hidden[0, 4:13])


def test_what_is_not_packed_goes_to_sdpa_with_its_masks() -> None:
    packed, plain = trunk_of("grouped heads", PACKED), trunk_of("grouped heads", "sdpa")
    input_ids, mask = torch.randint(61, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    mask[0, :3] = 0
    ours, theirs = (trunk(input_ids=input_ids, attention_mask=mask).last_hidden_state for trunk in (packed, plain))
    assert torch.equal(ours[mask.bool()], theirs[mask.bool()])


def test_checkpointed_layers_compute_the_same() -> None:
    plain, checkpointed = trunk_of("llama", PACKED), trunk_of("llama", PACKED)
    checkpointed.train()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    checkpointed.enable_input_require_grads()
    row = row_of([5, 2, 9])
    for trunk in (plain, checkpointed):
        run_packed(trunk, *row).square().sum().backward()
    for ours, theirs in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_an_architecture_that_asks_for_more_is_an_error() -> None:
    trunk = trunk_of("llama", PACKED)
    for layer in trunk.layers:
        layer.self_attn.attention_dropout = 0.5
    trunk.train()
    with pytest.raises(InputError, match="has dropout 0.5 in its attention, expected 0"):
        run_packed(trunk, *row_of([3, 4]))


def test_the_choice() -> None:
    assert attention_candidates("auto", CPU, torch.float32) == (PACKED, "sdpa", "eager")
    assert attention_candidates("packed", CPU, torch.bfloat16) == (PACKED,)
    assert attention_candidates("eager", CPU, torch.float32) == ("eager",)
    assert attention_candidates("padded", CPU, torch.float32) == ("sdpa", "eager")
    assert attention_candidates("auto", torch.device("cuda"), torch.float32) == ("sdpa", "eager")
    with pytest.raises(InputError, match="flash_attention_2"):
        attention_candidates("flash_attention_2", CPU, torch.float32)
    with pytest.raises(InputError, match="'packed' on device cuda in torch.float32"):
        attention_candidates("packed", torch.device("cuda"), torch.float32)


def varlen_by_loop(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):  # noqa: ANN001, ANN201
    """Stands for torch.nn.attention.varlen.varlen_attn, which has no CPU kernel: [N, H, d] -> [N, H, d]."""
    assert cu_seq_q.dtype == torch.int32 and window_size[1] == 0
    parts = []
    for own, seen in zip(cu_seq_q.unfold(0, 2, 1).tolist(), cu_seq_k.unfold(0, 2, 1).tolist(), strict=True):
        count, shared = own[1] - own[0], seen[1] - seen[0] - own[1] + own[0]
        assert count + shared <= max_q == max_k
        queries, keys, values = (x[slice(*at)].transpose(0, 1) for x, at in ((q, own), (k, seen), (v, seen)))
        # FlashAttention aligns the mask with the last key.
        mask = torch.ones(count, count + shared, dtype=torch.bool).tril(shared)
        if window_size[0] >= 0:
            mask &= mask.triu(shared - window_size[0])
        attended = scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
        )
        parts.append(attended.transpose(0, 1))
    return torch.cat(parts)


def varlen_of_2_11(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):  # noqa: ANN001, ANN201
    """Stands for torch 2.11's, which takes grouped heads without being told."""
    options = {"scale": scale, "window_size": window_size, "enable_gqa": True}
    return varlen_by_loop(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, **options)


@pytest.fixture(params=[varlen_by_loop, varlen_of_2_11], ids=["torch 2.13", "torch 2.11"])
def _varlen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", request.param)
    attention._varlen_options.cache_clear()
    yield
    attention._varlen_options.cache_clear()


@pytest.mark.usefixtures("_varlen")
def test_packed_attention_runs_on_cuda_whatever_the_version_of_torch() -> None:
    cuda = torch.device("cuda")
    assert attention_candidates("packed", cuda, torch.bfloat16) == (PACKED,)
    assert PACKED in attention_candidates("auto", cuda, torch.bfloat16)


def test_without_a_scale_or_a_window_variable_length_attention_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda q, k, v: None)
    attention._varlen_options.cache_clear()
    with pytest.raises(InputError, match="'packed' on device cuda in torch.bfloat16"):
        attention_candidates("packed", torch.device("cuda"), torch.bfloat16)
    attention._varlen_options.cache_clear()


@pytest.mark.usefixtures("_varlen")
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_what_cuda_is_asked_for(heads: tuple[int, int], window: int | None) -> None:
    """The arguments of the variable-length kernel mean the same as the loop of the CPU."""
    query, key, value = (torch.randn(1, count, 15, 8) for count in (heads[0], heads[1], heads[1]))
    cu_seqlens = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    ours = attention._varlen(query, key, value, 0.3, (cu_seqlens, cu_seqlens), 9, window)
    groups = heads[0] // heads[1]
    wide = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    torch.testing.assert_close(ours, attention._one_by_one(query, *wide, 0.3, (cu_seqlens, cu_seqlens), window))


@pytest.mark.usefixtures("_varlen")
@pytest.mark.parametrize("window", [None, 4])
def test_what_cuda_is_asked_for_where_a_prompt_is_shared(window: int | None) -> None:
    query, key, value = torch.randn(1, 2, 12, 8), *torch.randn(2, 1, 2, 18, 8)
    bounds = (torch.tensor([0, 7, 10, 12]).int(), torch.tensor([0, 7, 13, 18]).int())
    ours = attention._varlen(query, key, value, 0.3, bounds, 7, window)
    torch.testing.assert_close(ours, attention._one_by_one(query, key, value, 0.3, bounds, window))


@pytest.mark.parametrize("name", CONFIGS)
def test_responses_that_share_a_prompt_are_those_that_repeat_it(name: str) -> None:
    """Hidden states of the responses, and every gradient, in float64; prompts of one token, responses of one token."""
    shared, repeated = trunk_of(name, PACKED), trunk_of(name, PACKED)
    prompts = [torch.randint(61, (length,)) for length in (6, 1, 9)]
    groups = [[4, 1, 13], [2, 5], [3]]
    responses = [[torch.randint(61, (length,)) for length in lengths] for lengths in groups]
    flat = [(prompt, response) for prompt, own in zip(prompts, responses, strict=True) for response in own]
    whole = pack(*zip(*flat, strict=True), CPU)
    once = pack(*zip(*flat, strict=True), CPU, share=True)
    saved = sum((len(own) - 1) * prompt.numel() for prompt, own in zip(prompts, responses, strict=True))
    assert once.input_ids.numel() == whole.input_ids.numel() - saved
    assert torch.equal(once.targets, whole.targets) and torch.equal(once.sequence_ids, whole.sequence_ids)
    upstream = torch.randn(whole.targets.numel(), 32, dtype=torch.float64)
    results = []
    for trunk, row in ((shared, once), (repeated, whole)):
        hidden = run_packed(trunk, row.input_ids, row.position_ids)[0]
        (hidden[row.predictors] * upstream).sum().backward()
        results.append((hidden[row.predictors], hidden[row.last]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-11)
    for (parameter, ours), theirs in zip(shared.named_parameters(), repeated.parameters(), strict=True):
        # The norms of transformers compute in float32, whatever they are given.
        assert (ours.grad - theirs.grad).norm() <= 1e-6 * theirs.grad.norm(), parameter
