"""Everything that needs a GPU, in one command of less than eight minutes on one H100:

    python -m bench.gpu_suite --out DIR

    environment   the device, its bare speed, driver, versions
    correctness   every op against float64, and the other promises of the ops          (gpu_correctness.py)
    kernels       the loss head beside its peers; where its time goes; tuning          (gpu_kernels.py)
    training      the policy update at the geometry of a 7B model                      (training_phase.py)
    limits        ids out of range, addresses beyond 32 bits: last, since a wrong address would end the process's use of
                  the device                                                           (gpu_correctness.py)

Run from the root of the repository: neither repo_fast nor its C++ extension needs to be installed, only torch, triton
and transformers. Peers are measured where they can be imported.

A part is a sequence of units. After each of them DIR/PART.json is written anew, so a run that is cut off leaves what
it had measured. A unit that fails leaves its traceback there, and the rest goes on; units that are not begun before
the part's time is over are named there. At the end come all tables, DIR/tables.md and DIR/summary.json, and the exit
status: not 0 if a unit failed or a check did not pass. Missed targets are told, and are no failure.

Without a GPU everything runs in tiny sizes on the CPU, as a test of the suite itself.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench import gpu_correctness, gpu_kernels, training_phase
from bench.measure import Task, elapsed_ms
from bench.tables import render, render_targets

VERSIONS = ("torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy", "deepspeed", "flash-attn")
Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """A part of the suite.

    Attributes:
        units: (device, tiny, seconds for timed rounds) -> names, and functions that measure and return what they found.
        table: Those results as text.
        seconds: After which no unit is begun, on a GPU.
    """

    units: Callable[[torch.device, bool, float], Iterator[tuple[str, Callable[[], dict[str, Any]]]]]
    table: Callable[[Results], str]
    seconds: float


# ------------------------------------------------------------------------------------------------ environment


def environment_units(
    device: torch.device, tiny: bool, budget_s: float
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    yield "machine", partial(machine, device)
    yield "speed", partial(bare_speed, device, 256 if tiny else 8192)


def machine(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, commit and date."""
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "python": platform.python_version(),
        "processor": f"{os.cpu_count()} x {platform.machine()}",
        "threads": torch.get_num_threads(),
        "device": "CPU",
    }
    for name in VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts[name] = metadata.version(name)
    facts["repo_fast._C"] = importlib.util.find_spec("repo_fast._C") is not None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "memory, MiB": properties.total_memory >> 20,
            "multiprocessors": properties.multi_processor_count,
            "CUDA": torch.version.cuda or torch.version.hip,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return facts


def _output(*command: str) -> str | None:
    """What a program prints, None where there is no such program or it fails."""
    if shutil.which(command[0]) is None:
        return None
    run = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return run.stdout.strip() if run.returncode == 0 else None


def bare_speed(device: torch.device, size: int) -> dict[str, Any]:
    """A square bfloat16 product on random data, and a copy: what the device does with nothing in the way."""
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    copy = torch.empty(size, size, 4, device=device)
    source = torch.zeros_like(copy)
    product_ms, copy_ms = (
        sorted(elapsed_ms(Task(run), device) for _ in range(9))[4]
        for run in (lambda: a @ b, lambda: copy.copy_(source))
    )
    return {
        f"product of {size}, TFLOP/s": round(2e-9 * size**3 / product_ms, 1),
        "copy, read and written, GB/s": round(2e-6 * copy.nbytes / copy_ms, 1),
    }


def environment_table(results: Results) -> str:
    facts = {key: value for result in results.values() for key, value in result.items()}
    return render(["environment", ""], [[key, str(value)] for key, value in facts.items()])


def checks_table(results: Results) -> str:
    """What failed, and the checks that came nearest to what is allowed."""
    rows = []
    for name, result in results.items():
        shares = {
            quantity: error / bound if bound else float(error != 0)
            for quantity, (error, bound) in result["errors"].items()
        }
        worst = max(shares, key=lambda quantity: shares[quantity])
        rows.append((result["passed"], -shares[worst], name, worst))
    rows.sort()
    shown = [row for i, row in enumerate(rows) if not row[0] or i < NEAREST_CHECKS]
    passed = sum(result["passed"] for result in results.values())
    return render(
        [f"{passed} of {len(rows)} checks passed; the nearest", "quantity", "error / allowed", ""],
        [[name, worst, f"{-share:.2f}", "" if passed else "FAILED"] for passed, share, name, worst in shown],
    )


