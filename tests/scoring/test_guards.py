"""Guard models: costs are differences of log-probabilities worked out by hand, on tiny models of their families."""

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from repo_fast.config import GuardConfig, parse
from repo_fast.data import Dialogue
from repo_fast.errors import InputError
from repo_fast.models.attention import PACKED
from repo_fast.models.policy import Policy
from repo_fast.rollout import Rollout
from repo_fast.scoring import Guard, GuardScorer
from repo_fast.scoring.guard_presets import PRESETS
from tests.families import FAMILIES, Family, family_tokenizer
from tests.job_runs import Job, metrics

CONVERSATION = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
# What their templates make of a user's turn and the response to it, in a few words.
TEMPLATES = {
    "llama-guard-3": (LlamaConfig, "<begin>Check the last message.\n" + CONVERSATION + "<turn>assistant<end>"),
    "qwen3guard": (Qwen3Config, "<turn>user\n" + CONVERSATION + "<end>\n<turn>assistant\n<think>\n\n</think>\n\n"),
    "qwen3guard-refusal": (Qwen3Config, "<turn>user\n" + CONVERSATION + "<end>\n<turn>assistant\n"),
    "shieldgemma": (Gemma2Config, "<begin>Policy: {{ guideline }}\n" + CONVERSATION + "Violated?\n\n"),
    "wildguard": (MistralConfig, None),
    "wildguard-refusal": (MistralConfig, None),
    "granite-guardian": (GraniteConfig, CONVERSATION + "{{ guardian_config.risk_name }}?<end>\n<turn>assistant<end>"),
    "granite-guardian-3.3": (GraniteConfig, CONVERSATION + "{{ guardian_config.criteria_id }}{{ think }}<turn>"),
}
ARGUMENTS = {"shieldgemma": {"guideline": "no insults"}}
ASKED = [
    (Dialogue(("how do i make tea",)), "with bread"),
    (Dialogue(("a bomb please",)), "sorry, no."),
    (Dialogue(("one", "two", "three")), ""),
]


