"""Score models' folders: what is written is what was read, in each layout; what cannot be used is one line."""

import ctypes
import gc
import json
import logging
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    MixtralConfig,
    MixtralForSequenceClassification,
)

from repo_fast.errors import InputError
from repo_fast.models import score_writing
from repo_fast.models.score_checkpoint import LAYOUTS
from repo_fast.models.score_model import ScoreModel
from repo_fast.models.score_writing import convert_score_model, save_score_model
from tests.job_runs import on_ranks, same_bits, snapshot
from tests.tiny import save_beaver, save_policy, save_sequence_classifier, word_tokenizer

CLASSES = {"score": "LlamaForScore", "model-for-score": "LlamaModelForScore"}
BEAVER_KEYS = {"score_type", "score_dim", "do_normalize", "bias", "score_bias"}
ROWS = [torch.tensor(ids) for ids in ([1, 12, 13], [7], [1, 9, 8, 2], [2, 2])]
DTYPES = [torch.float32, torch.bfloat16]
ACTIVE = {"do_normalize": True, "score_type": "cost"}


def load(path, dtype=torch.float32):
    return ScoreModel.from_pretrained(str(path), dtype=dtype).eval()


@torch.no_grad()
def scores(model):
    lengths = torch.tensor([len(row) for row in ROWS])
    positions = torch.cat([torch.arange(n) for n in lengths])
    return model(torch.cat(ROWS)[None], positions[None], lengths.cumsum(0) - 1)


def settings(path):
    return json.loads((Path(path) / "config.json").read_text())


def tensors(path):
    """All tensors of a folder, by name, whatever the files."""
    found = {}
    for file in sorted(Path(path).iterdir()):
        if file.suffix == ".safetensors":
            found |= load_file(file)
        elif file.suffix == ".bin":
            found |= torch.load(file, weights_only=True)
    return found


def equal_tensors(one, other):
    """Equal names, dtypes, shapes and bits."""
    one, other = tensors(one), tensors(other)
    described = [{name: (tensor.dtype, tensor.shape) for name, tensor in side.items()} for side in (one, other)]
    return described[0] == described[1] and same_bits(one, other)


def rewritten(model, folder, layout="score", score_type="reward", tokenizer=None):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokenizer = tokenizer or word_tokenizer(chat_template=False)
    save_score_model(folder, model, state, tokenizer, score_type=score_type, layout=layout)
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", CLASSES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("normalizer", "overrides"),
    [(None, {}), ((3.0, 4.0), {}), ((3.0, 4.1), ACTIVE), (None, ACTIVE)],
    ids=["none", "inactive", "active", "lost"],
)
def test_writing_a_loaded_model_gives_back_every_bit(tmp_path, dtype, layout, bias, normalizer, overrides):
    source = save_beaver(
        tmp_path / "source",
        CLASSES[layout],
        bias=bias,
        normalizer=normalizer,
        dtype=dtype,
        config_overrides=overrides,
    )
    model = load(source, dtype)
    score_type = overrides.get("score_type", "reward")
    written = rewritten(model, tmp_path / "written", layout, score_type)
    assert equal_tensors(source, written)
    before, after = settings(source), settings(written)
    keys = (BEAVER_KEYS & before.keys()) | {"architectures", "pad_token_id", "torch_dtype", "vocab_size", "model_type"}
    assert {key: after[key] for key in keys} == {key: before[key] for key in keys}
    assert BEAVER_KEYS <= after.keys()
    assert torch.equal(scores(load(written, dtype)), scores(model))
    assert AutoTokenizer.from_pretrained(written).get_vocab() == word_tokenizer().get_vocab()


def test_a_new_score_model_has_the_keys_of_safe_rlhf(tmp_path):
    policy = save_policy(tmp_path / "policy", pad_token_id=0)
    model = ScoreModel.from_policy(str(policy), dtype=torch.bfloat16)
    model.score_head.to(torch.bfloat16)
    torch.nn.init.normal_(model.score_head.weight)
    written = rewritten(model, tmp_path / "written", score_type="cost")
    trunk = {name for name in load_file(policy / "model.safetensors") if name != "lm_head.weight"}
    state = tensors(written)
    assert trunk and all(name.startswith("model.") for name in trunk)
    normalizer = {f"normalizer.{name}" for name in ("mean", "var", "count")}
    assert state.keys() == trunk | {"score_head.weight"} | normalizer
    assert state["score_head.weight"].shape == (1, 32) and state["score_head.weight"].dtype == torch.bfloat16
    assert {key: value for key, value in settings(written).items() if key in BEAVER_KEYS} == {
        "score_type": "cost",
        "score_dim": 1,
        "do_normalize": False,
        "bias": False,
        "score_bias": False,
    }
    assert settings(written)["architectures"] == ["LlamaForScore"] and settings(written)["pad_token_id"] == 0
    assert settings(written)["dtype"] == settings(written)["torch_dtype"] == "bfloat16"
    assert torch.equal(scores(load(written, torch.bfloat16)), scores(model.eval()))


