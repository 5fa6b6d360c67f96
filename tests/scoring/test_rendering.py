"""A score is read at the same token where a score model is trained, where it is checked, and where it is used."""

import json

import pytest
import torch
from tokenizers import pre_tokenizers

from repo_fast.config import EvaluateConfig, parse
from repo_fast.data import Candidate, Dialogue, Preference, PromptTemplate
from repo_fast.evaluation.inputs import read_inputs as evaluation_inputs
from repo_fast.jobs.inputs import read_inputs as train_inputs
from repo_fast.jobs.score_training import _tokenize
from repo_fast.rollout import Rollout
from repo_fast.score import main as score
from repo_fast.scoring import ModelScorer, load_score_model, score_text
from repo_fast.scoring.score_models import reads_tokens_of
from tests.families import FAMILIES, family_tokenizer
from tests.job_runs import write_lines
from tests.tiny import save_beaver, save_policy, word_tokenizer

CPU = torch.device("cpu")
TURNS, ANSWERS = ("How?", "No.", "Please!"), ("Like this.", "So:\n\n- so")


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def chat(turns, answer):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate((*turns, answer))]


def alone(model, tokens):
    """The score of a row by itself, at its last token."""
    with torch.no_grad():
        hidden = model.trunk(torch.tensor([tokens])).last_hidden_state[0, -1]
        return float(model.score_head(hidden)[0])


def drawn(policy, responses, finished=True):
    """Rollouts of a policy: texts with the tokens that were drawn, the last of which ended them."""
    turns = [TURNS] * len(responses)
    return Rollout(
        prompt_ids=torch.arange(len(responses)),
        prompts=["How?"] * len(responses),
        responses=[policy.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in responses],
        prompt_tokens=[torch.tensor(policy.encode_prompt(asked)) for asked in turns],
        response_tokens=[torch.tensor(tokens) for tokens in responses],
        finished=torch.tensor([finished] * len(responses)),
        dialogues=[Dialogue(TURNS)] * len(responses),
    )


def scores_in_use(model, template, policy, rollout):
    settings = {"name": "cost", "max_tokens": 200, "token_budget": 400, "device": CPU}
    return ModelScorer(model, template, policy, **settings).score(rollout).tolist()


def test_training_check_and_use_give_one_score(family, tmp_path):
    tokenizer = family_tokenizer(family)
    path = save_beaver(tmp_path, tokenizer=tokenizer)
    model = load_score_model(str(path), dtype=torch.float32).eval()
    template = PromptTemplate(tokenizer)
    finished = [tokenizer.apply_chat_template(chat(TURNS, answer), tokenize=True)["input_ids"] for answer in ANSWERS]
    expected = [alone(model, tokens) for tokens in finished]
    # Any token more, or fewer, is seen.
    moved = [alone(model, tokens[:-1]) for tokens in finished]
    assert min(abs(a - b) for a, b in zip(expected, moved, strict=True)) > 0.01

    pair = Preference(tuple(Candidate(TURNS, answer) for answer in ANSWERS))
    (trained,) = _tokenize([pair], template, 200, "source", [])
    assert [sequence.tolist() for sequence in trained.sequences] == finished

    texts = [tokenizer.apply_chat_template(chat(TURNS, answer), tokenize=False) for answer in ANSWERS]
    assert [score_text(model, tokenizer, text) for text in texts] == pytest.approx(expected, rel=1e-4)

    for end in {family.turn_end, family.eos}:
        responses = [
            tokenizer.encode(f"{family.before}{answer}{family.after}{end}", add_special_tokens=False)
            for answer in ANSWERS
        ]
        in_use = scores_in_use(model, template, PromptTemplate(tokenizer), drawn(template, responses))
        assert in_use == pytest.approx(expected, rel=1e-4)