PARTS = {
    "environment": Part(environment_units, environment_table, 20),
    "correctness": Part(gpu_correctness.units, checks_table, 130),
    "kernels": Part(gpu_kernels.units, gpu_kernels.table, 170),
    "training": Part(training_phase.units, training_phase.table, 100),
    "limits": Part(gpu_correctness.limit_units, checks_table, 20),
}
# Of a part's time, for its timed rounds; the rest is for inputs, compilers and memory.
TIMED_SHARE = 0.4
TINY_TIMED_SECONDS = 2.0
NEAREST_CHECKS = 12


# ---------------------------------------------------------------------------------------------------- running


def run_part(name: str, part: Part, device: torch.device, tiny: bool, deadline: float, out: Path) -> dict[str, Any]:
    """Runs the units of a part until the deadline (`time.monotonic`), and keeps `out/name.json` up to date.

    Returns:
        What is in the file: `status` ("done", "out of time", "failed"), `seconds`, `results` and `failures` by unit,
        and the names of the units `left_out`.
    """
    start = time.monotonic()
    record: dict[str, Any] = {
        "part": name,
        "status": "running",
        "seconds": 0.0,
        "results": {},
        "failures": {},
        "left_out": [],
    }

    def save() -> None:
        record["seconds"] = round(time.monotonic() - start, 1)
        write_json(out / f"{name}.json", record)

    save()
    try:
        for unit, measure in part.units(device, tiny, TINY_TIMED_SECONDS if tiny else TIMED_SHARE * part.seconds):
            if time.monotonic() > deadline:
                record["left_out"].append(unit)
                continue
            began = time.monotonic()
            try:
                record["results"][unit] = measure()
            except Exception:
                record["failures"][unit] = traceback.format_exc()
            print(f"{name}: {unit}, {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
            save()
            if device.type == "cuda":
                torch.cuda.empty_cache()  # blocks of the sizes of one unit would be in the way of the next
    except Exception:
        record["failures"]["units"] = traceback.format_exc()
    record["status"] = "failed" if record["failures"] else "out of time" if record["left_out"] else "done"
    save()
    return record


def write_json(path: Path, value: Any) -> None:
    """Replaces the file in one step: a reader finds the old or the new one, whole."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    os.replace(aside, path)


def summarize(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Status of the parts, what failed or was left out, and the judged targets."""
    checks = {
        name: check
        for part in ("correctness", "limits")
        if part in records
        for name, check in records[part]["results"].items()
    }
    targets: dict[str, Any] = {}
    for part, judge in (("kernels", gpu_kernels.judge), ("training", training_phase.judge)):
        if part in records:
            targets |= judge(records[part]["results"])
    return {
        "parts": {name: f"{record['status']}, {record['seconds']:.0f} s" for name, record in records.items()},
        "failures": {name: list(record["failures"]) for name, record in records.items() if record["failures"]},
        "left_out": {name: record["left_out"] for name, record in records.items() if record["left_out"]},
        "checks_passed": sum(check["passed"] for check in checks.values()),
        "checks_failed": [name for name, check in checks.items() if not check["passed"]],
        "targets": targets,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the suite; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results; made if it is not there")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    tiny = not torch.cuda.is_available()
    device = torch.device("cpu") if tiny else torch.device("cuda", torch.cuda.current_device())

    records: dict[str, dict[str, Any]] = {}
    deadline = time.monotonic()
    for name in options.parts:
        deadline += PARTS[name].seconds  # not from now: a part that took longer leaves less to the next
        records[name] = run_part(name, PARTS[name], device, tiny, deadline, options.out)
    summary = summarize(records)
    write_json(options.out / "summary.json", summary)
    tables = [PARTS[name].table(record["results"]) for name, record in records.items() if record["results"]]
    tables.append(render_targets(summary["targets"]))
    text = "\n\n".join(table for table in tables if table)
    (options.out / "tables.md").write_text(text + "\n")
    print(text)
    for key in ("parts", "failures", "left_out", "checks_failed"):
        print(f"{key}: {summary[key]}")
    return 1 if summary["failures"] or summary["checks_failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
