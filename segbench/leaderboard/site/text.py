"""Text for readers: numbers as they are printed, and strings of strangers made harmless."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

NOTHING = "–"
_MARKS_IN_A_ROW = 4
_URL = re.compile(r"https://[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+")
_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,120}")


def clean(text: str, limit: int = 4000) -> str:
    r"""``text`` in one line: without control, format and private characters, few marks on a letter, cut at ``limit``.

    >>> clean("a\u202eb\n c"), clean("abcdef", 4)
    ('ab c', 'abc…')
    """
    if len(text) <= limit and text.isascii() and text.isprintable():
        return " ".join(text.split())
    kept, marks = [], 0
    for char in text[: 4 * limit]:
        kind = unicodedata.category(char)
        marks = marks + 1 if kind in ("Mn", "Me") else 0
        if char in "\n\t\u2028\u2029":
            kept.append(" ")
        elif kind[0] != "C" and marks <= _MARKS_IN_A_ROW:
            kept.append(char)
    line = " ".join("".join(kept).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def link(url: str | None) -> str | None:
    """``url`` if it is a plain https address without a user name, else None.

    >>> link("https://arxiv.org/abs/2306.12941")
    'https://arxiv.org/abs/2306.12941'
    >>> link("javascript:alert(1)"), link("http://a.b/"), link("https://a.b@c.d/")
    (None, None, None)
    """
    if url is None or len(url) > 2000 or not _URL.fullmatch(url):
        return None
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    return url if parts.hostname and "@" not in parts.netloc else None


def segment(text: str) -> str:
    """``text`` as one part of a path: itself where it is harmless, else with a hash that keeps it apart from others.

    >>> segment("pirat_convnext_t_voc"), segment("../x")
    ('pirat_convnext_t_voc', '_x-d6b96a97')
    """
    if _SEGMENT.fullmatch(text):
        return text
    safe = re.sub(r"[^A-Za-z0-9_-]+", "_", text)[:80]
    return f"{safe}-{sha256(text.encode('utf-8', 'replace')).hexdigest()[:8]}"


def percent(value: float | None) -> str:
    """A fraction in percent with one decimal.

    >>> percent(0.3455), percent(None)
    ('34.5', '–')
    """
    return NOTHING if value is None else f"{100 * value:.1f}"


def beaten(score: Mapping[str, Any] | None) -> bool:
    """Whether the best known value of a score is below its value, as far as the printed digits tell.

    >>> beaten({"value": 0.233, "best_known": 0.228}), beaten({"value": 0.35001, "best_known": 0.35})
    (True, False)
    """
    if not score or score["value"] is None or score["best_known"] is None:
        return False
    known, value = score["best_known"], score["value"]
    return bool(known < value and percent(known) != percent(value))


def interval(values: list[float] | None) -> str | None:
    """An interval in percent.

    >>> interval([0.31, 0.44])
    '31.0–44.0'
    """
    return None if values is None else f"{100 * values[0]:.1f}–{100 * values[1]:.1f}"


def eps(view: float | str) -> str:
    """A radius as readers write it.

    >>> eps(8.0), eps("0.25")
    ('8/255', '0.25/255')
    """
    return f"{float(view):g}/255"


def view_label(view: str, short: bool = False) -> str:
    """A score view in words.

    >>> view_label("clean"), view_label("mean"), view_label("8"), view_label("8", short=True)
    ('clean', 'mean over ε = 4, 8, 12/255', 'ε = 8/255', '8/255')
    """
    if view == "clean":
        return "clean"
    if view == "mean":
        return "mean" if short else "mean over ε = 4, 8, 12/255"
    return eps(view) if short else f"ε = {eps(view)}"


def parameters(count: int | None) -> str:
    """A number of parameters in millions.

    >>> parameters(60181610), parameters(104744)
    ('60.2M', '0.10M')
    """
    if count is None:
        return NOTHING
    return f"{count / 1e6:.1f}M" if count >= 10_000_000 else f"{count / 1e6:.2f}M"


def duration(seconds: float | None) -> str:
    """Seconds in the two largest units.

    >>> duration(101.9), duration(7300), duration(9)
    ('1 min 42 s', '2 h 1 min', '9 s')
    """
    if seconds is None:
        return NOTHING
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: int | None) -> str:
    """A number of bytes.

    >>> size(988262400)
    '0.99 GB'
    """
    return NOTHING if count is None else f"{count / 1e9:.2f} GB"


def count(number: float | None) -> str:
    r"""A number in groups of three, without a fraction where there is none.

    >>> count(88416), count(300.0), count(0.5)
    ('88\u202f416', '300', '0.5')
    """
    return NOTHING if number is None else f"{number:,.15g}".replace(",", "\u202f")
