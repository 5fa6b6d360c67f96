"""Folders of adapters: what is in them, that they score as the merged folder does, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from repo_fast.errors import InputError
from repo_fast.models.adapters import Base, is_adapter, merge_adapter, put_adapter, read_adapter
from repo_fast.models.lora import add_lora, describe, has_adapters, merged_state
from repo_fast.models.policy import Policy
from repo_fast.models.score_checkpoint import ScoreCheckpoint, output_names, read_settings
from repo_fast.models.score_model import ScoreModel
from repo_fast.models.score_writing import convert_score_model, save_score_model
from repo_fast.models.vocabulary import fit_vocabulary
from repo_fast.models.weight_files import Checkpoint
from tests.job_runs import same_bits, snapshot
from tests.tiny import save_beaver, save_policy, save_sequence_classifier, word_tokenizer

READ = torch.tensor([[1, 7, 9, 11, 20, 4, 2]])
HEADS = {"violence": {"categories": ["Violence"], "severity": 2}, "any": {"categories": None, "severity": 1}}


@torch.no_grad()
def scores(model: nn.Module) -> torch.Tensor:
    """At every token: [7], of K heads [7, K]."""
    return model(READ, torch.arange(READ.shape[1])[None], torch.arange(READ.shape[1]))


@torch.no_grad()
def drawn_anew(module: nn.Module, seed: int) -> None:
    """What is trained, away from where it started."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.1)


def write(folder: Path, start: Path, kind: str = "cost", **settings) -> Path:
    """A score model trained with adapters on `start`; returns its `adapter/`, beside which the merged model is.

    Args:
        settings: `dtype`, `heads`, `layout`, `quantize`, `seed`, and `pad_token` and `multiple` of the vocabulary.
    """
    dtype, heads = settings.get("dtype", torch.float32), settings.get("heads", {})
    if (json.loads((start / "config.json").read_text())["architectures"][0]).endswith("CausalLM"):
        model = ScoreModel.from_policy(str(start), dtype=dtype, names=tuple(heads), quantize=settings.get("quantize"))
    else:
        model = ScoreModel.from_pretrained(str(start), dtype=dtype)
    model.score_head.to(dtype)
    tokenizer = AutoTokenizer.from_pretrained(start)
    fit_vocabulary(model.trunk, tokenizer, pad_token=settings.get("pad_token"), multiple=settings.get("multiple", 1))
    add_lora(model.trunk, rank=3, alpha=6.0)
    drawn_anew(model, settings.get("seed", 1))
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    packed = {f"{name}.weight": layer for name, layer in model.named_modules() if hasattr(layer, "unpacked")}
    save_score_model(
        folder,
        model,
        state | {name: layer.unpacked(layer.weight) for name, layer in packed.items()},
        tokenizer,
        score_type=kind,  # type: ignore[arg-type]
        layout=settings.get("layout", "score"),
        heads=heads,
        base=Base.of(str(start)),
    )
    return folder / "adapter"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`policy/`, and `cost/` with `cost/adapter/`, trained on it."""
    folder = tmp_path_factory.mktemp("adapters")
    write(folder / "cost", save_policy(folder / "policy"), heads=HEADS)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy of `adapter/`, to spoil."""
    return shutil.copytree(written / "cost" / "adapter", tmp_path / "adapter")


def load(path: Path, dtype: torch.dtype = torch.float32, **options) -> ScoreModel:
    return ScoreModel.from_pretrained(str(path), dtype=dtype, **options)


def said(path: Path) -> str:
    """The error line of loading it."""
    with pytest.raises(InputError) as error:
        load(path)
    return str(error.value)