def test_a_model_without_a_pad_token_takes_its_tokenizers(tmp_path):
    model = load(save_beaver(tmp_path / "source", config_overrides={"pad_token_id": None}))
    assert settings(rewritten(model, tmp_path / "written"))["pad_token_id"] == word_tokenizer().pad_token_id


def test_large_models_are_written_as_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(score_writing, "SHARD_SIZE", 20_000)
    source = save_beaver(tmp_path / "source", bias=True)
    written = rewritten(load(source), tmp_path / "written")
    index = json.loads((written / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2 and equal_tensors(source, written)
    assert torch.equal(scores(load(written)), scores(load(source)))


def save_other(path, kind):
    sizes = dict(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=64, intermediate_size=64)
    sizes |= dict(num_key_value_heads=2, head_dim=8, num_local_experts=3, initializer_range=0.2, num_labels=1)
    torch.manual_seed(0)
    if kind == "mixtral":
        MixtralForSequenceClassification(MixtralConfig(**sizes)).save_pretrained(path)
    else:
        config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, initializer_range=0.2, num_labels=1)
        GPT2ForSequenceClassification(config).save_pretrained(path)
    return path


@pytest.mark.parametrize(("kind", "prefix"), [("gpt2", "transformer."), ("mixtral", "model.")])
def test_other_architectures_keep_their_own_names(tmp_path, kind, prefix):
    """Mixtral's experts are one tensor in memory, and many in the file."""
    source = save_other(tmp_path / "source", kind)
    written = rewritten(load(source), tmp_path / "written")
    before, after = tensors(source), tensors(written)
    trunk = {name: tensor for name, tensor in before.items() if name.startswith(prefix)}
    assert len(trunk) == len(before) - 1
    assert same_bits(trunk, {name: after[name] for name in after if name.startswith(prefix)})
    assert torch.equal(scores(load(written)), scores(load(source)))
    rewritten(load(written), tmp_path / "back", "sequence-classification")
    assert equal_tensors(source, tmp_path / "back")


def transformers_scores(path):
    """What plain transformers makes of a folder, which must hold all that it wants and nothing else."""
    model, loading = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return torch.cat([model.eval()(row[None]).logits[:, 0].float() for row in ROWS])


@pytest.mark.parametrize("how", ["written", "converted"])
def test_plain_transformers_loads_the_third_layout(tmp_path, how):
    source = save_beaver(tmp_path / "source", bias=False, normalizer=(3.0, 4.0))
    target = tmp_path / "target"
    if how == "written":
        rewritten(load(source), target, "sequence-classification")
    else:
        convert_score_model(str(source), target, layout="sequence-classification")
    assert settings(target)["architectures"] == ["LlamaForSequenceClassification"]
    assert not BEAVER_KEYS & settings(target).keys()
    torch.testing.assert_close(transformers_scores(target), scores(load(source)), rtol=1e-5, atol=1e-5)
    assert torch.equal(scores(load(target)), scores(load(source)))


@pytest.mark.parametrize(("shards", "suffix"), [(3, "safetensors"), (1, "bin"), (3, "bin")])
def test_every_kind_of_weight_file(tmp_path, shards, suffix):
    reference = load(save_beaver(tmp_path / "one", bias=True))
    other = load(save_beaver(tmp_path / "other", bias=True, shards=shards, suffix=suffix))
    assert torch.equal(scores(other), scores(reference))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shards", "suffix"), [(1, "safetensors"), (3, "safetensors"), (1, "bin"), (3, "bin")])
@pytest.mark.parametrize("there", LAYOUTS)
@pytest.mark.parametrize("here", CLASSES)
def test_converting_there_and_back_gives_every_bit(tmp_path, here, there, shards, suffix, dtype):
    plain = there == "sequence-classification"
    source = save_beaver(
        tmp_path / "source",
        CLASSES[here],
        bias=not plain,
        # Hugging Face's layout loses the normalizer; what comes back is that of a model that has seen no score.
        normalizer=None if plain else (3.0, 4.1),
        shards=shards,
        suffix=suffix,
        dtype=dtype,
        config_overrides={"rope_theta": 5e5} | ({} if plain else ACTIVE),
    )
    before = snapshot(source)
    convert_score_model(str(source), tmp_path / "there", layout=there)
    convert_score_model(str(tmp_path / "there"), tmp_path / "back", layout=here, score_type="reward" if plain else None)
    assert snapshot(source) == before
    lost = {"normalizer.mean", "normalizer.var", "normalizer.count"} if plain else set()
    back = tensors(tmp_path / "back")
    assert back.keys() == tensors(source).keys() | lost
    assert same_bits(tensors(source), {name: tensor for name, tensor in back.items() if name not in lost})
    assert all(back[name].dtype == tensor.dtype for name, tensor in tensors(source).items())
    # The number of labels means something in Hugging Face's layout alone, and a bias is told under both of its keys.
    apart = ("id2label", "label2id", "bias", "score_bias")
    before, after = (
        {key: value for key, value in settings(path).items() if key not in apart}
        for path in (source, tmp_path / "back")
    )
    assert before == after
    assert settings(tmp_path / "back")["bias"] == settings(tmp_path / "back")["score_bias"] == (not plain)
    for folder in ("there", "back"):
        assert (tmp_path / folder / "model.safetensors.index.json").exists() == (shards > 1)
        assert not list((tmp_path / folder).glob("*.bin")) and not (tmp_path / f"{folder}.partial").exists()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / folder / name).read_bytes() == (source / name).read_bytes()
    assert torch.equal(scores(load(tmp_path / "there", dtype)), scores(load(source, dtype)))


