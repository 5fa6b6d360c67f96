"""Every file of a checkpoint damaged in turn: always noticed, before anything is loaded, and the one before it used."""

import contextlib
import io
import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from repo_fast.checkpoint import DAMAGED, main
from tests.campaign.book import Trial
from tests.campaign.runs import STEPS, Kind, assert_equal, go_on, undisturbed
from tests.checkpoints.test_files import DAMAGES, damage
from tests.job_runs import engines

KIND = Kind(2, ("--checkpoint.keep 2",))
_NAME = f"step-{STEPS:06d}"


def trials() -> Iterator[Trial]:
    """One for each file of the last checkpoint of a run on two ranks."""
    folder = undisturbed(KIND)[0] / "checkpoints" / _NAME
    assert engines(folder.parents[1], STEPS) == {"policy", "reward_critic", "cost_critic"}
    for number, file in enumerate(sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())):
        yield Trial(str(file), partial(_damaged, number, file))


def _damaged(seed: int, file: Path, folder: Path) -> str:
    """In each way `--verify` names the file; in one of them the run is gone on with."""
    output_dir = folder / "run"
    shutil.copytree(undisturbed(KIND)[0], output_dir)
    newest = output_dir / "checkpoints" / _NAME
    assert _verify(output_dir) == (0, [])
    kept = (newest / file).read_bytes()
    for how in DAMAGES:
        damage(newest / file, how)
        status, named = _verify(output_dir)
        assert status == DAMAGED and len(named) == 1 and f"damaged: {file} " in named[0], f"{how}: {status}, {named}"
        (newest / file).write_bytes(kept)
    how = random.Random(seed).choice(list(DAMAGES))
    damage(newest / file, how)
    shutil.rmtree(output_dir / "policy")
    said = go_on(KIND, output_dir)
    assert f"{_NAME} is damaged ({file} " in said and f"the run goes on from step {STEPS - 1}" in said, said[-2000:]
    shutil.rmtree(newest.with_name(f"{_NAME}.damaged"))
    assert_equal(output_dir, KIND)
    return f"noticed in {len(DAMAGES)} ways; {how}: went on from step {STEPS - 1} to the same bits"


def _verify(output_dir: Path) -> tuple[int, list[str]]:
    """The exit status, and the lines about damage."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main([str(output_dir), "--verify"])
    return status, [line for line in printed.getvalue().splitlines() if "damaged" in line]