def settings(folder: Path, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --------------------------------------------------------------------------------------------------- as the merged one


@pytest.mark.parametrize(
    ("start", "options"),
    [
        ("policy", {}),
        ("policy", {"heads": HEADS}),
        ("policy", {"heads": HEADS, "layout": "sequence-classification"}),
        ("policy", {"layout": "model-for-score"}),
        ("policy", {"pad_token": "<pad2>", "multiple": 8}),
        ("beaver", {"kind": "reward"}),
        ("classifier", {}),
    ],
    ids=["one head", "heads", "classifier's layout", "older layout", "more rows", "normalised, a bias", "classifier"],
)
def test_it_scores_as_the_merged_model_to_the_last_bit(tmp_path: Path, start: str, options: dict) -> None:
    if start == "policy":
        path = save_policy(tmp_path / start, word_tokenizer(pad_token=None))
    elif start == "beaver":
        overrides = {"do_normalize": True}
        path = save_beaver(tmp_path / start, bias=True, normalizer=(0.7, 2.3), config_overrides=overrides)
    else:
        path = save_sequence_classifier(tmp_path / start)
    adapter = write(tmp_path / "model", path, **options)
    assert is_adapter(str(adapter)) and not is_adapter(str(tmp_path / "model"))
    states = []
    for path in (adapter, tmp_path / "model"):
        torch.manual_seed(0)
        load(path)
        states.append(torch.random.get_rng_state())
    assert torch.equal(*states)
    ours, merged = load(adapter), load(tmp_path / "model")
    assert same_bits(dict(ours.state_dict()), dict(merged.state_dict()))
    assert torch.equal(scores(ours), scores(merged)) and scores(ours).std() > 0.1
    assert not has_adapters(ours) and all(parameter.requires_grad for parameter in ours.parameters())
    assert ours.trunk.config.vocab_size == merged.trunk.config.vocab_size
    # All that the folder says beside its weights.
    assert read_settings(str(adapter)) == read_settings(str(tmp_path / "model"))
    assert ours.normalization == merged.normalization and ours.format.names == merged.format.names
    files = {file.name for file in (tmp_path / "model").iterdir()} - {"model.safetensors", "adapter"}
    for file in files:
        assert (adapter / file).read_bytes() == (tmp_path / "model" / file).read_bytes(), file
    own = {"adapter_config.json", "adapter_model.safetensors", "score_head.safetensors"}
    assert {file.name for file in adapter.iterdir()} - files <= own | {"README.md"}


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_in_bfloat16(tmp_path: Path, kept: torch.dtype) -> None:
    """In the dtype of its training, whatever its base is kept in, it is the merged model to the bit; in another, both
    are rounded in different places."""
    start = save_policy(tmp_path / "policy")
    LlamaForCausalLM.from_pretrained(start, dtype=kept).save_pretrained(start)
    for trained, used, exact in (
        (torch.bfloat16, torch.bfloat16, True),
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.float32, False),
        (torch.float32, torch.bfloat16, kept == torch.bfloat16),
    ):
        adapter = write(tmp_path / f"{trained} {used}", start, dtype=trained)
        ours, merged = (scores(load(path, used)) for path in (adapter, adapter.parent))
        gap = (ours - merged).abs().max() / merged.std()
        assert gap == 0 if exact else 0 < gap < 0.1, (trained, used)


def test_the_heads_are_the_merged_models(written: Path) -> None:
    path = str(written / "cost" / "adapter")
    assert output_names(path) == tuple(HEADS) and read_settings(path)["score_heads"] == HEADS
    checkpoint, merged = ScoreCheckpoint(path), ScoreCheckpoint(str(written / "cost"))
    assert torch.equal(checkpoint.head()[0], merged.head()[0])
    assert checkpoint.format().normalizer.keys() == merged.format().normalizer.keys() != set()


# ------------------------------------------------------------------------------------------------- beside the weights

# Between adapters that are merged and those that stand beside: in bfloat16 what they add is summed after rounding.
BESIDE = {torch.float32: 1e-5, torch.bfloat16: 0.15}


def gap(ours: ScoreModel, merged: ScoreModel) -> float:
    return float((scores(ours) - scores(merged)).abs().max() / scores(merged).std())


@pytest.mark.parametrize("dtype", BESIDE)
def test_beside_the_weights_of_the_base(written: Path, dtype: torch.dtype) -> None:
    path, states = written / "cost" / "adapter", []
    for merge in (True, False):
        torch.manual_seed(0)
        ours = load(path, dtype, merge=merge)
        states.append(torch.random.get_rng_state())
    assert torch.equal(*states)
    assert gap(ours, load(path, dtype)) < BESIDE[dtype]
    base = load_file(written / "policy" / "model.safetensors")
    held = {name.replace(".base_layer.", "."): p for name, p in ours.trunk.named_parameters() if ".lora_" not in name}
    assert all(torch.equal(p, base[f"model.{name}"].to(dtype)) for name, p in held.items()) and held
    added = [p for name, p in ours.trunk.named_parameters() if ".lora_" in name]
    assert len(added) == 2 * 14 and all(p.dtype == dtype for p in added)
    assert not any(p.requires_grad for p in ours.trunk.parameters()) and not has_adapters(ours)


