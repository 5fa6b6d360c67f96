"""The command that watches a run: what it refuses, what it writes, and how it ends."""

import signal
import subprocess
import sys
import urllib.request
from functools import partial
from pathlib import Path
from subprocess import PIPE

import pytest

from repo_fast.watch import main
from tests.job_runs import REPOSITORY
from tests.report.made_run import make_run


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{}"], "has neither config.yaml nor metrics.jsonl, expected the output_dir of a run"),
        (["{}/nowhere"], "has neither config.yaml nor metrics.jsonl"),
        (["{}", "--port", "70000"], "--port is 70000, expected 0 to 65535"),
        (["{}", "--port", "x"], "--port: invalid int value: 'x'"),
        (["{}", "--write", "--port", "8000"], "not allowed with argument --write"),
        ([], "arguments are required: folder"),
    ],
)
def test_what_is_refused(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word.format(tmp_path) for word in words]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and said in printed.err
    assert printed.err.count("\n") == 1


def test_the_page_of_a_run_of_before_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run", 3)
    assert main([str(folder), "--write"]) == 0
    assert capsys.readouterr().out == f"{folder}/report.html\n"
    assert "step 3 of 40" in (folder / "report.html").read_text()


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run", 3)
    (folder / "report.html" / "x").mkdir(parents=True)
    assert main([str(folder), "--write"]) == 2
    assert "report.html cannot be written: Is a directory" in capsys.readouterr().err


def test_it_prints_its_address_serves_the_page_and_ends_by_ctrl_c_without_a_traceback(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 3)
    words = [sys.executable, "-m", "repo_fast.watch", str(folder)]
    # A shell that runs the tests in the background has them ignore Ctrl-C.
    heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(words, cwd=REPOSITORY, text=True, stdout=PIPE, stderr=PIPE, preexec_fn=heard) as child:
        try:
            assert child.stdout is not None and child.stderr is not None
            line = child.stdout.readline()
            address = line.removeprefix(f"{folder}: ").partition(" ")[0]
            with urllib.request.urlopen(address, timeout=120) as answer:
                assert b"Mean reward" in answer.read()
            child.send_signal(signal.SIGINT)
            assert child.wait(60) == 130
            assert child.stderr.read() == ""
        finally:
            child.kill()
    assert not (folder / "report.html").exists()
