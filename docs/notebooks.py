"""Notebooks: `python docs/notebooks.py` executes their sources; a hook of MkDocs makes pages of the results.

A source is a Python file in jupytext's percent form in `docs/notebooks/`; beside it lies what it was executed into, an
.ipynb with its outputs, which is committed. Executing takes about two minutes on two cores, works in a temporary
folder, and reaches no network.
"""

import argparse
import html
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import jupytext
import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))
# In a source's first cell: replaced by how long the execution took.
DURATION = "{duration}"
_CELL_SECONDS = 600
_OUTPUT = re.compile(r"<!-- output (\d+) -->")


def read(source: Path) -> NotebookNode:
    """A source as a notebook without outputs, with ids and metadata that are the same each time."""
    notebook = jupytext.read(source, fmt="py:percent")
    for number, cell in enumerate(notebook.cells, 1):
        cell.id = f"cell-{number}"
        cell.metadata = {}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def execute(source: Path) -> NotebookNode:
    """The notebook of a source, with its outputs.

    It runs in a temporary folder. Its outputs leave out stderr, where commands say which process they start.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell or a command in it failed.
    """
    notebook = read(source)
    metadata = notebook.metadata.copy()
    with tempfile.TemporaryDirectory(prefix="notebook-") as folder:
        # `repo-fast` is found without an activated environment; what Jupyter and IPython keep goes with the folder.
        state = {name: f"{folder}/.{name.lower()}" for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR")}
        state["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        client = NotebookClient(
            notebook,
            timeout=_CELL_SECONDS,
            kernel_name="python3",
            startup_timeout=_CELL_SECONDS,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        )
        with patch.dict(os.environ, state):
            started = time.monotonic()
            client.execute()
            seconds = time.monotonic() - started
    notebook.metadata = metadata
    first = notebook.cells[0]
    first.source = first.source.replace(DURATION, f"{seconds:.0f} s on {os.cpu_count()} CPU cores")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def pages() -> dict[str, Path]:
    """By their place in the site, the notebooks."""
    return {f"notebooks/{source.stem}.md": source.with_suffix(".ipynb") for source in SOURCES}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page of each notebook; the notebooks lie beside them."""
    for place, path in pages().items():
        files.append(File.generated(config, place, content=markdown(path)))
    return files


def markdown(path: Path) -> str:
    """A notebook's text and code; where a cell has outputs, a mark that `on_page_content` replaces."""
    first, *cells = nbformat.read(path, as_version=4).cells
    # Not in Markdown, where a link to a notebook is one to its page.
    links = [f'<a href="{name}" download>{name}</a>' for name in (path.name, f"{path.stem}.py")]
    parts = [first.source, f"<p>Download: {', '.join(links)}</p>"]
    for number, cell in enumerate(cells, 1):
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        language, code = "python", cell.source
        if code.startswith("%%bash\n"):
            language, code = "bash", code.removeprefix("%%bash\n")
        parts += [f"```{language}\n{code}\n```", f"<!-- output {number} -->"]
    return "\n\n".join(parts) + "\n"


def on_page_content(content: str, page: Page, **_: object) -> str:
    """Put the outputs in as they are: neither Markdown nor the hook of links is to read them."""
    path = pages().get(page.file.src_uri)
    if path is None:
        return content
    cells = nbformat.read(path, as_version=4).cells
    return _OUTPUT.sub(lambda match: "".join(map(shown, cells[int(match[1])].outputs)), content)


def shown(output: NotebookNode) -> str:
    """An output in HTML: the richest form that it has."""
    if output.output_type == "stream":
        return f'<pre class="output">{html.escape(output.text)}</pre>'
    if "text/html" in output.data:
        return f'<div class="output">{output.data["text/html"]}</div>'
    if "image/png" in output.data:
        return f'<img class="output" alt="" src="data:image/png;base64,{output.data["image/png"].strip()}">'
    return f'<pre class="output">{html.escape(output.data["text/plain"])}</pre>'


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sources", nargs="*", type=Path, default=SOURCES, help="all, if none is named")
    for source in parser.parse_args(arguments).sources:
        notebook = execute(source)
        nbformat.write(notebook, source.with_suffix(".ipynb"))
        print(source.with_suffix(".ipynb"))


if __name__ == "__main__":
    main()
