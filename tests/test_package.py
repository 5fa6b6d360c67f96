"""The package as others meet it: an installed wheel, a library called `kernels` beside it, its import rules."""

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import grimp
import pytest

import repo_fast

ROOT = Path(__file__).parent.parent
LEFT_BEHIND = shutil.ignore_patterns(".*", "outputs", "build", "dist", "*.egg-info", "*.so", "__pycache__")
LIMIT_SECONDS = 600


def run(*words: str | Path, cwd: Path, **environment: str) -> str:
    """The standard output of a child process that must succeed, and that sees only what it is given to import."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    finished = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    return finished.stdout


# ---------------------------------------------------------------------------------------------- an installed wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without a network from a copy of the tree, where building leaves its traces."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=LEFT_BEHIND)
    words = ["wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, "."]
    run(sys.executable, "-m", "pip", *words, cwd=folder / "source")
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment with the wheel, and with the dependencies of the one the tests run in."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=folder,
    )
    # After the installation, which would otherwise find this package there already. A path in a .pth file is searched
    # for modules, but not for further .pth files: an editable installation of this package stays out of sight.
    (site_packages,) = folder.glob("lib/python*/site-packages")
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "dependencies.pth").write_text("\n".join(sorted(paths)) + "\n")
    return python


def test_a_wheel_holds_what_a_run_needs_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    configs = {f"repo_fast/configs/{path.name}" for path in (ROOT / "repo_fast" / "configs").glob("*.yaml")}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "repo_fast").rglob("*.py")}
    assert configs | sources <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"repo_fast"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_an_installed_wheel_brings_its_configurations_and_corpus(python, tmp_path):
    script = (
        "import json, repo_fast.config, repo_fast.data, repo_fast.ops\n"
        "config = repo_fast.config.parse([])\n"
        "sources = (config.data.prompts, config.data.eval_prompts)\n"
        "prompts = [len(repo_fast.data.load_prompts(source)) for source in sources]\n"
        "print(json.dumps([repo_fast.config.__file__, str(repo_fast.config.find_config('tiny')), prompts]))\n"
    )
    module, config, (train, held_out) = json.loads(run(python, "-c", script, cwd=tmp_path))
    environment = str(python.parent.parent)
    assert module.startswith(environment) and config.startswith(environment)
    assert train >= 200 and held_out >= 64


def test_an_installed_wheel_brings_the_command(python, tmp_path):
    command = python.with_name("repo-fast")
    assert run(command, "--version", cwd=tmp_path) == f"repo_fast {repo_fast.__version__}\n"
    assert "agrees" in run(command, "doctor", cwd=tmp_path)


def test_the_main_job_runs_from_an_installed_wheel_in_an_empty_folder(python, tmp_path):
    words = ["--total_steps", "1", "--evaluation.prompts", "4", "--evaluation.samples_per_prompt", "1"]
    printed = run(python, "-m", "repo_fast.train", *words, cwd=tmp_path)
    assert "strict violation" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    output = tmp_path / "outputs" / "tiny"
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 1
    assert (output / "policy" / "model.safetensors").is_file()


# -------------------------------------------------------------------------------- Hugging Face's library `kernels`

STUB = """
class Anything:
    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, target=None, *args, **kwargs):
        return target


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything
"""


def what_is_called_kernels(path: str = "") -> list:
    """After imports in the repository's root: whether transformers uses a library `kernels`, and which."""
    script = (
        "import json, sys, transformers.models.llama.modeling_llama, repo_fast.jobs.trainer\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "used = is_kernels_available()\n"
        "print(json.dumps([used, getattr(sys.modules.get('kernels'), '__file__', None)]))\n"
    )
    return json.loads(run(sys.executable, "-c", script, cwd=ROOT, PYTHONPATH=path).splitlines()[-1])


def test_the_trainer_imports_beside_the_folder_kernels():
    import importlib.util

    installed = importlib.util.find_spec("kernels")
    if installed is not None and installed.origin is not None:
        pytest.skip("Hugging Face's library kernels is installed here")
    assert what_is_called_kernels() == [False, None]


def test_the_trainer_imports_beside_a_library_called_kernels(tmp_path):
    from transformers.utils import import_utils

    version = getattr(import_utils, "KERNELS_MIN_VERSION", "0.12.0")
    library = tmp_path / "kernels" / "__init__.py"
    library.parent.mkdir()
    library.write_text(STUB)
    metadata = tmp_path / f"kernels-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    assert what_is_called_kernels(str(tmp_path)) == [True, str(library)]


# --------------------------------------------------------------------------------------------------- import rules


def test_kernels_know_nothing_of_the_package():
    """They are in no room, and no contract sees them."""
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level < 2 else []
            assert not (isinstance(node, ast.ImportFrom) and node.level > 1), path
            assert not any(name.split(".")[0] == "repo_fast" for name in names), path


def test_the_import_rules_see_every_file():
    """A folder without `__init__.py` would be seen by no contract."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "repo_fast").rglob("*.py")
        if "kernels" not in path.parts
    }
    assert grimp.build_graph("repo_fast", cache_dir=None).modules == files


@pytest.mark.parametrize(
    ("file", "line", "kept"),
    [
        ("repo_fast/config/train.py", "", True),
        ("repo_fast/ops/loss.py", "import repo_fast.config", False),
        ("repo_fast/objective/algorithm.py", "import repo_fast.data", False),
        ("repo_fast/models/policy.py", "import repo_fast.learning.experience", False),
        ("repo_fast/packing/rows.py", "import repo_fast.engine", False),
        ("repo_fast/report/page.py", "import tests", False),
        ("repo_fast/cellar.py", "", False),  # in no room
        ("repo_fast/jobs/trainer.py", "import deepspeed", False),
        ("repo_fast/models/policy.py", "import vllm", False),
    ],
)
def test_the_import_rules_hold_and_bite(file, line, kept, tmp_path):
    shutil.copytree(ROOT / "repo_fast", tmp_path / "repo_fast", symlinks=True, ignore=LEFT_BEHIND)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / file, "a") as source:
        source.write(f"\n{line}\n")
    linter = Path(sys.executable).with_name("lint-imports")
    finished = subprocess.run(
        [linter, "--no-logo", "--no-cache"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
    )
    assert (finished.returncode == 0) == kept, finished.stdout.decode()
