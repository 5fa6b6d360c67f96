"""Table and plots of a benchmark run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import report

ROOT = Path(__file__).parents[2]


def row(peer, T, ms, scratch_mib, **others):
    return {
        "peer": peer,
        "T": T,
        "D": 256,
        "V": 32001,
        "dtype": "bfloat16",
        "ignored": 0.0,
        "computation": "policy_loss",
        "notes": f"the notes of {peer}",
        "ms": ms,
        "spread_ms": 0.25,
        "tflops": 1.5,
        "share_of_floor": 0.875,
        "scratch_mib": scratch_mib,
        "first_call_s": 2.0,
        **others,
    }


def run_of(*rows):
    return {
        "datetime": "2026-11-23T20:00:00+00:00",
        "machine_info": {
            "cpu": {"brand_raw": "A Processor"},
            "processor": "x86_64",
            "python_version": "3.11.7",
            "device": "cpu",
            "threads": 2,
            "packages": {"torch": "2.13.0", "liger-kernel": None},
        },
        "benchmarks": [{"extra_info": row} for row in rows],
    }


def test_table_has_a_row_for_each_peer_under_its_shape_and_names_the_machine():
    text = report.table(
        run_of(
            row("products", 128, 10.0, None),
            row("ours", 128, 11.5, 8.0),
            row("ours", 256, 23.0, 8.0, ignored=0.5, computation="log_probs"),
        )
    )
    assert text.startswith("A Processor, 2 threads, Python 3.11.7, torch 2.13.0, 2026-11-23\n")
    first, second = text.split("**Policy loss, forward + backward**, T 128, D 256, V 32001, bfloat16\n")[1].split(
        "**Log-probabilities, forward only**, T 256, D 256, V 32001, bfloat16, 50% of the tokens ignored\n"
    )
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in first.splitlines() if "ours" in line]
    assert cells == [["ours", "11.5", "0.2", "1.5", "0.875", "8.0", "2.0"]]
    assert "| products |" in first and "| products |" not in second
    assert "23.0" in second
    assert "- ours: the notes of ours." in text
    assert "Not measured" in text and "verl" in text and "Fast-LLM" in text


def test_plots_where_there_are_several_lengths(tmp_path):
    run = run_of(
        row("products", 128, 10.0, None),
        row("products", 256, 20.0, None),
        row("ours", 256, 23.0, 8.0),
        row("ours", 128, 11.5, 8.0),
        row("ours", 128, 11.5, 8.0, dtype="float32"),
    )
    (path,) = report.plots(run, tmp_path)
    assert path.name == "policy_loss-bfloat16-D256-V32001.png"
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_from_a_measurement_to_its_table(tmp_path):
    """The two steps of `make bench`, on the smallest measurement."""
    # Beside other tests of a parallel run, whose workers pytest-benchmark would take itself for one of.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**own, "OMP_WAIT_POLICY": "PASSIVE"}
    path = tmp_path / "run.json"
    for command in (
        ["pytest", "bench/", "-q", "-k", "T128 and plain", "--benchmark-json", str(path)],
        ["bench.report", str(path), "--out", str(tmp_path / "made" / "here")],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "made" / "here" / "table.md").read_text() in done.stdout
    assert "| plain |" in done.stdout
    run = json.loads(path.read_text())
    assert "node" not in run["machine_info"]
    (measured,) = report.load(run)
    # Logits in bfloat16 and float32, and their gradient: between two and three times the float32 ones.
    logits_mib = 128 * 32001 * 4 / 2**20
    assert 2 * logits_mib < measured["scratch_mib"] <= 3.1 * logits_mib
    assert 0 < measured["share_of_floor"] < 2
