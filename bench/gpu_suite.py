"""Everything that needs a GPU, in one command of less than eight minutes on one H100:

    python -m bench.gpu_suite --out DIR

    environment   the device, its bare speed, driver, versions
    correctness   every op against float64, in all ways of calling it                  (gpu/correctness.py)
                  the other promises of the ops                                        (gpu/promises.py)
                  packed attention                                                     (gpu/attention.py)
    kernels       the loss head beside its peers; where its time goes; tuning          (gpu/kernels.py)
    utilisation   how much of the device the policy update of a 7B model uses          (gpu/utilisation.py)
    training      that update beside padded batches, and without what makes it fast    (training_phase.py)
    rollout       generation, where DeepSpeed can be imported; vLLM's, where it can    (rollout_phase.py)
    limits        ids out of range, addresses beyond 32 bits: last, since a wrong address would end the process's use of
                  the device                                                           (gpu/promises.py)

Run from the root of the repository: neither repo_fast nor its C++ extension needs to be installed, only torch, triton
and transformers. Peers are measured where they can be imported.

A part is a sequence of units, those of most consequence first. Two files are written: DIR/results.json anew after each
unit, DIR/tables.md after each part, so a run that is cut off leaves what it had measured. A unit that fails leaves its
traceback in results.json, and the rest goes on; units that are not begun before the part's time is over are named
there. The exit status is not 0 if a unit failed or a check did not pass. Missed targets are told, and are no failure.

Without a GPU everything runs in tiny sizes on the CPU, as a test of the suite itself.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import training_phase
from bench.gpu import attention, correctness, kernels, promises, utilisation
from bench.measuring.machine import environment_table, environment_units
from bench.measuring.suite import Part, Results, run_part, write_json
from bench.measuring.tables import render, render_targets
from bench.trainer import processes


def correctness_units(
    device: torch.device, tiny: bool, budget_s: float
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Functions that make a check and return whether it `passed`, and its `errors`; there are no rounds to time."""
    for checks in (
        promises.promises(tiny, device),
        attention.checks(device),
        correctness.checks(tiny, device),
        promises.compiled(tiny, device),
    ):
        for name, check in checks:
            yield name, partial(judged, check)


def limit_units(
    device: torch.device, tiny: bool, budget_s: float
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """As `correctness_units`, the checks that a wrong address would fail for good."""
    for name, check in promises.limits(tiny, device):
        yield name, partial(judged, check)


def judged(check: Callable[[], correctness.Errors]) -> dict[str, Any]:
    errors = check()
    return {"passed": all(error <= bound for error, bound in errors.values()), "errors": errors}


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


def rollout_units(
    device: torch.device, tiny: bool, budget_s: float
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    if importlib.util.find_spec("deepspeed") is None:
        print("rollout: left out, for deepspeed is not installed", file=sys.stderr)
        return
    name = "tiny" if tiny else "half-billion"

    def run(folder: Path) -> dict[str, Any]:
        return processes.torchrun(1, "bench.rollout_phase", str(folder), "OUT", name)

    yield f"{name}, one rank", partial(processes.with_job, training_phase.GEOMETRIES[name], run)


def rollout_table(results: Results) -> str:
    # Knows DeepSpeed.
    from bench import rollout_phase

    return rollout_phase.table(results)


PARTS = {
    "environment": Part(environment_units, environment_table, 15),
    "correctness": Part(correctness_units, checks_table, 115),
    "kernels": Part(kernels.units, kernels.table, 175),
    "utilisation": Part(utilisation.units, utilisation.table, 20),
    "training": Part(training_phase.units, training_phase.table, 85),
    "rollout": Part(rollout_units, rollout_table, 50),
    "limits": Part(limit_units, checks_table, 15),
}
NEAREST_CHECKS = 12


def summarize(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Status of the parts, what failed or was left out, and the judged targets."""
    checks = {
        name: check
        for part in ("correctness", "limits")
        if part in records
        for name, check in records[part]["results"].items()
    }
    targets: dict[str, Any] = {}
    for part, phase in (("kernels", kernels), ("utilisation", utilisation), ("training", training_phase)):
        if part in records:
            targets |= phase.judge(records[part]["results"])
    if records.get("rollout", {}).get("results"):
        from bench import rollout_phase

        targets |= rollout_phase.judge(records["rollout"]["results"])
    return {
        "parts": {name: f"{record['status']}, {record['seconds']:.0f} s" for name, record in records.items()},
        "failures": {name: list(record["failures"]) for name, record in records.items() if record["failures"]},
        "left_out": {name: record["left_out"] for name, record in records.items() if record["left_out"]},
        "checks_passed": sum(check["passed"] for check in checks.values()),
        "checks_failed": [name for name, check in checks.items() if not check["passed"]],
        "targets": targets,
    }


def tables(records: dict[str, dict[str, Any]]) -> str:
    """What the parts found, and the judged targets, as text."""
    found = [PARTS[name].table(record["results"]) for name, record in records.items() if record["results"]]
    found.append(render_targets(summarize(records)["targets"]))
    return "\n\n".join(table for table in found if table)


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

    def keep(record: dict[str, Any]) -> None:
        records[record["part"]] = record
        write_json(options.out / "results.json", {"summary": summarize(records), "parts": records})

    deadline = time.monotonic()
    text = ""
    for name in options.parts:
        deadline += PARTS[name].seconds  # not from now: a part that took longer leaves less to the next
        run_part(name, PARTS[name], device, tiny, deadline, keep)
        text = tables(records)
        (options.out / "tables.md").write_text(text + "\n")
    print(text)
    summary = summarize(records)
    for key in ("parts", "failures", "left_out", "checks_failed"):
        print(f"{key}: {summary[key]}")
    return 1 if summary["failures"] or summary["checks_failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
