"""What a run's rules and its choice of the best make of a resume with other settings."""

from pathlib import Path

import pytest

from repo_fast.config import parse
from repo_fast.jobs.watch import Watch


def watching(folder: Path, *options: str, said: list[str] | None = None, state: dict | None = None) -> Watch:
    watch = Watch(parse([word for option in options for word in option.split(" ")]))
    folder.mkdir(exist_ok=True)
    watch.open(folder, None, (said if said is not None else []).append)
    if state is not None:
        watch.load_state_dict(state)
    return watch


def far(watch: Watch, first: int, last: int) -> None:
    for step in range(first, last + 1):
        watch.see_step({"step": step, "kl": 9.0})


@pytest.fixture
def warned(tmp_path: Path) -> dict:
    """The state of a run that was warned of its KL at step 5 and went on to step 7."""
    watch = watching(tmp_path / "first", "--evaluation.kl_bound 5")
    far(watch, 1, 7)
    watch.close()
    assert watch.stopped_by() is None
    return watch.state_dict()


def test_who_asks_for_a_stop_while_a_warning_stands_gets_it(tmp_path: Path, warned: dict) -> None:
    stopping = ("--evaluation.kl_bound 5", "--evaluation.stop_on [kl]")
    assert watching(tmp_path / "same", *stopping, state=warned).stopped_by() == "kl"
    assert (
        watching(tmp_path / "other", *stopping[:1], "--evaluation.stop_on [length]", state=warned).stopped_by() is None
    )
    # A bound that is raised above it ends the warning, one that is lowered does not.
    for bound, rule in (("2", "kl"), ("10", None)):
        watch = watching(tmp_path / bound, f"--evaluation.kl_bound {bound}", stopping[1], state=warned)
        assert watch.stopped_by() == rule
    said: list[str] = []
    watch = watching(tmp_path / "again", "--evaluation.kl_bound 5", said=said, state=warned)
    far(watch, 8, 9)
    assert said == []


def test_another_measure_is_chosen_by_among_all_evaluations(tmp_path: Path) -> None:
    options = ("--evaluation.every 2", "--checkpoint.keep_best strict_violation")
    watch, rows = watching(tmp_path / "first", *options), []
    for step, reward in ((0, 0.5), (2, 1.0), (4, 3.0), (6, 2.0)):
        rows.append({"step": step, "mean_reward": reward, "strict_violation": 0.5 - step / 100})
        watch.see_evaluation(rows[-1])
    assert watch.best is not None and watch.best.step == 6
    other = watching(tmp_path / "second", options[0], "--checkpoint.keep_best mean_reward", state=watch.state_dict())
    other.catch_up(rows)
    assert other.best is not None and (other.best.step, other.best.value, other.best.value_at_start) == (4, 3.0, 0.5)
    other.see_evaluation({"step": 8, "mean_reward": 1.5, "strict_violation": 0.1})
    assert other.best.step == 4


def test_an_evaluation_behind_its_checkpoint_is_looked_at_once(tmp_path: Path) -> None:
    """Also where the run evaluates at other steps from there on, and would not come to it."""
    options = ("--evaluation.every 1", "--checkpoint.keep_best strict_violation")
    watch, rows, state = watching(tmp_path / "first", *options), [], {}
    for step, violation in ((0, 5.0), (1, 5.0), (2, 1.0)):
        if step == 2:
            state = watch.state_dict()
        rows.append({"step": step, "strict_violation": violation})
        watch.see_evaluation(rows[-1])
    other = watching(tmp_path / "second", "--evaluation.every 3", options[1], state=state)
    for _ in range(2):
        other.catch_up(rows)
        other.see_evaluation(rows[-1])
        assert other.state_dict() == watch.state_dict()
    other.see_evaluation({"step": 3, "strict_violation": 3.0})
    assert other.best is not None and (other.best.step, other.best.value) == (2, 1.0)
