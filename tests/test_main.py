"""The command `repo-fast`: what goes to the launcher, what to the job, and what is refused before there are ranks."""

import re
from pathlib import Path

import pytest
import torch

import repo_fast
from repo_fast import __main__ as command
from repo_fast import launcher


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What would be run on ranks, with status 5."""
    calls: list[tuple] = []

    def run_ranks(*arguments: object) -> int:
        calls.append(arguments)
        return 5

    monkeypatch.setattr(launcher, "run_ranks", run_ranks)
    return calls


def has_gpus(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)


JOB = ["train", "--config", "tiny"]
CONFIG = ["--config", "tiny"]


@pytest.mark.parametrize(
    ("gpus", "words", "expected"),
    [
        (0, JOB, ("repo_fast.train", CONFIG, 1, 1, "")),
        (0, [*JOB, "--gpus", "2"], ("repo_fast.train", CONFIG, 2, 1, "")),
        (4, JOB, ("repo_fast.train", CONFIG, 4, 1, "")),
        (4, ["train", "--gpus=3", *CONFIG, "--seed", "1"], ("repo_fast.train", [*CONFIG, "--seed", "1"], 3, 1, "")),
        (
            8,
            [*JOB, "--nodes", "2", "--rdzv-endpoint", "first-machine:29500"],
            ("repo_fast.train", CONFIG, 8, 2, "first-machine:29500"),
        ),
        # Words that parsers take for options stay where they are.
        (
            0,
            ["score", "--kind", "reward", "--expect", "- a text", "-1.5", "--gpus", "2", "--epochs", "1"],
            ("repo_fast.score", ["--kind", "reward", "--expect", "- a text", "-1.5", "--epochs", "1"], 2, 1, ""),
        ),
        (
            0,
            ["evaluate", "--config", "tiny", "--policy", "a=world:tiny", "--policy", "b=F", "--reference", "a"],
            (
                "repo_fast.evaluate",
                ["--config", "tiny", "--policy", "a=world:tiny", "--policy", "b=F", "--reference", "a"],
                1,
                1,
                "",
            ),
        ),
    ],
)
def test_a_job_is_started_on_its_ranks_with_its_own_words(gpus, words, expected, started, monkeypatch):
    has_gpus(monkeypatch, gpus)
    assert command.main(words) == 5
    assert started == [expected]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "unknown command 'trian', expected one of train, sft, score"),
        (["trian"], "doctor; the nearest is 'train'"),
        ([*JOB, "--gpu", "2"], "unknown option '--gpu' in the command line, the nearest valid name is '--gpus'"),
        ([*JOB, "--rdzv_endpoint=a:1"], "the nearest valid name is '--rdzv-endpoint'"),
        (["train", "--rollouts.top_p", "1"], r"unknown option 'rollouts\.top_p' .*'rollout\.top_p'"),
        (["train", "--rollout.top_p", "much"], r"rollout\.top_p"),
        (["sft", "--gpu", "1"], "unknown option '--gpu' .*'--gpus'"),
        (["evaluate", "--policy", "before"], "--policy is 'before', expected NAME=PATH"),
        (["train", "--gpus", "two"], "argument --gpus: invalid int value: 'two'"),
        (["train", "--gpus", "0"], "--gpus is 0, expected at least 1 and at most 2, the GPUs that torch sees here"),
        (["train", "--gpus", "3"], "--gpus is 3, expected at least 1 and at most 2"),
        (["train", "--nodes", "0"], "--nodes is 0"),
        (["train", "--nodes", "2"], "--rdzv-endpoint is None, expected HOST:PORT"),
        (["train", "--rdzv-endpoint", "here:1"], "--nodes is 1 and --rdzv-endpoint is 'here:1'"),
        (["train", "--nodes", "2", "--rdzv-endpoint", "here"], "--rdzv-endpoint is 'here', expected HOST:PORT"),
        (["train", "--nodes", "2", "--rdzv-endpoint", "here:99999"], "expected HOST:PORT"),
    ],
)
def test_what_cannot_be_used_is_one_line_before_there_are_ranks(words, said, started, monkeypatch, capsys):
    has_gpus(monkeypatch, 2)
    assert command.main(words) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*{said}.*\n", error), error
    assert not started


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--print_config"],
        ["evaluate", "--verify", "nowhere.json"],
        ["score", "--check=nowhere", "--kind", "cost"],
        ["score", "--convert", "nowhere", "--to", "there"],
    ],
)
def test_what_is_no_run_is_done_once_without_ranks(words, started, monkeypatch, tmp_path, capsys):
    has_gpus(monkeypatch, 8)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if words == ["train", "--print_config"]:
        with pytest.raises(SystemExit) as ended:
            command.main(words)
        assert ended.value.code == 0 and "rollout:" in capsys.readouterr().out
    else:
        assert command.main(words) == 2
        assert "nowhere" in capsys.readouterr().err
    assert not started and not list(tmp_path.iterdir())


def test_tools_are_called_with_their_words(started, tmp_path, capsys):
    assert command.main(["checkpoint", str(tmp_path)]) == 2
    assert "has no checkpoints" in capsys.readouterr().err
    assert command.main(["plan", "--gpus", "0"]) == 2
    assert "--gpus: 0, expected a whole number of at least 1" in capsys.readouterr().err
    assert command.main(["pipeline", "--until", "never", "--output_dir", str(tmp_path)]) == 2
    assert "--until is 'never'" in capsys.readouterr().err
    assert not started


def test_help_names_every_command_and_the_job_s_options(capsys):
    assert command.main(["--help"]) == command.main([]) == 0
    said = capsys.readouterr().out
    names = [*command.JOBS, *command.TOOLS]
    assert re.findall(r"^  (\w+) ", said, re.MULTILINE) == names * 2
    for name in names:
        assert (Path(repo_fast.__file__).parent / f"{name}.py").is_file() or name == "plan"
    with pytest.raises(SystemExit) as ended:
        command.main(["train", "--help"])
    assert ended.value.code == 0
    launch, _, job = capsys.readouterr().out.partition("usage: repo-fast train [--config")
    assert {"--gpus", "--nodes", "--rdzv-endpoint"} <= set(re.findall(r"--[a-z-]+", launch))
    assert "--rollout.top_p" in job
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"repo_fast {repo_fast.__version__}\n"


def test_ctrl_c_before_there_are_ranks_is_no_traceback(monkeypatch):
    def interrupted(words: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_run", interrupted)
    assert command.main(["train"]) == 130
