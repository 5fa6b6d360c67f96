"""How several sequences are run at once is found by trying, and is right whatever the architecture."""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from transformers import AutoModel, GPT2Config, LlamaConfig, RobertaConfig

from bench.trainer.architectures import Outcome, config_of, measure, save_model
from repo_fast.collectives import Ranks
from repo_fast.errors import InputError
from repo_fast.models.attention import PACKED, PADDED, run_packed
from repo_fast.models.loss_head import LogitSettings
from repo_fast.models.on_paper import built, check_positions, first_attention, position_limit


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    from repo_fast.engine import start_distributed, stop_distributed

    yield start_distributed()
    stop_distributed()


# By what is particular about them; `python -m bench.trainer.architectures` has all.
WAYS = {
    "llama": "packed",
    "gemma3_text": "packed",
    "opt": "packed",
    "qwen3_moe": "packed",
    # Scaled logits, by division and by multiplication, and a bias on the head.
    "granite": "packed",
    "cohere": "packed",
    "hyperclovax": "packed",
    "phi": "packed",
    # Capped logits, and those of attention.
    "gemma2": "eager",
    "recurrent_gemma": PADDED,
    # They do not hand on what packed attention needs.
    "stablelm": "sdpa",
    # An attention of its own, and local ones.
    "gpt_neo": "eager",
    # ALiBi; a rotary that counts positions itself; sinks; recurrent states.
    "bloom": PADDED,
    "falcon": PADDED,
    "gpt_oss": PADDED,
    "mamba": PADDED,
    "lfm2": PADDED,
}
# What some of them can in transformers 5.24, and not in what is locked.
LATER = {"falcon": "sdpa", "gptj": "packed"} if Version(version("transformers")) >= Version("5.24") else {}


def outcome_of(architecture: str, ranks: Ranks, folder: Path, attention: str = "auto") -> Outcome:
    save_model(config_of(architecture), folder)
    return measure(folder, ranks, attention)


@pytest.mark.parametrize("architecture", WAYS)
def test_auto_finds_what_is_right(architecture: str, ranks: Ranks, tmp_path: Path) -> None:
    outcome = outcome_of(architecture, ranks, tmp_path)
    assert outcome.way == LATER.get(architecture, WAYS[architecture])
    assert bool(outcome.reason) == (outcome.way != "packed")
    # Log-probabilities of transformers alone; what sequences see of each other is above 1.
    assert outcome.gap is not None and outcome.gap < 3e-5


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_padded_rows_can_be_asked_for(architecture: str, ranks: Ranks, tmp_path: Path) -> None:
    outcome = outcome_of(architecture, ranks, tmp_path, PADDED)
    assert outcome.way == PADDED and outcome.gap is not None and outcome.gap < 3e-5


@pytest.mark.parametrize(
    ("architecture", "attention", "message"),
    [
        ("falcon", "sdpa", "cannot be run packed, .*sequences of a row see each other"),
        (
            "gptj",
            "packed",
            "cannot be built with any attention .*: packed: the architecture has no such",
        ),
        ("gpt_oss", "sdpa", "the architecture has no such attention"),
        ("stablelm", "packed", "StableLmAttention does not take part in packed attention"),
        ("phimoe", "auto", "draws random numbers in training"),
        ("gemma2", "packed", "Gemma2Attention needs softcap, which packed attention and SDPA lack"),
        (
            "gemma2",
            "sdpa",
            "Gemma2Attention needs softcap, which packed .*SDPA lack|architecture has no such attention",
        ),
    ],
)
def test_what_cannot_be_is_one_line(
    architecture: str, attention: str, message: str, ranks: Ranks, tmp_path: Path
) -> None:
    outcome = outcome_of(architecture, ranks, tmp_path, attention)
    if LATER.get(architecture) == attention:
        assert outcome.way == attention
        assert outcome.gap is not None and outcome.gap < 3e-5
        return
    assert outcome.way == "refused"
    with pytest.raises(InputError, match=message):
        raise InputError(outcome.reason)
    assert "\n" not in outcome.reason


