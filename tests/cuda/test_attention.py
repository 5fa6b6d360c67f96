"""A packed forward on CUDA does not wait for the device: neither the forward nor what packs the row."""

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig

from repo_fast.models import attention
from repo_fast.models.attention import PACKED, PADDED, attention_candidates, run_packed
from repo_fast.models.critic import Critic
from repo_fast.models.loss_head import LossHead
from repo_fast.models.policy import Policy
from repo_fast.models.score_model import ScoreModel
from repo_fast.packing.rows import PackedBatch, pack, pack_whole
from tests.cuda.fake import CUDA, FakeCuda, needs_graph
from tests.models.test_attention import CONFIGS

CPU = torch.device("cpu")
asked: list[str] = []


def varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):  # noqa: ANN001, ANN201
    """Stands for torch.nn.attention.varlen.varlen_attn, which looks for its kernels: what it asks of its arguments."""
    for part in (q, k, v):
        assert part.device == CUDA and part.dtype in (torch.bfloat16, torch.float16) and part.dim() == 3
        assert part.stride(-1) == 1 and part.shape[-1] % 8 == 0
    for bounds in (cu_seq_q, cu_seq_k):
        assert bounds.dtype == torch.int32 and bounds.device == CUDA and bounds.is_contiguous()
    assert k.shape == v.shape and q.shape[1] % k.shape[1] == 0 and cu_seq_q.shape == cu_seq_k.shape
    assert isinstance(max_q, int) and max_q == max_k and window_size[1] == 0
    asked.append("shared" if k.shape[0] != q.shape[0] else "own")
    return q * 1 + 0 * (k.sum() + v.sum())


@pytest.fixture(autouse=True)
def _varlen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    attention._varlen_options.cache_clear()
    asked.clear()
    yield
    attention._varlen_options.cache_clear()


def row_of(share: bool = False, device: torch.device = CPU) -> PackedBatch:
    prompts = [torch.zeros(5, dtype=torch.int64)] * 2 + [torch.ones(3, dtype=torch.int64)]
    return pack(prompts, [torch.zeros(count, dtype=torch.int64) for count in (3, 1, 4)], device, share)


def trunk_on(fake: FakeCuda, name: str, implementation: str, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    return fake.on_cuda(AutoModel.from_config(CONFIGS[name], attn_implementation=implementation, dtype=dtype))


@needs_graph
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows(name: str, share: bool, checkpointed: bool) -> None:
    fake, row = FakeCuda(), row_of(share)
    assert attention_candidates("auto", CUDA, torch.bfloat16)[0] == PACKED
    trunk = trunk_on(fake, name, PACKED)
    if checkpointed:
        trunk.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trunk.train()
    row = fake.on_cuda(row)
    with fake:
        hidden = run_packed(trunk, row.input_ids, row.position_ids, row.bounds)
        assert hidden.shape == (1, row.input_ids.numel(), 32) and hidden.device == CUDA
        hidden.sum().backward()
    assert fake.waits == []
    assert asked == ["shared" if share else "own"] * (2 + 2 * checkpointed)
    assert all(parameter.grad.device == CUDA for parameter in trunk.parameters())


@pytest.mark.parametrize("way", [PADDED, "sdpa"])
def test_padded_and_masked_rows(way: str) -> None:
    """Under a mask transformers itself waits, once: it is not seen here (`tests/cuda/fake.py`)."""
    fake, row = FakeCuda(), row_of()
    trunk = trunk_on(fake, "llama", "sdpa")
    setattr(trunk, PADDED, way == PADDED)
    row = fake.on_cuda(row)
    with fake, torch.no_grad():
        assert run_packed(trunk, row.input_ids, row.position_ids, row.bounds).shape == (1, 21, 32)
    assert fake.waits == []


def test_flash_attention_2_is_handed_the_bounds() -> None:
    """Not run: its package needs a GPU to be built."""
    fake, row = FakeCuda(), row_of()
    seen = {}

    class Trunk:
        config = LlamaConfig(attn_implementation="flash_attention_2")

        def __call__(self, **options: object) -> object:
            seen.update(options)
            return type("Output", (), {"last_hidden_state": None})

    row = fake.on_cuda(row)
    with fake:
        run_packed(Trunk(), row.input_ids, row.position_ids, row.bounds)
    assert fake.waits == []
    assert all(seen[name].shape == (4,) and seen[name].device == CUDA for name in ("cu_seq_lens_q", "cu_seq_lens_k"))
    assert seen["max_length_q"] == seen["max_length_k"] == 8


def test_every_model_hands_the_bounds_on() -> None:
    fake, row = FakeCuda(), row_of()
    whole = pack_whole([torch.zeros(4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)], CPU)
    causal = AutoModelForCausalLM.from_config(CONFIGS["llama"], attn_implementation=PACKED, dtype=torch.bfloat16)
    causal.lm_head.__class__ = LossHead
    trunks = (AutoModel.from_config(CONFIGS["llama"], attn_implementation=PACKED, dtype=torch.bfloat16) for _ in "12")
    score, valued = (ScoreModel(trunk, torch.zeros(1, 32)) for trunk in trunks)
    policy, score = fake.on_cuda(Policy(causal)), fake.on_cuda(score)
    critic = fake.on_cuda(Critic(valued, ("reward", "cost"), torch.bfloat16))
    row, whole = fake.on_cuda(row), fake.on_cuda(whole)
    with fake, torch.no_grad():
        assert policy(row, lambda hidden, projection, batch: hidden).shape == (8, 32)
        assert critic(row.input_ids, row.position_ids, row.predictors, row.bounds).shape == (2, 8)
        assert score(*whole).shape == (2,)
    assert fake.waits == []


@pytest.mark.parametrize("share", [False, True])
def test_rows_are_packed_and_sent_without_a_wait(share: bool) -> None:
    with FakeCuda() as fake:
        row, (input_ids, *others) = row_of(share, CUDA), pack_whole([torch.zeros(4, dtype=torch.int64)], CUDA)
        parts = [*vars(row).values(), *vars(row.bounds).values(), input_ids, *others]
        assert all(part.device == CUDA for part in parts if isinstance(part, torch.Tensor))
        assert fake.waits == []
        assert row.input_ids.cpu().device.type == "cpu" and torch.zeros(3).to(CUDA).device == CUDA
        assert fake.waits == ["copy to cpu", "copy to cuda"]