def test_a_classifier_becomes_a_reward_or_cost_model_and_back(tmp_path):
    source = save_sequence_classifier(tmp_path / "source", id2label={0: "harmful"}, label2id={"harmful": 0})
    (source / "generation_config.json").write_text("{}")
    with pytest.raises(InputError, match="does not say its score type"):
        convert_score_model(str(source), tmp_path / "score", layout="score")
    convert_score_model(str(source), tmp_path / "score", layout="score", score_type="cost")
    assert {key: settings(tmp_path / "score")[key] for key in BEAVER_KEYS - {"score_bias"}} == {
        "score_type": "cost",
        "score_dim": 1,
        "do_normalize": False,
        "bias": False,
    }
    assert torch.equal(scores(load(tmp_path / "score")), scores(load(source)))
    convert_score_model(str(tmp_path / "score"), tmp_path / "back", layout="sequence-classification")
    assert equal_tensors(source, tmp_path / "back") and settings(source) == settings(tmp_path / "back")
    names = {path.name for path in source.iterdir()}
    assert names == {path.name for path in (tmp_path / "back").iterdir()} and "chat_template.jinja" in names


def test_the_index_counts_what_is_in_the_files(tmp_path):
    source = save_beaver(tmp_path / "source", shards=3)
    convert_score_model(str(source), tmp_path / "target", layout="sequence-classification")
    index = json.loads((tmp_path / "target" / "model.safetensors.index.json").read_text())
    state = tensors(tmp_path / "target")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    assert {name: load_file(tmp_path / "target" / file)[name].shape for name, file in index["weight_map"].items()} == {
        name: tensor.shape for name, tensor in state.items()
    }


def test_a_left_over_half_conversion_is_replaced(tmp_path):
    source = save_beaver(tmp_path / "source")
    (tmp_path / "target.partial").mkdir()
    (tmp_path / "target.partial" / "old").write_text("")
    (tmp_path / "target").mkdir()
    convert_score_model(str(source), tmp_path / "target", layout="model-for-score")
    assert not (tmp_path / "target.partial").exists() and not (tmp_path / "target" / "old").exists()
    assert equal_tensors(source, tmp_path / "target")


