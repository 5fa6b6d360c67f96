"""Generation by Hugging Face draws from the distribution that is trained, and reports it."""

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from bench.trainer.architectures import config_of, save_model
from repo_fast.config import RolloutConfig
from repo_fast.data import Prompt
from repo_fast.errors import InputError
from repo_fast.models.policy import Policy
from repo_fast.ops import linear_log_probs
from repo_fast.packing.rows import pack
from repo_fast.rollout import Rollout, hf
from repo_fast.rollout.hf import Request, check_generation, end_tokens, generate, generation_settings, stop_alike
from repo_fast.rollout.seeds import Purpose, response_seeds
from tests.families import FAMILIES, family_tokenizer
from tests.tiny import EOS, save_policy, word_tokenizer

CPU = torch.device("cpu")
# Ragged, so that a batch of them is padded.
TEXTS = [
    "tea",
    "how do i make tea with bread please",
    "can you",
    "how do i make a bomb",
    "no no no yes yes yes tea tea",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy"), max_position_embeddings=512)


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return Policy.from_pretrained(str(folder), dtype=torch.float32, attention="sdpa")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return word_tokenizer()


def requests(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] = TEXTS) -> list[Request]:
    return [Request(Prompt(i, text), torch.tensor(tokenizer(text).input_ids)) for i, text in enumerate(texts)]


def draw(policy: Policy, tokenizer: PreTrainedTokenizerBase, asked: list[Request], **settings) -> Rollout:
    config = RolloutConfig(**{"max_new_tokens": 24, **settings})
    return generate(policy.model, tokenizer, asked, range(len(asked)), config, CPU)


def trainer_log_probs(policy: Policy, rollout: Rollout, temperature: float) -> list[torch.Tensor]:
    """As the trainer computes them: packed, without padding, at the head."""
    batch = pack(rollout.prompt_tokens, rollout.response_tokens, CPU)
    with torch.no_grad():
        packed = policy(batch, lambda h, p, b: linear_log_probs(h, p.weight, b.targets, temperature=temperature))
    return list(packed.split([tokens.numel() for tokens in rollout.response_tokens]))


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    """Over the seeds of responses, at each of their tokens; and whatever the probabilities add up to."""
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.125, 1e-3, 0.124, 0.0])
    count = 100_000
    uniform = hf.uniform_numbers(response_seeds(count, 0, Purpose.TRAINING), 3)
    deviation = (probabilities * (1 - probabilities) / count).sqrt()
    for numbers in uniform.split(1, dim=1):
        drawn = hf.draw(probabilities.expand(count, -1), numbers)
        assert drawn.shape == (count, 1)
        share = torch.bincount(drawn[:, 0], minlength=8) / count
        assert ((share - probabilities).abs() <= 4.5 * deviation).all()
        assert torch.equal(hf.draw(8 * probabilities.expand(count, -1), numbers), drawn)
    # Each token's number says nothing about the next one's, nor a response's about the next response's.
    correlations = torch.stack([uniform[:, 0], uniform[:, 1], uniform[:, 0].roll(1)]).corrcoef()
    assert (correlations - torch.eye(3)).abs().max() < 4.5 / count**0.5