@pytest.mark.parametrize("targets", [(), ("q_proj", "up_proj")])
def test_what_is_trained_is_added_to_them(written: Path, targets: tuple[str, ...]) -> None:
    """A critic's start: its own adapters see what the merged model is, and leave the others as they are."""
    path = written / "cost" / "adapter"
    ours, merged = load(path, merge=False), load(path)
    frozen = {name: p.clone() for name, p in ours.trunk.named_parameters() if ".frozen." in name}
    for model in (ours, merged):
        torch.manual_seed(3)
        add_lora(model.trunk, rank=2, alpha=4.0, targets=targets)
    assert gap(ours, merged) < 1e-5
    trained = [{name: p for name, p in m.trunk.named_parameters() if p.requires_grad} for m in (ours, merged)]
    assert trained[0].keys() == trained[1].keys() and all(".default." in name for name in trained[0])
    assert len(trained[0]) == 2 * (4 if targets else 14)
    assert describe(ours).startswith(f"LoRA rank 2 on {len(trained[0]) // 2} layers")
    before = scores(ours)
    for model in (ours, merged):
        drawn_anew(model.trunk, 4)
        model(READ, torch.arange(7)[None], torch.arange(7)).sum().backward()
    assert gap(ours, merged) < 1e-5 and (scores(ours) - before).abs().max() > 0.1
    for name, parameter in trained[0].items():
        torch.testing.assert_close(parameter.grad, trained[1][name].grad, rtol=1e-4, atol=1e-5)
    after = dict(ours.trunk.named_parameters())
    assert len(frozen) == 2 * 14
    assert all(torch.equal(after[name], value) and not after[name].requires_grad for name, value in frozen.items())
    with pytest.raises(ValueError, match="frozen adapters, which are not merged"):
        merged_state(ours, dict(ours.state_dict()))


def test_beside_a_base_in_4_bits(written: Path) -> None:
    """Those of a plain base, at its price; what was trained there is nowhere else what it is."""
    plain = written / "cost" / "adapter"
    ours, full = load(plain, quantize="nf4"), load(plain)
    assert 0.01 < gap(ours, full) < 3
    names = [name for name, layer in ours.trunk.named_modules() if hasattr(layer, "unpacked")]
    assert len(names) == 14 and all(name.endswith(".base_layer") for name in names)
    # The same on the numbers that the 4 bits stand for.
    by_hand = load(plain, merge=False)
    for name in names:
        layer = ours.trunk.get_submodule(name)
        by_hand.trunk.get_submodule(name).weight.data.copy_(layer.unpacked(layer.weight))
    assert torch.equal(scores(ours), scores(by_hand))


def test_trained_beside_a_base_in_4_bits(written: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "model", written / "policy", quantize="nf4")
    # Merged, dequantised, and as it was trained.
    assert gap(load(adapter, quantize="nf4"), load(adapter.parent)) < 1e-5
    assert said(adapter) == (
        f"{str(adapter)!r} was trained beside its base in 4 bits, and quantize is None, expected 'nf4', or the folder "
        "of the merged model"
    )


# ----------------------------------------------------------------------------------------------------------- the base


