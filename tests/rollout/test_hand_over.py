"""Weights in the form of files, and the verification of an engine that was given them. The engines are stand-ins."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from repo_fast.collectives import Ranks
from repo_fast.config import EngineConfig
from repo_fast.engine import Engine
from repo_fast.errors import InputError
from repo_fast.models.lora import adapter_shape, add_lora, base_one_by_one, merged_one_by_one, of_adapter
from repo_fast.models.policy import Policy
from repo_fast.rollout.hand_over import Verification, as_in_files, fixed_rows, fixed_tokens, policy_log_probs
from tests.job_runs import on_ranks
from tests.tiny import save_policy, word_tokenizer

ALONE = Ranks(0, 1, torch.device("cpu"))
SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
TOKENS = range(7, 24)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LlamaForCausalLM", {}),
        # Each expert by itself in the files, under other names.
        ("MixtralForCausalLM", {"num_local_experts": 3}),
        ("Qwen3MoeForCausalLM", EXPERTS | {"num_experts": 3}),
        # With a buffer that is saved.
        ("Glm4MoeForCausalLM", EXPERTS | {"n_routed_experts": 4, "first_k_dense_replace": 1}),
        # The head has another name there.
        ("GPTNeoXForCausalLM", {}),
        # Joined in the files, and apart in memory.
        ("HrmTextForCausalLM", {"head_dim": 8}),
    ],
)
def test_weights_are_named_and_shaped_as_in_the_files(tmp_path: Path, kind: str, options: dict) -> None:
    architecture = getattr(transformers, kind)
    torch.manual_seed(0)
    architecture(architecture.config_class(**SIZES | options, tie_word_embeddings=False)).save_pretrained(tmp_path)
    model = architecture.from_pretrained(tmp_path)
    handed = dict(as_in_files(model, model.state_dict().items()))
    files = load_file(tmp_path / "model.safetensors")
    assert handed.keys() == files.keys()
    assert all(torch.equal(handed[name], value) for name, value in files.items())


def test_no_more_than_a_block_of_layers_is_held(tmp_path: Path) -> None:
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=3))
    begun: list[str] = []

    def one_by_one():
        for name, value in model.state_dict().items():
            begun.append(name)
            yield name, value

    taken = {name: list(begun) for name, _ in as_in_files(model, one_by_one())}
    first = next(names for name, names in taken.items() if "layers.0." in name)
    # The next one's first name is what says that the block is over.
    assert [name for name in first if "layers.1." in name] == [next(name for name in begun if "layers.1." in name)]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LlamaForCausalLM", {}),
        # With biases.
        ("Qwen2ForCausalLM", {}),
        # Adapters beside experts, which have none.
        ("MixtralForCausalLM", {"num_local_experts": 3}),
        # The head has another name there.
        ("GPTNeoXForCausalLM", {}),
    ],
)
def test_merged_weights_are_handed_over_as_a_folder_has_them(tmp_path: Path, kind: str, options: dict) -> None:
    """Each W of the files, and scaling B A where there is an adapter, in float64."""
    policy, files = adapted(tmp_path, kind, options)
    state = dict(policy.state_dict())
    handed = handed_over(policy, merged_one_by_one(policy, state.items()))
    assert handed.keys() == files.keys()
    base = handed_over(policy, base_one_by_one(policy, state.items()))
    assert base.keys() == files.keys() and all(torch.equal(base[name], value) for name, value in files.items())
    changed = set()
    for name, value in files.items():
        a, b = (state.get(f"model.{name.removesuffix('.weight')}.lora_{part}.default.weight") for part in "AB")
        if a is None or b is None:
            assert torch.equal(handed[name], value), name
        else:
            exact = value.double() + 2.5 * (b.double() @ a.double())
            torch.testing.assert_close(handed[name].double(), exact, atol=2e-6, rtol=1e-6)
            changed.add(name)
    assert len(changed) == sum(".lora_A." in name for name in state) >= 8
    assert all(not torch.equal(handed[name], files[name]) for name in changed)


def adapted(folder: Path, kind: str, options: dict) -> tuple[Policy, dict[str, torch.Tensor]]:
    """A policy with adapters that are not 0, and its folder's weights."""
    architecture = getattr(transformers, kind)
    torch.manual_seed(0)
    architecture(architecture.config_class(**SIZES | options, tie_word_embeddings=False)).save_pretrained(folder)
    policy = Policy.from_pretrained(str(folder), dtype=torch.float32, attention="sdpa")
    add_lora(policy.model, rank=2, alpha=5.0)
    for name, parameter in policy.named_parameters():
        if of_adapter(name):
            torch.nn.init.normal_(parameter)
    return policy, load_file(folder / "model.safetensors")


