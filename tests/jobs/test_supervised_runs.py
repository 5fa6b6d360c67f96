"""The loop that `repo_fast.sft` and `repo_fast.score` share: resume, ranks, steps that are skipped."""

import math
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from repo_fast.jobs import checkpoint, supervised
from tests.job_runs import Job, engines, metrics, on_ranks, states
from tests.learning.learner_worker import plain_descent
from tests.supervised_runs import KINDS, assert_same_run, here, make_inputs, norm_wise, result


@contextmanager
def at_step(step: int, disturb: Callable[[], None]) -> Iterator[None]:
    """Call `disturb` in a step, before its update."""
    update = supervised.SupervisedRun.update

    def disturbed(run: supervised.SupervisedRun, batch: list) -> dict:
        if run.step + 1 == step:
            disturb()
        return update(run, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervised.SupervisedRun, "update", disturbed)
        yield


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each kind at once, on one rank."""
    runs = {kind: tmp_path_factory.mktemp(kind) / "run" for kind in KINDS}
    assert {kind: here(kind, inputs, run) for kind, run in runs.items()} == dict.fromkeys(KINDS, 0)
    return runs


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_by_the_option(inputs: Path, whole: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Between two checkpoints that were due, and before an evaluation."""
    assert here(kind, inputs, tmp_path / "run", "--stop_after 3") == 0
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3]
    assert not (tmp_path / "run" / ("policy" if kind == "sft" else "model")).exists()
    assert here(kind, inputs, tmp_path / "run", "--resume auto") == 0
    assert_same_run(tmp_path / "run", whole[kind])


@pytest.mark.parametrize("kind", ["sft", "cost"])
def test_stopped_by_a_signal(inputs: Path, whole: dict[str, Path], tmp_path: Path, kind: str) -> None:
    with at_step(2, terminate):
        assert here(kind, inputs, tmp_path / "run") == 128 + signal.SIGTERM
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]
    assert here(kind, inputs, tmp_path / "run", "--resume auto") == 0
    assert_same_run(tmp_path / "run", whole[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_compared_does_move(whole: dict[str, Path], kind: str) -> None:
    rows = metrics(whole[kind])
    for name in ("loss", "learning_rate", "gradient_norm", "tokens"):
        assert len({row[name] for row in rows}) > 2, name
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 4, 5]
    # The fifth batch holds one example of a third epoch.
    assert [row["epoch"] for row in rows] == pytest.approx([3 / 7, 6 / 7, 9 / 7, 12 / 7, 15 / 7])


def test_a_finished_run_resumes_to_its_own_end(inputs: Path, whole: dict[str, Path], tmp_path: Path) -> None:
    again = Path(shutil.copytree(whole["cost"], tmp_path / "run"))
    assert here("cost", inputs, again, "--resume auto") == 0
    assert_same_run(again, whole["cost"])


# ---------------------------------------------------------------------------------------------- more than one rank

SHARED_CRITIC = ("--critics.shared_trunk true", "--critics.lora.rank 2")


def descents(folder: Path, output_dir: Path) -> dict[str, int]:
    """Runs of every kind by plain descent, so that the weights show the gradients.

    Batches of three examples, in micro-batches of one: one rank of two has more of them. Batches of one: one has none.
    """
    statuses = {}
    plain = ("--optimizer.learning_rate 0.3", "--optimizer.gradient_clip 0", "--optimizer.schedule constant")
    cases = {f"{kind}-3": (kind, "--batch_size 3", "--micro_batch_tokens 1") for kind in KINDS}
    cases["cost-1"] = ("cost", "--batch_size 1")
    with plain_descent(0.3):
        for name, (kind, *options) in cases.items():
            statuses[name] = here(kind, folder, output_dir / name, *plain, *options, "--epochs 1")
    return statuses


def runs_on_two_ranks(folder: Path) -> dict[str, int]:
    """On each rank of a torchrun: all runs that need two."""
    from repo_fast import engine

    # Ranks that leave a group and join another meet the addresses of the first in torchrun's store.
    engine.stop_distributed = lambda: None
    last_rank = os.environ["RANK"] == "1"
    adapters = "--model.lora.rank 2"
    statuses = descents(folder, folder / "two")
    for kind, options in {"sft": (), "cost": (adapters,)}.items():
        statuses[f"{kind} whole"] = here(kind, folder, folder / f"{kind}-whole", *options)
        with at_step(3, lambda: terminate() if last_rank else None):
            statuses[f"{kind} stopped"] = here(kind, folder, folder / f"{kind}-stopped", *options)
        statuses[f"{kind} resumed"] = here(kind, folder, folder / f"{kind}-stopped", *options, "--resume auto")
    job = Job(folder / "job")
    everywhere = ("--policy.lora.rank 2", *SHARED_CRITIC, "--total_steps 3")
    statuses["train whole"] = job.here(folder / "train-whole", *everywhere)
    statuses["train stopped"] = job.here(folder / "train-stopped", *everywhere, "--stop_after 2")
    statuses["train resumed"] = job.here(folder / "train-stopped", *everywhere, "--resume auto")
    return statuses


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, int]]]:
    """All runs on two ranks with ZeRO-3, in one launch."""
    folder = make_inputs(tmp_path_factory.mktemp("two_ranks"))
    Job.make(folder / "job")
    return folder, on_ranks(2, "tests.jobs.test_supervised_runs:runs_on_two_ranks", folder)


