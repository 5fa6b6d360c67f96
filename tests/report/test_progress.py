"""The display: plain lines in pipes, a live one on a terminal, and a run that outlives its reader."""

import io
import os
import pty
import re
import subprocess
import sys

import pytest

from repo_fast.report.progress import Progress

METRICS = {"reward": 0.5, "cost": -0.25, "strict_violation": 0.125, "multiplier": 1.5, "kl": 2.0}
SHOWN = (
    ("reward", "reward", ".3f"),
    ("cost", "cost", ".3f"),
    ("strict_violation", "violation", ".3f"),
    ("multiplier", "lambda", ".3f"),
    ("kl", "kl", ".3f"),
    ("tokens_per_second", "tokens/s", ",.0f"),
)
RUN = (
    f"""
SHOWN = {SHOWN!r}
"""
    + """
import sys
from repo_fast.report.progress import Progress
with Progress(total_steps=4, start_step=1, shown=SHOWN) as progress:
    for step in (2, 3, 4):
        for phase in ("generate", "score", "update"):
            progress.phase(phase)
        progress.step({"step": step, "reward": step / 8, "tokens_per_second": 1234.0})
        progress.message("now [bold]step\\x1b[31m " + str(step))
    if sys.argv[1:] == ["fail"]:
        raise RuntimeError("boom")
print("end", file=sys.stderr)
"""
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_on_a_terminal(*arguments, term="xterm"):
    """Returns (exit status, what a terminal would have been sent)."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": term, "COLUMNS": "100", "LINES": "30", "PYTHONIOENCODING": "utf-8"}
    child = subprocess.Popen(
        [sys.executable, "-c", RUN, *arguments], stdout=slave, stderr=subprocess.DEVNULL, env=environment
    )
    os.close(slave)
    shown = b""
    try:
        while chunk := os.read(master, 65536):
            shown += chunk
    except OSError:  # Linux answers so once the other side is closed
        pass
    os.close(master)
    return child.wait(), shown.decode()


def test_piped_output_is_one_plain_line_a_step():
    stream = io.StringIO()
    with Progress(total_steps=10, start_step=3, shown=SHOWN, stream=stream) as progress:
        progress.phase("generate")
        progress.step({"step": 4, **METRICS, "tokens_per_second": 12345.6})
        progress.phase("update")
        progress.step({"step": 5, "reward": None, "cost": float("nan")})
    first, second = stream.getvalue().splitlines()
    assert re.fullmatch(
        r"step 4/10  reward 0\.500  cost -0\.250  violation 0\.125  lambda 1\.500  kl 2\.000  tokens/s 12,346  "
        r"0\.0 s  ETA 0:00:00",
        first,
    )
    assert second.startswith("step 5/10  reward -  cost nan  violation -  lambda -  kl -  tokens/s -  ")
    assert first.isascii() and first.isprintable() and len(first) <= 120


def test_remaining_time_ignores_the_steps_of_an_earlier_run(monkeypatch):
    now = iter([0.0, 0.0, 10.0, 30.0, 1030.0])
    monkeypatch.setattr("repo_fast.report.progress.time.monotonic", lambda: next(now))
    stream = io.StringIO()
    with Progress(total_steps=1100, start_step=1000, shown=SHOWN, stream=stream) as progress:
        progress.step({"step": 1001})
        progress.step({"step": 1002})
        progress.step({"step": 1003})
    first, second, third = stream.getvalue().splitlines()
    assert first.endswith("10.0 s  ETA 0:16:30")  # 99 steps of 10 s
    assert second.endswith("20.0 s  ETA 0:24:30")  # 98 steps of 15 s
    assert third.endswith("1000.0 s  ETA 0:32:20")  # 97 steps of 20 s: one long pause is no trend


def test_messages_lose_control_characters_when_piped():
    stream = io.StringIO()
    with Progress(1, 0, SHOWN, stream) as progress:
        progress.message("a\x1b[31mb\rc\td\x9be\nf")
    assert stream.getvalue() == "a [31mb c d e\nf\n"


def test_a_real_pipe_gets_three_lines_and_three_messages():
    result = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[::2]] == ["step 2/4", "step 3/4", "step 4/4"]
    assert lines[1::2] == [f"now [bold]step [31m {step}" for step in (2, 3, 4)]
    assert all(line.isprintable() for line in lines)


def test_a_terminal_sees_the_display_and_gets_its_cursor_back():
    status, shown = run_on_a_terminal()
    assert status == 0
    visible = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    last = visible[visible.rindex("step 4/4") :]
    assert "update" in last and "elapsed 0:00:0" in last and "ETA 0:00:00" in last
    assert "reward 0.500" in last and "λ -" in last and "tokens/s 1,234" in last
    assert "now [bold]step [31m 3" in visible and "\x1b[31m" not in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_an_exception_passes_through_and_the_cursor_comes_back():
    status, shown = run_on_a_terminal("fail")
    assert status == 1
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_a_dumb_terminal_gets_plain_lines():
    status, shown = run_on_a_terminal(term="dumb")
    assert status == 0 and "\x1b" not in shown
    assert shown.count("step 2/4") == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_does_not_end_the_run(unbuffered):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-c", RUN + "\nprint('a later line of somebody else')"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    child.stdout.close()
    errors = child.stderr.read()
    assert child.wait() == 0, errors
    assert errors == "end\n"


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_a_stream_closed_midway_is_no_error(kind):
    stream = kind()
    with Progress(3, 0, SHOWN, stream) as progress:
        progress.step({"step": 1})
        stream.close()
        progress.step({"step": 2})
        progress.message("x")


def test_what_the_stream_cannot_encode_is_replaced():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with Progress(2, 0, SHOWN, stream) as progress:
        progress.message("λ → 1")
        progress.step({"step": 1})
    assert raw.getvalue().startswith(b"? ? 1\nstep 1/2")


def test_plain_lines_do_not_load_rich():
    code = RUN + "\nassert not {'rich', 'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE)
