"""A vocabulary that has grown trains, survives saving and loading, and gives the tokens it had the same logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from repo_fast.config import EngineConfig, OptimizerConfig
from repo_fast.engine import Engine, sharded_loading, start_distributed, stop_distributed
from repo_fast.errors import InputError
from repo_fast.models import policy as policies
from repo_fast.models.loss_head import LossHead, Projection
from repo_fast.models.policy import Policy
from repo_fast.models.score_model import ScoreModel
from repo_fast.models.vocabulary import fit_vocabulary, never_drawn
from repo_fast.ops import linear_log_probs
from repo_fast.packing.rows import PackedBatch, pack
from tests.job_runs import on_ranks, same_bits
from tests.tiny import EOS, PAD, UNKNOWN, save_policy, word_tokenizer

CPU = torch.device("cpu")
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup=0.0, gradient_clip=1e9)
NEW = "<filling>"
# The tokenizer's words, a row each: a pad token needs one more, and a multiple of 16 some beside.
ROWS, FITTED = 28, 32
LEARNED = [([3, 9, 14], [15, 16, 17, 2]), ([5, 8, ROWS], [20, 9])]


def load(path: Path | str, dtype: torch.dtype = torch.float32) -> Policy:
    return Policy.from_pretrained(str(path), dtype=dtype, attention="sdpa")


def batch(rank: int, ranks: int) -> PackedBatch:
    prompts, responses = zip(*LEARNED[rank::ranks], strict=True)
    return pack([torch.tensor(p) for p in prompts], [torch.tensor(r) for r in responses], CPU)


def negative_log_likelihood(hidden: torch.Tensor, projection: Projection, packed: PackedBatch) -> torch.Tensor:
    return -linear_log_probs(hidden, projection.weight, packed.targets).sum()


def fit(model: nn.Module, tokenizer, multiple: int = 16, pad_token: str | None = NEW) -> bool:
    return fit_vocabulary(model, tokenizer, pad_token=pad_token, multiple=multiple)


def sizes(model: nn.Module) -> set[int]:
    """All places that say how many rows there are."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = {model.config.vocab_size, model.vocab_size, model.base_model.vocab_size, embedding.num_embeddings}
    found.add(embedding.weight.shape[0])
    return found if head is None else found | {head.out_features, head.weight.shape[0]}


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def folder(tmp_path: Path, tied: bool) -> Path:
    """A policy whose tokenizer has no pad token."""
    return save_policy(tmp_path / "policy", word_tokenizer(pad_token=None), tie_word_embeddings=tied)


def test_rows_are_appended(folder: Path, tied: bool) -> None:
    policy, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    state = torch.get_rng_state()
    assert fit(policy.model, tokenizer) is True
    assert torch.equal(torch.get_rng_state(), state)
    assert (tokenizer.pad_token, tokenizer.pad_token_id, len(tokenizer)) == (NEW, ROWS, ROWS + 1)
    assert sizes(policy.model) == {FITTED}
    assert policy.model.config.pad_token_id is None
    assert policy.model.generation_config.pad_token_id == ROWS
    head = policy.model.get_output_embeddings()
    assert isinstance(head, LossHead)
    assert (head.weight is policy.model.get_input_embeddings().weight) == tied
    for name, value in policy.state_dict().items():
        assert torch.equal(value[: len(before[name])], before[name]), name
        if len(value) > len(before[name]):
            assert torch.allclose(value[ROWS:], before[name].mean(0).expand(FITTED - ROWS, -1), atol=1e-6), name


def test_old_tokens_keep_their_logits(folder: Path) -> None:
    policy, ids = load(folder), torch.tensor([[1, 12, 13, 5]])
    with torch.no_grad():
        before = policy.model(ids).logits
        fit(policy.model, AutoTokenizer.from_pretrained(folder))
        after = policy.model(ids).logits
    assert torch.allclose(after[..., :ROWS], before, atol=1e-6)
    # The mean row gives the mean of the logits.
    assert torch.allclose(after[..., ROWS:], before.mean(-1, keepdim=True).expand(-1, -1, FITTED - ROWS), atol=1e-5)


def test_again_there_is_nothing_to_do(folder: Path) -> None:
    policy, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    fit(policy.model, tokenizer)
    before, vocabulary = dict(policy.named_parameters()), tokenizer.get_vocab()
    assert fit(policy.model, tokenizer) is False
    assert all(parameter is before[name] for name, parameter in policy.named_parameters())
    assert tokenizer.get_vocab() == vocabulary


