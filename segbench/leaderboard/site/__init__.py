"""The pages of the leaderboard: one self-contained index, a page per model, documents, and the numbers to download.

Needs the extra ``site`` (jinja2, altair, vl-convert-python, markdown-it-py); it is imported when a site is built.
"""

from __future__ import annotations

from segbench.leaderboard.site.builder import build

__all__ = ["build"]
