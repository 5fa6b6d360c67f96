"""What this machine has, what runs on what here, and whether the ops compute the right thing.

    repo-fast doctor

It needs no GPU and no network, and imports nothing before it is looked at. What is broken or missing is said below the
tables in one line, with what to do: as a note where runs go on without it, as an error where they do not, or where an
op differs from its reference by more than rounding. Exit status: 0; 1 where there is an error.
"""

import contextlib
import importlib
import importlib.metadata
import io
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from repo_fast.errors import first_line, one_line
from repo_fast.report.progress import printable
from repo_fast.report.tables import grid
from repo_fast.speed.host import host_cores, host_memory


@dataclass(frozen=True)
class Finding:
    """A row of a table.

    Attributes:
        cells: It; the first is what was looked at.
        advice: What is wrong with it, and what to do; empty where nothing is.
        fails: Whether runs fail, or compute the wrong thing, until it is done.
    """

    cells: tuple[str, ...]
    advice: str = ""
    fails: bool = False


@dataclass(frozen=True)
class Package:
    """One that is looked for.

    Attributes:
        name: As pip has it.
        module: What is imported to see whether it works; empty: nothing is.
        get: What to do where it is missing or broken.
        needed: Whether every run needs it.
    """

    name: str
    module: str
    get: str
    needed: bool = False