def test_the_other_models_of_a_run_find_the_token(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    fit(load(folder).model, tokenizer)
    trunk = ScoreModel.from_policy(str(folder), dtype=torch.float32).trunk
    assert fit(trunk, tokenizer) is True
    assert sizes(trunk) == {FITTED} and len(tokenizer) == ROWS + 1
    assert not hasattr(trunk, "generation_config") or trunk.generation_config is None


def test_nothing_asked_for_nothing_done(folder: Path) -> None:
    policy, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    assert fit(policy.model, tokenizer, multiple=1, pad_token=None) is False
    assert tokenizer.pad_token is None and policy.model.generation_config.pad_token_id is None
    assert sizes(policy.model) == {ROWS}


@pytest.mark.parametrize("token", [EOS, UNKNOWN])
def test_a_token_that_is_there_needs_no_row(folder: Path, token: str) -> None:
    policy, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    assert fit(policy.model, tokenizer, multiple=1, pad_token=token) is False
    assert tokenizer.pad_token == token and sizes(policy.model) == {ROWS}
    assert policy.model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_a_pad_token_that_is_there_is_kept(tmp_path: Path) -> None:
    path = save_policy(tmp_path / "policy")
    policy, tokenizer = load(path), AutoTokenizer.from_pretrained(path)
    assert fit(policy.model, tokenizer, multiple=1) is False
    assert tokenizer.pad_token == PAD


def test_a_multiple_alone(folder: Path) -> None:
    policy, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    assert fit(policy.model, tokenizer, multiple=5, pad_token=None) is True
    assert sizes(policy.model) == {30} and tokenizer.pad_token is None


def test_a_frozen_weight_stays_frozen(folder: Path) -> None:
    policy = load(folder).requires_grad_(False)
    fit(policy.model, AutoTokenizer.from_pretrained(folder))
    assert not any(parameter.requires_grad for parameter in policy.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"multiple": 0}, "the vocabulary's multiple is 0, expected at least 1"),
        ({"pad_token": ""}, "the pad token is '', expected a token such as '<pad>'"),
    ],
)
def test_bad_input(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        fit(load(folder).model, AutoTokenizer.from_pretrained(folder), **settings)
    assert str(error.value) == message


def test_never_drawn() -> None:
    tokenizer = word_tokenizer()
    assert never_drawn(FITTED, tokenizer) == [28, 29, 30, 31]
    assert never_drawn(FITTED, tokenizer, [2], pad=True) == [0, 28, 29, 30, 31]
    # A pad token that also ends responses has to be drawn.
    assert never_drawn(FITTED, tokenizer, [0, 2], pad=True) == [28, 29, 30, 31]
    assert never_drawn(ROWS, word_tokenizer(pad_token=None), [2], pad=True) == []


# ------------------------------------------------------------------------------------------------------- under ZeRO


def measure(folder: Path) -> dict[str, Any]:
    """On each rank: load, fit, take a step, save; then load what was saved, fit that, and go on."""
    ranks = start_distributed()
    found = {}
    for name in ("tied", "untied"):
        for stage in (2, 3):
            torch.manual_seed(ranks.rank)
            config = EngineConfig(dtype="float32", parameter_persistence_threshold=0, zero_stage=stage)
            tokenizer = AutoTokenizer.from_pretrained(folder / name)
            with sharded_loading(config, CPU):
                policy = load(folder / name)
                grown = [fit(policy.model, tokenizer), fit(policy.model, tokenizer)]
            engine = Engine(policy, config, ranks, OPTIMIZER, steps=10)
            weights = [engine.whole_state()]
            step(engine, ranks)
            weights.append(engine.whole_state())
            written = folder / f"{name}-{stage}"
            engine.save(folder / f"checkpoint-{name}-{stage}")
            if ranks.is_first:
                policies.save_policy(written, policy, weights[-1], tokenizer, str(folder / name))
            ranks.barrier()

            tokenizer = AutoTokenizer.from_pretrained(written)
            with sharded_loading(config, CPU):
                again = load(written)
                grown.append(fit(again.model, tokenizer))
            loaded = Engine(again, config, ranks, OPTIMIZER, steps=10)
            weights.append(loaded.whole_state())

            with sharded_loading(config, CPU):
                resumed = load(folder / name)
                fit(resumed.model, tokenizer)
            engine_2 = Engine(resumed, config, ranks, OPTIMIZER, steps=10)
            engine_2.load(folder / f"checkpoint-{name}-{stage}")
            step(engine, ranks)
            step(engine_2, ranks)
            weights += [engine.whole_state(), engine_2.whole_state()]
            with engine.gathered() as module:
                rows = sizes(module.model)
            head, embedding = policy.model.get_output_embeddings(), policy.model.get_input_embeddings()
            sharded = [hasattr(module.weight, "ds_id") and module.weight.numel() == 0 for module in (head, embedding)]
            found[name, stage] = {
                "grown": grown,
                "weights": weights,
                "rows": rows,
                "sharded": sharded,
                "tied": head.weight is embedding.weight,
                "head": type(head),
            }
    stop_distributed()
    return found


def step(engine: Engine, ranks) -> None:
    engine.backward(engine(batch(ranks.rank, ranks.size), negative_log_likelihood), last=True)
    assert engine.step().applied


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["one rank", "two ranks"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """The folder, and what each rank of a run found."""
    folder = tmp_path_factory.mktemp("vocabulary")
    for name in ("tied", "untied"):
        save_policy(folder / name, word_tokenizer(pad_token=None), tie_word_embeddings=name == "tied")
    return folder, on_ranks(request.param, "tests.models.test_vocabulary:measure", folder)


CASES = [(name, stage) for name in ("tied", "untied") for stage in (2, 3)]


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_shards_grow_as_whole_weights_do(runs, name: str, stage: int) -> None:
    folder, ranks = runs
    policy = load(folder / name)
    fit(policy.model, AutoTokenizer.from_pretrained(folder / name))
    for rank in ranks:
        found = rank[name, stage]
        assert found["grown"] == [True, False, False]
        assert found["rows"] == {FITTED} and found["head"] is LossHead
        assert found["tied"] == (name == "tied") and found["sharded"] == [stage == 3] * 2
    start = ranks[0][name, stage]["weights"][0]
    assert same_bits(start, dict(policy.state_dict()))


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_a_step_is_that_of_plain_torch(runs, name: str, stage: int) -> None:
    folder, ranks = runs
    policy = load(folder / name)
    fit(policy.model, AutoTokenizer.from_pretrained(folder / name))
    groups = [
        {"params": [p for p in policy.parameters() if p.dim() > 1], "weight_decay": OPTIMIZER.weight_decay},
        {"params": [p for p in policy.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=OPTIMIZER.learning_rate, betas=OPTIMIZER.betas)
    for rank in range(2):
        policy(batch(rank, 2), negative_log_likelihood).backward()
    adam.step()
    ours = ranks[0][name, stage]["weights"][1]
    # Adam's first step is the sign of a gradient where that is far from its epsilon.
    for key, parameter in policy.named_parameters():
        assert (ours[key] - parameter).norm() <= 1e-4 * parameter.norm(), key
    for key in ("model.lm_head.weight", "model.model.embed_tokens.weight"):
        assert not torch.equal(ours[key][ROWS], ranks[0][name, stage]["weights"][0][key][ROWS]), key


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_save_and_load(runs, name: str, stage: int) -> None:
    folder, ranks = runs
    _, trained, loaded, continued, resumed = ranks[0][name, stage]["weights"]
    assert same_bits(trained, loaded)
    assert same_bits(continued, resumed) and not same_bits(continued, trained)

    written = folder / f"{name}-{stage}"
    assert json.loads((written / "config.json").read_text())["vocab_size"] == FITTED
    assert json.loads((written / "generation_config.json").read_text())["pad_token_id"] == ROWS
    assert load_file(written / "model.safetensors")["model.embed_tokens.weight"].shape[0] == FITTED
    tokenizer = AutoTokenizer.from_pretrained(written)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (NEW, ROWS)
    model = AutoModelForCausalLM.from_pretrained(written)
    assert sizes(model) == {FITTED}
    assert same_bits({f"model.{key}": value for key, value in model.state_dict().items()}, trained)
    texts = tokenizer(["how do i", "make"], return_tensors="pt", padding=True, padding_side="left")
    assert texts["input_ids"][1, 0] == ROWS
    assert model.generate(**texts, max_new_tokens=3, do_sample=False).shape[0] == 2
