"""What the benchmark of one base runs, and what it prints of it."""

from pathlib import Path

import pytest

from bench import one_base
from repo_fast.config import TrainConfig, parse


@pytest.mark.parametrize("engine", ["hf", "vllm"])
@pytest.mark.parametrize("way", one_base.WAYS)
def test_a_way_is_a_configuration(way: str, engine: str, tmp_path: Path) -> None:
    config = parse(one_base.options(way, "world:tiny", None, engine, tmp_path), TrainConfig)
    together, quantize = one_base.WAYS[way]
    assert config.engine.share_base is together
    assert {config.policy.quantize, config.critics.quantize, config.reward.quantize, config.cost.quantize} == {quantize}
    assert config.rollout.engine == engine and len(config.critic_streams) == 2
    # Only what is whole can be apart.
    assert config.cost.path.endswith("adapter") == (together or quantize is not None)


def test_the_report_by_hand() -> None:
    """Six apart are five of 100 MB and one more base of 50."""
    rows = [dict.fromkeys(one_base.COMPARED, value) for value in (1.0, -2.0)]
    moved = [dict(row, kl=row["kl"] + 0.25) for row in rows]
    sizes = {"apart": (80e6, 5e6, 15e6), "one base": (10e6, 5e6, 15e6)}
    found = {
        f"{name}{suffix}": {
            "rows": moved if name == "one base" else rows,
            "bytes": dict(zip(one_base.PARTS, own, strict=True)),
            "base": 50_000_000,
        }
        for name, own in sizes.items()
        for suffix in ("", ", nf4")
    }
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in one_base.report(found).splitlines()]
    assert ["apart, and a reference", "130.0", "5.0", "15.0", "150.0", "1.000"] in lines
    assert ["apart", "80.0", "5.0", "15.0", "100.0", "0.667"] in lines
    assert ["one base", "10.0", "5.0", "15.0", "30.0", "0.200"] in lines
    row = next(line for line in lines if len(line) > 1 and line[0] == "one base" and "of" in line[1])
    assert row[1:] == ["2.5e-01 of 2" if name == "kl" else "0.0e+00 of 2" for name in one_base.COMPARED]
