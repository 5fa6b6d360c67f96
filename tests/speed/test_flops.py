"""The count of floating-point operations, against torch's own counter and by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, MixtralConfig

from repo_fast.models.lora import add_lora
from repo_fast.models.trunk import train_last_layers
from repo_fast.speed.flops import Shape, peak_flops
from tests.tiny import tiny_llama_config

LLAMA = tiny_llama_config(61, num_hidden_layers=3, attn_implementation="eager")
GPT2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=61, n_positions=64, attn_implementation="eager")
N = 24


def counted(model: torch.nn.Module, backward: bool) -> int:
    model.train()
    counter = FlopCounterMode(display=False)
    with counter:
        output = model(input_ids=torch.randint(61, (1, N)), use_cache=False)[0]
        if backward:
            output.sum().backward()
    return counter.get_total_flops()


def whole_square(shape: Shape) -> int:
    """What attention's upper half takes, which eager attention computes and the count leaves out."""
    return 2 * shape.layers * shape.attention_width * N**2


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_forward_is_what_torch_counts(config) -> None:
    model = AutoModelForCausalLM.from_config(config)
    shape = Shape.of(model)
    assert counted(model, backward=False) == shape.forward([N], N) + whole_square(shape)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_backward_takes_twice_as_much(config) -> None:
    model = AutoModelForCausalLM.from_config(config)
    shape = Shape.of(model)
    assert shape.forward_and_backward([N], N) == 3 * shape.forward([N], N)
    assert counted(model, backward=True) == pytest.approx(3 * (shape.forward([N], N) + whole_square(shape)), rel=0.03)


def test_what_is_frozen_takes_less() -> None:
    model = AutoModelForCausalLM.from_config(LLAMA)
    whole = Shape.of(model)
    train_last_layers(model, 1)
    last = Shape.of(model)
    assert last.trained_products == last.passed_products == whole.products // 3 and not last.head_trained
    ours = last.forward_and_backward([N], N)
    square = whole_square(last) * (1 + 2 / 3)
    # The first trained layer passes no gradient on, which is not looked at so closely.
    assert counted(model, backward=True) == pytest.approx(ours + square, rel=0.05)


def test_adapters_pass_gradients_through_what_is_frozen() -> None:
    model = AutoModelForCausalLM.from_config(LLAMA)
    whole = Shape.of(model)
    add_lora(model, rank=2, alpha=4.0, targets=())
    shape = Shape.of(model)
    assert shape.products > whole.products and shape.trained_products < 0.2 * shape.products
    assert shape.passed_products > 0.9 * shape.products
    forward = shape.forward([N], N)
    assert 1.9 * forward < shape.forward_and_backward([N], N) < 2.3 * forward


def test_sequences_do_not_attend_to_each_other_and_the_head_is_asked_where_it_counts() -> None:
    shape = Shape.of(AutoModelForCausalLM.from_config(LLAMA))
    assert shape.forward([4, 6], 0) == shape.forward([4], 0) + shape.forward([6], 0) < shape.forward([10], 0)
    assert shape.forward([4], 3) - shape.forward([4], 0) == 2 * 3 * 32 * 61


def test_a_trunk_has_no_head_and_needs_no_data() -> None:
    with torch.device("meta"):
        trunk, model = AutoModel.from_config(LLAMA), AutoModelForCausalLM.from_config(LLAMA)
    assert Shape.of(trunk).head == 0 and Shape.of(trunk).products == Shape.of(model).products


def test_experts_are_not_counted() -> None:
    config = MixtralConfig(**{k: v for k, v in LLAMA.to_dict().items() if k in MixtralConfig().to_dict()})
    with torch.device("meta"):
        assert Shape.of(AutoModel.from_config(config)) is None


def test_a_cpu_has_no_data_sheet_here() -> None:
    assert peak_flops(torch.device("cpu")) is None
