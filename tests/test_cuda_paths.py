"""What runs on the host of a GPU, without one: the tests of `tests/cuda`, in a process that was told of a GPU.

python -m tests.test_cuda_paths [PYTEST_ARGUMENTS]
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from shutil import which

import pytest
import torch

FOLDER = Path(__file__).parent / "cuda"
COMPILER = os.environ.get("CXX", "c++")


def run_told_of_a_gpu(arguments: list[str], **options: object) -> subprocess.CompletedProcess:
    """Run pytest on `tests/cuda`. A CPU build of torch is told of a GPU; a CUDA build knows GPUs, and has none."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"ABSENT_GPU": "1", "DS_ACCELERATOR": "cuda"}
        if torch.version.cuda is None:
            environment["LD_PRELOAD"] = str(_built(Path(folder)))
        command = [sys.executable, "-m", "pytest", FOLDER, "-p", "no:cacheprovider", "--quiet", *arguments]
        return subprocess.run(command, cwd=FOLDER.parents[1], env=environment, **options)


def _built(folder: Path) -> Path:
    torch_folder = Path(torch.__file__).parent
    built = folder / "absent_gpu.so"
    libraries = [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder / 'lib'}"]
    headers = f"-I{torch_folder / 'include'}"
    command = [COMPILER, "-std=c++20", "-shared", "-fPIC", headers, FOLDER / "absent_gpu.cpp", "-o", built, *libraries]
    subprocess.run(command, check=True)
    return built


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is None and which(COMPILER) is None, reason="a C++ compiler is needed")
def test_the_host_s_side_of_a_gpu() -> None:
    run = run_told_of_a_gpu(["-x"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


if __name__ == "__main__":
    sys.exit(run_told_of_a_gpu(sys.argv[1:]).returncode)
