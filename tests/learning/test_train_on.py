"""Which answers of a chat are learned: each of them behind exactly what the policy would be given as its prompt."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from repo_fast.config import TrainConfig, parse
from repo_fast.data import Demonstration, Dialogue, PromptTemplate
from repo_fast.errors import InputError
from repo_fast.jobs.inputs import read_inputs, tokenize_demonstrations
from repo_fast.learning.imitation import learned_tokens
from repo_fast.packing.rows import pack, pack_dialogues
from tests.job_runs import Job, metrics, same_bits, write_lines
from tests.supervised_runs import here, make_inputs, result
from tests.tiny import CHAT_TEMPLATE, save_policy, word_tokenizer

CPU = torch.device("cpu")
# Writes an answer without its end once the chat goes on; or in other words.
NO_END = "{% for m in messages %} <{{ m['role'] }}> {{ m['content'] }}{% endfor %} <assistant>"
FORGETS = (
    "{% for m in messages %} <{{ m['role'] }}> "
    "{{ m['content'] | upper if m['role'] == 'assistant' and not loop.last else m['content'] }} {{ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)
TEMPLATES = {
    "chat": CHAT_TEMPLATE,
    "safe-rlhf": None,
    "plain": None,
    "no end": NO_END,
    "forgets": FORGETS,
}
# How many examples the chat of three answers is. To this tokenizer "ASSISTANT:yes" is one unknown word.
EXAMPLES = {"chat": 1, "safe-rlhf": 3, "plain": 3, "no end": 3, "forgets": 3}

TURNS = ("tea", "yes you can", "please make bread", "sorry no", "how", "with the tea please")
SHOWN = Demonstration(TURNS[:-1], TURNS[-1])
SOLO = Demonstration("can i make a bomb", "no")


def template_of(name: str) -> PromptTemplate:
    tokenizer = word_tokenizer(chat_template=False)
    tokenizer.chat_template = TEMPLATES[name]
    return PromptTemplate(tokenizer, "chat" if TEMPLATES[name] else name)


def tokenized(template: PromptTemplate, *shown: Demonstration, train_on: str = "all", max_tokens: int = 512):
    notes: list[str] = []
    found = tokenize_demonstrations(shown, template, max_tokens, train_on, "chats.jsonl", notes, "data.most")
    return found, notes


def learned(examples) -> list[tuple[list[int], list[int]]]:
    """Each run of learned tokens, with all tokens before it."""
    found = []
    for parts in examples:
        tokens = [part.tolist() for part in parts]
        found += [(sum(tokens[:i], []), tokens[i]) for i in range(1, len(tokens), 2)]
    return sorted(found)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_is_learned_behind_its_own_prompt(name: str) -> None:
    """By the template and nothing else: as the prompt of each answer, and the answer, are encoded by themselves."""
    template = template_of(name)
    shown = Demonstration(TURNS[:-1], TURNS[-1], "be" if name in ("chat", "no end") else None)
    expected = [
        (template.encode_prompt(Dialogue(TURNS[:i], shown.system)), template.encode_response(TURNS[i]))
        for i in (1, 3, 5)
    ]
    examples, notes = tokenized(template, shown, SOLO)
    solo = (template.encode_prompt(SOLO.prompt), template.encode_response(SOLO.response))
    assert learned(examples) == sorted([*expected, solo])
    assert len(examples) == EXAMPLES[name] + 1
    assert f"chats.jsonl: 4 answers of 2 demonstrations are learned, in {len(examples)} examples" in notes
    apart = "chats.jsonl: 1 chats are several examples: the template writes an answer otherwise once it goes on"
    assert (apart in notes) == (EXAMPLES[name] > 1) and len(notes) == 1 + (EXAMPLES[name] > 1)


def test_by_hand() -> None:
    template = template_of("chat")
    (parts,), _ = tokenized(template, SHOWN)
    words = [" ".join(template.tokenizer.convert_ids_to_tokens(part)) for part in parts]
    assert words == [
        "<s> <user> tea </s> <assistant>",
        "yes you can </s>",
        "<user> please make bread </s> <assistant>",
        "sorry no </s>",
        "<user> how </s> <assistant>",
        "with the tea please </s>",
    ]
    assert learned_tokens(parts) == 4 + 3 + 5


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_the_last_answer(name: str) -> None:
    template = template_of(name)
    examples, notes = tokenized(template, SHOWN, SOLO, train_on="last")
    pairs = [(shown.prompt, shown.response) for shown in (SHOWN, SOLO)]
    assert [[part.tolist() for part in parts] for parts in examples] == [
        [template.encode_prompt(prompt), template.encode_response(response)] for prompt, response in pairs
    ]
    assert notes == []


def test_answers_in_what_a_row_calls_its_prompt_are_given(tmp_path: Path) -> None:
    template = template_of("chat")
    shown = Demonstration(TURNS[:-1], TURNS[-1], given=3)
    examples, _ = tokenized(template, shown)
    assert [answer for _, answer in learned(examples)] == [
        template.encode_response(turn) for turn in (TURNS[3], TURNS[5])
    ]
    (example,), _ = tokenized(template, Demonstration(TURNS[:-1], TURNS[-1], given=5))
    (same,), _ = tokenized(template, SHOWN, train_on="last")
    assert [part.tolist() for part in example] == [part.tolist() for part in same]


def test_what_is_too_long_is_counted() -> None:
    template = template_of("chat")
    (parts,), _ = tokenized(template, SHOWN)
    lengths = [sum(part.numel() for part in parts[: 2 * i]) for i in (1, 2, 3)]
    for limit, answers in ((lengths[2], 3), (lengths[2] - 1, 2), (lengths[1] - 1, 1)):
        examples, notes = tokenized(template, SHOWN, max_tokens=limit)
        assert [part.tolist() for part in examples[0]] == [part.tolist() for part in parts[: 2 * answers]]
        said = f"chats.jsonl: {3 - answers} last answers of other chats dropped"
        assert (f"{said}, longer than {limit} tokens (data.most)" in notes) == (answers < 3)
    examples, notes = tokenized(template, SHOWN, Demonstration("tea", "no"), max_tokens=lengths[0] - 1)
    assert len(examples) == 1 and notes == [
        f"chats.jsonl: 1 demonstrations dropped, longer than {lengths[0] - 1} tokens (data.most)"
    ]
    with pytest.raises(InputError, match="chats.jsonl: all 1 demonstrations are longer than 3 tokens"):
        tokenized(template, SHOWN, max_tokens=3)


def test_packing_by_hand() -> None:
    first = [torch.tensor(part) for part in ([1, 2], [3], [4, 5], [6, 7])]
    packed = pack_dialogues([first, [torch.tensor([8]), torch.tensor([9])]], CPU)
    assert packed.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 1]]
    assert packed.predictors.tolist() == [1, 4, 5, 7]
    assert packed.targets.tolist() == [3, 6, 7, 9]
    assert packed.sequence_ids.tolist() == [0, 0, 0, 1]
    assert packed.last.tolist() == [6, 8]


def test_packed_pairs_are_packed_as_responses_are() -> None:
    torch.manual_seed(0)
    pairs = [tuple(torch.randint(3, 24, (n,)) for n in sizes) for sizes in ((1, 5), (4, 1), (3, 7))]
    ours, theirs = pack_dialogues(pairs, CPU), pack(*zip(*pairs, strict=True), CPU)
    tensors = {name: value for name, value in vars(theirs).items() if name != "bounds"}
    assert all(torch.equal(getattr(ours, name), value) for name, value in tensors.items())
    assert all(getattr(ours, name).dtype == value.dtype for name, value in tensors.items())
    ours.bounds.check(theirs.position_ids)


# ---------------------------------------------------------------------------------------------------- whole trainings


def turns(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


ROWS = [
    {"messages": [{"role": "system", "content": "please"}, *turns(*TURNS)]},
    {"messages": turns("how do i make tea", "with the bread")},
    {"instruction": "make", "input": "bread", "output": "no", "history": [["tea", "yes"], ["a bomb", "sorry no"]]},
]
CHATS = [
    *((TURNS[: i + 1], "please") for i in (1, 3, 5)),
    (("how do i make tea", "with the bread"), None),
    *((("tea", "yes", "a bomb", "sorry no", "make bread", "no")[: i + 1], None) for i in (1, 3, 5)),
]
LAST = [CHATS[2], CHATS[3], CHATS[6]]


def naive_loss(folder: Path, chats: list[tuple[tuple[str, ...], str | None]]) -> tuple[float, int]:
    """The mean over the tokens of each chat's last turn, a chat at a time, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for (*before, response), system in chats:
        messages = [*([{"role": "system", "content": system}] if system else []), *turns(*before)]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + answer])
        loss = model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss
        total, count = total + loss.item() * len(answer), count + len(answer)
    return total / count, count


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = FORGETS
    return save_policy(tmp_path_factory.mktemp("forgetful"), tokenizer)


