"""Documents of the repository as pages: markdown without HTML, links that lead somewhere, headings with anchors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segbench.leaderboard.site.pages import missing
from segbench.leaderboard.site.text import link

if TYPE_CHECKING:
    from markdown_it.token import Token

NAMES = {"read": "read_the_leaderboard.md", "protocol": "protocol.md", "submit": "submit_a_result.md"}
LABELS = {"read": "How to read it", "protocol": "Protocol", "submit": "Submit a result"}


def find(docs: Path | None) -> dict[str, Path]:
    """The documents that exist, by the name of their page."""
    if docs is None:
        return {}
    return {name: docs / file for name, file in NAMES.items() if (docs / file).is_file()}


def render(path: Path, pages: dict[str, str]) -> tuple[str, str]:
    """Title and HTML of a document.

    Args:
        path: of the markdown.
        pages: the page of each document that has one, by file name; other files of the repository are not linked.
    """
    try:
        from markdown_it import MarkdownIt
    except ImportError as error:
        raise missing(error) from error
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(path.read_text("utf-8"))
    title = path.stem.replace("_", " ")
    taken: set[str] = set()
    for number, token in enumerate(tokens):
        if token.type == "inline":
            token.children = _linked(token.children or [], pages)
        if token.type == "heading_open":
            words = _words(tokens[number + 1])
            title = words if token.tag == "h1" else title
            token.attrSet("id", _anchor(words, taken))
    html: str = parser.renderer.render(tokens, parser.options, {})
    # a wide table scrolls in a region of its own, which a keyboard can reach
    html = html.replace("<table>", '<div class="scroll" tabindex="0" role="region" aria-label="Table"><table>')
    html = html.replace("</table>", "</table></div>").replace("<th>", '<th scope="col">')
    html = html.replace("<th style=", '<th scope="col" style=')
    html = re.sub(r' style="text-align:(left|right|center)"', r' class="\1"', html)
    return title, html.replace("<pre>", '<pre tabindex="0">')


def _linked(children: list[Token], pages: dict[str, str]) -> list[Token]:
    """Without the links that lead nowhere, and with the text of images in their place."""
    kept: list[Token] = []
    dropped: list[bool] = []
    for token in children:
        if token.type == "link_open":
            address = _address(str(token.attrs.get("href", "")), pages)
            dropped.append(address is None)
            if address is None:
                continue
            token.attrSet("href", address)
            if address.startswith("https:"):
                token.attrSet("rel", "noreferrer")
        elif token.type == "link_close" and dropped.pop():
            continue
        elif token.type == "image":
            token.type, token.tag = "text", ""
        kept.append(token)
    return kept


def _address(href: str, pages: dict[str, str]) -> str | None:
    if href.startswith("#"):
        return href
    file, _, anchor = href.partition("#")
    if file in pages:
        return pages[file] + (f"#{anchor}" if anchor else "")
    return link(href)


def _words(inline: Token) -> str:
    parts: list[Any] = [child.content for child in inline.children or [] if child.type in ("text", "code_inline")]
    return "".join(parts)


def _anchor(words: str, taken: set[str]) -> str:
    """As GitHub names headings."""
    base = name = re.sub(r"[^\w\- ]", "", words.lower()).strip().replace(" ", "-") or "section"
    number = 1
    while name in taken:
        name, number = f"{base}-{number}", number + 1
    taken.add(name)
    return name
