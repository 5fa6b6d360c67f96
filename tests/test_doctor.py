"""The doctor: its tables, and that it notices what is broken or wrong without breaking itself."""

import re
import sys
import types
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import repo_fast.ops
from repo_fast import doctor
from repo_fast.doctor import Finding, Package
from repo_fast.ops import dispatch, registration, self_check
from repo_fast.ops.dispatch import implementation

CPU = torch.device("cpu")
BACKENDS = ("cpp", "torch", "triton")


@pytest.fixture
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Triton's interpreter, which takes seconds."""
    monkeypatch.setattr(dispatch, "INTERPRETED", False)


def test_a_sound_machine_is_status_0_and_every_op_is_in_the_table(capsys):
    assert doctor.main([]) == 0
    said = capsys.readouterr()
    assert said.err == "" and "note: " not in said.out
    # As it was installed: from PyPI without the build that torch adds to it.
    assert re.search(rf"\| torch +\| +{re.escape(version('torch'))} \|", said.out)
    assert re.search(r"\| repo_fast\._C +\| +built, runs \w+ \|", said.out)
    assert re.search(r"\| ops +\| +cpp \|", said.out) and re.search(r"\| between ranks +\| +gloo \|", said.out)
    rows = re.findall(r"^\| (\w+) +\| +(\w+) \| (\S+) \| +agrees \|$", said.out, re.MULTILINE)
    ops = set(repo_fast.ops.__all__) - {"PolicyLoss", "available_backends"}
    assert {row[:2] for row in rows} == {(op, backend) for op in ops for backend in BACKENDS}
    # Float32 is not float64: each was compared with something else than itself.
    assert all(0 < float(difference) <= self_check.LIMIT for *_, difference in rows)


def broken(op: str, backend: str, spoil: Callable[[Any], Any]) -> Callable[..., Any]:
    """The table of implementations, in which one is spoilt."""

    def chosen(name: str, own: str) -> Callable[..., Any]:
        real = implementation(name, own)
        return (lambda *inputs: spoil(real(*inputs))) if (name, own) == (op, backend) else real

    return chosen


def fails(out: Any) -> Any:
    raise RuntimeError("no kernel image\nis available")


@pytest.mark.parametrize(
    ("op", "spoil", "said"),
    [
        (
            "prompt_violations",
            lambda out: out + 1e-3,
            r"differs from its reference by \d\.\de-03, expected at most 1e-05",
        ),
        ("prompt_violations", lambda out: out.fill_(torch.nan), r"differs from its reference by inf"),
        ("generalized_advantages", lambda out: (out[0], out[1] * 1.001), r"differs from its reference by .*"),
        ("linear_log_probs", fails, r"RuntimeError: no kernel image"),
    ],
)
@pytest.mark.usefixtures("_compiled")
def test_an_op_that_is_wrong_is_named_with_status_1(op, spoil, said, monkeypatch, capsys):
    monkeypatch.setattr(registration, "implementation", broken(op, "cpp", spoil))
    monkeypatch.setattr(doctor, "_SECTIONS", doctor._SECTIONS[-1:])
    assert doctor.main([]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("WRONG") == 1 and printed.out.count("agrees") == 9
    assert re.fullmatch(rf"error: {op} on the backend cpp: {said}.*\n", printed.err), printed.err


@pytest.mark.usefixtures("_compiled")
def test_a_wrong_gradient_is_noticed(monkeypatch):
    name = "fused_rectified_policy_loss_and_gradients"

    def spoil(out: tuple) -> tuple:
        return tuple(value * 1.01 if value.dim() == 2 else value for value in out)

    monkeypatch.setattr(registration, "implementation", broken(name, "torch", spoil))
    wrong = [(one.op, one.backend) for one in self_check.check_ops(CPU) if not one.agrees]
    assert wrong == [("fused_rectified_policy_loss", "torch")]


# ------------------------------------------------------------------------------------------------------------ packages


def installed(folder: Path, name: str, source: str) -> None:
    """A package in a folder, with what pip would have written of it."""
    (folder / f"{name}.py").write_text(source)
    information = folder / f"{name}-1.2.3.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2.3\n")


