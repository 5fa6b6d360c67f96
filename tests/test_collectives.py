"""What two ranks say to each other."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from repo_fast.collectives import Ranks
from repo_fast.errors import InputError, RankError
from tests.job_runs import on_ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


def talk(folder: Path) -> dict:
    """On each rank of a torchrun."""
    dist.init_process_group("gloo")
    ranks = Ranks.connect()
    me = ranks.rank
    said = {
        "rank": (ranks.rank, ranks.size, ranks.is_first),
        "ragged": ranks.gather(torch.arange(3 * me + 1) + 10 * me),
        "one empty": ranks.gather(torch.full((2 * me,), 0.5)),
        "both empty": ranks.gather(torch.zeros(0, dtype=torch.float64)),
        "bool": ranks.gather(torch.tensor([me == 1])),
        "list": ranks.gather_list([("word", me)] * (2 - me)),
        "share": ranks.share("abcde"),
        "share of one": ranks.share("a"),
        "sum": ranks.sum(torch.tensor([1.0 + me, 2.0**-40])),
        "max": ranks.max(7 - me),
        "any": (ranks.any(me == 1), ranks.any(False)),
    }
    with ranks.together("nothing"):
        pass
    said["bad input on rank 1"] = _raised(ranks, InputError("the score is bad") if me == 1 else None)
    said["a fault on rank 0"] = _raised(ranks, KeyError("a fault") if me == 0 else None)
    said["both"] = _raised(ranks, InputError(f"rank {me}"))
    # Still in step after all of it.
    said["afterwards"] = ranks.gather(torch.tensor([me]))
    dist.destroy_process_group()
    return said


def one_stays_away(folder: Path) -> str:
    """Rank 1 comes when the other has long said that it does not."""
    dist.init_process_group("gloo")
    ranks = Ranks.connect(timeout=3)
    if ranks.rank == 1:
        # The store, which the other asks, is rank 0's.
        time.sleep(20)
        return ""
    try:
        with ranks.accounted_for():
            ranks.barrier()
    except RankError as error:
        assert error.by == 0
        return str(error)
    return "it came"


def _raised(ranks: Ranks, error: Exception | None) -> tuple[str, str]:
    try:
        with ranks.together("the reward"):
            if error is not None:
                raise error
    except Exception as seen:
        return type(seen).__name__, str(seen)
    return "", ""


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    said, _ = on_ranks(2, "tests.test_collectives:one_stays_away", tmp_path)
    assert said.startswith("rank 1 does not answer: rank 0 waited for it in vain, expected it within timeout (3 s)")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return on_ranks(2, "tests.test_collectives:talk", tmp_path_factory.mktemp("ranks"))


def test_ranks(said: list[dict]) -> None:
    assert [rank["rank"] for rank in said] == [(0, 2, True), (1, 2, False)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ragged", torch.tensor([0, 10, 11, 12, 13])),
        ("one empty", torch.tensor([0.5, 0.5])),
        ("both empty", torch.zeros(0, dtype=torch.float64)),
        ("bool", torch.tensor([False, True])),
        ("sum", torch.tensor([3.0, 2.0**-39], dtype=torch.float64)),
        ("afterwards", torch.tensor([0, 1])),
    ],
)
def test_tensors(said: list[dict], name: str, expected: torch.Tensor) -> None:
    for rank in said:
        assert rank[name].dtype == expected.dtype
        assert torch.equal(rank[name], expected)


def test_plain_values(said: list[dict]) -> None:
    for rank in said:
        assert rank["list"] == [("word", 0), ("word", 0), ("word", 1)]
        assert rank["max"] == 7
        assert rank["any"] == (True, False)


def test_shares_are_even_and_complete(said: list[dict]) -> None:
    assert [rank["share"] for rank in said] == [["a", "b"], ["c", "d", "e"]]
    assert sorted(len(rank["share of one"]) for rank in said) == [0, 1]


def test_an_error_on_one_rank_is_raised_on_all(said: list[dict]) -> None:
    assert [rank["bad input on rank 1"] for rank in said] == [("InputError", "the score is bad")] * 2
    assert said[0]["a fault on rank 0"] == ("KeyError", "'a fault'")
    assert said[1]["a fault on rank 0"] == ("RankError", "rank 0 failed in the reward: KeyError: 'a fault'")
    assert [rank["both"] for rank in said] == [("InputError", "rank 0"), ("InputError", "rank 1")]


def test_a_rank_alone() -> None:
    values = torch.tensor([1.5, 2.5])
    assert torch.equal(ALONE.gather(values), values)
    assert ALONE.gather_list([1]) == [1] and ALONE.share("ab") == ["a", "b"]
    assert ALONE.sum(values).dtype == torch.float64 and ALONE.max(3) == 3 and not ALONE.any(False)
    ALONE.barrier()
    with pytest.raises(KeyError, match="a fault"), ALONE.together("the reward"):
        raise KeyError("a fault")
