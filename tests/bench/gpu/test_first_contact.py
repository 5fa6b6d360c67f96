"""What is carried to a GPU machine, on the CPU: the probe runs whole, and the scripts run what they say and pack it."""

import json
import os
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.gpu.first_contact import probe
from bench.gpu_suite import PARTS
from bench.loss_head.chunks import chunks_of, rounded_sums
from repo_fast.ops import sweep
from tests.job_runs import REPOSITORY

CPU = torch.device("cpu")
SCRIPTS = Path(REPOSITORY, "bench", "gpu", "first_contact")


# ------------------------------------------------------------------------------------------------------- probe


@pytest.mark.slow
def test_the_probe_runs_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Row passes by Triton's interpreter."""
    out = tmp_path / "out.jsonl"
    probe.main([str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert out.read_text() == capsys.readouterr().out
    assert [row for row in rows if "error" in row] == []
    names = [row["name"] for row in rows]
    products = [
        f"{name}, {alignment}"
        for alignment in ("V and pitch V", "pitch padded", "V and pitch padded")
        for name in ("logits", "dh", "dW")
    ]
    assert names[1:10] == products and names[10:13] == ["dW +=", "dW in float32", "dW += in float32"]
    assert [name for name in names if name.startswith("rows, ")] == [
        "rows, log-probs",
        "rows, log-probs and entropies",
        "rows, gradient",
        "rows, gradient of entropies as well",
    ]
    ops = [(row["chunk"], row["sum"]) for row in rows if row["name"] == "op, policy_loss"]
    assert ops == [("as shipped", "as shipped"), (16, "as shipped"), (16, "rounded")]
    assert all(0 < error < 1e-5 for row in rows for error in row.get("errors", ()))
    assert all("aten::mm" in row["kernels"] for row in rows[1:10])
    (timeline,) = [row["events"] for row in rows if row["name"] == "timeline of log_probs"]
    names = [event["name"] for event in timeline]
    assert names.index("aten::nonzero") < names.index("aten::mm")
    assert sorted(timeline, key=lambda event: event["start"]) == timeline and timeline[0]["start"] == 0


def said_of(*pieces: Any) -> list[dict[str, Any]]:
    def all_of_them() -> Iterator[probe.Piece]:
        for piece in pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    rows: list[dict[str, Any]] = []
    probe.measure("part", all_of_them(), rows.append)
    return rows


def failing(error: Exception) -> probe.Piece:
    def fail() -> dict[str, Any]:
        raise error

    return probe.Piece("bad", {"V": 3}, fail)


def test_what_fails_is_said_and_the_rest_goes_on() -> None:
    good = probe.Piece("good", {"V": 3}, lambda: {"ms": 1.0})
    assert said_of(failing(ValueError("no such\nthing")), good) == [
        {"name": "bad", "V": 3, "error": "ValueError: no such\nthing"},
        {"name": "good", "V": 3, "ms": 1.0},
    ]
    # Inputs that do not fit.
    assert said_of(good, MemoryError("large"))[1:] == [{"name": "part", "error": "MemoryError: large"}]


def test_a_device_that_failed_ends_the_probe() -> None:
    rows: list[dict[str, Any]] = []
    with pytest.raises(torch.AcceleratorError):
        probe.measure("part", iter([failing(torch.AcceleratorError("illegal address"))]), rows.append)
    assert "illegal address" in rows[0]["error"]


@pytest.mark.parametrize("version", ["2.11", "2.13"])
def test_attention_is_compared_with_sequences_alone(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_loop(
        query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, *others: Any, scale: float, window_size: Any
    ) -> Tensor:
        assert window_size == (-1, 0) and others[1:] == (300, 300)
        bounds = cu_seqlens.tolist()
        parts = []
        for start, stop in zip(bounds, bounds[1:], strict=False):
            one = (x[start:stop].transpose(0, 1) for x in (query, key, value))
            parts.append(scaled_dot_product_attention(*one, is_causal=causal, scale=scale, enable_gqa=True))
        return torch.cat(parts, dim=1).transpose(0, 1)

    def newer(*args: Any, scale: float, window_size: Any, enable_gqa: bool = False) -> Tensor:
        assert enable_gqa == (args[0].shape[1] != args[1].shape[1])
        return by_loop(*args, scale=scale, window_size=window_size)

    causal = True
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", by_loop if version == "2.11" else newer)
    for piece in probe.attention(CPU, torch.float32):
        row = piece.measure()
        assert max(row["output"], *row["gradients"]) < 1e-5
        assert {"scale", "window_size"} <= set(row["arguments"])
    causal = False
    assert probe.varlen_errors(1, CPU, torch.float32)["output"] > 0.1


def test_sums_are_rounded_after_each_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """In step with the loop over rows: a sum of bfloat16, and further off than the one that is shipped."""
    # Also on a CPU where operands would be widened, and no sum be rounded.
    monkeypatch.setattr(sweep, "cpu_multiplies_bfloat16", lambda: True)
    g = torch.Generator().manual_seed(0)
    V = sweep.BFLOAT16_MIN_VOCABULARY
    hidden = torch.randn(256, 16, generator=g).bfloat16()
    weight = torch.randn(V, 16, generator=g).bfloat16()

    def grad_weight() -> Tensor:
        with chunks_of(16):
            return sweep.sweep(hidden, weight, None, lambda *chunk: None, need_weight=True)[1]

    shipped, true = grad_weight(), (hidden.float() @ weight.float().T).bfloat16().float().T @ hidden.float()
    with rounded_sums():
        rounded = grad_weight()
    assert rounded.dtype == torch.bfloat16
    errors = [probe.relative_error(value, true) for value in (shipped, rounded)]
    assert errors[0] < 0.6 * errors[1] < 0.02


# ----------------------------------------------------------------------------------------------------- scripts

STUB = """#!/usr/bin/env bash
echo "$@" >> "$CALLS"
echo "said by $2"
case "$*" in
  *bench.gpu_suite*) touch "$4/results.json" "$4/tables.md" ;;
  *first_contact.probe*) echo row > "$3" ;;
  *repo_fast.train*) echo "PYTHONPATH $PYTHONPATH" >> "$CALLS"; mkdir -p "$6"; touch "$6/metrics.jsonl" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with nothing but what `prepare.sh` made in it, without wheels."""
    root = tmp_path / "checkout"
    root.mkdir()
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    prepared = subprocess.run(
        ["bash", SCRIPTS / "prepare.sh"], cwd=root, env=os.environ | {"WHEELS": "no"}, capture_output=True, text=True
    )
    assert prepared.returncode == 0, prepared.stderr
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    return root


def test_what_is_carried_is_ignored_by_git(checkout: Path) -> None:
    assert {path.name for path in (checkout / ".carry").iterdir()} == {
        "first.sh",
        "second.sh",
        "third.sh",
        "contact.sh",
        "wheels",
        "peers",
    }
    status = subprocess.run(["git", "status", "--porcelain"], cwd=checkout, capture_output=True, text=True, check=True)
    assert status.stdout == ""


def test_the_scripts_run_every_part_and_pack_what_it_left(checkout: Path, tmp_path: Path) -> None:
    out, calls = tmp_path / "out", tmp_path / "calls"
    environment = os.environ | {"PYTHON": str(tmp_path / "python"), "CALLS": str(calls)}
    said = []
    for script in ("first", "second", "third"):
        command = ["bash", f".carry/{script}.sh", str(out)]
        run = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=60)
        assert run.returncode == 0, run.stderr
        said.append(run.stdout)
    assert (
        "probe: exit status 0" in said[0] and "suite2: exit status 0" in said[1] and "train: exit status 0" in said[2]
    )
    ran = re.findall(r"-m bench.gpu_suite --out \S+ --parts (.*)", calls.read_text())
    assert " ".join(ran).split() == [part for part in PARTS if part != "rollout"]
    assert re.search(r"-m bench.gpu.first_contact.probe \S+/1/probe.jsonl", calls.read_text())
    assert re.search(r"-m repo_fast.train --config tiny .*\nPYTHONPATH /\S+\n", calls.read_text())
    assert sorted(path.name for path in out.iterdir()) == ["1.tar.gz", "2.tar.gz", "3.tar.gz"]
    packed = []
    for path in sorted(out.iterdir()):
        with tarfile.open(path) as archive:
            packed.append({name.partition("/")[2] for name in archive.getnames()} - {""})
    suite = {"results.json", "tables.md"}
    assert packed == [
        {"probe.jsonl", "probe.log", "suite1.log"} | suite,
        {"suite2.log"} | suite,
        {"suite3.log", "train.log", "metrics.jsonl"} | suite,
    ]


def test_a_script_has_the_time_of_its_parts() -> None:
    """And to start: 20 s."""
    for script in ("first", "second", "third"):
        text = (SCRIPTS / f"{script}.sh").read_text()
        ((seconds, parts),) = re.findall(r"^suite (\d+) \d (.*)$", text, re.MULTILINE)
        assert sum(PARTS[part].seconds for part in parts.split()) + 20 <= int(seconds)
        allowed = int(seconds) + sum(map(int, re.findall(r"bounded (\d+)", text)))
        assert allowed <= int(re.findall(r"less than (\d+) s", text)[0])