PACKAGES = (
    Package("torch", "torch", "see https://pytorch.org/get-started/locally", needed=True),
    Package("triton", "triton", "pip install triton (Linux)"),
    Package("transformers", "transformers", "pip install transformers", needed=True),
    # By the room that may import it.
    Package("deepspeed", "repo_fast.engine.library", "pip install deepspeed", needed=True),
    Package("flash-attn", "flash_attn", "pip install repo_fast[flash-attn], on CUDA"),
    # To import it would take longer than all the rest.
    Package("vllm", "", "pip install repo_fast[vllm]"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if {"--help", "-h"}.intersection(words):
        print(__doc__)
        return 0
    if words:
        print(f"error: {one_line(f'unexpected word {words[0]!r}, expected none')}", file=sys.stderr)
        return 2
    return examine()


def examine() -> int:
    """Print the tables, and below them what is to be done; returns the exit status."""
    findings: list[Finding] = []
    for header, look in _SECTIONS:
        with _quiet():
            own = look()
        findings += own
        print(printable(grid(header, [one.cells for one in own])), flush=True)
        if any(one.fails and one.cells[0] == "torch" for one in own):
            break
    for finding in findings:
        if finding.advice:
            word, stream = ("error", sys.stderr) if finding.fails else ("note", sys.stdout)
            print(f"{word}: {one_line(finding.advice)}", file=stream, flush=True)
    failed = any(finding.fails for finding in findings)
    if not failed:
        print("What runs need is here, and the ops compute what their reference does.")
    return int(failed)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what libraries print as they are imported."""
    sink = io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# -------------------------------------------------------------------------------------------------------- the machine


def machine() -> list[Finding]:
    """Cores, memory, disk, GPUs and compiler."""
    memory, disk = host_memory(), shutil.disk_usage(Path.cwd())
    compilers = [
        found for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if (found := shutil.which(name))
    ]
    return [
        Finding(("system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}")),
        Finding(("cores", str(host_cores()))),
        Finding(("host memory", _free(*memory))),
        Finding(("disk of this folder", _free(disk.free, disk.total))),
        *_gpus(),
        Finding(("C++ compiler", compilers[0] if compilers else "none")),
    ]


def _free(free: float, total: float) -> str:
    return f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"


def _gpus() -> list[Finding]:
    try:
        import torch

        if not torch.cuda.is_available():
            return [_no_gpu(torch.version.cuda)]
        rows = [Finding(("GPU driver", _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")))]
        if torch.version.hip is not None:
            rows = [Finding(("ROCm", torch.version.hip))]
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            free = _free(*torch.cuda.mem_get_info(index))
            named = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}, {free}"
            rows.append(Finding((f"GPU {index}", named)))
        return rows
    except Exception as error:
        return [Finding(("GPU", "broken"), f"GPUs cannot be looked at: {_why(error)}", fails=True)]


def _no_gpu(cuda: str | None) -> Finding:
    """There is none, or torch cannot use it."""
    if not _said("nvidia-smi", "-L"):
        return Finding(("GPU", "none"))
    why = (
        "is a build without CUDA" if cuda is None else f"is built for CUDA {cuda}, which the driver may be too old for"
    )
    advice = f"nvidia-smi lists GPUs that torch does not see: torch {why}; {PACKAGES[0].get}"
    return Finding(("GPU", "none that torch sees"), advice)


def _said(*command: str) -> str:
    """The first line of what a program prints; empty where it is not there, or fails."""
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return finished.stdout.partition("\n")[0] if finished.returncode == 0 else ""


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


# ------------------------------------------------------------------------------------------------------- the software


def software() -> list[Finding]:
    """Versions of what matters, and whether it can be imported."""
    return [*map(look_at, PACKAGES), _extension()]


def look_at(package: Package) -> Finding:
    """Whether a package is here, and works."""
    try:
        version = importlib.metadata.version(package.name)
    except importlib.metadata.PackageNotFoundError:
        advice = f"{package.name} is not installed, and every run needs it: {package.get}" if package.needed else ""
        return Finding((package.name, f"not installed: {package.get}"), advice, package.needed)
    try:
        if package.module:
            importlib.import_module(package.module)
    except Exception as error:
        advice = f"{package.name} {version} cannot be imported ({_why(error)}): {package.get}, or remove it"
        return Finding((package.name, f"{version}, broken"), advice, fails=package.needed or _on_gpu())
    return Finding((package.name, version))


def _on_gpu() -> bool:
    """Whether a GPU is used: then what may be missing may not be broken."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available()


def _extension() -> Finding:
    name = "repo_fast._C"
    try:
        return Finding((name, f"built, runs {importlib.import_module(name).instruction_set()}"))
    except Exception as error:
        from repo_fast.ops.dispatch import why_missing

        return Finding((name, "not built"), f"the CPU's ops are slower without C++: {why_missing(first_line(error))}")


# ------------------------------------------------------------------------------------------------------ what runs here


def choices() -> list[Finding]:
    """What `auto` is here."""
    try:
        import torch

        from repo_fast.engine import process_group_backend, resolve_dtype
        from repo_fast.models.attention import PACKED, attention_candidates
        from repo_fast.ops.dispatch import resolve

        device = _device()
        dtype = resolve_dtype("auto", device)
        attention = attention_candidates("auto", device, dtype)[0]
        by = "torch's varlen FlashAttention" if device.type == "cuda" else "SDPA, a sequence at a time"
        named = {PACKED: f"packed rows, by {by}", "flash_attention_2": "packed rows, by flash-attn"}
        vllm = importlib.util.find_spec("vllm") is not None
        return [
            Finding(("device", device.type)),
            Finding(("weights and activations", str(dtype).removeprefix("torch."))),
            Finding(("ops", resolve("linear_log_probs", "auto", device))),
            Finding(("attention", named.get(attention, attention))),
            Finding(("rollouts", "hf, or vllm by --rollout.engine vllm" if vllm else "hf")),
            Finding(("between ranks", process_group_backend())),
            Finding(("OpenMP threads", str(torch.get_num_threads()))),
        ]
    except Exception as error:
        return [Finding(("what runs", "broken"), f"what runs here cannot be said: {_why(error)}", fails=True)]


def _device() -> "torch.device":  # noqa: F821 - imported where it is used
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# -------------------------------------------------------------------------------------------------------------- the ops


def op_checks() -> list[Finding]:
    """Each public op once, by each backend that runs here, against its reference in float64."""
    try:
        from repo_fast.ops.self_check import LIMIT, check_ops

        found = []
        for one in check_ops(_device()):
            advice = ""
            if not one.agrees:
                off = f"differs from its reference by {one.difference:.1e}, expected at most {LIMIT:.0e}"
                advice = f"{one.op} on the backend {one.backend}: {one.error or off}; {_MEND[one.backend]}"
            cells = (one.op, one.backend, f"{one.difference:.1e}", "agrees" if one.agrees else "WRONG")
            found.append(Finding(cells, advice, fails=not one.agrees))
        return found
    except Exception as error:
        return [Finding(("ops", "", "", "broken"), f"the ops cannot be run: {_why(error)}", fails=True)]


_MEND = {
    "triton": "install the Triton that belongs to this torch, or a newer driver",
    "cpp": "build the extension again, with another compiler",
    "torch": "install another torch",
}
_SECTIONS: tuple[tuple[tuple[str, ...], Callable[[], list[Finding]]], ...] = (
    (("this machine", ""), machine),
    (("software", ""), software),
    (("what runs here", ""), choices),
    (("op", "backend", "off by", "float32 against float64"), op_checks),
)


if __name__ == "__main__":
    sys.exit(main())