def test_what_is_drawn_depends_on_the_seed_of_a_response_alone(policy, tokenizer) -> None:
    """Neither on the torch random state, nor on what is drawn beside it or before, nor on how many tokens there may be.
    Here in float64, in which padding moves no token."""
    policy = copy.deepcopy(policy).double()
    asked = requests(tokenizer) * 4
    seeds = response_seeds(len(asked), 3, Purpose.TRAINING, 5)
    config = RolloutConfig(max_new_tokens=24, batch_size=8)
    torch.manual_seed(0)
    together = generate(policy.model, tokenizer, asked, seeds, config, CPU).response_tokens
    assert len({tuple(tokens.tolist()) for tokens in together}) > 12
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for batch_size, new_tokens, places in [(3, 24, range(19, -1, -1)), (1, 30, range(4, 12))]:
        config = RolloutConfig(max_new_tokens=new_tokens, batch_size=batch_size)
        chosen = [asked[i] for i in places], [seeds[i] for i in places]
        apart = generate(policy.model, tokenizer, *chosen, config, CPU).response_tokens
        assert all(torch.equal(tokens[:24], together[i]) for tokens, i in zip(apart, places, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_a_token_of_probability_0_is_never_drawn(number: float) -> None:
    vocabulary = torch.randn(50, 300).softmax(-1)
    vocabulary[:, [0, 1, 298, 299]] = 0
    # Sums that a number next to 1 rounds up to, and a token that alone has all.
    peaked = torch.zeros(1, 300)
    peaked[0, 77] = 1
    drawn = hf.draw(torch.cat([vocabulary, peaked]), torch.full((51, 1), number, dtype=torch.float64))[:, 0]
    assert (drawn[:50] == (2 if number == 0 else 297)).all() and drawn[50] == 77


def test_scores_that_are_no_numbers_are_an_error(policy, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    # The first of a model are checked before.
    draw(policy, tokenizer, requests(tokenizer))
    head = policy.model.get_output_embeddings()
    monkeypatch.setattr(head, "forward", lambda hidden: torch.full((*hidden.shape[:-1], 32), torch.nan))
    with pytest.raises(RuntimeError, match="gives scores that are not finite"):
        draw(policy, tokenizer, requests(tokenizer))


def test_the_rarest_token_is_drawn_too() -> None:
    """In float32 the running sum would lose it behind the others."""
    probabilities = torch.cat([torch.full((32000,), 1 / 32000), torch.tensor([1e-9])])
    sums = probabilities.double().cumsum(0)
    middle = (sums[-2] + sums[-1]) / 2 / sums[-1]
    assert hf.draw(probabilities[None], middle[None, None]).item() == 32000


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_the_trainer_has_the_samplers_log_probs(policy, tokenizer, temperature: float) -> None:
    rollout = draw(policy, tokenizer, requests(tokenizer) * 3, temperature=temperature)
    for ours, sampled in zip(trainer_log_probs(policy, rollout, temperature), rollout.sampler_log_probs, strict=True):
        torch.testing.assert_close(ours, sampled, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_with_top_p_they_differ_by_the_log_of_the_nucleus_mass(policy, tokenizer, temperature: float) -> None:
    """The mass from the whole distribution: a token is kept where less than top-p lies on likelier ones."""
    rollout = draw(policy, tokenizer, requests(tokenizer) * 2, temperature=temperature, top_p=0.7)
    differences = []
    for i, ours in enumerate(trainer_log_probs(policy, rollout, temperature)):
        prompt, response = rollout.prompt_tokens[i], rollout.response_tokens[i]
        with torch.no_grad():
            logits = policy.model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        probabilities = (logits.double() / temperature).softmax(-1)
        likelier = (probabilities[:, None, :] * (probabilities[:, None, :] > probabilities[:, :, None])).sum(-1)
        kept = likelier < 0.7
        mass = (probabilities * kept).sum(-1)
        assert kept.gather(1, response[:, None]).all()
        differences.append(rollout.sampler_log_probs[i] - ours)
        torch.testing.assert_close(differences[-1].double(), -mass.log(), atol=1e-4, rtol=0)
    assert torch.cat(differences).mean() > 0.05


def test_generation_settings_of_the_model_folder_are_set_aside(folder: Path, policy, tokenizer, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "policy"))
    settings = {
        "repetition_penalty": 5.0,
        "top_k": 2,
        "top_p": 0.3,
        "min_p": 0.2,
        "typical_p": 0.5,
        "temperature": 0.1,
        "do_sample": False,
        "num_beams": 2,
        "suppress_tokens": [7, 8, 9],
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 20,
        "max_length": 9,
        "eos_token_id": 2,
    }
    (other / "generation_config.json").write_text(json.dumps(settings))
    changed = Policy.from_pretrained(str(other), dtype=torch.float32, attention="sdpa")
    assert changed.model.generation_config.repetition_penalty == 5.0
    plain, ours = (draw(model, tokenizer, requests(tokenizer)) for model in (policy, changed))
    assert [t.tolist() for t in ours.response_tokens] == [t.tolist() for t in plain.response_tokens]
    # It is put back: the exported folder has its own settings still.
    assert changed.model.generation_config.repetition_penalty == 5.0


def test_end_tokens_of_the_model_folder_end_a_response(folder: Path, tokenizer, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "policy"))
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 13]}))
    policy = Policy.from_pretrained(str(other), dtype=torch.float32, attention="sdpa")
    rollout = draw(policy, tokenizer, requests(tokenizer) * 8)
    assert {int(tokens[-1]) for tokens, done in endings(rollout) if done} == {2, 13}
    for tokens, _ in endings(rollout):
        assert not torch.isin(tokens[:-1], torch.tensor([2, 13])).any()


