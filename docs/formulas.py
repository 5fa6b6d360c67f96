"""A hook of MkDocs: formulas as MathML, which browsers draw by themselves, so that no script is fetched."""

import html
import re

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\([(\[])(.*?)\\[)\]]\s*</\1>', re.DOTALL)


def on_page_content(content: str, **_: object) -> str:
    """Draw what the extension arithmatex has marked."""

    def drawn(match: re.Match) -> str:
        return convert(html.unescape(match[3]).strip(), display="block" if match[2] == "[" else "inline")

    return _FORMULA.sub(drawn, content)
