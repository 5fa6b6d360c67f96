"""Score models give the numbers of their checkpoints, packed in any company, or say why they cannot be used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
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
from repo_fast.models.score_model import ScoreModel
from repo_fast.models.trunk import check_packing
from tests.tiny import save_beaver, save_policy, save_sequence_classifier

CPU = torch.device("cpu")
SEQUENCES = [torch.tensor(ids) for ids in ([1, 12, 13], [7], [1, 9, 8, 2], [5, 5, 5, 5, 5, 5, 0], [2, 2])]


def reading_last(model):
    """A model as `check_packing` runs it: scored at the end of its row of six tokens."""
    return lambda ids, positions: model(ids, positions, torch.tensor([5]))


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


@pytest.mark.parametrize(("shards", "suffix"), [(3, "safetensors"), (1, "bin"), (3, "bin")])
def test_every_kind_of_weight_file(tmp_path, shards, suffix):
    reference = load(save_beaver(tmp_path / "one", bias=True))
    other = load(save_beaver(tmp_path / "other", bias=True, shards=shards, suffix=suffix))
    assert torch.equal(scores(other), scores(reference))


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
    check_packing(reading_last(load(path)), "the model", CPU)


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


def test_a_trunk_that_cannot_be_packed_is_refused():
    torch.manual_seed(0)
    config = BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64, initializer_range=0.2)

    class IgnoresPositions(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bloom = BloomModel(config)

        def forward(self, input_ids, position_ids, attention_mask, use_cache):
            return self.bloom(input_ids=input_ids, use_cache=False)

    with pytest.raises(InputError, match="the cost model cannot be run packed"):
        check_packing(reading_last(ScoreModel(IgnoresPositions(), torch.randn(1, 32)).eval()), "the cost model", CPU)


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


def edit_config(path, **values):
    file = Path(path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return path


def edit_weights(path, *, without):
    file = Path(path) / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != without}, file, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: edit_weights(save_beaver(p), without="score_head.weight"), "no score head"),
        (lambda p: edit_weights(save_sequence_classifier(p), without="score.weight"), "no score head"),
        (lambda p: edit_weights(save_beaver(p), without="model.norm.weight"), "lacks 1 weights.*norm.weight"),
        (lambda p: save_beaver(p, config_overrides={"bias": True}), "no score_head.bias"),
        (lambda p: save_beaver(p, config_overrides={"score_dim": 2}), "score_dim 2, expected 1"),
        (lambda p: save_beaver(p, config_overrides={"hidden_size": 64}), "shape .1, 32., expected .1, 64."),
        (lambda p: save_beaver(p, config_overrides={"intermediate_size": 8}), "cannot be loaded"),
        (lambda p: save_sequence_classifier(p, num_labels=3), "num_labels 3, expected 1"),
        (lambda p: save_policy(p), "'LlamaForCausalLM', expected a score model: LlamaForScore"),
        (lambda p: edit_config(save_beaver(p), architectures=None), "architecture 'none'"),
        (lambda p: edit_config(save_beaver(p), model_type="no-such"), "no-such"),
        (lambda p: save_beaver(p, normalizer=None, config_overrides={"do_normalize": True}), "no normalizer.mean"),
        (
            lambda p: save_beaver(p, config_overrides={"do_normalize": True, "score_type": "fun"}),
            "score_type 'fun', expected one of reward",
        ),
    ],
)
def test_folders_that_are_no_score_model(tmp_path, make, message):
    with pytest.raises(InputError, match=message) as caught:
        load(make(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_weight_files_that_cannot_be_read(tmp_path):
    path = save_beaver(tmp_path / "a")
    (path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="has no weights, expected model.safetensors or"):
        load(path)
    (path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        load(path)
    path = save_beaver(tmp_path / "b", shards=2)
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be (read|loaded)"):
        load(path)


class Danger:
    def __reduce__(self):
        return (open, ("pickled_code_ran", "w"))


def test_pickled_code_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save_beaver(tmp_path / "model", suffix="bin")
    torch.save({"score_head.weight": Danger()}, path / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read"):
        load(path)
    assert not (tmp_path / "pickled_code_ran").exists()


ZERO3 = """
import sys, torch
import repo_fast.engine  # keeps DeepSpeed from compiling its all-reduce for CPUs
import deepspeed
from transformers.integrations import HfDeepSpeedConfig
from repo_fast.models.score_model import ScoreModel
from repo_fast.models.trunk import check_packing
deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "zero_optimization": {
    "stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0}}
alive = HfDeepSpeedConfig(config)
for path, out in zip(sys.argv[1::2], sys.argv[2::2]):
    kind = ScoreModel.from_policy if "policy" in path else ScoreModel.from_pretrained
    model = kind(path, dtype=torch.float32)
    sharded = model.trunk.embed_tokens.weight.numel() == 0
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    last = torch.tensor([5])
    check_packing(lambda ids, positions: engine(ids, positions, last), "model", torch.device("cpu"))
    ids, positions, last = torch.load("packed.pt")
    with torch.no_grad():
        scores = engine(ids, positions, last)
        if "policy" in path:
            scores = engine.module.trunk(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    torch.save((sharded, scores), f"{out}.{torch.distributed.get_rank()}")
torch.distributed.destroy_process_group()
"""


def test_loading_under_zero3_is_exact(tmp_path):
    """On two ranks, every parameter sharded: an empty or freshly drawn one would move the scores."""
    folders = {
        "beaver": save_beaver(tmp_path / "beaver", bias=True, shards=2),
        "classifier": save_sequence_classifier(tmp_path / "classifier"),
        "policy": save_policy(tmp_path / "policy"),
    }
    torch.save(packed(SEQUENCES), tmp_path / "packed.pt")
    (tmp_path / "zero3.py").write_text(ZERO3)
    arguments = [str(a) for name, path in folders.items() for a in (path, tmp_path / f"{name}.out")]
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(root),
        # DeepSpeed builds a small op at first use, with the ninja that is installed beside this interpreter.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "zero3.py", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for rank in range(2):
        for name in ("beaver", "classifier"):
            sharded, got = torch.load(tmp_path / f"{name}.out.{rank}")
            assert sharded, name
            torch.testing.assert_close(got, scores(load(folders[name])), rtol=1e-5, atol=1e-5)
        sharded, hidden = torch.load(tmp_path / f"policy.out.{rank}")
        ids, positions, _ = packed(SEQUENCES)
        trunk = ScoreModel.from_policy(str(folders["policy"]), dtype=torch.float32).eval().trunk
        with torch.no_grad():
            expected = trunk(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        assert sharded
        torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