@pytest.mark.slow
def test_two_ranks_end_alike(two_ranks: tuple[Path, list[dict[str, int]]]) -> None:
    """A signal to one rank stops both."""
    first, second = two_ranks[1]
    assert first == second
    stopped = {f"{kind} stopped" for kind in ("sft", "cost")}
    assert first == {name: 128 + signal.SIGTERM if name in stopped else 0 for name in first}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "cost"])
def test_two_ranks_resume_exactly(two_ranks: tuple[Path, list[dict[str, int]]], kind: str) -> None:
    """The cost model with adapters."""
    folder, _ = two_ranks
    assert_same_run(folder / f"{kind}-stopped", folder / f"{kind}-whole")


@pytest.mark.slow
def test_two_ranks_resume_training_with_adapters_exactly(two_ranks: tuple[Path, list[dict[str, int]]]) -> None:
    """Adapters in the policy and in the critics' shared trunk."""
    folder, _ = two_ranks
    ours, theirs = folder / "train-stopped", folder / "train-whole"
    assert [row["step"] for row in metrics(ours)] == [1, 2, 3]
    assert metrics(ours) == metrics(theirs)
    assert metrics(ours)[0]["kl"] == 0.0 and metrics(ours)[2]["kl"] != 0.0
    assert engines(theirs, 3) == {"policy", "reward_cost_critic"}
    assert states(ours, 3) == states(theirs, 3)


@pytest.mark.slow
def test_the_number_of_ranks_changes_no_update(two_ranks: tuple[Path, list[dict[str, int]]], tmp_path: Path) -> None:
    folder, _ = two_ranks
    statuses = descents(folder, tmp_path)
    assert statuses == dict.fromkeys(statuses, 0)
    start = load_file(folder / "policy" / "model.safetensors")
    for name in statuses:
        one, two = tmp_path / name, folder / "two" / name
        assert norm_wise(result(two), result(one), start) <= 1e-5, name
        for ours, theirs in zip(metrics(two), metrics(one), strict=True):
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                if not isinstance(value, str):
                    assert math.isclose(ours[key], value, rel_tol=1e-4, abs_tol=1e-5), (name, key, theirs["step"])


# -------------------------------------------------------------------------------------------- losses not finite


@contextmanager
def not_finite(steps: range) -> Iterator[None]:
    """The gradients of these steps are NaN."""
    update, backward = supervised.SupervisedRun.update, supervised.Engine.backward

    def spoiled(engine: supervised.Engine, loss: torch.Tensor, *, last: bool) -> None:
        backward(engine, loss * math.nan, last=last)

    def observed(run: supervised.SupervisedRun, batch: list) -> dict:
        patch.setattr(supervised.Engine, "backward", spoiled if run.step + 1 in steps else backward)
        return update(run, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervised.SupervisedRun, "update", observed)
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    inputs: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture
) -> None:
    """It changes no weight, as the held-out loss shows, and leaves the schedule where it was, in its warm-up."""
    options = ("--max_skipped_steps 3", "--stop_after 3", "--evaluate_every 1")
    with not_finite(range(1, 3)):
        assert here(kind, inputs, tmp_path / "run", *options) == 0
    assert "step 2: a loss or gradient was not finite; that optimizer step was skipped" in capsys.readouterr().out
    rows = metrics(tmp_path / "run")
    assert [row["steps_skipped"] for row in rows] == [1, 1, 0]
    assert rows[0]["learning_rate"] == rows[1]["learning_rate"] == rows[2]["learning_rate"]
    assert rows[0]["eval_loss"] == rows[1]["eval_loss"] != rows[2]["eval_loss"]
    assert checkpoint.read_run(tmp_path / "run" / "checkpoints" / "step-000003")["state"]["skipped"] == [2, 0]


@pytest.mark.parametrize("kind", ["sft", "cost"])
def test_too_many_of_them_end_the_run(inputs: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture) -> None:
    """Of which the first came before the run was stopped."""
    limit = "--max_skipped_steps 2"
    with not_finite(range(3, 6)):
        assert here(kind, inputs, tmp_path / "run", limit, "--stop_after 3") == 0
        capsys.readouterr()
        assert here(kind, inputs, tmp_path / "run", limit, "--resume auto") == 2
    expected = r"error: 2 optimizer steps in a row had .*fewer than max_skipped_steps \(2\); .*\n"
    assert re.fullmatch(expected, capsys.readouterr().err)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3]
    # What was learned before can be gone on with.
    assert here(kind, inputs, tmp_path / "run", limit, "--resume auto") == 0
