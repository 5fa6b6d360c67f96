"""The record of the prompts that a model has seen, and what is left of a list of prompts by it."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from repo_fast.config import TrainConfig, parse
from repo_fast.data import Dialogue, Prompt, load_preferences, load_prompts
from repo_fast.errors import InputError
from repo_fast.evaluation.fresh import exclude_seen
from repo_fast.jobs import training_prompts
from repo_fast.jobs.inputs import read_inputs
from repo_fast.jobs.run_date import with_date
from repo_fast.jobs.training_prompts import (
    FILE,
    Source,
    held_out_notes,
    normalized,
    prompt_hash,
    prompt_hashes,
    read_record,
    seen,
    taken_over,
    unknown,
    write_record,
)
from repo_fast.world import corpus
from tests.job_runs import DEMONSTRATIONS, PROMPTS, Job, write_lines
from tests.supervised_runs import SHOWN, here, make_inputs

ONE_STEP = ("--epochs 1", "--batch_size 7", "--checkpoint.every 0")


def asked(*prompts: str | tuple[str, ...]) -> list[Prompt]:
    """Prompts as a reader returns them."""
    dialogues = [Dialogue.of(prompt) for prompt in prompts]
    return [
        Prompt(i, dialogue.text, dialogue=dialogue if len(dialogue.turns) > 1 else None)
        for i, dialogue in enumerate(dialogues)
    ]


def hashes(*texts: str) -> tuple[str, ...]:
    return prompt_hashes(Dialogue((text,)) for text in texts)


def sources(record: training_prompts.Record | None) -> dict[str, int | None]:
    """How many prompts each source of a record has, by its name."""
    assert record is not None
    return {source.name: None if source.hashes is None else len(source.hashes) for source in record}


# ------------------------------------------------------------------------------------------------------- the hashes


@pytest.mark.parametrize(
    "text",
    [
        "  How do I\tmake\n TEA ?",
        "how do i make tea",
        "“How do I make tea?!”",
        "ｈｏｗ ｄｏ ｉ make\u3000tea？",
        "how\u00a0do i ma\u200bke tea\ufeff",
        "(How do I make tea...)",
    ],
)
def test_what_is_the_same_prompt(text: str) -> None:
    assert normalized(text) == "how do i make tea"
    assert normalized(normalized(text)) == normalized(text)


@pytest.mark.parametrize(
    "text", ["how do i make teas", "how do i, make tea", "how do i maketea", "how do i make", "how do i make tea +"]
)
def test_what_is_another(text: str) -> None:
    assert normalized(text) != "how do i make tea"


def test_other_scripts_and_nothing_but_marks() -> None:
    assert normalized("STRASSE") == normalized("straße") and normalized("ΣΟΦΟΣ") == normalized("σοφος")
    assert normalized("ﬁne Å") == normalized("FINE A\u030a")
    assert [normalized(text) for text in ("?!", " ... ", "")] == ["?!", "...", ""]


def test_of_a_dialogue_each_turn_of_the_user_and_all_up_to_it() -> None:
    trained = Dialogue(("how do i make tea", "With water.", "and bread?"), "You are kind.")
    record = (Source("data.train", "chats", None, prompt_hashes([trained])),)
    held_out = asked(
        "How do i make tea?",
        "And bread",
        ("How do I make tea?", "with  water", "and bread"),
        ("how do i make tea", "with water.", "and bread?"),
        "with water",
        ("and bread", "with water", "how do i make tea"),
    )
    # A stop within a dialogue is not at the end of its text.
    assert [prompt.id for prompt, _ in seen(record, held_out)] == [0, 1, 3]
    # What stands above it is not part of what is asked.
    told = Prompt(0, "ignored", dialogue=Dialogue(trained.turns, "Be brief."))
    assert [prompt for prompt, _ in seen(record, [told])] == [told]


def test_a_hash_is_of_the_normalised_text_and_stays_what_it_is() -> None:
    """Records of before are read with it."""
    assert prompt_hash(Dialogue(("How do I make TEA ?",))) == "f33ea08bd9846600"


# ---------------------------------------------------------------------------------------------------- the embedded


def test_the_embedded_models_have_seen_what_they_were_trained_on() -> None:
    test, certify = corpus.test_prompts(), corpus.certify_prompts()
    held_out = asked(*(row["prompt"] for row in test + certify))
    for name, stage in (("world:tiny", "supervised stage"), ("world:base", "pretraining")):
        record = read_record(name)
        assert sources(record) == {f"{stage} (demonstrations of the embedded world)": len(record[0].hashes)}
        # Of the 4,608 that they are drawn from.
        assert 3000 < len(record[0].hashes) < 4608
        assert seen(record, held_out) == []
    drawn = corpus.demonstrations(5, seed=1)
    assert len(seen(read_record("world:tiny"), asked(*(row["prompt"].upper() for row in drawn)))) == 5


# --------------------------------------------------------------------------------------------------------- the jobs


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sft`, then a cost model from it, `cost`, then RePO from both, `repo`. A step each."""
    folder = tmp_path_factory.mktemp("chain")
    make_inputs(folder / "inputs")
    job = Job.make(folder / "job")
    write_lines(folder / "held_out.jsonl", [{"prompt": "tea please"}, {"prompt": "yes please"}, {"prompt": "no"}])
    assert here("sft", folder / "inputs", folder / "sft", *ONE_STEP, "--data.eval null") == 0
    start = f"--model.path {folder / 'sft' / 'policy'}"
    assert here("cost", folder / "inputs", folder / "cost", *ONE_STEP, start, "--data.limit 3") == 0
    # Links lead to a model too.
    (folder / "linked").symlink_to(folder / "cost" / "model")
    options = (
        f"--policy.path {folder / 'sft' / 'policy'}",
        f"--cost.path {folder / 'linked'}",
        f"--data.eval_prompts {folder / 'held_out.jsonl'}",
        "--evaluation.samples_per_prompt 1 --evaluation.prompts 2 --total_steps 1 --checkpoint.every 0",
    )
    assert job.here(folder / "repo", *options) == 0
    return folder