def test_logits_that_are_changed_after_the_head_are_found_by_trying(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the setting is called: a list of names will always lack one."""
    monkeypatch.setattr("repo_fast.models.policy.logit_settings", lambda *_: LogitSettings())
    for architecture in ("granite", "recurrent_gemma", "cohere"):
        save_model(config_of(architecture), tmp_path / architecture)
        assert "changes its logits after the head" in measure(tmp_path / architecture, ranks).reason


@pytest.mark.parametrize(("options", "chosen"), [(("q", "softcap"), "flash_attention_2"), (("q",), "eager")])
def test_a_flash_attention_without_caps_is_passed_over(
    options: tuple[str, ...], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers hands it what it takes, and leaves the rest out."""
    from repo_fast.models import on_paper

    monkeypatch.setattr(on_paper, "flash_attention_takes", lambda option: option in options)
    plain = on_paper.built
    monkeypatch.setattr(
        on_paper, "built", lambda kind, config, name: plain(kind, config, "eager" if "flash" in name else name)
    )
    monkeypatch.setattr(on_paper, "_tried", {})
    candidates = ("flash_attention_2", PACKED, "sdpa", "eager")
    assert first_attention(AutoModel, "folder", config_of("gemma2"), candidates)[0] == chosen


def test_padded_rows_have_the_gradients_of_packed_ones() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=61, num_attention_heads=4
    )
    packed, padded = (AutoModel.from_config(config, attn_implementation=name).double() for name in (PACKED, "sdpa"))
    padded.load_state_dict(packed.state_dict())
    setattr(padded, PADDED, True)
    positions = torch.cat([torch.arange(length) for length in (3, 1, 8, 5)])[None]
    ids, upstream = torch.randint(61, positions.shape), torch.randn(1, 17, 32, dtype=torch.float64)
    for trunk in (packed, padded):
        (run_packed(trunk, ids, positions) * upstream).sum().backward()
    torch.testing.assert_close(run_packed(padded, ids, positions), run_packed(packed, ids, positions))
    for ours, theirs in zip(padded.parameters(), packed.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_what_is_on_paper_takes_no_memory() -> None:
    """And no shards: a 70B model is built in a blink, whatever engine is to load it."""
    large = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, vocab_size=128256
    )
    assert all(parameter.is_meta for parameter in built(AutoModel, large).parameters())
    assert first_attention(AutoModel, "x", large, (PACKED, "sdpa")) == (PACKED, ())


@pytest.mark.parametrize(
    ("architecture", "limit"),
    [("llama", None), ("mamba", None), ("bloom", None), ("gpt2", 64), ("gptj", 64), ("opt", 64), ("mpt", 64)],
)
def test_positions_that_are_a_table_have_an_end(architecture: str, limit: int | None) -> None:
    """At which transformers fails; rotary ones go on."""
    config = config_of(architecture)
    model = AutoModel.from_config(config).eval()
    assert position_limit(model) == position_limit(built(AutoModel, config)) == limit
    longest = limit or 80
    model(input_ids=torch.ones(1, longest, dtype=torch.int64), use_cache=False)
    if limit is not None:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.ones(1, longest + 1, dtype=torch.int64), use_cache=False)


def test_an_encoder_s_positions_begin_behind_its_padding_s() -> None:
    config = RobertaConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=34
    )
    assert position_limit(AutoModel.from_config(config)) == 32


def test_longer_sequences_are_an_error(tmp_path: Path) -> None:
    GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=32, vocab_size=61).save_pretrained(tmp_path)
    check_positions(str(tmp_path), 32, "a prompt")
    with pytest.raises(InputError, match="a prompt: up to 33 tokens, expected at most the 32 positions that '.*' has"):
        check_positions(str(tmp_path), 33, "a prompt")