def full(path):
    path.mkdir()
    (path / "precious").write_text("")


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (save_policy, {}, "no score head: its architecture is 'LlamaForCausalLM', expected a score model"),
        (save_beaver, {"layout": "beaver"}, "layout is 'beaver', expected one of score, model-for-score, sequence-c"),
        (save_beaver, {"score_type": "fun"}, "score_type is 'fun', expected one of reward, cost, critic"),
        (
            save_beaver,
            {"layout": "sequence-classification", "score_type": "cost"},
            "score_type is 'cost', expected none: the layout sequence-classification cannot hold one",
        ),
        (
            lambda p: save_beaver(p, bias=True),
            {"layout": "sequence-classification"},
            "a score head with a bias, which the layout sequence-classification cannot hold",
        ),
        (
            lambda p: save_beaver(p, config_overrides=ACTIVE, normalizer=(0.0, 2.0)),
            {"layout": "sequence-classification"},
            "has do_normalize, which the layout sequence-classification cannot hold",
        ),
        (
            lambda p: save_beaver(p, config_overrides=ACTIVE),
            {"score_type": "reward"},
            "do_normalize as a cost model: with score type 'reward' the same normalizer would give other scores",
        ),
        (
            lambda p: edit_config(save_beaver(p), architectures=["UnheardForScore"]),
            {"layout": "sequence-classification"},
            "transformers has no UnheardForSequenceClassification for 'llama'",
        ),
        (lambda p: point_outside(save_beaver(p, shards=2)), {}, "names '../elsewhere.safetensors', expected a file of"),
        (lambda p: save_beaver(p) and full(p.parent / "target") or p, {}, "target'? exists, expected a new or empty"),
        (lambda p: save_beaver(p) and (p.parent / "target").write_text("") or p, {}, "exists, expected a new or emp"),
    ],
)
def test_conversions_that_are_refused(tmp_path, make, options, message):
    source = make(tmp_path / "source")
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        convert_score_model(str(source), tmp_path / "target", **{"layout": "model-for-score"} | options)
    assert "\n" not in str(caught.value) and snapshot(tmp_path) == before


def test_a_target_that_cannot_be_made_is_one_line(tmp_path):
    source = save_beaver(tmp_path / "source")
    with pytest.raises(InputError, match="config.json/target' cannot be written: Not a directory"):
        convert_score_model(str(source), source / "config.json" / "target", layout="model-for-score")


def test_a_bias_of_zero_is_no_bias(tmp_path):
    source = save_beaver(tmp_path / "source", bias=True)
    state = load_file(source / "model.safetensors")
    state["score_head.bias"].zero_()
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    convert_score_model(str(source), tmp_path / "target", layout="sequence-classification")
    torch.testing.assert_close(transformers_scores(tmp_path / "target"), scores(load(source)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["nothing", "sequence-classification"])
def test_models_that_a_layout_cannot_hold_are_not_written(tmp_path, layout):
    model = load(save_beaver(tmp_path / "source", bias=True))
    with pytest.raises(InputError, match="layout"):
        rewritten(model, tmp_path / "written", layout)
    normalized = load(save_beaver(tmp_path / "normalized", config_overrides=ACTIVE))
    with pytest.raises(InputError, match="would give other scores"):
        rewritten(normalized, tmp_path / "written", score_type="reward")
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config_overrides": {"bias": True}}, "says that its score head has a bias, but has none: loaded without"),
        ({"config_overrides": {"score_bias": True}, "layout": "LlamaModelForScore"}, "but has none: loaded without"),
        ({"config_overrides": ACTIVE, "normalizer": None}, "no normalizer.mean and .var: scores are not normalised"),
    ],
)
def test_what_a_checkpoint_may_lack_is_a_warning(tmp_path, caplog, options, message):
    plain = load(save_beaver(tmp_path / "plain"))
    with caplog.at_level(logging.WARNING, "repo_fast"):
        model = load(save_beaver(tmp_path / "source", **options))
    assert [message in record.getMessage() for record in caplog.records if record.name.startswith("repo_fast")] == [
        True
    ]
    assert torch.equal(scores(model), scores(plain))


def edit_config(path, **values):
    (path / "config.json").write_text(json.dumps(settings(path) | values))
    return path


def edit_weights(path, *, without):
    file = Path(path) / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != without}, file, metadata={"format": "pt"})
    return path


def point_outside(path):
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["score_head.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    return path


def odd_normalizer(path):
    save_beaver(path, config_overrides=ACTIVE)
    state = load_file(path / "model.safetensors") | {"normalizer.var": torch.ones(2)}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: edit_weights(save_beaver(p), without="score_head.weight"), "no score head"),
        (lambda p: edit_weights(save_sequence_classifier(p), without="score.weight"), "no score head"),
        (lambda p: edit_weights(save_beaver(p), without="model.norm.weight"), "lacks 1 weights.*norm.weight"),
        (lambda p: save_beaver(p, config_overrides={"score_dim": 2}), "shape .1, 32., expected .2, 32."),
        (lambda p: save_beaver(p, config_overrides={"hidden_size": 64}), "shape .1, 32., expected .1, 64."),
        (lambda p: save_beaver(p, config_overrides={"intermediate_size": 8}), "cannot be loaded"),
        (lambda p: save_policy(p), "'LlamaForCausalLM', expected a score model: LlamaForScore"),
        (lambda p: edit_config(save_beaver(p), architectures=None), "architecture is 'none'"),
        (lambda p: edit_config(save_beaver(p), model_type="no-such"), "no-such"),
        (lambda p: point_outside(save_beaver(p, shards=2)), "names '../elsewhere.safetensors'"),
        (odd_normalizer, "normalizer.var of shape .2., expected .1."),
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
    with pytest.raises(InputError, match="cannot be read"):
        convert_score_model(str(path), tmp_path / "target", layout="model-for-score")
    assert not (tmp_path / "pickled_code_ran").exists()