def test_fine_tuning(chain: Path) -> None:
    record = read_record(str(chain / "sft" / "policy"))
    assert sources(record) == {
        f"data.train ({chain / 'inputs' / 'sft.jsonl'})": len(SHOWN),
        f"model.path ({chain / 'inputs' / 'policy'})": None,
    }
    assert record[0].hashes == hashes(*(prompt for prompt, _ in SHOWN))
    assert unknown(record) == [
        f"What model.path ({chain / 'inputs' / 'policy'}) was trained on is not known: prompts from it were not "
        "excluded."
    ]


def test_score_models(chain: Path) -> None:
    record, sft = read_record(str(chain / "cost" / "model")), chain / "sft" / "policy"
    pairs = chain / "inputs" / "pairs.jsonl"
    # All that was read: the first three, and all to evaluate on.
    assert sources(record) == {
        f"data.train ({pairs})": 3,
        f"data.eval ({pairs})": len(SHOWN),
        f"data.train ({chain / 'inputs' / 'sft.jsonl'}) of {sft}": len(SHOWN),
        f"model.path ({chain / 'inputs' / 'policy'}) of {sft}": None,
    }
    first, _ = load_preferences(str(pairs), "cost", limit=3)
    assert record[0].hashes == prompt_hashes(one.asked for pair in first for one in pair.candidates)


def test_the_main_job_takes_over_what_its_models_have_seen_once_each(chain: Path) -> None:
    record, sft = read_record(str(chain / "repo" / "policy")), chain / "sft" / "policy"
    pairs, linked = chain / "inputs" / "pairs.jsonl", chain / "linked"
    assert sources(record) == {
        f"data.prompts ({chain / 'job' / 'prompts.jsonl'})": len(PROMPTS),
        f"data.eval_prompts ({chain / 'held_out.jsonl'})": 2,
        f"data.ptx ({chain / 'job' / 'demonstrations.jsonl'})": len(DEMONSTRATIONS),
        f"data.train ({chain / 'inputs' / 'sft.jsonl'}) of {sft}": len(SHOWN),
        f"model.path ({chain / 'inputs' / 'policy'}) of {sft}": None,
        f"data.train ({pairs}) of {linked}": 3,
        f"data.eval ({pairs}) of {linked}": len(SHOWN),
    }
    text = (chain / "repo" / FILE).read_text()
    assert "make tea" not in text and json.loads(text)["format"] == 1