def test_a_base_that_has_changed_is_refused(tmp_path: Path) -> None:
    """One bit of one weight."""
    start = save_policy(tmp_path / "policy")
    adapter = write(tmp_path / "cost", start)
    right = scores(load(adapter))
    state = load_file(start / "model.safetensors")
    state["model.norm.weight"].view(torch.int32)[3] ^= 1
    save_file(state, start / "model.safetensors", metadata={"format": "pt"})
    message = said(adapter)
    assert message.startswith(f"{str(adapter)!r} was trained on other weights than its base {str(start)!r} has: finger")
    state["model.norm.weight"].view(torch.int32)[3] ^= 1
    save_file(state, start / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(scores(load(adapter)), right)


def test_a_base_that_was_moved(folder: Path, written: Path, tmp_path: Path) -> None:
    right = scores(load(folder))
    missing = str(tmp_path / "moved")
    settings(folder, base_model_name_or_path=missing)
    message = said(folder)
    assert message.startswith(f"{str(folder)!r} needs its base {missing!r}: ") and "\n" not in message
    assert message.endswith("another path of it may be named as base_model_name_or_path in adapter_config.json")
    # In other files and under another name it is the same.
    model = LlamaForCausalLM.from_pretrained(written / "policy")
    model.save_pretrained(missing, max_shard_size="40KB")
    assert len(list(Path(missing).glob("*.safetensors"))) > 1
    assert torch.equal(scores(load(folder)), right)


def test_its_own_configuration_counts_and_not_the_bases(folder: Path, written: Path, tmp_path: Path) -> None:
    """The fingerprint is of weights: a base whose `config.json` was edited is loaded under the adapters' own."""
    right = scores(load(folder))
    base = shutil.copytree(written / "policy", tmp_path / "base")
    LlamaConfig.from_pretrained(base, rms_norm_eps=0.5).save_pretrained(base)
    settings(folder, base_model_name_or_path=str(base))
    assert torch.equal(scores(load(folder)), right)


def test_a_fingerprint_is_of_names_types_shapes_and_bits(tmp_path: Path) -> None:
    def of(**tensors: torch.Tensor) -> str:
        save_file(tensors, tmp_path / "model.safetensors")
        return Checkpoint(str(tmp_path)).fingerprint()

    a, b = torch.arange(6.0), torch.ones(2)
    first = of(a=a, b=b)
    others = [of(a=a, c=b), of(a=b, b=a), of(a=a.reshape(2, 3), b=b), of(a=a.int(), b=b), of(a=a, b=-b), of(a=a)]
    assert len({first, *others}) == 7 and of(b=b, a=a) == first
    (tmp_path / "model.safetensors").unlink()
    torch.save({"a": a, "b": b}, tmp_path / "pytorch_model.bin")
    assert Checkpoint(str(tmp_path)).fingerprint() == first


def test_a_relative_base_is_noted_as_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_policy(tmp_path / "policy")
    monkeypatch.chdir(tmp_path)
    assert Base.of("policy").path == str(tmp_path / "policy")


# ----------------------------------------------------------------------------------------------------------- refusals


def without_fingerprint(folder: Path) -> None:
    """As earlier versions wrote it, with a configuration beside."""
    save_file(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors")


def one_tensor(change: Callable[[dict[str, torch.Tensor], str], None]) -> Callable[[Path], None]:
    """Change the tensors, told one's name."""

    def spoil(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        change(tensors, sorted(tensors)[0])
        save_file(tensors, file, metadata=metadata)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (
            lambda folder: (folder / "score_head.safetensors").unlink(),
            "has adapters and no score head, expected one",
        ),
        (
            lambda folder: save_file({"x": torch.ones(1)}, folder / "score_head.safetensors"),
            "has no score head: there is no score_head.weight among its weights",
        ),
        (
            lambda folder: save_file({"score_head.weight": torch.ones(1, 32)}, folder / "score_head.safetensors"),
            "has score_head.weight of shape [1, 32], expected [2, 32]",
        ),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors, expected"),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"no"),
            "the adapter_model.safetensors of",
        ),
        (
            lambda folder: (folder / "config.json").unlink(),
            "holds adapters without a config.json, as policies",
        ),
        (without_fingerprint, "lacks base_fingerprint, which says what weights it was trained on"),
        (
            lambda folder: settings(folder, modules_to_save=["score"]),
            "have modules_to_save ['score'], expected plain",
        ),
        (lambda folder: settings(folder, use_rslora=True), "have use_rslora True, expected plain LoRA"),
        (
            lambda folder: settings(folder, rank_pattern={"q_proj": 2}),
            "have rank_pattern {'q_proj': 2}, expected",
        ),
        (lambda folder: settings(folder, bias="all"), "have bias 'all', expected plain LoRA"),
        (lambda folder: settings(folder, peft_type="IA3"), "has peft_type 'IA3', r 3, lora_alpha 6.0, base_model"),
        (lambda folder: settings(folder, r=0), "r 0, lora_alpha 6.0"),
        (lambda folder: settings(folder, r=4), "expected A [4, in] and B [out, 4]"),
        (lambda folder: settings(folder, base_model_name_or_path=None), "base_model_name_or_path None, expected LORA"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "cannot be read: it is no mapping"),
        (one_tensor(lambda tensors, name: tensors.pop(name)), "has {'B': [32, 3]}, expected A [3, in] and B [out, 3]"),
        (one_tensor(lambda tensors, name: tensors.update(other=torch.ones(1))), "has other, expected LoRA matrices"),
        (
            one_tensor(lambda tensors, name: tensors.update({name: torch.ones(3, 8)})),
            "in LlamaModel its weight is of shape [32, 64], expected [32, 8]",
        ),
    ],
)
def test_refused_in_one_line(folder: Path, spoil: Callable[[Path], None], expected: str) -> None:
    spoil(folder)
    message = said(folder)
    assert expected in message and str(folder) in message and "\n" not in message


def test_adapters_of_another_architectures_layers(folder: Path, tmp_path: Path) -> None:
    shallow = Policy.from_pretrained(
        str(save_policy(tmp_path / "shallow", num_hidden_layers=1)), dtype=torch.float32, attention="sdpa"
    )
    adapter = read_adapter(str(folder))
    for use in (merge_adapter, put_adapter):
        before = snapshot(tmp_path)
        with pytest.raises(InputError, match=r"an adapter of layers\.1\.\S+: in LlamaModel there is no such"):
            use(shallow.model.model, adapter)
        assert not has_adapters(shallow) and snapshot(tmp_path) == before


def test_it_cannot_be_converted(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds adapters, expected the folder of the merged model"):
        convert_score_model(str(folder), tmp_path / "converted", layout="model-for-score")
    assert not (tmp_path / "converted").exists()


def test_adapters_beside_whole_weights_are_refused(folder: Path, written: Path) -> None:
    shutil.copy(written / "cost" / "model.safetensors", folder)
    assert "holds an adapter beside its weights, expected a model that it is merged into" in said(folder)
