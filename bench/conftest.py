"""What belongs to a whole run of the benchmarks: its selection, and what its JSON says about the machine."""

import os
import tempfile
from importlib import metadata
from typing import Any

import pytest
import torch

PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "trl", "quack-kernels")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="All sizes and dtypes, not the selection of a few minutes.")


def pytest_configure(config: pytest.Config) -> None:
    # First calls are timed as on a machine that has never compiled anything: no graphs and no kernels of earlier runs.
    folder = tempfile.TemporaryDirectory(prefix="inductor-", ignore_cleanup_errors=True)
    config.add_cleanup(folder.cleanup)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    del machine_info["node"]  # a host's name means nothing to readers
    machine_info["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    machine_info["threads"] = torch.get_num_threads()
    machine_info["packages"] = {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
