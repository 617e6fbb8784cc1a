"""BibTeX of the papers on the board: a stranger's entry where it is plain data, else one made from the fields."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from segbench.leaderboard.site.shape import Board
from segbench.leaderboard.site.text import clean, link

_TYPES = {"article", "book", "inbook", "incollection", "inproceedings", "conference", "manual", "mastersthesis"}
_TYPES |= {"misc", "online", "phdthesis", "proceedings", "techreport", "unpublished"}
_START = re.compile(r"@([A-Za-z]+)\s*\{\s*([A-Za-z0-9][A-Za-z0-9:._/+-]{0,99})\s*,")
# accents such as \"o, \c{c} and \ss, and escaped specials; every other command could read files or run programs
_HARMLESS = re.compile(r"\\(?:[\"'`^~=.&%$#_]|(?:ss|ae|AE|oe|OE|aa|AA|[HbcdkrtuvlLoOij])(?![A-Za-z]))")
_SPECIAL = {
    "\\": r"{\textbackslash}",
    "{": "(",
    "}": ")",
    "~": r"{\textasciitilde}",
    "^": r"{\textasciicircum}",
    **{char: f"\\{char}" for char in "&%$#_"},
}


def bibliography(board: Board) -> str:
    """One entry for each paper, sorted by key; keys are unique."""
    papers: dict[tuple[str, str], dict[str, Any]] = {}
    for table in board.tables:
        for row in table.rows:
            if paper := row["paper"]:
                papers.setdefault((clean(paper["title"]).casefold(), paper["url"]), paper)
    keyed = sorted((entry(paper) for _, paper in sorted(papers.items())), key=lambda text: (_key(text), text))
    texts, taken = [], set()
    for text in dict.fromkeys(keyed):
        key = unique = _key(text)
        number = 2
        while unique.casefold() in taken:
            unique, number = f"{key}-{number}", number + 1
        taken.add(unique.casefold())
        before, found, after = text.partition("{" + key)
        texts.append(f"{before}{{{unique}{after}" if found else text)
    return "\n\n".join(texts) + "\n" if texts else ""


def entry(paper: dict[str, Any]) -> str:
    """BibTeX of one paper: its own if `harmless`, else made from title, authors, venue, year and address."""
    own = paper.get("bibtex")
    if own and harmless(own):
        return "\n".join(line.rstrip() for line in str(own).strip().splitlines() if line.strip())
    authors = [clean(name, 200) for name in paper["authors"]]
    first = authors[0].partition(",")[0].split() if authors else []
    surname = _ascii(first[-1]) if first else ""
    word = next((word for word in map(_ascii, clean(paper["title"], 300).split()) if len(word) > 3), "")
    fields = {
        "title": f"{{{escape(clean(paper['title'], 1000))}}}",
        "author": " and ".join(f"{{{escape(name)}}}" if "," in name else escape(name) for name in authors),
        "booktitle": escape(clean(paper["venue"], 300)) if paper.get("venue") else "",
        "year": str(int(paper["year"])) if paper.get("year") else "",
        "url": link(paper["url"]) or "",
    }
    kind = "inproceedings" if fields["booktitle"] else "misc"
    lines = [f"  {name} = {{{value}}}" for name, value in fields.items() if value]
    key = f"{surname or 'anonymous'}{fields['year']}{word}"
    return f"@{kind}{{{key},\n" + ",\n".join(lines) + "\n}"


def harmless(text: str) -> bool:
    r"""Whether ``text`` is one balanced entry of a known type, without commands but accents and escaped specials.

    >>> harmless(r'@misc{a, author = {G\"odel}}'), harmless(r"@misc{a, title = {\input{x}}}"), harmless("@misc{a, }}")
    (True, False, False)
    """
    text = text.strip()
    start = _START.match(text)
    if not start or start[1].lower() not in _TYPES or len(text) > 20_000:
        return False
    if any(unicodedata.category(char)[0] == "C" and char not in "\n\r\t" for char in text):
        return False
    plain = _HARMLESS.sub("", text)
    if plain.count('"') % 2:  # an open quote would swallow the entries behind it
        return False
    if "\\" in plain or "^^" in plain or re.search(r"[%$#~]", plain) or "@" in plain[1:]:
        return False
    depth = 0
    for position, char in enumerate(plain):
        depth += (char == "{") - (char == "}")
        if depth < 0 or (depth == 0 and char == "}" and position != len(plain) - 1):
            return False
    return depth == 0


def escape(text: str) -> str:
    r"""Plain text as TeX prints it.

    >>> escape("50% of A_1 {x}")
    '50\\% of A\\_1 (x)'
    """
    return "".join(_SPECIAL.get(char, char) for char in text)


def _key(text: str) -> str:
    match = _START.match(text)
    return match[2] if match else ""


def _ascii(text: str) -> str:
    plain: Iterable[str] = unicodedata.normalize("NFKD", text)
    return "".join(char for char in plain if char.isascii() and char.isalnum()).lower()
