"""That what README and docs show can be run, and that all of it is there, and true.

That every command and snippet at least parses is tested in `tests/test_shown_commands.py`.
"""

import contextlib
import json
import re
import shlex
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import repo_fast.__main__
import repo_fast.score
import repo_fast.sft
from docs import measures, options, tools
from repo_fast.__main__ import _LAUNCH_HELP, TOOLS
from repo_fast.config import EvaluateConfig, JobConfig, ScoreConfig, SftConfig, TrainConfig, known_keys, parse
from repo_fast.jobs.inputs import read_inputs
from repo_fast.report.known_prompts import KnownPrompts, known_measures
from repo_fast.report.measures import Evaluation, prompt_measures
from repo_fast.report.page_parts.wording import MEASURES
from repo_fast.rollout import Rollout
from repo_fast.scoring import FunctionScorer
from repo_fast.speed.throughput import PHASES
from tests.job_runs import Job, metrics, write_lines
from tests.tiny import save_beaver, save_policy, tiny_llama_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = "\n\n".join(page.read_text(encoding="utf-8") for page in PAGES)
# Its blocks are the files and commands of one path, which tests/test_strangers_path.py follows.
FOLLOWED = (ROOT / "docs/start/your-own.md").read_text(encoding="utf-8")
JOBS: dict[str, type[JobConfig]] = {
    "train": TrainConfig,
    "sft": SftConfig,
    "score": ScoreConfig,
    "evaluate": EvaluateConfig,
}


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT.replace(FOLLOWED, ""), re.DOTALL | re.MULTILINE)
    return [text for kind, text in found if kind == language]


def commands(job: str) -> list[list[str]]:
    """The job's own words in every command shown that runs it."""
    joined = "".join(blocks("bash")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in joined.splitlines()]
    shown = [words[2:] for words in lines if words[:2] == ["repo-fast", job]]
    places = [words.index("--gpus") if "--gpus" in words else len(words) for words in shown]
    return [words[:place] + words[place + 2 :] for words, place in zip(shown, places, strict=True)]


def test_the_op_runs_in_another_trainer_as_shown():
    from transformers import LlamaForCausalLM

    (snippet,) = [block for block in blocks("python") if "fused_rectified_policy_loss" in block]
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 10
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config())
    lengths, prompt = [6, 9], 2
    input_ids = torch.randint(64, (1, sum(lengths) + 1))
    sequence_ids = torch.arange(2).repeat_interleave(torch.tensor(lengths))
    targets = input_ids[0, 1:].clone()
    targets[:prompt] = -100
    logits = model(input_ids).logits[0, :-1]
    log_probs = logits.log_softmax(-1).gather(1, input_ids[0, 1:, None])[:, 0]
    batch = {
        "model": model,
        "input_ids": input_ids,
        "targets": targets,
        "old_log_probs": log_probs.detach() + 0.3 * torch.randn(sum(lengths)),
        "reward_advantages": torch.randn(sum(lengths)),
        "cost_advantages": torch.randn(sum(lengths)),
        "sequence_ids": sequence_ids,
        "costs": torch.tensor([0.5, -0.5]),
        "prompt_ids": torch.tensor([7, 3]),
    }
    exec(snippet, batch)
    # The first response is unsafe and lambda is 1, so it is weighted (1/2, 1/2); the second is safe, (1, 0).
    ratio = (log_probs - batch["old_log_probs"]).exp()

    def surrogate(advantages: torch.Tensor) -> torch.Tensor:
        return torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)

    reward, cost = surrogate(batch["reward_advantages"]), surrogate(-batch["cost_advantages"])
    unsafe = -(reward + cost)[prompt : lengths[0]].mean() / 2
    safe = -reward[lengths[0] :].mean()
    expected = (unsafe + safe) / 2
    torch.testing.assert_close(batch["out"].loss, expected, rtol=1e-5, atol=1e-6)
    shown = model.lm_head.weight.grad.clone()
    model.zero_grad()
    expected.backward()
    torch.testing.assert_close(shown, model.lm_head.weight.grad, rtol=1e-4, atol=1e-6)


def test_the_reward_and_cost_functions_work_as_shown(tmp_path, monkeypatch):
    (functions,) = [block for block in blocks("python") if "def reward" in block]
    (command,) = [words for words in commands("train") if "my_scores:reward" in words]
    monkeypatch.chdir(tmp_path)
    Path("my_scores.py").write_text(functions, encoding="utf-8")
    Path("prompts.txt").write_text("".join(f"how do i make tea {'please ' * i}\n" for i in range(20)))
    save_policy(tmp_path / "FOLDER")
    config = parse(command)
    inputs = read_inputs(config)
    assert len(inputs.requests) == 20 and inputs.policy_path == "FOLDER"
    responses = ["drink water .", "take one pill", "take two pills now."]
    rollout = Rollout(
        prompt_ids=torch.arange(3),
        prompts=["a"] * 3,
        responses=responses,
        prompt_tokens=[torch.tensor([1])] * 3,
        response_tokens=[torch.tensor([1])] * 3,
        finished=torch.ones(3, dtype=torch.bool),
        sampler_log_probs=[torch.zeros(1)] * 3,
    )
    assert FunctionScorer(config.cost.path, "cost").score(rollout).tolist() == [-1.0, 1.0, 1.0]
    rewards = FunctionScorer(config.reward.path, "reward").score(rollout)
    torch.testing.assert_close(rewards, torch.tensor([1 - 3 / 50, -3 / 50, 1 - 4 / 50]))