def test_another_tokenizer_ends_what_ended_as_its_own_template_does(family, tmp_path):
    """The policy's is one of words; the score model's template is of the family."""
    tokenizer = family_tokenizer(family)
    model = load_score_model(str(save_beaver(tmp_path, tokenizer=tokenizer)), dtype=torch.float32).eval()
    policy = PromptTemplate(word_tokenizer(["yes", "you", "can"]))
    rollout = drawn(policy, [policy.tokenizer.encode("yes you can</s>", add_special_tokens=False)])
    expected = tokenizer.apply_chat_template(chat(TURNS, "yes you can"), tokenize=True)["input_ids"]
    in_use = scores_in_use(model, PromptTemplate(tokenizer), policy, rollout)
    assert in_use == pytest.approx([alone(model, expected)], rel=1e-4)


def test_what_a_policys_template_has_it_write_around_an_answer_is_not_read_by_another(family, tmp_path):
    """The policy is of the family; the score model has a tokenizer of words, and a template of its own."""
    tokenizer, words = family_tokenizer(family), word_tokenizer(["Like", "this."])
    # One in which a space counts.
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    words.chat_template = (
        "{{ messages[0].content }} {% if messages[1:] %}{{ messages[-1].content }}{{ eos_token }}{% endif %}"
    )
    model = load_score_model(str(save_beaver(tmp_path, tokenizer=words)), dtype=torch.float32).eval()
    policy = PromptTemplate(tokenizer)
    text = f"{family.before}Like this.{family.after}{family.turn_end}"
    rollout = drawn(policy, [tokenizer.encode(text, add_special_tokens=False)])
    rollout.dialogues[0] = Dialogue(("Like",))
    expected = words.encode("Like Like this.</s>", add_special_tokens=False)
    in_use = scores_in_use(model, PromptTemplate(words), policy, rollout)
    assert in_use == pytest.approx([alone(model, expected)], rel=1e-4)


def test_nor_by_one_with_the_reads_tokens_of_and_another_template(tmp_path):
    tokenizer, other = (family_tokenizer(FAMILIES["vicuna"]) for _ in range(2))
    other.chat_template = FAMILIES["zephyr"].template
    model = load_score_model(str(save_beaver(tmp_path, tokenizer=other)), dtype=torch.float32).eval()
    policy = PromptTemplate(tokenizer)
    rollout = drawn(policy, [tokenizer.encode(" Like this. </s>", add_special_tokens=False)])
    expected = other.apply_chat_template(chat(TURNS, "Like this."), tokenize=True)["input_ids"]
    assert scores_in_use(model, PromptTemplate(other), policy, rollout) == pytest.approx(
        [alone(model, expected)], rel=1e-4
    )


def test_a_token_of_the_models_settings_may_have_ended_a_response(tmp_path):
    tokenizer = family_tokenizer(FAMILIES["chatml"])
    model = load_score_model(str(save_beaver(tmp_path, tokenizer=tokenizer)), dtype=torch.float32).eval()
    template = PromptTemplate(tokenizer)
    # One that the folder's generation settings list.
    other = tokenizer.convert_tokens_to_ids("<|im_start|>")
    rollout = drawn(template, [[*tokenizer.encode("Like this."), other]])
    expected = tokenizer.apply_chat_template(chat(TURNS, "Like this."), tokenize=True)["input_ids"]
    policy = PromptTemplate(tokenizer, end_tokens=[other])
    assert scores_in_use(model, template, policy, rollout) == pytest.approx([alone(model, expected)], rel=1e-4)


def test_a_runs_template_knows_the_tokens_of_the_models_settings(tmp_path):
    tokenizer = family_tokenizer(FAMILIES["chatml"])
    end, eos, other = (
        tokenizer.convert_tokens_to_ids(text) for text in ("<|im_end|>", "<|endoftext|>", "<|im_start|>")
    )
    folder = save_policy(tmp_path / "policy", tokenizer, eos_token_id=[other, eos])
    prompts = str(write_lines(tmp_path / "prompts.jsonl", [{"prompt": "How?"}]))
    scorers = ["--reward.path", "tests.scorers:reward", "--cost.path", "tests.scorers:cost"]
    words = ["--policy.path", str(folder), "--data.prompts", prompts, "--data.eval_prompts", "null"]
    words += ["--rollout.prompts_per_step", "1", "--evaluation.well_formed", "null"]
    assert train_inputs(parse([*words, *scorers])).template.end_tokens == {end, eos, other}
    words = [
        "--policies",
        json.dumps({"one": str(folder)}),
        "--prompts",
        prompts,
        "--output_dir",
        str(tmp_path / "out"),
    ]
    inputs = evaluation_inputs(parse([*words, *scorers], EvaluateConfig))
    assert inputs.policies["one"].template.end_tokens == {end, eos, other}


