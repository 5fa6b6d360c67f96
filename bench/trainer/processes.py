"""Measurements in processes of their own: ranks under torchrun, on a policy and prompts made for them."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.job_folder import write_job
from bench.training_phase import Geometry

REPOSITORY = Path(__file__).parents[2]
# A process that takes this long hangs.
LIMIT_SECONDS = 900


def torchrun(ranks: int, module: str, *words: str) -> dict[str, Any]:
    """Run a module of this folder on some ranks, the cores shared among them; returns what it wrote as JSON.

    Raises:
        RuntimeError: It failed, or took too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", module]
        # vLLM reads the second; it would take gigabytes.
        settings = {
            "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks)),
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
        run = subprocess.run(
            [sys.executable, *launcher, *(word.replace("OUT", str(out)) for word in words)],
            cwd=REPOSITORY,
            env=os.environ | settings | {"OMP_WAIT_POLICY": "PASSIVE"},
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
        )
        if run.returncode != 0 or not out.exists():
            raise RuntimeError(f"{module} ended with exit status {run.returncode}:\n{run.stderr[-4000:]}")
        return json.loads(out.read_text())


def with_job(geometry: Geometry, measure: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Call with a folder that holds a policy and prompts, which is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        write_job(Path(folder), geometry, geometry.sequences)
        return measure(Path(folder))
