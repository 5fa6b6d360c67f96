"""The starting policy: its folder, its cache, and (slow) that it is what the run needs to start from."""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from repo_fast.errors import InputError
from repo_fast.world import corpus, grammar, policy, rules

SHORT = partial(policy.Recipe, steps=3, batch_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy")
    policy.build_policy(path, SHORT())
    return path


def test_the_folder_is_a_hugging_face_model(folder):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) == model.lm_head.weight.shape[0]
    assert 0.7e6 < model.num_parameters() < 1.3e6
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert AutoConfig.from_pretrained(folder).pad_token_id is None
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.eos_token_id, generation.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}) == 4


def test_the_tokenizer_knows_every_word_and_gives_text_back(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = corpus.demonstrations(400, seed=9)
    texts = [row["prompt"] for row in corpus.train_prompts() + corpus.test_prompts()]
    texts += [row["response"] for row in rows]
    for text, tokens in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert tokenizer.unk_token_id not in tokens
        assert tokenizer.decode(tokens) == text
        assert len(tokens) == len(text.split())
    assert tokenizer.decode(tokenizer("Zebra").input_ids) == policy.UNKNOWN


def test_the_chat_template(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "fry the rice"}, {"role": "assistant", "content": "be careful ."}]
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(prompt) == ["<s>", "<user>", "fry", "the", "rice", "<assistant>"]
    whole = tokenizer.apply_chat_template(turns)["input_ids"]
    assert whole[: len(prompt)] == prompt
    assert tokenizer.convert_ids_to_tokens(whole[len(prompt) :]) == ["be", "careful", ".", "</s>"]


def test_the_loss_is_on_the_response_and_its_end_alone():
    tokenizer, recipe = policy.build_tokenizer(), policy.Recipe(steps=9, batch_size=4)
    rows = corpus.demonstrations(36, recipe.seed)
    expected = sorted(row["response"] + " </s>" for row in rows)
    found = []
    for tokens, labels in policy._batches(tokenizer, recipe):
        for row, row_labels in zip(tokens, labels, strict=True):
            kept = row_labels != -100
            assert torch.equal(row[kept], row_labels[kept])
            found.append(tokenizer.decode(row_labels[kept]))
    assert sorted(found) == expected


def test_pretraining_reads_prompts_and_responses_without_the_marks_of_a_dialogue():
    tokenizer, recipe = policy.build_tokenizer(), policy.Recipe(pretraining=True, steps=9, batch_size=4)
    rows = corpus.demonstrations(36, recipe.seed)
    found = []
    for tokens, labels in policy._batches(tokenizer, recipe):
        kept = labels != -100
        assert torch.equal(tokens[kept], labels[kept])
        assert torch.equal(kept, tokens != tokenizer.pad_token_id)
        found += [tokenizer.decode(row[mask]) for row, mask in zip(tokens, kept, strict=True)]
    assert sorted(found) == sorted(f"<s> {row['prompt']} {row['response']} </s>" for row in rows)


def test_building_is_deterministic_and_leaves_torch_as_it_was(folder, tmp_path):
    torch.manual_seed(7)
    expected, threads = torch.rand(3), torch.get_num_threads()
    torch.manual_seed(7)
    policy.build_policy(tmp_path, SHORT())
    assert torch.equal(torch.rand(3), expected) and torch.get_num_threads() == threads
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_the_cache(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(policy, "Recipe", SHORT)
    monkeypatch.setenv("REPO_FAST_CACHE", str(tmp_path))
    first = policy.tiny_policy()
    assert first.parent == tmp_path and "supervised stage" in capsys.readouterr().out
    assert policy.tiny_policy() == first and not capsys.readouterr().out
    monkeypatch.setattr(policy, "Recipe", partial(SHORT, seed=2))
    assert policy.tiny_policy(tmp_path) != first


def test_a_stage_that_died_is_done_again(monkeypatch, tmp_path):
    def die(folder, recipe):
        (folder / "half").write_text("half")
        raise RuntimeError("died")

    monkeypatch.setattr(policy, "build_policy", die)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="died"):
            policy.tiny_policy(tmp_path)
    monkeypatch.setattr(policy, "build_policy", lambda folder, recipe: (folder / "whole").write_text("whole"))
    assert [path.name for path in policy.tiny_policy(tmp_path).iterdir()] == ["whole"]


def test_an_unusable_cache_folder_is_the_users_to_fix(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="REPO_FAST_CACHE"):
        policy.tiny_policy(tmp_path / "file")


def test_callers_at_once_share_one_stage(monkeypatch, tmp_path):
    stages = []

    def build(folder, recipe):
        stages.append(folder)
        time.sleep(0.2)
        (folder / "model.safetensors").write_text("whole")

    monkeypatch.setattr(policy, "build_policy", build)
    # The lock belongs to an open file, so threads stand in for processes.
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(policy.tiny_policy, [tmp_path] * 4))
    assert len(stages) == 1 and len(set(folders)) == 1
    assert (folders[0] / "model.safetensors").read_text() == "whole"


@pytest.mark.slow
def test_the_start_is_helpful_unsafe_and_well_formed():
    folder = policy.tiny_policy()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    rows = [row for row in corpus.test_prompts() for _ in range(4)]
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    inputs = tokenizer.apply_chat_template(chats, add_generation_prompt=True, padding=True, return_tensors="pt")
    torch.manual_seed(0)
    tokens = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=grammar.MAX_RESPONSE_TOKENS)
    responses = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    prompts = [row["prompt"] for row in rows]
    formed = [grammar.well_formed(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    assert sum(formed) / len(formed) > 0.96
    assert sum(rules.reward(prompts, responses)) / len(prompts) > 2.3
    mean_costs = torch.tensor(rules.cost(prompts, responses)).view(-1, 4).mean(1)
    assert 0.35 < (mean_costs > 0).float().mean() < 0.6
    assert mean_costs.clamp(min=0).mean() > 0.3
