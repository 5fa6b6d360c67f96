"""A long measurement in parts, each a sequence of units: what was measured is kept, whatever comes after.

After each unit what is known of the part is saved. A unit that fails leaves its traceback there and the rest goes on;
units that are not begun before the part's time is over are named there.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Results = dict[str, dict[str, Any]]
# Of a part's time, for its timed rounds; the rest is for inputs, compilers and memory.
TIMED_SHARE = 0.4
TINY_TIMED_SECONDS = 2.0


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


def run_part(
    name: str,
    part: Part,
    device: torch.device,
    tiny: bool,
    deadline: float,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Runs the units of a part until the deadline (`time.monotonic`).

    Args:
        name: Of the part.
        part: Its units.
        device: Where they run.
        tiny: Small sizes, for a test.
        deadline: After which no unit is begun.
        keep: Called with what is returned, as far as it is known: before the first unit, after each of them, and at
            the end. It should write that where it outlasts this process.

    Returns:
        `part`, the name; `status` ("running", "done", "out of time", "failed"); `seconds`; `results` and `failures` by
        unit; `unit_seconds`; and the names of the units `left_out`.
    """
    start = time.monotonic()
    record: dict[str, Any] = {
        "part": name,
        "status": "running",
        "seconds": 0.0,
        "results": {},
        "failures": {},
        "unit_seconds": {},
        "left_out": [],
    }

    def save() -> None:
        record["seconds"] = round(time.monotonic() - start, 1)
        keep(record)

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
            record["unit_seconds"][unit] = round(time.monotonic() - began, 2)
            print(f"{name}: {unit}, {record['unit_seconds'][unit]:.1f} s", file=sys.stderr, flush=True)
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