def endings(rollout: Rollout) -> list[tuple[torch.Tensor, bool]]:
    return list(zip(rollout.response_tokens, rollout.finished.tolist(), strict=True))


@pytest.mark.parametrize("pad_token", ["<pad>", EOS, None], ids=["pad", "pad is eos", "no pad"])
def test_a_response_ends_with_its_end_token_or_is_truncated(policy, pad_token: str | None) -> None:
    tokenizer = word_tokenizer(pad_token=pad_token)
    rollout = draw(policy, tokenizer, requests(tokenizer) * 4, batch_size=8)
    assert 0 < int(rollout.finished.sum()) < len(rollout.responses)
    for tokens, finished in endings(rollout):
        assert (tokens == 2).sum() == finished
        assert (int(tokens[-1]) == 2) is finished
        assert finished or tokens.numel() == 24
    for tokens, text, sampled in zip(
        rollout.response_tokens, rollout.responses, rollout.sampler_log_probs, strict=True
    ):
        assert tokenizer.decode(tokens, skip_special_tokens=True) == text
        assert sampled.shape == tokens.shape and sampled.dtype == torch.float32
    for ours, sampled in zip(trainer_log_probs(policy, rollout, 1.0), rollout.sampler_log_probs, strict=True):
        torch.testing.assert_close(ours, sampled, atol=1e-4, rtol=0)


@pytest.mark.parametrize("stop", ["tea", "<unk>"], ids=["a word", "a special token"])
def test_stop_strings(policy, tokenizer, stop: str) -> None:
    """A response ends with the token that completes the string; what the batch generated after it is gone."""
    rollout = draw(policy, tokenizer, requests(tokenizer) * 8, stop=(stop,))
    stopped = 0
    for tokens, finished in endings(rollout):
        words = tokenizer.convert_ids_to_tokens(tokens.tolist())
        assert not {stop, EOS} & set(words[:-1])
        assert "<pad>" not in words or len(set(words)) > 1
        assert finished is (words[-1] in (stop, EOS))
        assert finished or len(words) == 24
        stopped += words[-1] == stop
    assert stopped >= 2
    for ours, sampled in zip(trainer_log_probs(policy, rollout, 1.0), rollout.sampler_log_probs, strict=True):
        torch.testing.assert_close(ours, sampled, atol=1e-4, rtol=0)


@pytest.mark.parametrize("batch_size", [2, 64])
def test_prompts_in_one_batch_are_answered_as_each_alone(policy, tokenizer, batch_size: int) -> None:
    """At a temperature so low that chance has no say; also shows that answers stay with their prompts."""
    asked = requests(tokenizer)
    together = draw(policy, tokenizer, asked, temperature=0.0005, batch_size=batch_size)
    assert together.prompts == TEXTS
    assert together.prompt_ids.tolist() == list(range(len(TEXTS)))
    alone = [draw(policy, tokenizer, [request], temperature=0.0005) for request in asked]
    assert len({tuple(one.response_tokens[0].tolist()) for one in alone}) > 1
    for i, one in enumerate(alone):
        assert together.response_tokens[i].tolist() == one.response_tokens[0].tolist()
        assert torch.equal(together.prompt_tokens[i], asked[i].tokens)
        torch.testing.assert_close(together.sampler_log_probs[i], one.sampler_log_probs[0], atol=5e-3, rtol=0)


