"""The choice of backend, and what is said when one cannot run."""

import subprocess
import sys

import pytest
import torch

from repo_fast.ops import available_backends, dispatch, generalized_advantages, linear_log_probs

OPS = [
    "fused_rectified_policy_loss",
    "generalized_advantages",
    "linear_log_probs",
    "prompt_violations",
    "rectified_policy_loss",
]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_every_op_has_every_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_CPP_MISSING", None)
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    for op in OPS:
        assert available_backends(op) == ["triton", "cpp", "torch"]
    assert available_backends() == ["triton", "cpp", "torch"]
    with pytest.raises(ValueError, match="available_backends: op must be one of .*'sum'"):
        available_backends("sum")


def test_triton_wants_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "triton" not in available_backends()
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="'triton' needs tensors on a CUDA or ROCm GPU, got tensors on cpu: use backe"):
        linear_log_probs(x, x, torch.tensor([0, 1]), backend="triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert available_backends()[0] == "triton"
    monkeypatch.setattr(dispatch, "_TRITON_MISSING", "Triton is not installed: run `pip install triton` (Linux)")
    assert "triton" not in available_backends()
    with pytest.raises(ValueError, match="'triton' cannot run here: Triton is not installed: run `pip install triton`"):
        dispatch.resolve("linear_log_probs", "triton", GPU)


@pytest.mark.parametrize("op", OPS)
def test_auto_prefers_what_is_built(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_CPP_MISSING", None)
    assert dispatch.resolve(op, "auto", CPU) == "cpp"
    assert dispatch.resolve(op, "auto", GPU) == "triton"
    monkeypatch.setattr(dispatch, "_TRITON_MISSING", "not installed")
    assert dispatch.resolve(op, "auto", GPU) == "torch"
    with pytest.raises(ValueError, match="'cpp' needs CPU tensors, got tensors on cuda"):
        dispatch.resolve(op, "cpp", GPU)


def test_without_the_extension_auto_is_torch_and_cpp_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_CPP_MISSING", dispatch.why_missing("no module"))
    zeros, offsets = torch.zeros(4), torch.tensor([0, 4], dtype=torch.int32)
    generalized_advantages(zeros, zeros, offsets)
    assert dispatch.resolve("generalized_advantages", "auto", CPU) == "torch"
    assert "cpp" not in available_backends("generalized_advantages")
    with pytest.raises(ValueError, match=r"has no C\+\+ extension .*no module.* `pip install -e \.`"):
        generalized_advantages(zeros, zeros, offsets, backend="cpp")


def test_a_missing_extension_is_said_once_at_import() -> None:
    code = "import sys; sys.modules['repo_fast._C'] = None; import repo_fast.ops"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.count("has no C++ extension") == 1