def handed_over(policy: Policy, weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return dict(as_in_files(policy.model, ((name.removeprefix("model."), weight) for name, weight in weights)))


def test_of_one_layer_alone_base_and_adapter_are_held(tmp_path: Path) -> None:
    policy, _ = adapted(tmp_path, "LlamaForCausalLM", {})
    begun: list[str] = []

    def one_by_one() -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in policy.state_dict().items():
            begun.append(name)
            yield name, value

    layer = "model.model.layers.0.self_attn.k_proj"
    taken = {name: list(begun) for name, _ in merged_one_by_one(policy, one_by_one())}
    assert taken[f"{layer}.weight"][-1] == f"{layer}.lora_B.default.weight"
    without = ((name, value) for name, value in policy.state_dict().items() if name != f"{layer}.lora_A.default.weight")
    with pytest.raises(ValueError, match=f"of {layer} and its adapter some weights are missing"):
        list(merged_one_by_one(policy, without))


def test_an_engine_gives_an_adapter_alone(tmp_path: Path) -> None:
    policy, _ = adapted(tmp_path, "LlamaForCausalLM", {})
    engine = Engine(policy, EngineConfig(zero_stage=1, dtype="float32"), ALONE)
    given = dict(engine.weights_one_by_one(of_adapter))
    assert set(given) == {name for name in policy.state_dict() if ".lora_" in name}
    assert adapter_shape(policy).rank == 2 and adapter_shape(policy).alpha == 5.0
    assert adapter_shape(policy).targets == tuple(sorted({name.split(".lora_")[0].split(".")[-1] for name in given}))


@pytest.mark.parametrize("longest", [2, 7, 65, 4096])
@pytest.mark.parametrize("start", [1, None])
def test_rows(start: int | None, longest: int) -> None:
    tokens = fixed_tokens(word_tokenizer(), TOKENS)
    rows = fixed_rows(tokens, start, longest)
    assert all(2 <= row.numel() <= longest for row in rows)
    compared = torch.cat([row[1:] for row in rows]).tolist()
    assert compared == (tokens[1:] if start is None else tokens) and len(compared) >= 64
    assert {int(row[0]) for row in rows} == {start} or start is None


def test_tokens_are_of_a_text_where_the_tokenizer_knows_it() -> None:
    """Else random ones: of words that it does not know, all are the same token. Neither moves the random state."""
    before = torch.get_rng_state()
    lettered = Tokenizer(BPE({letter: place for place, letter in enumerate(map(chr, range(32, 127)))}, []))
    letters = PreTrainedTokenizerFast(tokenizer_object=lettered)
    ordinary = [token for token in range(95) if token != letters.convert_tokens_to_ids("e")]
    found = fixed_tokens(letters, ordinary)
    assert letters.decode(found).startswith("T h r   a r   s v n   d a y s") and len(found) == 128
    drawn = fixed_tokens(word_tokenizer(), TOKENS)
    assert drawn == fixed_tokens(word_tokenizer(), TOKENS) and set(drawn) == set(TOKENS) and len(drawn) == 128
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def policy(folder: Path) -> Policy:
    return Policy.from_pretrained(str(folder), dtype=torch.float32, attention="sdpa")


def test_the_policys_own_log_probabilities_are_those_of_transformers(policy: Policy) -> None:
    rows = fixed_rows(list(TOKENS) * 4, 1, 20)
    with torch.no_grad():
        theirs = torch.cat(
            [policy.model(row[None]).logits[0, :-1].log_softmax(-1).gather(1, row[1:, None])[:, 0] for row in rows]
        )
    torch.testing.assert_close(policy_log_probs(policy, rows, ALONE.device), theirs, atol=1e-5, rtol=0)


def verification(dtype: torch.dtype = torch.float32, ranks: Ranks = ALONE) -> Verification:
    return Verification(
        "vLLM",
        "some/policy",
        list(TOKENS) * 8,
        start=1,
        longest=20,
        dtype=dtype,
        ranks=ranks,
        instead="choose --rollout.engine hf",
    )


def engine_of(policy: Policy, gap: float = 0.0) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    """What an engine says that has these weights, and is off by so much, up and down."""

    def log_probs(rows: Sequence[torch.Tensor]) -> torch.Tensor:
        right = policy_log_probs(policy, rows, ALONE.device)
        return right + gap * torch.ones_like(right).index_fill(0, torch.arange(0, right.numel(), 2), -1.0)

    return log_probs


@pytest.mark.parametrize(
    ("dtype", "name", "bad", "good"),
    [(torch.float32, "float32", 2e-3, 5e-4), (torch.bfloat16, "bfloat16", 0.2, 0.05)],
)
def test_a_gap_above_the_tolerance_is_one_line(
    policy: Policy, dtype: torch.dtype, name: str, bad: float, good: float
) -> None:
    verification(dtype)(policy, engine_of(policy, good))
    with pytest.raises(InputError) as raised:
        verification(dtype)(policy, engine_of(policy, bad))
    tolerance = {"float32": "0.001", "bfloat16": "0.1"}[name]
    assert str(raised.value) == (
        "vLLM does not compute what the policy 'some/policy' does: log-probabilities of 136 tokens differ by "
        f"{bad:.3g} nats on average, expected at most {tolerance} in {name}; choose --rollout.engine hf"
    )
    with pytest.raises(InputError, match="differ by nan nats"):
        verification(dtype)(policy, engine_of(policy, float("nan")))


def move(policy: Policy, size: float) -> None:
    """As an update does: head and all."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def test_an_engine_that_keeps_the_start_is_found_once_the_policy_has_moved(policy: Policy) -> None:
    """Also where updates that do nothing, such as a skipped one, came before, or some that move too little to tell."""
    stale, verify = engine_of(copy.deepcopy(policy)), verification()
    for size in (0.0, 0.0, 1e-5):
        move(policy, size)
        verify(policy, stale)
        assert not verify.is_over
    move(policy, 1e-2)
    with pytest.raises(InputError, match="differ by"):
        verify(policy, stale)


def test_it_is_over_once_the_policy_has_moved_far_enough(policy: Policy) -> None:
    verify = verification()
    verify(policy, engine_of(policy))
    move(policy, 1e-2)
    verify(policy, engine_of(policy))
    assert verify.is_over

    def unasked(rows: Sequence[torch.Tensor]) -> torch.Tensor:
        raise AssertionError

    verify(policy, unasked)


def on_two(folder: Path) -> list[tuple[str, str]]:
    """On each rank: what is raised, first with a good engine on both, then with a bad one on rank 1."""
    dist.init_process_group("gloo")
    ranks = Ranks.connect()
    policy = Policy.from_pretrained(str(folder / "policy"), dtype=torch.float32, attention="sdpa")
    verify, said = verification(ranks=ranks), []
    for gap in (0.0, 0.5 * ranks.rank):
        try:
            verify(policy, engine_of(policy, gap))
            said.append(("", ""))
        except Exception as error:
            said.append((type(error).__name__, str(error)))
    dist.destroy_process_group()
    return said


def test_one_rank_with_a_bad_engine_ends_all(tmp_path: Path) -> None:
    save_policy(tmp_path / "policy")
    first, second = on_ranks(2, "tests.rollout.test_hand_over:on_two", tmp_path)
    assert first == second
    assert first[0] == ("", "") and first[1][0] == "InputError"
    assert "differ by 0.5 nats" in first[1][1]


def test_an_engine_gives_all_that_files_hold() -> None:
    """A tied head under both of its names, and the buffers that a model saves."""
    config = transformers.Glm4MoeConfig(**SIZES, **EXPERTS, n_routed_experts=4, first_k_dense_replace=1)
    config.tie_word_embeddings = True
    model = transformers.Glm4MoeForCausalLM(config)
    engine = Engine(Policy(model), EngineConfig(zero_stage=1, dtype="float32"), ALONE)
    given = dict(engine.weights_one_by_one())
    assert given.keys() == {f"model.{name}" for name in model.state_dict()}
    assert "model.lm_head.weight" in given and "model.model.layers.1.mlp.gate.e_score_correction_bias" in given