@pytest.mark.parametrize("needed", [False, True])
def test_a_broken_package_is_one_line_and_fails_where_it_is_needed(needed, tmp_path, monkeypatch):
    installed(tmp_path, "broken_one", "print('hello')\nraise ImportError('undefined symbol: _Z3foo\\nin a library')")
    monkeypatch.syspath_prepend(tmp_path)
    found = doctor.look_at(Package("broken_one", "broken_one", "get another", needed))
    said = "broken_one 1.2.3 cannot be imported (ImportError: undefined symbol: _Z3foo): get another, or remove it"
    assert found == Finding(("broken_one", "1.2.3, broken"), said, fails=needed)


def test_on_a_gpu_what_is_broken_fails_though_it_may_be_missing(tmp_path, monkeypatch):
    installed(tmp_path, "broken_two", "import no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert doctor.look_at(Package("broken_two", "broken_two", "")).fails
    assert not doctor.look_at(Package("no-such-package", "no_such_package", "get it")).fails


def test_what_is_missing_says_how_to_get_it(monkeypatch, capsys):
    found = doctor.look_at(Package("no-such-package", "no_such_package", "get it"))
    assert found == Finding(("no-such-package", "not installed: get it"))
    monkeypatch.setattr(doctor, "PACKAGES", (Package("no-such-package", "", "get it", needed=True),))
    monkeypatch.setattr(doctor, "_SECTIONS", doctor._SECTIONS[1:2])
    assert doctor.main([]) == 1
    assert capsys.readouterr().err == "error: no-such-package is not installed, and every run needs it: get it\n"


def test_without_torch_nothing_else_is_looked_at(monkeypatch, capsys):
    def never() -> list[Finding]:
        raise AssertionError

    torch_is_gone = Finding(("torch", "not installed"), "torch is not installed", fails=True)
    monkeypatch.setattr(doctor, "_SECTIONS", ((("software", ""), lambda: [torch_is_gone]), (("ops", ""), never)))
    assert doctor.main([]) == 1
    assert capsys.readouterr().err == "error: torch is not installed\n"


def test_an_extension_that_was_not_built_is_a_note(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "repo_fast._C", None)
    monkeypatch.setattr(doctor, "PACKAGES", ())
    monkeypatch.setattr(doctor, "_SECTIONS", doctor._SECTIONS[1:2])
    assert doctor.main([]) == 0
    said = capsys.readouterr()
    assert "| not built |" in said.out and said.err == ""
    assert re.search(r"^note: the CPU's ops are slower .* no C\+\+ extension .*pip install", said.out, re.MULTILINE)


# ------------------------------------------------------------------------------------------------------------- machine


def test_gpus_are_listed_with_what_a_run_asks_of_them(monkeypatch):
    cuda = types.SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        get_device_capability=lambda index: (9, 0),
        get_device_name=lambda index: f"Fast {index}",
        mem_get_info=lambda index: (10 * 10**9, 140 * 10**9),
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(doctor, "_said", lambda *command: "570.1")
    assert [one.cells for one in doctor._gpus()] == [
        ("GPU driver", "570.1"),
        ("GPU 0", "Fast 0, compute capability 9.0, 10.0 of 140.0 GB free"),
        ("GPU 1", "Fast 1, compute capability 9.0, 10.0 of 140.0 GB free"),
    ]


def test_a_gpu_that_torch_does_not_see_is_a_note(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_said", lambda *command: "GPU 0: Fast")
    monkeypatch.setattr(torch.version, "cuda", None)
    (found,) = doctor._gpus()
    assert found.cells == ("GPU", "none that torch sees") and "build without CUDA" in found.advice and not found.fails


def test_a_word_too_many_is_one_line(capsys):
    assert doctor.main(["--fix"]) == 2
    assert capsys.readouterr().err == "error: unexpected word '--fix', expected none\n"
    assert doctor.main(["--help"]) == 0
    assert "repo-fast doctor" in capsys.readouterr().out
