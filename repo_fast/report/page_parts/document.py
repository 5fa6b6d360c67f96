"""How a page becomes one HTML file that needs nothing else: no network, no server, no font.

What models wrote is untrusted, so templates escape everything, and a content security policy admits the page's own
script and style by their hashes and nothing from outside.
"""

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from repo_fast.report.page_parts.wording import finalize


def render(
    template: str, context: Mapping[str, Any], styles: Sequence[str], scripts: Sequence[str], asks: bool = False
) -> Iterator[str]:
    """The parts of a page's text.

    Args:
        template: A file of this folder.
        context: Its variables.
        styles, scripts: Files of this folder.
        asks: Whether the page may ask the server that it comes from for more.
    """
    style, script = ("".join(map(_asset, names)) for names in (styles, scripts))
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    if asks:
        policy += "; connect-src 'self'"
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_asset),
    )
    return environment.get_template(template).generate(
        **context,
        style=Markup(style),
        script=Markup(script),
        security_policy=Markup(f"{policy}; base-uri 'none'; form-action 'none'"),
    )


def _asset(name: str) -> str:
    return files("repo_fast.report.page_parts").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
