"""Every Triton kernel at its shipped settings fits the GPUs it is for, which none of these machines need to have."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.compile_ahead import SHARED_LIMITS, Usage

KERNELS = Path(__file__).parents[2] / "kernels"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> list[Usage]:
    """From a process of its own: in this one kernels are defined for the interpreter. Shown, whatever comes of it."""
    folder = tmp_path_factory.mktemp("compiled")
    command = [sys.executable, "-m", "tests.kernels.compile_ahead", "--json", folder / "table.json"]
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder / "cache")}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{run.stdout}")
    return [Usage(**row) for row in json.loads((folder / "table.json").read_text())]


def test_every_kernel_is_compiled_for_every_gpu(table: list[Usage]) -> None:
    defined = set()
    for file in KERNELS.glob("*.py"):
        defined |= {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}
    kernels = {name for name in defined if name.endswith("_kernel")}
    for capability in SHARED_LIMITS:
        assert {row.kernel for row in table if row.capability == capability} == kernels


def test_nothing_spills_and_shared_memory_is_enough(table: list[Usage]) -> None:
    for row in table:
        assert row.spilled == 0, row
        assert row.shared <= SHARED_LIMITS[row.capability], row
        assert row.registers * row.warps * 32 <= 65536, row  # the registers of a multiprocessor


def test_two_rows_of_an_alpaca_sized_vocabulary_share_a_multiprocessor(table: list[Usage]) -> None:
    rows = [row for row in table if row.case.startswith("bfloat16 V=32001")]
    assert rows and all(2 * row.registers * row.warps * 32 <= 65536 for row in rows)


def test_kernels_know_torch_and_triton_only() -> None:
    files = list(KERNELS.glob("*.py"))
    assert files and not (KERNELS / "__init__.py").exists()  # it would shadow Hugging Face's library `kernels`
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 1 or node.module.split(".")[0] in ("torch", "triton"), file
            elif isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= {"torch", "triton"}, file