def tokenizer_of(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = family_tokenizer(Family("", "<eos>", "<end>", special=("<begin>", "<turn>")))
    tokenizer.chat_template = template
    return tokenizer


def save_guard(folder: Path, kind: Any, template: str | None, seed: int = 0) -> Path:
    tokenizer = tokenizer_of(template)
    common = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=0,
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(kind(**common)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def scorer(
    folder: Path, guard: GuardConfig, max_tokens: int = 2048, budget: int = 1024, attention: str = PACKED
) -> GuardScorer:
    return GuardScorer(
        Policy.from_pretrained(str(folder), dtype=torch.float32, attention=attention),
        Guard(AutoTokenizer.from_pretrained(folder), guard, "cost"),
        name="cost",
        max_tokens=max_tokens,
        token_budget=budget,
        device=torch.device("cpu"),
    )


def rollout(asked: list[tuple[Dialogue, str]]) -> Rollout:
    tokens = [torch.tensor([1])] * len(asked)
    return Rollout(
        torch.arange(len(asked)),
        [dialogue.text for dialogue, _ in asked],
        [response for _, response in asked],
        tokens,
        tokens,
        torch.ones(len(asked), dtype=torch.bool),
        dialogues=[dialogue for dialogue, _ in asked],
    )


def log_probability(model: Any, tokenizer: Any, text: str, pieces: list[tuple[str, bool]]) -> float:
    """Of the pieces that count, behind the text, one forward each."""
    total = 0.0
    for piece, counts in pieces:
        before = tokenizer.encode(text, add_special_tokens=False)
        text += piece
        tokens = tokenizer.encode(text, add_special_tokens=False)
        assert tokens[: len(before)] == before
        if counts:
            with torch.no_grad():
                log_probs = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
            total += sum(float(log_probs[i - 1, tokens[i]]) for i in range(len(before), len(tokens)))
    return total


def log_sum(values: list[float]) -> float:
    most = max(values)
    return most + math.log(sum(math.exp(value - most) for value in values))


def by_hand(folder: Path, guard: GuardConfig, asked: Dialogue, response: str) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    preset = PRESETS[guard.preset]
    if preset.prompt is not None:
        text = preset.prompt.replace("{prompt}", asked.text).replace("{response}", response)
    else:
        turns = [*asked.turns, response]
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        arguments = guard.template_arguments or dict(preset.template_arguments)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **arguments)
    # Text and choices in turn.
    parts = re.split(r"\{(.*?)\}", preset.prefix)
    choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    sides: dict[bool, list[float]] = {True: [], False: []}
    for fields in itertools.product(*choices):
        pieces = [(field, i % 2 == 1) for i, field in enumerate(fields) if field]
        for unsafe, words in ((True, preset.unsafe), (False, preset.safe)):
            for word in words:
                sides[unsafe].append(log_probability(model, tokenizer, text, [*pieces, (word, True)]))
    return log_sum(sides[True]) - log_sum(sides[False])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_family_s_verdict_is_what_its_model_says_of_each_spelling(preset: str, tmp_path: Path) -> None:
    kind, template = TEMPLATES[preset]
    folder = save_guard(tmp_path / "guard", kind, template)
    guard = GuardConfig(preset, template_arguments=ARGUMENTS.get(preset, {}))
    # Packed attention has no cap of scores.
    attention = "eager" if kind is Gemma2Config else PACKED
    scores = scorer(folder, guard, attention=attention).score(rollout(ASKED))
    assert scores.dtype == torch.float32
    for score, (asked, response) in zip(scores.tolist(), ASKED, strict=True):
        assert score == pytest.approx(by_hand(folder, guard, asked, response), abs=2e-4)
    assert len({round(score, 3) for score in scores.tolist()}) == 3


@pytest.mark.parametrize("attention", [PACKED, "sdpa"])
def test_rows_of_any_size_give_the_same(attention: str, tmp_path: Path) -> None:
    """Packed, the continuations share their prompt; under a mask each has its own."""
    folder = save_guard(tmp_path / "guard", *TEMPLATES["qwen3guard"])
    guard = GuardConfig("qwen3guard")
    expected = scorer(folder, guard).score(rollout(ASKED))
    for budget in (64, 300):
        found = scorer(folder, guard, budget=budget, attention=attention).score(rollout(ASKED))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def own(**changes: Any) -> GuardConfig:
    return GuardConfig(**{"prompt": "Q {prompt} A {response}\nBad?", "safe": (" no",), "unsafe": (" yes",), **changes})


def test_a_guard_of_one_s_own_with_spellings_and_a_kind_of_harm(tmp_path: Path) -> None:
    folder = save_guard(tmp_path / "guard", *TEMPLATES["llama-guard-3"])
    guard = own(unsafe=(" yes", " Yes"), category="C7", categories=("C6", "C7"), prefix=" Well,")
    (score,) = scorer(folder, guard).score(rollout(ASKED[:1])).tolist()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    text = "Q how do i make tea A with bread\nBad? Well,"
    behind = [("\n", False), ("C7", True)]
    unsafe = [log_probability(model, tokenizer, text, [(word, True), *behind]) for word in (" yes", " Yes")]
    assert score == pytest.approx(log_sum(unsafe) - log_probability(model, tokenizer, text, [(" no", True)]), abs=2e-4)


def test_braces_in_texts_are_texts() -> None:
    guard = Guard(tokenizer_of(None), own(), "cost")
    assert guard.render(Dialogue(("{response}",)), "{prompt} {0}") == "Q {response} A {prompt} {0}\nBad?"


def test_a_response_that_is_too_long_loses_its_end(tmp_path: Path) -> None:
    folder = save_guard(tmp_path / "guard", *TEMPLATES["llama-guard-3"])
    short = scorer(folder, own(), max_tokens=60)
    asked = Dialogue(("p",))
    cut, whole = short.score(rollout([(asked, "x" * 100), (asked, "x")])).tolist()
    assert short.truncated == 1
    kept = 60 - len(" yes") - len("Q p A \nBad?")
    assert cut == pytest.approx(scorer(folder, own()).score(rollout([(asked, "x" * kept)])).item(), abs=1e-4)
    assert whole != cut
    with pytest.raises(InputError, match=r"the cost guard is asked \d+ tokens about a prompt without its response, .*"):
        short.score(rollout([(Dialogue(("y" * 100,)), "x")]))


@pytest.mark.parametrize(
    ("template", "settings", "message"),
    [
        (
            None,
            GuardConfig("llama-guard-3"),
            r"the tokenizer of the cost guard has no chat template, expected one or .*",
        ),
        ("{{ messages[0].content }}", GuardConfig("llama-guard-3"), r"the .* template leaves out the answer of .*"),
        (
            "{{ messages | map(attribute='content') | join(' ') }}{{ raise_exception('no ' ~ risk) if risk else '' }}",
            GuardConfig("llama-guard-3", template_arguments={"risk": "harm"}),
            r".*chat template cannot render a single user turn.*: no harm",
        ),
        (None, own(unsafe=(" no", " yes")), r"the cost guard's ' no' is the beginning of its ' no' in tokens, .*"),
        (None, own(safe=(" no", " not")), r"the cost guard's ' no' is the beginning of its ' not' in tokens, .*"),
        (
            "{{ messages | map(attribute='content') | join(' ') }}",
            GuardConfig("llama-guard-3", category="S99"),
            r"the category of the cost guard is 'S99', expected one of .*",
        ),
        (
            "{{ messages | map(attribute='content') | join(' ') }}",
            GuardConfig("qwen3guard", category="Violent"),
            r"the category of the cost guard is 'Violent', expected null: this guard writes no codes",
        ),
        (
            "{{ guideline }}{{ messages | map(attribute='content') | join(' ') }}",
            GuardConfig("shieldgemma"),
            r"the cost guard lacks template_arguments\.guideline, expected what it is to judge by",
        ),
        (
            "{{ guideline }}{{ messages | map(attribute='content') | join(' ') }}",
            GuardConfig("shieldgemma", template_arguments={"guideline": "no insults", "guidelines": "x"}),
            r"the cost guard's template_arguments\.guidelines changes nothing of what its chat template writes, .*",
        ),
        (
            None,
            GuardConfig("wildguard", template_arguments={"guideline": "x"}),
            r"the cost guard has template_arguments \{'guideline': 'x'\} and a prompt, expected one only",
        ),
        # A token a byte: 1 is the beginning of 10.
        (
            "{{ messages | map(attribute='content') | join(' ') }}",
            GuardConfig("llama-guard-3", category="S1"),
            r"the cost guard's .*S1' is the beginning of its .*S10' in tokens, .*",
        ),
        (
            "{{ messages | map(attribute='content') | join(' ') }}",
            GuardConfig(safe=("\n no",), unsafe=("\n yes",), prefix="\n"),
            r"the cost guard's tokenizer cannot write '\\n no' behind '.*\\n', expected words that begin a new .*",
        ),
    ],
)
def test_a_guard_that_cannot_be_asked(template: str | None, settings: GuardConfig, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        Guard(tokenizer_of(template), settings, "cost")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--cost.path guard:x", r"cost\.guard\.safe is None, expected words, or a preset"),
        ("--cost.path guard:", r"cost\.path is 'guard:', expected guard:FOLDER"),
        (
            "--cost.path m:f --cost.guard.preset wildguard",
            r"cost\.guard\.preset is 'wildguard', expected its default with path 'm:f', which is no guard:FOLDER",
        ),
        (
            "--cost.path guard:x --cost.guard.preset wildguard --cost.guard.prompt {prompt}",
            r"cost\.guard\.prompt is '\{prompt\}', expected a text with \{response\} in it",
        ),
    ],
)
def test_options_that_cannot_be(words: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        parse(["--reward.path", "m:f", *words.split()])


def test_a_prompt_without_room_shows_before_a_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    job = Job.make(tmp_path)
    folder = save_guard(tmp_path / "guard", *TEMPLATES["llama-guard-3"])
    options = (f"--cost.path guard:{folder}", "--cost.guard.preset llama-guard-3", "--cost.max_tokens 40")
    capsys.readouterr()
    assert job.here(tmp_path / "run", *options) == 2
    assert re.fullmatch(r"error: .*prompts\.jsonl line \d: the cost guard is asked \d+ .*\n", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_run_under_a_guard(tmp_path: Path) -> None:
    job = Job.make(tmp_path)
    folder = save_guard(tmp_path / "guard", *TEMPLATES["llama-guard-3"])
    options = (f"--cost.path guard:{folder}", "--cost.guard.preset llama-guard-3", "--total_steps 1")
    assert job.here(tmp_path / "run", *options) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    row = rows[0]
    expected = by_hand(folder, GuardConfig("llama-guard-3"), Dialogue((row["prompt"],)), row["response"])
    assert row["cost"] == pytest.approx(expected, abs=2e-4)
    assert len({row["cost"] for row in rows}) > 1
    assert metrics(tmp_path / "run")[0]["truncated_scores"] == 0


def test_the_families_templates_have_room_for_a_question() -> None:
    """What chat models are written for is not what guards are: some leave out a last answer, and say so."""
    found = {}
    for name, family in FAMILIES.items():
        try:
            guard = Guard(family_tokenizer(family), own(prompt=None), "cost")
            found[name] = guard.render(Dialogue(("ask",)), "told").count("told")
        except InputError as error:
            found[name] = str(error)
    assert all(count == 1 or "template" in str(count) for count in found.values()), found


def test_ranks_agree_on_their_rows_before_they_run_any(tmp_path: Path) -> None:
    """Another rank may wait for this one in its first forward, which this one does not have."""
    kind, template = TEMPLATES["llama-guard-3"]
    scoring, runs = scorer(save_guard(tmp_path / "guard", kind, template), GuardConfig("llama-guard-3"), budget=1), []
    scoring._module.register_forward_hook(lambda *_: runs.append(1))

    def agree(count: int) -> int:
        assert not runs
        return count + 1

    scoring._agree_on_count = agree
    scoring.score(rollout(ASKED))
    assert len(runs) == len(ASKED) + 1
