"""What frozen weights of several models are kept once, and which are not."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from repo_fast.errors import InputError
from repo_fast.models.lora import add_lora, merged_state
from repo_fast.models.policy import Policy
from repo_fast.models.score_model import ScoreModel
from repo_fast.models.sharing import SharedWeights
from repo_fast.models.trunk import train_last_layers
from repo_fast.models.vocabulary import fit_vocabulary
from tests.tiny import save_policy, word_tokenizer

TOKENS = torch.tensor([[1, 4, 13, 14, 15, 16, 17, 2]])
PLACES = torch.arange(8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_policy(tmp_path_factory.mktemp("base") / "policy"))


def adapted(model: nn.Module, seed: int) -> nn.Module:
    """With adapters that change what it computes."""
    torch.manual_seed(seed)
    add_lora(model, rank=2, alpha=4.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def plain(folder: str) -> nn.Module:
    return Policy.from_pretrained(folder, dtype=torch.float32, attention="sdpa").model


def policy(folder: str) -> nn.Module:
    return adapted(plain(folder), 0)


def trunk(folder: str) -> nn.Module:
    return adapted(ScoreModel.from_policy(folder, dtype=torch.float32).trunk, 1)


def held(*modules: nn.Module) -> int:
    """Bytes of the distinct parameters of all, and of the scales that layers have hold of."""
    tensors = [p for module in modules for p in module.parameters()]
    layers = [layer for module in modules for layer in module.modules() if hasattr(layer, "quant_state")]
    tensors += [layer.quant_state.absmax for layer in layers]
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def of_adapters(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for name, p in module.named_parameters() if "lora_" in name)


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    found = model(TOKENS)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def test_a_base_is_kept_once_and_every_model_computes_what_it_did(folder: str) -> None:
    models = {"policy": policy(folder), "one": trunk(folder), "other": trunk(folder)}
    before, alone = {name: outputs(model) for name, model in models.items()}, held(models["policy"])
    shared = SharedWeights(required=True)
    for name, model in models.items():
        shared.take(name, model)
    assert held(*models.values()) == alone + of_adapters(models["one"]) + of_adapters(models["other"])
    assert shared.spared["policy"] == 0
    assert shared.spared["one"] == held(models["one"]) - of_adapters(models["one"]) > 0
    assert shared.unlike == {}
    assert all(torch.equal(outputs(model), before[name]) for name, model in models.items())
    assert not torch.equal(before["one"], outputs(plain(folder).model))


def test_each_trains_its_own_adapters(folder: str) -> None:
    """Gradients are those of a model by itself, and reach no other model."""
    apart, together = trunk(folder), trunk(folder)
    first, shared = policy(folder), SharedWeights()
    shared.take("policy", first)
    shared.take("critic", together)
    for model in (apart, together):
        model(TOKENS).last_hidden_state.square().sum().backward()
    expected = {name: p.grad for name, p in apart.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in together.named_parameters() if p.requires_grad}
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(p.grad is None for p in first.parameters())


def test_what_is_trained_is_not_shared(folder: str) -> None:
    """Of a policy whose last layer is trained the reference shares the first one and the embeddings."""
    trained = plain(folder)
    train_last_layers(trained, 1)
    reference = plain(folder).requires_grad_(False)
    shared = SharedWeights()
    shared.take("policy", trained)
    shared.take("reference", reference)
    same = {
        name
        for (name, ours), theirs in zip(trained.named_parameters(), reference.parameters(), strict=True)
        if ours is theirs
    }
    assert same == {name for name, p in trained.named_parameters() if not p.requires_grad}
    assert any("layers.0." in name for name in same)
    assert shared.unlike == {"reference": "model.layers.1.self_attn.q_proj.weight"}


def test_a_merged_model_keeps_its_layers(folder: str) -> None:
    base, merged = policy(folder), plain(folder)
    other = policy(folder)
    state = merged_state(other, {name: value.clone() for name, value in other.named_parameters()})
    merged.load_state_dict(state, strict=False)
    merged.requires_grad_(False)
    before = outputs(merged)
    shared = SharedWeights()
    shared.take("policy", base)
    shared.take("reward", copy.deepcopy(merged))
    assert shared.unlike == {"reward": "model.layers.0.self_attn.q_proj.weight"}
    # Embeddings, norms.
    assert 0 < shared.spared["reward"] < held(merged) / 2
    assert torch.equal(outputs(merged), before)
    strict = SharedWeights(required=True)
    strict.take("policy", base)
    with pytest.raises(
        InputError, match=r"share_base is true, but model.layers.0.\S+ of reward is unlike the policy's"
    ):
        strict.take("reward", merged)


def test_all_but_the_embeddings_of_a_grown_vocabulary_is_shared(folder: str) -> None:
    grown = plain(folder)
    fit_vocabulary(grown, word_tokenizer(), pad_token=None, multiple=64)
    grown, critic, shared = adapted(grown, 0), trunk(folder), SharedWeights(required=True)
    shared.take("policy", grown)
    shared.take("critic", critic)
    assert held(critic) - of_adapters(critic) - shared.spared["critic"] == critic.embed_tokens.weight.numel() * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_same_bits_are_alike(dtype: torch.dtype) -> None:
    def layer(values: list[float]) -> nn.Module:
        module = nn.Linear(3, 1, bias=False, dtype=dtype).requires_grad_(False)
        module.weight.copy_(torch.tensor([values]))
        return nn.ModuleDict({"layers": nn.ModuleList([module])})

    first, shared = layer([0.0, float("nan"), 1.0]), SharedWeights()
    shared.take("first", first)
    for name, values, same in (
        ("equal", [0.0, float("nan"), 1.0], True),
        ("another zero", [-0.0, float("nan"), 1.0], False),
        ("another number", [0.0, float("nan"), 1.0 + torch.finfo(dtype).eps], False),
    ):
        module = layer(values)
        shared.take(name, module)
        assert (module["layers"][0].weight is first["layers"][0].weight) == same == (name not in shared.unlike)
    other = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(3, 1, bias=False, dtype=torch.float64)])})
    shared.take("another dtype", other.requires_grad_(False))
    assert shared.unlike["another dtype"] == "layers.0.weight"


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    tied = str(save_policy(tmp_path / "policy", tie_word_embeddings=True))
    first, second, shared = policy(tied), policy(tied), SharedWeights(required=True)
    shared.take("policy", first)
    shared.take("other", second)
    assert second.lm_head.weight is second.model.embed_tokens.weight is first.model.embed_tokens.weight


def test_apart_only_counts(folder: str) -> None:
    first, second, shared = policy(folder), trunk(folder), SharedWeights(apart=True)
    shared.take("policy", first)
    shared.take("critic", second)
    assert shared.spared["critic"] == held(second) - of_adapters(second)
    assert held(first, second) == held(first) + held(second)


def test_a_base_in_4_bits_is_shared_with_its_scales(folder: str) -> None:
    """Twice a weight has the same 4 bits."""

    def quantized() -> nn.Module:
        model = Policy.from_pretrained(folder, dtype=torch.float32, attention="sdpa", quantize="nf4").model
        return adapted(model, 0)

    first, second, doubled = quantized(), quantized(), quantized()
    before, shared = outputs(second), SharedWeights()
    doubled.model.layers[0].mlp.up_proj.base_layer.weight.quant_state.absmax.mul_(2)
    for name, model in (("first", first), ("second", second), ("doubled", doubled)):
        shared.take(name, model)
    assert held(first, second) == held(first) + of_adapters(second)
    assert shared.spared["second"] == held(second) - of_adapters(second)
    assert torch.equal(outputs(second), before)
    assert shared.unlike == {"doubled": "model.layers.0.mlp.up_proj.base_layer.weight"}
    assert not torch.equal(outputs(doubled), before)