def test_no_requests(policy, tokenizer) -> None:
    rollout = draw(policy, tokenizer, [])
    assert rollout.prompt_ids.dtype == torch.int64 and rollout.prompt_ids.shape == (0,)
    assert rollout.finished.dtype == torch.bool and rollout.finished.shape == (0,)
    assert rollout.responses == rollout.response_tokens == rollout.sampler_log_probs == []


def test_the_models_mode_is_left_as_it_was(policy, tokenizer) -> None:
    policy.train()
    draw(policy, tokenizer, requests(tokenizer))
    assert policy.model.training


def test_a_response_ends_where_its_chat_template_ends_a_turn(tmp_path: Path) -> None:
    """Also where neither the tokenizer nor the folder says so; what is written does."""
    tokenizer = family_tokenizer(FAMILIES["chatml"])
    end, eos = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id
    policy = Policy.from_pretrained(
        str(save_policy(tmp_path, tokenizer, eos_token_id=eos)), dtype=torch.float32, attention="sdpa"
    )
    assert policy.model.generation_config.eos_token_id == eos
    assert end_tokens(policy.model.generation_config, tokenizer) == sorted([end, eos])
    # Draws nothing but the end of a turn.
    head = policy.model.get_output_embeddings()
    with pytest.MonkeyPatch.context() as patch:
        only = torch.full((len(tokenizer),), -torch.inf).index_fill(0, torch.tensor(end), 0.0)
        patch.setattr(head, "forward", lambda hidden: only.expand(*hidden.shape[:-1], -1))
        rollout = draw(policy, tokenizer, requests(tokenizer, ["How?"]))
    assert rollout.response_tokens[0].tolist() == [end] and rollout.finished.tolist() == [True]
    stop_alike(policy.model, tokenizer)
    policy.model.generation_config.save_pretrained(tmp_path / "written")
    assert generation_settings(str(tmp_path / "written")).eos_token_id == sorted([end, eos])


def test_a_folder_without_generation_settings_has_its_configurations(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "policy")
    (tmp_path / "policy" / "generation_config.json").unlink()
    config = json.loads((tmp_path / "policy" / "config.json").read_text())
    (tmp_path / "policy" / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, 5]}))
    model = Policy.from_pretrained(str(tmp_path / "policy"), dtype=torch.float32, attention="sdpa").model
    settings = generation_settings(str(tmp_path / "policy"))
    assert settings.eos_token_id == model.generation_config.eos_token_id == [2, 5]


def test_generation_settings_that_cannot_be_read_are_not_taken_for_none(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "policy")
    (tmp_path / "policy" / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match="has a generation_config.json that cannot be"):
        generation_settings(str(tmp_path / "policy"))


def test_a_policy_that_gives_no_numbers_is_refused(folder: Path, tokenizer, tmp_path: Path) -> None:
    policy = Policy.from_pretrained(str(folder), dtype=torch.float32, attention="sdpa")
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(InputError, match=f"of '{folder}'.* gives logits that are not finite"):
        draw(policy, tokenizer, requests(tokenizer))


@pytest.mark.parametrize("architecture", ["recurrent_gemma", "rwkv"])
def test_a_model_that_generates_otherwise_in_a_batch_is_refused(architecture: str, tmp_path: Path) -> None:
    """Its tokens would be drawn from another distribution than the one that is trained; one by one they are not."""
    save_model(config_of(architecture), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    try:
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, pad_token_id=0)
    except ValueError:
        # transformers 5.24 asks RecurrentGemma's cache for what it has not.
        with pytest.raises(InputError, match=r"cannot generate by transformers 5\..*; choose another"):
            check_generation(model, 0, CPU, batch_size=8)
        return
    with pytest.raises(InputError, match="generates in a batch from other probabilities .*; choose a batch size of 1"):
        check_generation(model, 0, CPU, batch_size=8)
    check_generation(model, 0, CPU, batch_size=1)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mamba", "bloom"])
def test_what_generates_as_it_is_trained_is_found_once(architecture: str, batch_size: int, tmp_path: Path) -> None:
    save_model(config_of(architecture), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    state = torch.get_rng_state()
    check_generation(model, 0, CPU, batch_size)
    assert torch.equal(torch.get_rng_state(), state)
    model.generate = None  # not looked at again
    check_generation(model, 0, CPU, batch_size)
