"""Templates, and pages that run only the scripts and styles that were written into them."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segbench import content
from segbench.errors import SegbenchError

if TYPE_CHECKING:
    import jinja2

INSTALL = "Install it: pip install 'segbench[site]'"


@dataclass(frozen=True)
class Script:
    """A script or a block of data that is written into a page."""

    text: str

    @cached_property
    def source(self) -> str:
        """The text so that no end tag and no comment is in it."""
        return re.sub(r"</(?=script)", r"<\\/", self.text, flags=re.IGNORECASE).replace("<!--", "<\\!--")

    @cached_property
    def hash(self) -> str:
        """As a policy names it."""
        return _hash(self.source)


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


class Pages:
    """The templates of ``leaderboard/templates`` and what every page has: style, theme, navigation."""

    def __init__(self, navigation: Sequence[tuple[str, str]]) -> None:
        """Loads the templates.

        Args:
            navigation: (path, label) of the pages that each page links.

        Raises:
            SegbenchError: jinja2 is missing.
        """
        folder = content.folder("leaderboard") / "templates"
        self._environment = _environment(folder)
        self._navigation = navigation
        self._style = _minified((folder / "style.css").read_text("utf-8"))
        self.early = Script((folder / "early.js").read_text("utf-8"))
        self.common = Script((folder / "common.js").read_text("utf-8"))
        self.page = Script((folder / "page.js").read_text("utf-8"))

    def render(self, template: str, path: str, scripts: Sequence[Script] = (), style: str = "", **values: Any) -> bytes:
        """A page.

        Args:
            template: its file name.
            path: where the page will be, below the site; links are relative to it.
            scripts: that the template writes into the page, besides those that all pages have.
            style: rules besides those that all pages have.
            values: what the template asks for.
        """
        style = self._style + style
        hashes = [script.hash for script in (self.early, self.common, *scripts)]
        policy = (
            f"default-src 'none'; script-src {' '.join(hashes)}; style-src {_hash(style)}; img-src data:; "
            "base-uri 'none'; form-action 'none'"
        )
        text = self._environment.get_template(template).render(
            policy=policy,
            style=style,
            early=self.early.source,
            common=self.common.source,
            root="../" * path.count("/"),
            path=path,
            navigation=self._navigation,
            **values,
        )
        return text.encode("utf-8", "replace")


def data_block(value: Any) -> str:
    r"""JSON that can stand in a script element.

    >>> data_block({"a": "</script>"})
    '{"a":"\\u003c/script\\u003e"}'
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _environment(folder: Path) -> jinja2.Environment:
    try:
        import jinja2
    except ImportError as error:
        raise SegbenchError(f"The site is written with jinja2, which is not installed. {INSTALL}") from error
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )


def _minified(style: str) -> str:
    """A style sheet without comments and needless space."""
    style = re.sub(r"/\*.*?\*/", "", style, flags=re.DOTALL)
    return re.sub(r"\s*([{};,])\s*", r"\1", re.sub(r"\s+", " ", style)).strip()


def missing(error: ImportError) -> SegbenchError:
    """What to say when a library of the extra ``site`` is not installed."""
    return SegbenchError(f"The site needs {error.name or 'a library'}, which is not installed. {INSTALL}")
