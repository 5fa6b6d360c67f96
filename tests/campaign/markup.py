"""Markup and terminal escapes in texts and names, and what is written and printed of them."""

import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import yaml
from markdown_it import MarkdownIt

from tests.campaign.book import Trial
from tests.campaign.traps import Place, call, edit_json, started
from tests.job_runs import write_lines
from tests.tiny import save_policy, word_tokenizer

_HOSTILE = '<script>alert(1)</script> "><img src=x onerror=alert(1)> [a](javascript:alert(1)) | ![b](http://x) <b>'
_ESCAPES = "\x1b]0;title\x07\x1b[2J\x1b[31m\x9b31m\r"


def trials() -> Iterator[Trial]:
    """Both of them."""
    yield Trial("markup in pages and cards", _markup)
    yield Trial("terminal escapes in what is printed", _terminal)


class _Elements(HTMLParser):
    """The elements of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def _assert_no_markup(page: str, harmless: str, what: str) -> None:
    """That a page has the elements of one that was made of harmless texts, or fewer kinds."""
    found, expected = _Elements(page).found, _Elements(harmless).found
    for tag, attributes in found:
        assert not any(name.startswith("on") for name in attributes), (what, tag, attributes)
        for name in ("src", "href", "action"):
            value = attributes.get(name) or ""
            assert not re.match(r"\s*(javascript|http|data:text)", value) or any(
                value == (own.get(name) or "") for _, own in expected
            ), (what, tag, value)
    for tag in ("script", "img", "iframe", "b", "style", "link", "form"):
        ours, theirs = (sum(own == tag for own, _ in every) for every in (found, expected))
        assert ours == theirs, f"{what}: {ours} elements {tag}, {theirs} without markup in its texts"


def _evaluated(place: Place, text: str) -> tuple[str, str]:
    """A page and a card, of an evaluation all of whose texts are one."""
    words = [text.replace(" ", "_"), *(f"w{i}" for i in range(3))]
    folder = place.out()
    folder.mkdir(parents=True)
    policy = save_policy(folder / f"policy {text[:60].replace('/', '_')}", word_tokenizer(words))
    other = save_policy(folder / "other", word_tokenizer(words), seed=1)
    rows = [{"prompt": f"{text} {i}", "category": f"{text} {i % 2}"} for i in range(6)]
    source = write_lines(folder / f"{text[:60].replace('/', '_')}.jsonl", rows)
    edit_json(policy / "config.json", _name_or_path=text, description=text)
    options = {
        "policies": {"one": str(other), "two": str(policy)},
        "prompts": str(source),
        "reward": {"path": "tests.scorers:reward"},
        "cost": {"path": "tests.scorers:cost"},
        "samples_per_prompt": 2,
        "resamples": 20,
        "sampling": {"max_new_tokens": 8},
        "certify": {
            "claims": {
                "a": {"statement": "unsafe_prompts", "limit": 0.5},
                "c": {"statement": "worst_category", "limit": 0.5},
            }
        },
    }
    (folder / "evaluate.yaml").write_text(yaml.safe_dump(options))
    out = folder / "out"
    status, said = call("repo_fast.evaluate", "--config", str(folder / "evaluate.yaml"), "--output_dir", str(out))
    assert status in (0, 3, 4), said
    assert "\x1b" not in said
    assert call("repo_fast.evaluate", "--verify", str(out / "certificate.json"))[0] == status
    return (out / "report.html").read_text(), (policy / "README.md").read_text()


def _markup(folder: Path) -> str:
    place = Place(folder)
    page, card = _evaluated(place, _HOSTILE)
    harmless = _evaluated(place, "x" * len(_HOSTILE))
    assert "&lt;script&gt;alert(1)" in page
    assert any(tag == "script" for tag, _ in _Elements(f"<p>{_HOSTILE}</p>").found)
    _assert_no_markup(page, harmless[0], "report.html")
    markdown = MarkdownIt("commonmark", {"html": True}).enable("table")
    as_html, expected = (markdown.render(text.split("---", 2)[2]) for text in (card, harmless[1]))
    assert "<script>" in markdown.render(_HOSTILE) and "alert" in as_html
    _assert_no_markup(as_html, expected, "the model card")
    assert as_html.count("<td") == expected.count("<td"), "a bar in a text makes another cell"
    trained, expected = (_trained(place, text) for text in (_HOSTILE, "x" * len(_HOSTILE)))
    assert trained.count("&lt;script&gt;alert(1)") >= 5, "not all prompts are on the page"
    _assert_no_markup(trained, expected, "report.html of a run")
    pages = [path.name for path in folder.rglob("*.html") if path.name != "report.html"]
    assert not pages, pages
    return (
        "report.html, of evaluations and of runs, and the model card have the elements of harmless ones; nothing else "
        "writes HTML or Markdown"
    )


def _trained(place: Place, text: str) -> str:
    """The page of a run whose prompts are one text; every cost is above the threshold, so that they are all shown."""
    folder = place.out()
    folder.mkdir(parents=True)
    data = _of_escapes(folder, text)
    run = place.run(f"--data.prompts {data}", f"--data.eval_prompts {data}", "--algorithm.threshold=-1000")
    return (run / "report.html").read_text()


def _of_escapes(folder: Path, text: str) -> Path:
    rows = [{"prompt": f"{text} {i}", "category": f"{text}{i % 2}", text: "an unused column"} for i in range(5)]
    return write_lines(folder / "texts.jsonl", rows)


def _terminal(folder: Path) -> str:
    """Texts, names of columns and of files, of models that are read, in what is said of them, errors too."""
    place = Place(folder)
    odd = folder / f"a{_ESCAPES}b"
    odd.mkdir()
    data, policy = _of_escapes(folder, _ESCAPES), place.folder / "policy"
    shutil.copy(data, odd / "texts.jsonl")
    shutil.copytree(policy, odd / "policy")
    two = [{"prompt": "x", "category": "c"}, {"prompt": "x", _ESCAPES: 1, "question": _ESCAPES, "text": "y"}]
    write_lines(folder / "contrary.jsonl", two)
    (folder / "broken.yaml").write_text(f'"{_ESCAPES!r}": 1\n'.replace("'", ""))
    (folder / "keys.yaml").write_text(yaml.safe_dump({_ESCAPES: 1}))
    scorers = ["--reward.path", "tests.scorers:reward", "--cost.path", "tests.scorers:cost"]
    few = ["--samples_per_prompt", "2", "--resamples", "20", "--sampling.max_new_tokens", "4"]

    def train(name: str, *options: str) -> list[str]:
        words = place.job.words(folder / name, "--total_steps 1", "--algorithm.advantage rloo", "--data.ptx null")
        return ["repo_fast.train", *words, "--algorithm.ptx_coefficient", "0", *options]

    def evaluate(name: str, *options: str) -> list[str]:
        return ["repo_fast.evaluate", *options, *scorers, *few, "--output_dir", str(folder / name)]

    programs = [
        (0, train("a", "--data.prompts", str(data), "--data.eval_prompts", str(data))),
        (0, train("b", "--data.prompts", str(odd / "texts.jsonl"), "--policy.path", str(odd / "policy"))),
        (2, train("c", "--data.prompts", str(folder / "contrary.jsonl"))),
        (2, train("d", "--data.prompts", str(odd / "none.jsonl"))),
        (2, train("e", "--policy.path", str(odd / "none"))),
        (2, train("f", "--cost.path", f"tests.campaign.limited:{_ESCAPES}")),
        (2, train("g", "--cost.path", "tests.campaign.limited:raises_escapes")),
        (2, train("h", f"--{_ESCAPES}", "1")),
        (2, ["repo_fast.train", "--config", str(folder / "keys.yaml")]),
        (2, ["repo_fast.train", "--config", str(folder / "broken.yaml")]),
        (2, ["repo_fast.checkpoint", str(odd)]),
        (None, evaluate("i", "--policy", f"a={policy}", "--prompts", str(data))),
        (
            None,
            evaluate(
                *("j", "--policy", f"a={odd / 'policy'}", "--prompts", str(odd / "texts.jsonl")),
                *("--claim", "unsafe_prompts=0.5", "--claim", "worst_category=0.5"),
            ),
        ),
        (2, evaluate("k", "--policy", f"{_ESCAPES}={policy}", "--prompts", str(data))),
        (2, ["repo_fast.plan", "--gpus", "1", *place.job.words(folder / "l"), "--policy.path", str(odd / "none")]),
        (2, ["repo_fast.score", "--check", str(odd / "none"), "--kind", "reward"]),
    ]
    wrong = []
    for expected, words in programs:
        with started(["-m", *words]) as child:
            out, err = child.communicate(timeout=300)
        shown = {c for c in out + err if ord(c) < 32 and c not in "\n\t" or 127 <= ord(c) < 160}
        # Progress bars of libraries go back to the start of their line.
        shown -= {"\r"} if "|" in err else set()
        if shown or (expected is not None and child.returncode != expected):
            wrong.append((" ".join(words[:1] + words[-2:]), child.returncode, sorted(shown), (out + err)[-300:]))
    assert not wrong, wrong
    return f"{len(programs)} programs print none of the control characters that they were given"