@pytest.mark.parametrize("name", ["chat", "safe-rlhf"])
def test_tokenizers_that_differ_in_their_end_of_sequence_token_alone(tmp_path, name):
    """The policy's ended the response; the score model's own stands where its template has it."""
    tokenizer, own = (family_tokenizer(FAMILIES["chatml"]) for _ in range(2))
    own.eos_token = "<|im_end|>"
    model = load_score_model(str(save_beaver(tmp_path, tokenizer=tokenizer)), dtype=torch.float32).eval()
    template, policy = PromptTemplate(tokenizer, name), PromptTemplate(own)
    assert reads_tokens_of(tokenizer, own)
    rollout = drawn(policy, [own.encode("Like this.<|im_end|>")])
    expected = template.encode_dialogue(TURNS, "Like this.")
    assert tokenizer.decode(expected).endswith("<|im_end|>\n" if name == "chat" else "Like this.<|endoftext|>")
    assert scores_in_use(model, template, policy, rollout) == pytest.approx([alone(model, expected)], rel=1e-4)


def test_templates_that_differ_in_their_ending_alone(tmp_path):
    """The score model's own ending is read, and a cut response gets none."""
    one, two = (family_tokenizer(FAMILIES["chatml"]) for _ in range(2))
    two.chat_template = two.chat_template.replace("<|im_end|>\n", "<|im_end|><|endoftext|>\n")
    assert reads_tokens_of(one, two) and not PromptTemplate(one).renders_like(PromptTemplate(two))
    model = load_score_model(str(save_beaver(tmp_path, tokenizer=two)), dtype=torch.float32).eval()
    policy = PromptTemplate(one)
    own = one.encode("Like this.")
    for finished in (True, False):
        tokens = [*own, one.convert_tokens_to_ids("<|im_end|>")] if finished else own
        expected = two.apply_chat_template(chat(TURNS, "Like this."), tokenize=True)["input_ids"]
        expected = expected if finished else expected[:-3]
        in_use = scores_in_use(model, PromptTemplate(two), policy, drawn(policy, [tokens], finished))
        assert in_use == pytest.approx([alone(model, expected)], rel=1e-4)


@pytest.mark.parametrize("name", ["chatml", "gemma"])
def test_the_score_of_a_training_run_is_the_one_that_its_check_gives(tmp_path, capsys, name):
    """A run that learns nothing writes the held-out scores down; `--check` gets the text as transformers renders it."""
    tokenizer = family_tokenizer(FAMILIES[name])
    path = save_beaver(tmp_path / "model", tokenizer=tokenizer)
    rows = [{"prompt": "How?", "chosen": ANSWERS[0], "rejected": ANSWERS[1]}]
    pairs = str(write_lines(tmp_path / "pairs.jsonl", rows))
    words = ["--kind", "reward", "--model.path", str(path), "--data.train", pairs, "--data.eval", pairs]
    words += ["--optimizer.learning_rate", "0", "--log.loggers", "[]", "--output_dir", str(tmp_path / "run")]
    assert score(words) == 0
    written = json.loads((tmp_path / "run" / "eval_scores.jsonl").read_text())
    for i, answer in enumerate(ANSWERS):
        text = tokenizer.apply_chat_template(chat(("How?",), answer), tokenize=False)
        expected = written[f"score_{i}"]
        assert score(["--check", str(path), "--kind", "reward", "--expect", text, str(expected)]) == 0
        assert f"score {expected:.4f}, as expected" in capsys.readouterr().out