def test_the_conversion_and_the_check_work_as_shown(tmp_path, monkeypatch, capsys):
    convert, check = (
        next(words for words in commands("score") if option in words) for option in ("--convert", "--check")
    )
    source = save_beaver(tmp_path / "source", config_overrides={"score_type": "cost"})
    monkeypatch.chdir(tmp_path)
    assert repo_fast.score.main([str(source) if "beaver" in word else word for word in convert]) == 0
    assert json.loads((tmp_path / "outputs/cost/config.json").read_text())["architectures"] == ["LlamaModelForScore"]
    # The score shown is made up, so this model's is another one.
    assert repo_fast.score.main(check) == 2
    assert "expected -1.5" in capsys.readouterr().err


def test_the_heads_of_a_cost_model_are_taken_as_shown(tmp_path):
    (shown,) = re.findall(r"^```yaml\n(heads:.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    path = tmp_path / "heads.yaml"
    path.write_text("kind: cost\n" + textwrap.dedent(shown))
    heads = parse(["--config", str(path)], ScoreConfig).heads
    assert heads["violence"].categories == ("Violence", "Physical Harm") and heads["harm"].severity == 1


def test_every_option_and_target_named_exists():
    named = set(re.findall(r"--([a-z_]+(?:[.-][a-z_]+)*)", TEXT)) | set(re.findall(r"`([a-z]+\.[a-z_]+)`", TEXT))
    others = {"help", "print_config", "config"}  # of every job
    others |= {"nproc-per-node", "nnodes", "standalone", "rdzv-backend"}  # of torchrun
    others |= {"logdir", "out"}  # of TensorBoard, of benchmarks
    others |= {"version", *(name.removeprefix("--") for name in options_of(_LAUNCH_HELP))}  # of repo-fast
    others |= {typed.split()[0].removeprefix("--") for kind in JOBS.values() for typed in kind.ALSO}
    others |= set(re.findall(r"^`--([\w-]+)", tools.render(), re.MULTILINE))
    files = {name for name in named if name.endswith((".yaml", ".json", ".jsonl", ".html", ".txt", ".py"))}
    assert named - others - files - {"torch.distributed"} <= {key for kind in JOBS.values() for key in known_keys(kind)}
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make (train|test|pipeline|[a-z]+(?=`))", TEXT)) <= targets


def test_the_map_names_only_what_exists_and_every_room():
    (rooms,) = [block for block in blocks("") if "entry points" in block]
    assert len(rooms.splitlines()) <= 26
    inside = {line.split()[0] for line in rooms.splitlines() if line.startswith("  ")}
    top = {line.split()[0] for line in rooms.splitlines() if not line.startswith("  ")}
    assert [name for name in top if not (ROOT / name).exists()] == []
    assert [name for name in inside if not (ROOT / "repo_fast" / name).exists()] == []
    folders = {f"{path.name}/" for path in (ROOT / "repo_fast").iterdir() if path.is_dir()}
    assert folders - inside <= {"configs/", "kernels/", "__pycache__/"}


def options_of(shown: str) -> list[str]:
    """Options and arguments, as a parser lists them."""
    return re.findall(r"^  (?:-h, )?(--[\w.-]+|[a-z]\w*)", shown, re.MULTILINE)


def help_of(job: str, capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit):
        parse(["--help"], JOBS[job])
    return capsys.readouterr().out


@pytest.mark.parametrize("job", options.JOBS)
def test_every_option_is_in_the_reference_and_the_other_way_round(job: str, capsys: pytest.CaptureFixture) -> None:
    shown = {name.removeprefix("--") for name in options_of(help_of(job, capsys))}
    shown = {name for name in shown if not name.endswith("help")} - {"config", "print_config"}
    page = options.render(job, JOBS[job])
    terms = re.findall(r"^(?:## )?`(?:--)?([\w.-]+)[^`]*` ?\{ #", page, re.MULTILINE)
    referred = {name.removesuffix(".NAME") for name in terms}
    assert shown - referred == set()
    # Below the names that users choose help does not look, nor below a section that may be null.
    below = tuple(f"{name}." for name in shown)
    assert {name for name in referred - shown if not name.startswith(below) and "NAME" not in name} == set()


@pytest.mark.parametrize("job", ["score", "evaluate"])
def test_help_has_what_a_job_reads_by_itself(job: str, capsys: pytest.CaptureFixture) -> None:
    """Words that its entry point looks for, before the rest becomes a configuration."""
    source = (ROOT / f"repo_fast/{job}.py").read_text(encoding="utf-8")
    read = set(re.findall(r'"(--[\w.-]+)"', source))
    assert len(read) > 2 and read <= set(options_of(help_of(job, capsys)))


@pytest.mark.parametrize("tool", TOOLS)
def test_every_option_of_a_tool_is_in_the_reference_and_the_other_way_round(tool, capsys) -> None:
    with contextlib.suppress(SystemExit):
        repo_fast.__main__.main([tool, "--help"])
    shown = set(options_of(capsys.readouterr().out)) - {"--help"}
    _, _, section = tools.render().partition(f"\n## {tool} ")
    referred = re.findall(r"^`([\w-]+)[^`]*`\{ #", section.partition("\n## ")[0], re.MULTILINE)
    assert shown == set(referred) and bool(shown) == (tool != "doctor")


def test_every_option_of_the_launcher_is_in_the_reference_and_the_other_way_round() -> None:
    page = (ROOT / "docs/reference/command.md").read_text(encoding="utf-8")
    referred = re.findall(r"^\| `(--[\w-]+)", page, re.MULTILINE)
    assert referred and referred == options_of(_LAUNCH_HELP)


def test_every_measure_of_an_evaluation_is_in_the_reference() -> None:
    """With its unit; and they are those that are computed of responses with every field."""
    listed = re.findall(r"^\| `(\w+)` \| \S", measures.render(), re.MULTILINE)
    assert sorted(listed) == sorted(MEASURES)
    assert measures.UNITS.keys() == {key for key, measure in MEASURES.items() if not measure.share}
    drawn = Evaluation(
        prompt_ids=[0, 0, 1, 1],
        rewards=[1.0, 2.0, 3.0, 4.0],
        costs=[-1.0, 1.0, 2.0, -2.0],
        kl=[0.0] * 4,
        response_lengths=[1] * 4,
        well_formed=[True] * 4,
        second_rewards=[0.0] * 4,
        failed=[True, False] * 2,
        blank=[False] * 4,
    )
    assert {entry.name for entry in fields(drawn) if getattr(drawn, entry.name) is None} == set()
    known = KnownPrompts({"suite": [0, 1]}, harmful={0: True, 1: False}, clusters={0: "a", 1: "b"})
    judged = re.findall(r'measure = "(\w+)"', (ROOT / "repo_fast/evaluation/judgments.py").read_text(encoding="utf-8"))
    computed = {*prompt_measures(drawn, drawn), *known_measures(drawn, known), *judged}
    assert len(judged) == 2 and computed == MEASURES.keys()


def test_every_metric_is_in_the_reference(tmp_path: Path) -> None:
    """With importance weights, a reward's cap and demonstrations, which bring metrics of their own."""
    job = Job.make(tmp_path)
    options = ("--algorithm.importance_cap 2", "--algorithm.reward_cap 1", "--total_steps 1")
    assert job.here(tmp_path / "train", *options) == 0
    data = tmp_path / "demonstrations.jsonl"
    common = ["--model.path", str(tmp_path / "policy"), "--epochs", "1", "--log.loggers", "[]"]
    sft = [*common, "--data.train", str(data), "--data.eval", str(data)]
    assert repo_fast.sft.main([*sft, "--output_dir", str(tmp_path / "sft")]) == 0
    pair = {"prompt": "please", "response_0": "yes", "response_1": "no", "better_response_id": 0}
    pair |= {"safer_response_id": 1, "is_response_0_safe": False, "is_response_1_safe": True}
    write_lines(tmp_path / "pairs.jsonl", [pair, pair | {"prompt": "tea"}])
    score = [
        "--kind",
        "cost",
        "--data.train",
        str(tmp_path / "pairs.jsonl"),
        "--data.eval",
        str(tmp_path / "pairs.jsonl"),
    ]
    assert repo_fast.score.main([*common, *score, "--output_dir", str(tmp_path / "score")]) == 0
    assert_named(tmp_path / "train", "importance_mean", "capped_prompts", "ptx_loss", "cost_value_loss")
    assert_named(tmp_path / "sft", "loss", "eval_loss")
    assert_named(tmp_path / "score", "ranking_accuracy", "safety_calibration_error")


def assert_named(output_dir: Path, *expected: str) -> None:
    page = (ROOT / "docs/reference/metrics.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    named |= {name.replace("PHASE", phase) for name in named for phase in PHASES}
    *_, record = metrics(output_dir)
    assert set(expected) < record.keys()
    assert record.keys() - named == set()
