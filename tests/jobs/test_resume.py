"""A run that was stopped, by an option, a signal or a kill, goes on as if it had not been."""

import gzip
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest

from repo_fast.config import parse, to_dict
from repo_fast.errors import InputError
from repo_fast.jobs import checkpoint
from tests import scorers
from tests.job_runs import Job, checkpoint_names, engines, metrics, on_ranks, run, same_bits, snapshot, states, weights
from tests.tiny import save_policy


def drawn_at_step(output_dir: Path, step: int) -> list[tuple[int, str]]:
    """Prompts and responses, in whatever order ranks had them."""
    rows = map(json.loads, (output_dir / "samples.jsonl").read_text().splitlines())
    return sorted((row["prompt_id"], row["response"]) for row in rows if row["step"] == step)


@pytest.fixture(scope="module")
def uninterrupted(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps at once, on one rank, in this process."""
    output_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert job.here(output_dir) == 0
    return output_dir


@pytest.fixture(scope="module")
def stopped_once(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of six."""
    output_dir = tmp_path_factory.mktemp("stopped") / "run"
    assert job.here(output_dir, "--stop_after 3") == 0
    return output_dir


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """A copy of it, to go on with."""
    return Path(shutil.copytree(stopped_once, tmp_path / "run"))


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Equal metrics, policy, samples, and state of everything else that learns."""
    assert len(metrics(ours)) == 6
    assert metrics(ours) == metrics(theirs)
    assert same_bits(weights(ours), weights(theirs))
    assert (ours / "samples.jsonl").read_bytes() == (theirs / "samples.jsonl").read_bytes()
    assert engines(theirs, 6) == {"policy", "reward_critic", "cost_critic"}
    assert states(ours, 6) == states(theirs, 6)


def test_the_run_has_state_to_lose(uninterrupted: Path) -> None:
    """What the tests below compare does move, else they would show nothing."""
    rows = metrics(uninterrupted)
    for name in ("multiplier", "kl", "reward_value_loss", "cost_value_loss", "ptx_loss", "learning_rate", "loss"):
        assert len({row[name] for row in rows}) > 1, name
    before, after = (states(uninterrupted, step) for step in (4, 6))
    assert before.keys() == after.keys() and all(before[name] != after[name] for name in before)


def test_stopped_by_the_option(job: Job, stopped: Path, uninterrupted: Path) -> None:
    assert [row["step"] for row in metrics(stopped)] == [1, 2, 3]
    assert not (stopped / "policy").exists()
    assert job.here(stopped, "--resume auto") == 0
    assert_same_run(stopped, uninterrupted)
    # keep 2, of what both processes wrote.
    assert checkpoint_names(stopped) == ["step-000004", "step-000006"]


def test_stopped_by_a_signal(job: Job, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def terminate(call: int) -> None:
        if call == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(scorers, "at_call", terminate)
    assert job.here(tmp_path / "run") == 128 + signal.SIGTERM
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3]
    assert checkpoint_names(tmp_path / "run") == ["step-000002", "step-000003"]
    monkeypatch.setattr(scorers, "at_call", lambda call: None)
    assert job.here(tmp_path / "run", "--resume auto") == 0
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_signal_before_the_first_step_leaves_a_run_that_starts_anew(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminate(call: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    held_out = f"--data.eval_prompts {job.folder / 'prompts.jsonl'}"
    monkeypatch.setattr(scorers, "at_call", terminate)
    assert job.here(tmp_path / "run", held_out, "--total_steps 1") == 128 + signal.SIGTERM
    assert not (tmp_path / "run" / "checkpoints").exists()
    monkeypatch.setattr(scorers, "at_call", lambda call: None)
    assert job.here(tmp_path / "run", held_out, "--total_steps 1", "--resume auto") == 0
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1]


def several_runs_on_two_ranks(folder: Path) -> dict:
    """On each rank of a torchrun: the runs that need no launch of their own.

    Args:
        folder: Holds the job, a run on two ranks that torchrun ended, and a run of one rank.
    """
    from repo_fast import engine

    # Ranks that leave a group and join another meet the addresses of the first in torchrun's store.
    engine.stop_distributed = lambda: None
    job = Job(folder)
    statuses = {
        "whole": job.here(folder / "whole", "--profile 2"),
        "stopped": job.here(folder / "stopped", "--stop_after 3"),
        "resumed": job.here(folder / "stopped", "--resume auto"),
        "resumed after torchrun": job.here(folder / "ended", "--resume auto"),
    }
    statuses["other ranks"] = job.here(folder / "one_rank", "--resume auto")
    return {"statuses": statuses}


@pytest.fixture(scope="module")
def two_ranks(job: Job, stopped_once: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """All runs on two ranks with ZeRO-3, in two launches."""
    folder = tmp_path_factory.mktemp("two_ranks")
    shutil.copytree(stopped_once, folder / "one_rank")
    shutil.copy(job.folder / "job.yaml", folder)
    # The third call of a scorer is in step 3.
    ended = job.torchrun(2, folder / "ended", environment={"TEST_TERMINATE_AT": "3"})
    assert ended.returncode != 0
    assert "stopped after step 3 of 6" in ended.stdout, ended.stderr
    return folder, on_ranks(2, "tests.jobs.test_resume:several_runs_on_two_ranks", folder)


@pytest.mark.slow
def test_two_ranks_stopped_by_the_option(two_ranks: tuple[Path, list[dict]]) -> None:
    folder, returned = two_ranks
    for rank in returned:
        assert rank["statuses"] | {"other ranks": 0} == dict.fromkeys(rank["statuses"], 0)
    assert_same_run(folder / "stopped", folder / "whole")


@pytest.mark.slow
def test_a_traced_step_changes_nothing_and_leaves_traces_of_all_ranks(two_ranks: tuple[Path, list[dict]]) -> None:
    folder, _ = two_ranks
    written = folder / "whole" / "profile"
    assert sorted(path.name for path in written.iterdir()) == [
        "timeline.png",
        "trace-rank-0.json.gz",
        "trace-rank-1.json.gz",
    ]
    for rank in range(2):
        events = json.loads(gzip.decompress((written / f"trace-rank-{rank}.json.gz").read_bytes()))["traceEvents"]
        assert {"generate", "score", "experience", "update"} <= {event.get("name") for event in events}
    assert (written / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert_same_run(folder / "whole", folder / "ended")


@pytest.mark.slow
def test_two_ranks_stopped_by_torchrun(two_ranks: tuple[Path, list[dict]]) -> None:
    """SIGTERM to the launcher reaches the ranks; they end the step, save, and another launch goes on."""
    folder, _ = two_ranks
    assert_same_run(folder / "ended", folder / "whole")


@pytest.mark.slow
def test_a_checkpoint_of_another_number_of_ranks(two_ranks: tuple[Path, list[dict]], uninterrupted: Path) -> None:
    folder, returned = two_ranks
    assert [rank["statuses"]["other ranks"] for rank in returned] == [0, 0]
    said = [(folder / f"said-{rank}.txt").read_text() for rank in range(2)]
    assert ["going on with 2 ranks, where 1 wrote the checkpoint" in text for text in said] == [True, False]
    assert [row["step"] for row in metrics(folder / "one_rank")] == [1, 2, 3, 4, 5, 6]
    assert metrics(folder / "one_rank")[:3] == metrics(uninterrupted)[:3]
    # The same policy draws the same. After it the steps differ: each rank shuffles its share into minibatches.
    ours, theirs = (drawn_at_step(run, 4) for run in (folder / "one_rank", uninterrupted))
    assert len(ours) == 6 and ours == theirs


KILLED_WHILE_WRITING = """
import os, signal, sys
from repo_fast.engine.saved import Unsaved
from repo_fast.train import main

write = Unsaved.write

def killed(self, folder):
    sums = write(self, folder)
    if folder.parent.name.startswith("step-000004") and folder.name == "reward_critic":
        os.kill(os.getpid(), signal.SIGKILL)
    return sums

Unsaved.write = killed
main(sys.argv[1:])
"""


def test_killed_while_a_checkpoint_is_written(job: Job, uninterrupted: Path, tmp_path: Path) -> None:
    killed = run([sys.executable, "-c", KILLED_WHILE_WRITING, *job.words(tmp_path / "run")])
    assert killed.returncode == -signal.SIGKILL
    assert checkpoint_names(tmp_path / "run") == ["step-000002", "step-000004.partial"]
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert job.here(tmp_path / "run", "--resume auto", "--checkpoint.every 3") == 0
    assert_same_run(tmp_path / "run", uninterrupted)
    # The unfinished one is gone too, although no later checkpoint has its name.
    assert checkpoint_names(tmp_path / "run") == ["step-000003", "step-000006"]


def test_an_older_checkpoint_is_never_half_deleted_under_its_own_name(
    job: Job, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill while step 2 is being removed, after step 4 is complete."""

    def killed(folder: Path, **_) -> None:
        if "step-000002" in str(folder):
            (folder / "run.json").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        job.here(stopped, "--resume auto")
    monkeypatch.undo()
    assert [path.name for path in checkpoint.checkpoints(stopped)] == ["step-000003", "step-000004"]
    assert all((path / "run.json").is_file() for path in checkpoint.checkpoints(stopped))


def test_a_finished_run_resumes_to_its_own_end(job: Job, uninterrupted: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    assert job.here(again, "--resume auto") == 0
    assert_same_run(again, uninterrupted)
    assert checkpoint_names(again) == checkpoint_names(uninterrupted)


def test_resume_of_a_checkpoint_into_another_folder(job: Job, uninterrupted: Path, tmp_path: Path) -> None:
    """The metrics go on where the checkpoint was; its own folder stays as it is."""
    before = snapshot(uninterrupted)
    source = uninterrupted / "checkpoints" / "step-000004"
    assert job.here(tmp_path / "new", f"--resume {source}") == 0
    assert metrics(tmp_path / "new") == metrics(uninterrupted)[4:]
    assert same_bits(weights(tmp_path / "new"), weights(uninterrupted))
    assert snapshot(uninterrupted) == before


@pytest.mark.slow
def test_the_table_of_a_resumed_run(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It compares with the start of the run; where that is in another folder, the run says so and ends well."""
    options = [f"--data.eval_prompts {job.folder / 'prompts.jsonl'}", "--total_steps 2"]
    assert job.here(tmp_path / "run", *options, "--stop_after 1") == 0
    start = (tmp_path / "run" / "eval_before.jsonl").read_bytes()
    elsewhere = f"--resume {tmp_path / 'run' / 'checkpoints' / 'step-000001'}"
    assert job.here(tmp_path / "new", *options, elsewhere) == 0
    assert "no before/after table" in capsys.readouterr().out
    assert not (tmp_path / "new" / "before_after.txt").exists()
    assert job.here(tmp_path / "run", *options, "--resume auto") == 0
    assert (tmp_path / "run" / "before_after.txt").read_text() in capsys.readouterr().out
    assert (tmp_path / "run" / "eval_before.jsonl").read_bytes() == start
    assert (tmp_path / "run" / "eval_after.jsonl").read_bytes() == (tmp_path / "new" / "eval_after.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed 1"], r"another configuration: seed is 0 there and 1 here"),
        (["--rollout.temperature 0.5"], r"another configuration: rollout\.temperature is 1\.0 there and 0\.5 here"),
        (["--policy.path {wide}"], r"another configuration: policy\.path is '.*policy' there and '.*wide' here"),
        (["--resume {run}/checkpoints"], r"--resume '.*checkpoints' is not a complete checkpoint"),
        (["--resume {run}/checkpoints/step-000099"], r"--resume '.*step-000099' is not a complete checkpoint"),
    ],
)
def test_a_checkpoint_that_does_not_fit(
    job: Job, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], message: str
) -> None:
    save_policy(tmp_path / "wide", hidden_size=64)
    before = snapshot(stopped)
    capsys.readouterr()
    options = [option.format(run=stopped, wide=tmp_path / "wide") for option in options]
    assert job.here(stopped, "--resume auto", *options) == 2
    assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)
    assert snapshot(stopped) == before


def test_a_checkpoint_of_another_model_at_the_same_path(stopped: Path) -> None:
    folder = stopped / "checkpoints" / "step-000003"
    run = checkpoint.read_run(folder)
    checkpoint.check_model(folder, run, run["model"], "here")
    with pytest.raises(InputError, match="of another model: elements is [0-9]+ there, 20 in 'here'"):
        checkpoint.check_model(folder, run, run["model"] | {"elements": 20}, "here")


def test_a_checkpoint_of_before_there_were_several_constraints(job: Job, stopped: Path) -> None:
    folder = stopped / "checkpoints" / "step-000003"
    run = checkpoint.read_run(folder)
    then = run["config"]
    config = to_dict(parse([*job.words(stopped), "--date", then["date"]]))
    del then["constraints"], then["algorithm"]["confidence"], then["algorithm"]["importance_level"]
    for name in ("reward", "cost"):
        del then[name]["guard"], then[name]["judge"]
    then["critics"]["shared_trunk"] = False
    checkpoint.check_run(folder, run, config)
    then["critics"]["shared_trunk"] = True
    with pytest.raises(InputError, match="critics.shared_trunk is True there and None here"):
        checkpoint.check_run(folder, run, config)


@pytest.mark.parametrize("options", [(), ("--resume auto",)])
def test_a_folder_of_what_is_no_runs_is_left_alone(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture, options: tuple[str, ...]
) -> None:
    """Such as that of the policy that the run starts from: its result is written as `policy` too."""
    save_policy(tmp_path / "policy")
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert job.here(tmp_path, f"--policy.path {tmp_path / 'policy'}", *options) == 2
    said = r"error: --output_dir '.*' holds 'policy' and no run, which would write over it, expected a new folder\n"
    assert re.fullmatch(said, capsys.readouterr().err)
    assert snapshot(tmp_path) == before


def test_a_used_output_folder_is_left_alone(job: Job, stopped: Path, capsys: pytest.CaptureFixture) -> None:
    before = snapshot(stopped)
    capsys.readouterr()
    assert job.here(stopped) == 2
    assert re.fullmatch(r"error: --output_dir '.*' holds a run already, .*--resume auto.*\n", capsys.readouterr().err)
    assert snapshot(stopped) == before


def test_a_checkpoint_is_not_resumed_into_another_runs_folder(
    job: Job, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("seed: 7\n")
    capsys.readouterr()
    newest = checkpoint.checkpoints(stopped)[-1]
    assert job.here(tmp_path / "other", f"--resume {newest}") == 2
    assert re.fullmatch(r"error: --resume .* holds another run or newer checkpoints, .*\n", capsys.readouterr().err)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["config.yaml"]
