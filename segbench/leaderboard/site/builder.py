"""A board to a folder of files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from segbench.leaderboard.site import bibtex, documents, exports, files, index, model
from segbench.leaderboard.site.pages import Pages, missing
from segbench.leaderboard.site.shape import Board


def build(board: Board, out: Path, *, content_root: Path, docs: Path | None = None) -> list[Path]:
    """Writes the site of a board: the same board gives the same bytes. Other files in ``out`` are left alone.

    Args:
        board: the tables.
        out: folder of the site; made where it is missing.
        content_root: holds ``entries/``, whose entries and evidence are copied beside the pages.
        docs: holds the markdown of the pages about reading, protocol and submitting; a missing one has no page.

    Returns:
        All files of the site.

    Raises:
        SegbenchError: a library of the extra ``site`` is not installed.
    """
    try:
        import altair  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise missing(error) from error
    return files.write_all(out, _files(board, content_root, docs))


def _files(board: Board, content_root: Path, docs: Path | None) -> Iterator[tuple[str, bytes | Path]]:
    found = documents.find(docs)
    paths = {name: f"{name}.html" for name in found}
    navigation = [("index.html", "Leaderboard"), *((paths[name], documents.LABELS[name]) for name in found)]
    pages = Pages(navigation)
    copies: dict[str, str | None] = {}

    def linked(path: str | None) -> str | None:
        if path is not None and path not in copies:
            copies[path] = files.copied(content_root, path)
        return copies[path] if path is not None else None

    yield "index.html", index.render(pages, board, linked, paths)
    links = {documents.NAMES[name]: path for name, path in paths.items()}
    for name, path in found.items():
        title, html = documents.render(path, links)
        yield paths[name], pages.render("doc.html.j2", paths[name], title=title, html=html)
    places = model.places(board)
    for table in board.tables:
        for row in table.rows:
            yield files.model_page(table, row), model.render(pages, table, row, linked, places)
    for path_copied in copies.values():
        if path_copied is not None:
            yield path_copied, content_root / path_copied
    yield "leaderboard.json", exports.to_json(board).encode()
    yield "leaderboard.csv", exports.to_csv(board).encode("utf-8", "replace")
    yield "leaderboard.bib", bibtex.bibliography(board).encode("utf-8", "replace")