class PeakMemory:
    """The largest growth of this process's private memory while it is open (bytes).

    Pages of a mapped file are not part of it: the system shares them between ranks and drops them when it needs room.
    """

    def __enter__(self):
        gc.collect()
        self._start, self._done, self.growth = self._now(), threading.Event(), 0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def _watch(self):
        while not self._done.wait(0.001):
            self.growth = max(self.growth, self._now() - self._start)

    def _now(self):
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024


def load_sharded(folder: Path) -> dict:
    """On every rank: load a small model, then the large one; score with it, and write it."""
    from repo_fast.config import EngineConfig
    from repo_fast.engine import Engine, sharded_loading, start_distributed, stop_distributed

    # Freed memory goes back to the system at once, so that what a rank has is what it holds. -3 is M_MMAP_THRESHOLD.
    ctypes.CDLL(None).mallopt(-3, 65536)
    ranks = start_distributed()
    config = EngineConfig(zero_stage=3, parameter_persistence_threshold=0)

    def sharded(path):
        with sharded_loading(config, ranks.device):
            return load(path)

    # What a first load imports and builds is no part of the measurement.
    sharded(folder / "small")
    result = {}
    for name in ("safetensors", "bin"):
        with PeakMemory() as memory:
            model = sharded(folder / name)
        here = sum(parameter.numel() + parameter.ds_tensor.numel() for parameter in model.trunk.parameters())
        result[name] = {"growth": memory.growth, "bytes": 4 * here}
    engine = Engine(model, config, ranks)
    result["scores"] = scores(engine)
    state = engine.whole_state()
    if ranks.is_first:
        save_score_model(folder / "written", model, state, word_tokenizer(), score_type="reward")
    stop_distributed()
    return result


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_zero3_loads_without_a_whole_copy_on_any_rank(tmp_path):
    sizes = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8)
    save_beaver(tmp_path / "small")
    for suffix in ("safetensors", "bin"):
        save_beaver(tmp_path / suffix, bias=True, shards=6, suffix=suffix, dtype=torch.float32, **sizes)
    trunk = sum(tensor.nbytes for name, tensor in tensors(tmp_path / "bin").items() if name.startswith("model."))
    assert trunk > 100e6
    whole = scores(load(tmp_path / "bin"))
    results = on_ranks(2, "tests.models.test_score_checkpoint:load_sharded", tmp_path)
    for result in results:
        for suffix in ("safetensors", "bin"):
            assert result[suffix]["bytes"] == pytest.approx(trunk / 2, rel=0.01)
            # Its half, one parameter whole, and 8 MB of other things.
            assert result[suffix]["growth"] < 0.75 * trunk, result
        torch.testing.assert_close(result["scores"], whole, rtol=1e-4, atol=1e-4)
    assert equal_tensors(tmp_path / "safetensors", tmp_path / "written")


@pytest.mark.parametrize("layout", CLASSES)
@pytest.mark.parametrize("bias", [False, True])
def test_both_keys_of_safe_rlhf_say_whether_there_is_a_bias(tmp_path, layout, bias):
    """Its releases read `bias` or `score_bias`, and take what is missing for another answer."""
    model = load(save_beaver(tmp_path / "source", bias=bias))
    written = settings(rewritten(model, tmp_path / "written", layout))
    convert_score_model(str(tmp_path / "source"), tmp_path / "converted", layout=layout)
    for found in (written, settings(tmp_path / "converted")):
        assert (found["bias"], found["score_bias"]) == (bias, bias)


def test_a_normalizer_that_only_the_configuration_has_is_used(tmp_path):
    plain = load(save_beaver(tmp_path / "plain", normalizer=None))
    keys = {"do_normalize": True, "score_type": "reward", "mean": [3.0], "var": [4.0]}
    normalized = load(save_beaver(tmp_path / "normalized", normalizer=None, config_overrides=keys))
    torch.testing.assert_close(scores(normalized), (scores(plain) - 3) / 2)


def test_transformers_4_finds_the_base_of_the_rotary_embedding(tmp_path):
    rope = {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}
    model = load(save_beaver(tmp_path / "source", config_overrides=rope))
    assert settings(rewritten(model, tmp_path / "written"))["rope_theta"] == 500000.0
