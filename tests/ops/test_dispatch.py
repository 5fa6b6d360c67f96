"""The choice of backend, and what is said when one cannot run."""

import subprocess
import sys

import pytest
import torch

from repo_fast.ops import available_backends, dispatch, generalized_advantages, linear_log_probs


def test_torch_is_always_there() -> None:
    assert "torch" in available_backends()
    assert available_backends("linear_log_probs") == ["torch"]
    with pytest.raises(ValueError, match="available_backends: op must be one of .*'sum'"):
        available_backends("sum")


def test_a_backend_that_does_not_exist_yet_says_what_to_use() -> None:
    x = torch.zeros(2, 3)
    for backend in ("triton", "cpp"):
        with pytest.raises(ValueError, match=f"backend='{backend}' cannot run here: .*use backend='auto'"):
            linear_log_probs(x, x, torch.tensor([0, 1]), backend=backend)


def test_auto_prefers_what_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(dispatch, "_CPP_MISSING", None)
    assert dispatch.resolve("generalized_advantages", "auto", cpu) == "cpp"
    assert dispatch.resolve("linear_log_probs", "auto", cpu) == "torch"
    assert dispatch.resolve("generalized_advantages", "auto", torch.device("cuda")) == "torch"
    with pytest.raises(ValueError, match="needs CPU tensors"):
        dispatch.resolve("generalized_advantages", "cpp", torch.device("cuda"))


def test_without_the_extension_auto_is_torch_and_cpp_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_CPP_MISSING", dispatch.why_missing("no module"))
    zeros, offsets = torch.zeros(4), torch.tensor([0, 4], dtype=torch.int32)
    generalized_advantages(zeros, zeros, offsets)
    assert available_backends("generalized_advantages") == ["torch"]
    with pytest.raises(ValueError, match=r"has no C\+\+ extension .*no module.* `pip install -e \.`"):
        generalized_advantages(zeros, zeros, offsets, backend="cpp")


def test_a_missing_extension_is_said_once_at_import() -> None:
    code = "import sys; sys.modules['repo_fast._C'] = None; import repo_fast.ops"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.count("has no C++ extension") == 1
