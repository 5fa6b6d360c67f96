"""Notebooks are their sources, executed: each runs; what is committed of it is no older, small, and of no machine."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from docs import notebooks

by_name = pytest.mark.parametrize("source", notebooks.SOURCES, ids=lambda source: source.stem)
LARGEST = 300_000  # bytes of an .ipynb


def test_each_source_has_its_notebook_and_the_other_way_round():
    executed = [path.with_suffix(".py") for path in sorted(notebooks.FOLDER.glob("*.ipynb"))]
    assert executed == notebooks.SOURCES and len(executed) == 4


@by_name
def test_a_notebook_has_the_cells_of_its_source(source: Path):
    executed = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(executed)
    (first, *cells), (given, *expected) = executed.cells, notebooks.read(source).cells
    assert [(cell.cell_type, cell.source) for cell in cells] == [(cell.cell_type, cell.source) for cell in expected]
    duration = re.escape(given.source).replace(re.escape(notebooks.DURATION), r"\d+ s on \d+ CPU cores")
    assert given.source.count(notebooks.DURATION) == 1 and re.fullmatch(duration, first.source)


@by_name
def test_a_notebook_is_small_and_names_nothing_of_the_machine_it_ran_on(source: Path):
    text = source.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert len(text) < LARGEST
    assert re.findall(r"(?<![\w./])/(?:root|home|tmp|work|usr|opt|var)/\S{,60}", text) == []


@by_name
def test_a_notebook_runs(source: Path):
    executed = notebooks.execute(source)
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


def test_a_failing_cell_fails(tmp_path: Path):
    source = tmp_path / "failing.py"
    source.write_text('# %% [markdown]\n# # Title\n# %% language="bash"\n# exit 3\n')
    with pytest.raises(CellExecutionError):
        notebooks.execute(source)


def test_a_page_shows_text_code_and_outputs(tmp_path: Path):
    source = tmp_path / "1-small.py"
    cells = ["[markdown]\n# # Title\n", 'language="bash"\n# echo "a < b"\n', "\n1 + 1\n"]
    source.write_text("".join(f"# %% {cell}" for cell in cells))
    nbformat.write(notebooks.execute(source), source.with_suffix(".ipynb"))
    text = notebooks.markdown(source.with_suffix(".ipynb"))
    assert text.startswith("# Title\n") and '```bash\necho "a < b"\n```' in text and "```python\n1 + 1\n```" in text
    shown = [
        notebooks.shown(output)
        for cell in nbformat.read(source.with_suffix(".ipynb"), 4).cells[1:]
        for output in cell.outputs
    ]
    assert shown == ['<pre class="output">a &lt; b\n</pre>', '<pre class="output">2</pre>']
