"""Score models give the numbers of their checkpoints, packed in any company."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    BloomConfig,
    BloomModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForSequenceClassification,
    LlamaModel,
    MistralConfig,
    MistralForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from repo_fast.errors import InputError
from repo_fast.models.packing import settle_packing, state_before
from repo_fast.models.score_model import ScoreModel
from tests.job_runs import on_ranks
from tests.tiny import save_beaver, save_policy, save_sequence_classifier

CPU = torch.device("cpu")
SEQUENCES = [torch.tensor(ids) for ids in ([1, 12, 13], [7], [1, 9, 8, 2], [5, 5, 5, 5, 5, 5, 0], [2, 2])]


def settle(name, model, attention="sdpa"):
    """What is said of how a `ScoreModel`, or an engine around one, runs several sequences at once."""
    inner = getattr(model, "module", model)
    return settle_packing(name, inner.trunk, state_before(inner.score_head, model), attention, CPU)


def packed(sequences):
    lengths = torch.tensor([len(s) for s in sequences])
    positions = torch.cat([torch.arange(n) for n in lengths])
    return torch.cat(sequences)[None], positions[None], lengths.cumsum(0) - 1


def load(path, dtype=torch.float32):
    return ScoreModel.from_pretrained(str(path), dtype=dtype).eval()


def scores(model, sequences=SEQUENCES):
    with torch.no_grad():
        return model(*packed(sequences))


def beaver_by_hand(path, weight_file="model.safetensors"):
    """Safe RLHF's own formula on the raw checkpoint: head of the trunk's last hidden state."""
    state = load_file(Path(path) / weight_file)
    trunk = LlamaModel.from_pretrained(path).eval()

    def end_score(ids):
        hidden = trunk(ids).last_hidden_state[:, -1]
        return (hidden * state["score_head.weight"]).sum(-1) + state.get("score_head.bias", torch.zeros(1))

    with torch.no_grad():
        return torch.cat([end_score(s[None]) for s in SEQUENCES])


@pytest.mark.parametrize("layout", ["LlamaForScore", "LlamaModelForScore"])
@pytest.mark.parametrize("bias", [None, False, True])
def test_both_beaver_layouts(tmp_path, layout, bias):
    path = save_beaver(tmp_path, layout, bias=bias)
    got = scores(load(path))
    assert got.dtype == torch.float32 and got.shape == (5,)
    torch.testing.assert_close(got, beaver_by_hand(path), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("score_type", "expected"),
    [("reward", lambda s: (s - 3.0) / 2.0), ("cost", lambda s: s / 2.0), ("critic", lambda s: s)],
)
def test_the_normalizer_counts_only_when_asked_for(tmp_path, score_type, expected):
    plain = scores(load(save_beaver(tmp_path / "plain", normalizer=None)))
    ignored = save_beaver(tmp_path / "ignored", normalizer=(3.0, 4.0))
    used = save_beaver(
        tmp_path / "used",
        normalizer=(3.0, 4.0),
        config_overrides={"do_normalize": True, "score_type": score_type},
    )
    assert torch.equal(scores(load(ignored)), plain)
    torch.testing.assert_close(scores(load(used)), expected(plain))


def save_classifier(path, kind):
    sizes = dict(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=64)
    sizes |= dict(initializer_range=0.2, num_labels=1)
    small = dict(sizes, intermediate_size=64)
    torch.manual_seed(0)
    model = {
        "qwen2": lambda: Qwen2ForSequenceClassification(Qwen2Config(**small, num_key_value_heads=2)),
        "mistral": lambda: MistralForSequenceClassification(
            MistralConfig(**small, num_key_value_heads=2, head_dim=8, sliding_window=3)
        ),
        "gpt_neox": lambda: GPTNeoXForSequenceClassification(GPTNeoXConfig(**small)),
        "gpt2": lambda: GPT2ForSequenceClassification(
            GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, initializer_range=0.2, num_labels=1)
        ),
    }[kind]()
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gpt_neox", "gpt2"])
def test_sequence_classifiers_score_as_their_own_class_does(tmp_path, kind):
    path = save_sequence_classifier(tmp_path) if kind == "llama" else save_classifier(tmp_path, kind)
    reference = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        expected = torch.cat([reference(s[None]).logits[:, 0] for s in SEQUENCES if s[-1] != 0])
    got = scores(load(path))
    torch.testing.assert_close(got[[0, 1, 2, 4]], expected, rtol=1e-4, atol=1e-5)
    assert settle("the model", load(path)) == "sdpa"


def test_company_does_not_change_a_score(tmp_path):
    model = load(save_beaver(tmp_path))
    together = scores(model)
    for i, sequence in enumerate(SEQUENCES):
        torch.testing.assert_close(scores(model, [sequence])[0], together[i], rtol=1e-5, atol=1e-5)
    backwards = scores(model, SEQUENCES[::-1])
    torch.testing.assert_close(backwards.flip(0), together, rtol=1e-5, atol=1e-5)


def test_gradients_do_not_leak_between_packed_sequences(tmp_path):
    model = load(save_beaver(tmp_path))
    ids, positions, last = packed(SEQUENCES)
    embeddings = []
    model.trunk.embed_tokens.register_forward_hook(lambda _m, _i, out: embeddings.append(out) or out.retain_grad())
    model.requires_grad_(True)
    model(ids, positions, last)[2].backward()
    touched = embeddings[0].grad[0].abs().sum(-1) > 0
    assert touched.nonzero()[:, 0].tolist() == [4, 5, 6, 7]


def test_a_trunk_that_cannot_be_packed_is_refused_or_padded(tmp_path):
    torch.manual_seed(0)
    config = BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64, initializer_range=0.2)
    BloomModel(config).save_pretrained(tmp_path)
    model = ScoreModel.from_policy(str(tmp_path), dtype=torch.float32, attention=("eager",)).eval()
    with pytest.raises(InputError, match="the cost model .BloomModel. cannot be run packed.*see each other"):
        settle("the cost model", model, "eager")
    torch.nn.init.normal_(model.score_head.weight)
    leaked = scores(model)
    assert "padded rows, eager; " in settle("the cost model", model, "auto")
    alone = torch.cat([scores(model, [sequence]) for sequence in SEQUENCES])
    torch.testing.assert_close(scores(model), alone, rtol=1e-5, atol=1e-5)
    assert (leaked - alone).abs().max() > 0.1


def test_bfloat16_scores_are_computed_in_float32(tmp_path):
    path = save_beaver(tmp_path, bias=True)
    model = load(path, dtype=torch.bfloat16).bfloat16()
    got = scores(model)
    assert got.dtype == torch.float32 and not torch.equal(got, got.bfloat16().float())
    torch.testing.assert_close(got, scores(load(path)), rtol=0.05, atol=0.5)


def test_a_critic_starts_from_the_policy_with_zero_values(tmp_path):
    path = save_policy(tmp_path)
    critic = ScoreModel.from_policy(str(path), dtype=torch.float32)
    assert torch.equal(scores(critic), torch.zeros(5))
    state = load_file(path / "model.safetensors")
    for name, tensor in critic.trunk.state_dict().items():
        assert torch.equal(tensor, state[f"model.{name}"]), name
    critic(*packed(SEQUENCES)).sum().backward()
    assert critic.score_head.weight.grad.abs().sum() > 0


def test_dropout_is_off(tmp_path):
    critic = ScoreModel.from_pretrained(str(save_classifier(tmp_path, "gpt2")), dtype=torch.float32).train()
    assert torch.equal(scores(critic), scores(critic))


KINDS = {
    "beaver": ScoreModel.from_pretrained,
    # The head stays bfloat16 in a float32 model.
    "bfloat16": ScoreModel.from_pretrained,
    "classifier": ScoreModel.from_pretrained,
    "policy": ScoreModel.from_policy,
}


def scores_of_shards(folder: Path) -> dict[str, torch.Tensor]:
    """On every rank: what models loaded into shards give, by the name of their folder."""
    from repo_fast.config import EngineConfig
    from repo_fast.engine import Engine, sharded_loading, start_distributed, stop_distributed

    ranks = start_distributed()
    config = EngineConfig(zero_stage=3, parameter_persistence_threshold=0)
    given = {}
    for name, kind in KINDS.items():
        with sharded_loading(config, ranks.device):
            model = kind(str(folder / name), dtype=torch.float32)
        assert model.trunk.embed_tokens.weight.numel() == 0
        engine = Engine(model, config, ranks)
        settle(name, engine)
        given[name] = scores(engine)
        if name == "policy":
            ids, positions, _ = packed(SEQUENCES)
            with torch.no_grad():
                given[name] = model.trunk(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    stop_distributed()
    return given


def test_loading_under_zero3_is_exact(tmp_path):
    """On two ranks, every parameter sharded: an empty or freshly drawn one would move the scores."""
    save_beaver(tmp_path / "beaver", bias=True, shards=2)
    save_beaver(tmp_path / "bfloat16", bias=True, dtype=torch.bfloat16)
    save_sequence_classifier(tmp_path / "classifier")
    save_policy(tmp_path / "policy")
    expected = {name: scores(load(tmp_path / name)) for name in KINDS if name != "policy"}
    # A zero head says nothing of the trunk.
    trunk = ScoreModel.from_policy(str(tmp_path / "policy"), dtype=torch.float32).eval().trunk
    ids, positions, _ = packed(SEQUENCES)
    with torch.no_grad():
        expected["policy"] = trunk(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    for given in on_ranks(2, "tests.models.test_score_model:scores_of_shards", tmp_path):
        assert given.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(given[name], expected[name], rtol=1e-5, atol=1e-5)