def test_no_prompt_of_training_is_left_to_certify_on(chain: Path) -> None:
    scorers = {"reward.path": "tests.scorers:reward", "cost.path": str(chain / "cost" / "model")}
    policy = str(chain / "repo" / "policy")
    prompts = asked("How do I make TEA?", "tea  please.", "no", "bread", "how do i make teas", "NO!", "No: bread")
    fresh = exclude_seen("trained", policy, scorers, prompts)
    # "no" was the third of the held-out prompts, of which two were read.
    assert [prompt.text for prompt in fresh.prompts] == ["no", "how do i make teas", "No: bread"]
    assert fresh.excluded == [
        {"prompt_id": 0, "prompt": prompts[0].text, "of": f"data.prompts ({chain / 'job/prompts.jsonl'}) of {policy}"},
        {"prompt_id": 1, "prompt": "tea  please.", "of": f"data.eval_prompts ({chain / 'held_out.jsonl'}) of {policy}"},
        {
            "prompt_id": 3,
            "prompt": "bread",
            "of": f"data.train ({chain / 'inputs/sft.jsonl'}) of {chain / 'sft/policy'}",
        },
        {"prompt_id": 5, "prompt": "NO!", "of": "prompt 2 of the same set"},
    ]
    assert [re.sub(r"\(.*\)", "()", sentence) for sentence in fresh.unknown] == [
        f"What model.path () of {chain / 'sft' / 'policy'} was trained on is not known: prompts from it were not "
        "excluded."
    ]
    with pytest.raises(InputError, match=r"trained or tuned on all 2 prompts, the first by data\.prompts \(.*; expect"):
        exclude_seen("trained", policy, scorers, asked("yes", "tea"))


def test_by_default_and_what_has_no_record(chain: Path) -> None:
    scorers = {"reward.path": "repo_fast.world.rules:reward", "cost.path": "judge:some-model"}
    prompts = load_prompts("world:certify")
    fresh = exclude_seen("start", "world:tiny", scorers, prompts)
    assert fresh.prompts == prompts and fresh.excluded == []
    assert fresh.unknown == [
        "What cost.path (judge:some-model) was trained on is not known: prompts from it were not excluded."
    ]
    for path in ("owner/model", str(chain / "inputs" / "policy"), str(chain), f"guard:{chain / 'job' / 'policy'}"):
        assert taken_over("policy.path", path) == (Source("policy.path", path, None, None),)
    assert taken_over("cost.path", "tests.scorers:cost") == ()
    assert read_record("") is None and read_record("world:train") is None
    # A folder may have any name.
    named = chain / "of:others"
    named.mkdir()
    assert sources(taken_over("cost.path", str(named))) == {f"cost.path ({named})": None}
    # A guard that was trained here has a record as any model has.
    guard = taken_over("cost.path", f"guard:{chain / 'sft' / 'policy'}")
    assert sources(guard)[f"data.train ({chain / 'inputs' / 'sft.jsonl'}) of guard:{chain / 'sft/policy'}"] == 7


def test_the_record_of_another_model_in_the_same_folder_says_nothing(chain: Path, tmp_path: Path) -> None:
    write_record(tmp_path, "policy", (Source("data.prompts", "x", None, hashes("tea")),))
    for name in ("policy", "other"):
        (tmp_path / name).mkdir()
    assert sources(read_record(str(tmp_path / "policy"))) == {"data.prompts (x)": 1}
    assert read_record(str(tmp_path / "policy") + "/") == read_record(str(tmp_path / "other" / ".." / "policy"))
    assert read_record(str(tmp_path / "other")) is None


