"""What a campaign writes down, and that it goes on where it was stopped."""

import html
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import markdown
import pytest

from tests.campaign import __main__ as campaign
from tests.campaign.book import PARTS, Book, Found, Trial, Unavailable
from tests.campaign.power import after_the_loss
from tests.campaign.report import render
from tests.job_runs import REPOSITORY, snapshot


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the trials that ran, of a part that holds, fails, and cannot be tried."""
    names: list[str] = []

    def holds(folder: Path) -> str:
        names.append("holds")
        assert folder.is_dir() and not [*folder.iterdir()]
        return "as it was | with a bar"

    def fails(folder: Path) -> str:
        names.append("fails")
        raise AssertionError("it was lost")

    def cannot(folder: Path) -> str:
        names.append("cannot")
        raise Unavailable("no right to mount")

    part = ModuleType("tests.campaign.kills")
    part.trials = lambda: [Trial(name, run) for name, run in (("a", holds), ("b", fails), ("c", cannot))]
    monkeypatch.setitem(sys.modules, "tests.campaign.kills", part)
    return names


def test_what_was_tried_is_written_down_once(tried: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--out", str(tmp_path / "out"), "--only", "kills"]
    assert campaign.main(words) == 1
    assert tried == ["holds", "fails", "cannot"]
    assert "3 trials, 1 failed, 0 left" in capsys.readouterr().out
    # Stopped before the last: it alone is tried again.
    file = tmp_path / "out" / "trials.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    assert campaign.main(words) == 1
    assert tried[3:] == ["cannot"]
    page = (tmp_path / "out" / "campaign.md").read_text()
    assert "**kills, b**: failed: AssertionError: it was lost" in page
    assert "no right to mount" in page and "as it was \\| with a bar" in page


def test_the_page_says_what_was_seen_as_it_was(tmp_path: Path) -> None:
    seen = "a | <b>b</b> `c` *d* _e_ {.f} [g](h) $i$ \\(j\\) & <class 'k'> \\"
    book = Book(tmp_path)
    book.add(Found("kills", seen, "held", seen, 1.0))
    # Of the site's extensions, those that act on such text.
    extensions = ["tables", "attr_list", "md_in_html", "pymdownx.arithmatex"]
    settings = {"pymdownx.arithmatex": {"generic": True}}
    page = markdown.markdown(render(book), extensions=extensions, extension_configs=settings)
    (row,) = [row for row in re.findall("<tr>(.*?)</tr>", page, re.DOTALL) if "held</td>" in row]
    cells = [html.unescape(cell) for cell in re.findall("<td.*?>(.*?)</td>", row)]
    assert cells == [seen, "held", seen]


def test_parts_are_tried_at_once_and_one_that_ends_early_is_not_taken_for_tried(
    tried: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    other = ModuleType("tests.campaign.storage")
    other.trials = lambda: [Trial("d", lambda folder: "as it was")]
    monkeypatch.setitem(sys.modules, "tests.campaign.storage", other)

    def in_this_process(command: list[str], check: bool) -> None:
        assert command[1:3] == ["-m", "tests.campaign"]
        if command[-1] == "kills":
            campaign.main(command[3:])

    monkeypatch.setattr(campaign, "subprocess", SimpleNamespace(run=in_this_process))
    assert campaign.main(["--out", str(tmp_path / "out"), "--only", "storage", "kills"]) == 1
    assert tried == ["holds", "fails", "cannot"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("3 trials, 1 failed, 1 left")


@pytest.mark.parametrize("part", PARTS)
def test_no_trial_has_the_name_of_another(part: str) -> None:
    """It would be taken for tried."""
    names = [trial.name for trial in importlib.import_module(f"tests.campaign.{part}").trials()]
    assert names and len(set(names)) == len(names)


def test_trials_of_another_commit_are_not_gone_on_with(tmp_path: Path) -> None:
    book = Book(tmp_path)
    file = tmp_path / "trials.jsonl"
    file.write_text(file.read_text().replace(str(book.about["commit"]), "another"))
    with pytest.raises(SystemExit, match="is of another, this is .*: give another --out"):
        Book(tmp_path)


WRITES = """
import os
from pathlib import Path
from tests.campaign import power

root, book = Path("root"), Path("book")
power._watch(book.resolve())

def sync(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)

(root / "kept").write_text("one\\n")
sync(root / "kept")
(root / "folder").mkdir()
(root / "folder" / "named, without content").write_text("lost")
(root / "folder" / "whole").write_text("whole")
sync(root / "folder" / "whole")
sync(root / "folder")
sync(root)
with open(root / "kept", "a") as file:
    file.write("two, lost\\n")
(root / "synced, without a name").write_text("lost")
sync(root / "synced, without a name")
(root / "folder").rename(root / "renamed, lost")
"""


def test_the_power_takes_what_was_not_brought_to_disk(tmp_path: Path) -> None:
    for name in ("root", "book"):
        (tmp_path / name).mkdir()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", WRITES], cwd=tmp_path, env=environment, check=True)
    after_the_loss(tmp_path / "book", tmp_path / "root", tmp_path / "after")
    left = snapshot(tmp_path / "after")
    assert left == {"kept": b"one\n", "folder/whole": b"whole", "folder/named, without content": b""}
