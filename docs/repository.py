"""A hook of MkDocs: pages that are files of the repository, and links that hold in both.

The README, results and examples are read where they lie, so that there is one text of each. Links in all pages are
written as they hold in the repository (as on a code host), and become those of the site here: to a page where there is
one, as of a notebook, to a copy where it is a picture, and to nothing, the text alone, where it is a source file. One
that leads nowhere ends the build.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
HOME = "README.md"
PICTURES = (".png", ".svg")
_LINK = re.compile(r"(?<!!)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^()\s]+)\)")
_PICTURE = re.compile(r"!\[(?P<text>[^\]]*)\]\((?P<target>[^()\s]+)\)")
_CODE = re.compile(r"^(```|~~~).*?^\1\s*$", re.DOTALL | re.MULTILINE)


def pages() -> dict[str, str]:
    """Those outside `docs/`: by their place in the site, their place in the repository."""
    found = {"index.md": HOME}
    for pattern in ("CONTRIBUTING.md", "CHANGELOG.md", "bench/**/*.md", "experiments/*/*.md", "examples/*/*.md"):
        found |= {path: path for path in sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob(pattern))}
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and the pictures that they show."""
    for place, source in pages().items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
        for match in _PICTURE.finditer((ROOT / source).read_text(encoding="utf-8")):
            picture = _resolved(source, match["target"])
            if not picture.startswith("docs/") and files.get_file_from_path(picture) is None:
                files.append(File.generated(config, picture, abs_src_path=str(ROOT / picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the repository's links into the site's, but for those in blocks of code."""
    place = page.file.src_uri
    if pages().get(place) == HOME:
        page.meta["hide"] = ["navigation"]
    source = pages().get(place, f"docs/{place}")
    code = _CODE.search(markdown)
    if code is None:
        return _in_text(markdown, source, place, files)
    before, after = markdown[: code.start()], markdown[code.end() :]
    return _in_text(before, source, place, files) + code[0] + on_page_markdown(after, page, config, files)


def _in_text(markdown: str, source: str, place: str, files: Files) -> str:
    places = {there: here for here, there in pages().items()}

    def link(match: re.Match) -> str:
        target, _, anchor = match["target"].partition("#")
        if ":" in target or not target:
            return match[0]
        path = _resolved(source, target)
        here = places.get(path, path.removeprefix("docs/"))
        if here.endswith(".ipynb"):
            here = here.removesuffix(".ipynb") + ".md"
        if files.get_file_from_path(here) is None:
            return match["text"]
        return f"[{match['text']}]({posixpath.relpath(here, posixpath.dirname(place))}{anchor and '#' + anchor})"

    def picture(match: re.Match) -> str:
        here = _resolved(source, match["target"]).removeprefix("docs/")
        return f"![{match['text']}]({posixpath.relpath(here, posixpath.dirname(place))})"

    return _PICTURE.sub(picture, _LINK.sub(link, markdown))


def _resolved(source: str, target: str) -> str:
    """A link's target from the root of the repository."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    # These are made by `options.py`, `tools.py` and `measures.py`.
    made = [f"docs/reference/{name}.md" for name in ("train", "sft", "score", "evaluate", "tools", "measures")]
    if not (ROOT / path).exists() and path not in made:
        raise PluginError(f"{source}: a link to {target}, which is not in the repository")
    return path