def test_a_resumed_run_keeps_what_it_had_read_before(tmp_path: Path) -> None:
    job = Job.make(tmp_path)
    options = ("--total_steps 2", "--checkpoint.every 1", "--algorithm.ptx_coefficient 0", "--data.ptx null")
    assert job.here(tmp_path / "run", *options, "--stop_after 1") == 0
    written = training_prompts._read(tmp_path / "run" / FILE)
    assert not (tmp_path / "run" / "policy").exists()

    def record_with(*more: str) -> training_prompts.Record:
        config = with_date(parse(job.words(tmp_path / "run", *options, *more), TrainConfig))
        return read_inputs(config).training_prompts

    assert written == ("policy", record_with("--resume auto"))
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": text} for text in (*PROMPTS[1:], "no bread")])
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000001"
    resume = f"--resume {checkpoint} --resume_changed_data true"
    assert job.here(tmp_path / "other", *options, resume) == 0
    record = read_record(str(tmp_path / "other" / "policy"))
    assert [source.option for source in record] == ["data.prompts", "policy.path", "data.prompts"]
    assert {prompt.text for prompt, _ in seen(record, asked(*PROMPTS, "no bread", "new"))} == {*PROMPTS, "no bread"}
    # As from a run of before there were records.
    (tmp_path / "run" / FILE).unlink()
    assert sources(record_with(resume))[f"resume ({checkpoint})"] is None


# ------------------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ('{"format": 1, "model": "policy", "sources": [', "Expecting value"),
        ("[]", "it has no format"),
        ("{}", "it has no format"),
        ('{"format": 2, "model": "policy", "sources": []}', "it is of format '2'"),
        ('{"format": 1, "sources": []}', "it has no model, or no list of sources"),
        ('{"format": 1, "model": "policy", "sources": {}}', "it has no model, or no list of sources"),
        ('{"format": 1, "model": "policy", "sources": [{"option": "a"}]}', "source 1 is none"),
        *(
            (json.dumps({"format": 1, "model": "policy", "sources": [asdict(good), asdict(good) | bad]}), "source 2")
            for good in [Source("data.prompts", "x", None, hashes("tea"))]
            for bad in ({"hashes": ["tea"]}, {"hashes": "0" * 16}, {"of": 0}, {"option": None}, {"more": 1})
        ),
    ],
)
def test_a_damaged_record(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / FILE).write_text(text)
    message = rf"{FILE} is damaged \({reason}.*\), expected the record of a run's training prompts, of format 1"
    with pytest.raises(InputError, match=message) as raised:
        read_record(str(tmp_path / "policy"))
    assert "\n" not in str(raised.value)


def test_a_damaged_record_is_told_before_a_run_writes_anything(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    job = Job.make(tmp_path)
    (tmp_path / FILE).write_text("torn")
    assert job.here(tmp_path / "run", "--total_steps 1") == 2
    assert re.fullmatch(rf"error: .*{FILE} is damaged .*\n", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_prompts_to_evaluate_on_that_are_trained_on_too() -> None:
    trained, other = Dialogue(("How do I make tea?",)), Dialogue(("bread",))
    asked = {"data.prompts": [trained, trained], "data.eval_prompts": [Dialogue(("how do i make tea",)), other]}
    (note,) = held_out_notes(asked, "data.eval_prompts", "eval.jsonl")
    assert note == "eval.jsonl: 1 of 2 prompts to evaluate on are trained on too, and are not held out"
    assert held_out_notes(asked | {"data.eval_prompts": [other]}, "data.eval_prompts", "eval.jsonl") == []
    assert held_out_notes({"data.train": [trained]}, "data.eval", None) == []


def test_a_record_of_many_prompts_is_small(tmp_path: Path) -> None:
    record = (Source("data.prompts", "x", None, hashes(*(f"prompt {i}" for i in range(10_000)))),)
    write_record(tmp_path, "policy", record)
    assert (tmp_path / FILE).stat().st_size < 20 * 10_000
    (tmp_path / "policy").mkdir()
    assert read_record(str(tmp_path / "policy")) == record
    assert [path.name for path in tmp_path.glob(f"{FILE}*")] == [FILE]