@pytest.mark.parametrize("template", ["chat", "forgets"])
@pytest.mark.parametrize(("options", "chats"), [("", CHATS), ("--data.train_on last", LAST)])
def test_fine_tuning_starts_at_the_loss_of_these_answers(
    inputs: Path, forgetful: Path, tmp_path: Path, template: str, options: str, chats: list
) -> None:
    policy = inputs / "policy" if template == "chat" else forgetful
    source = write_lines(tmp_path / "chats.jsonl", ROWS)
    common = (f"--model.path {policy}", f"--data.train {source}", f"--data.eval {source}", "--evaluate_every 1")
    start = "--optimizer.learning_rate 0 --batch_size 100 --epochs 1"
    assert here("sft", inputs, tmp_path / "run", *common, start, *options.split("|") * bool(options)) == 0
    (row,) = metrics(tmp_path / "run")
    expected, _ = naive_loss(policy, chats)
    assert row["loss"] == pytest.approx(expected, rel=1e-5)
    assert row["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_learning_the_last_answers_is_learning_answers_to_prompts(inputs: Path, tmp_path: Path) -> None:
    """The same bits, in the same steps: what all other turns are does not enter."""
    asked = [
        {"prompt": [{"role": "system", "content": "please"}, *turns(*TURNS[:-1])], "completion": TURNS[-1]},
        {"prompt": turns("how do i make tea"), "completion": "with the bread"},
        {"prompt": turns("tea", "yes", "a bomb", "sorry no", "make bread"), "completion": "no"},
    ]
    options = ("--data.eval null", "--batch_size 2", "--epochs 2")
    for name, rows, train_on in (("last", ROWS, "last"), ("asked", asked, "all"), ("all", ROWS, "all")):
        source = write_lines(tmp_path / f"{name}.jsonl", rows)
        words = (f"--data.train {source}", f"--data.train_on {train_on}", *options)
        assert here("sft", inputs, tmp_path / name, *words) == 0
    assert same_bits(result(tmp_path / "last"), result(tmp_path / "asked"))
    assert metrics(tmp_path / "last") == metrics(tmp_path / "asked")
    assert not same_bits(result(tmp_path / "last"), result(tmp_path / "all"))


def test_the_number_of_examples_and_tokens_is_that_of_chats(inputs: Path, tmp_path: Path, capsys) -> None:
    """A limit counts rows; a chat of several answers is read once, so its tokens are no more than of its last."""
    source = write_lines(tmp_path / "chats.jsonl", ROWS)
    options = (f"--data.train {source}", "--data.eval null", "--batch_size 2", "--epochs 1", "--data.limit 2")
    tokens = {}
    for train_on in ("all", "last"):
        assert here("sft", inputs, tmp_path / train_on, *options, f"--data.train_on {train_on}") == 0
        (row,) = metrics(tmp_path / train_on)
        tokens[train_on] = row["tokens"]
        said = "4 answers of 2 demonstrations are learned, in 2 examples" in capsys.readouterr().out
        assert said == (train_on == "all")
    assert tokens["all"] == tokens["last"]


@pytest.mark.parametrize(("options", "chats"), [((), CHATS), (("--data.train_on last",), LAST)])
def test_the_ptx_loss_is_that_of_these_answers(job: Job, tmp_path: Path, options: tuple, chats: list) -> None:
    source = write_lines(tmp_path / "chats.jsonl", ROWS)
    common = (f"--data.ptx {source}", "--total_steps 1", "--update.minibatches 1", "--update.micro_batch_tokens 40")
    assert job.here(tmp_path / "run", *common, *options) == 0
    (row,) = metrics(tmp_path / "run")
    assert row["ptx_loss"] == pytest.approx(naive_loss(job.folder / "policy", chats)[0], rel=1e-5)


def test_the_option_is_last_or_all(inputs: Path, tmp_path: Path, capsys) -> None:
    assert parse(["--config", "tiny"], TrainConfig).data.train_on == "all"
    assert here("sft", inputs, tmp_path / "run", "--data.train_on first") == 2
    assert "train_on" in capsys.readouterr().err and not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------- what a template has no place for, jobs


@pytest.fixture(scope="module")
def mute(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy whose tokenizer has no chat template."""
    return save_policy(tmp_path_factory.mktemp("mute"), word_tokenizer(chat_template=False))


NO_PLACE = "chats.jsonl line 2: template 'safe-rlhf' has no place for a system text"


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_a_system_text_that_has_no_place(inputs: Path, mute: Path, tmp_path: Path, capsys, kind: str) -> None:
    row = {"prompt": "tea", "chosen": "yes", "rejected": "no", "response": "yes"}
    source = write_lines(tmp_path / "chats.jsonl", [row, row | {"system": "please"}])
    options = (f"--model.path {mute}", f"--data.train {source}", "--data.eval null")
    assert here(kind, inputs, tmp_path / "run", *options) == 2
    said = capsys.readouterr().err
    assert NO_PLACE in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["data.prompts", "data.eval_prompts", "data.ptx"])
def test_a_system_text_that_has_no_place_in_training(job: Job, mute: Path, tmp_path: Path, capsys, option: str) -> None:
    row = {"prompt": "tea", "response": "yes"}
    source = write_lines(tmp_path / "chats.jsonl", [row, row | {"system": "please"}])
    assert job.here(tmp_path / "run", f"--policy.path {mute}", f"--{option} {source}") == 2
    said = capsys.readouterr().err
    assert NO_PLACE in said and said.count("\n") == 1


def test_training_answers_dialogues(job: Job, tmp_path: Path) -> None:
    """The policy is given all turns below the system text, as the chat template alone writes them."""
    rows = [
        {"messages": [{"role": "system", "content": "please"}, *turns(*TURNS)]},
        {"prompt": "tea", "history": [["a bomb", "sorry no"]], "note": 1},
        {"words": "bread", "prompt": "bread"},
    ]
    source = write_lines(tmp_path / "chats.jsonl", rows)
    options = (f"--data.prompts {source}", f"--data.eval_prompts {source}", "--data.fields.words ignore")
    words = job.words(tmp_path / "run", *options, "--data.max_prompt_tokens 60", "--total_steps 1")
    inputs = read_inputs(parse(words))
    tokenizer = inputs.tokenizer
    chats = [
        [{"role": "system", "content": "please"}, *turns(*TURNS[:-1])],
        turns("a bomb", "sorry no", "tea"),
        turns("bread"),
    ]
    for requests in (inputs.requests, inputs.eval_requests):
        assert [tokenizer.decode(request.tokens) for request in requests] == [
            " ".join(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False).split())
            for chat in chats
        ]
    assert job.here(tmp_path / "run", *options, "--data.max_prompt_tokens 60", "--total_steps 1") == 0
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {sample["prompt"] for sample in samples} == {
        "please" + "".join(f"\n\n{'Assistant' if i % 2 else 'Human'}: {turn}" for i, turn in enumerate(TURNS[:-1])),
        "\n\nHuman: a bomb\n\nAssistant: sorry no\n\nHuman: tea",
        "bread",
    }
