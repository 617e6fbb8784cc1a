"""Finds model_zoo/, entries/ and leaderboard/ in a wheel, an editable install and a plain checkout."""

from __future__ import annotations

from pathlib import Path

from segbench.errors import ContentError

_PACKAGE = Path(__file__).resolve().parent


def folder(name: str) -> Path:
    """The content folder ``name``: inside the package (wheel) or beside it (checkout, editable install).

    Raises:
        ContentError: the installation is incomplete.
    """
    for path in (_PACKAGE / "_content" / name, _PACKAGE.parent / name):
        if path.is_dir():
            return path
    raise ContentError(
        f"The folder {name} is missing from this installation. Mend: pip install --force-reinstall segbench"
    )


def dataset_folder(dataset_id: str) -> str:
    """The folder of a data set in model_zoo/ and entries/: a variant has one of its own.

    >>> dataset_folder("camvid"), dataset_folder("pascal_voc/void-ignored")
    ('camvid', 'pascal_voc-void-ignored')
    """
    return dataset_id.replace("/", "-")


def family(dataset_id: str) -> str:
    """The data set that a variant belongs to; described folders are no variants of each other.

    >>> family("pascal_voc/void-ignored"), family("folder/potholes")
    ('pascal_voc', 'folder/potholes')
    """
    return dataset_id if dataset_id.startswith("folder/") else dataset_id.partition("/")[0]


def entries_above(path: Path) -> Path | None:
    """The folder entries/ of a checkout or an installation that holds ``path``, at whatever depth; None outside."""
    return next(
        (above for above in path.parents if above.name == "entries" and (above.parent / "model_zoo").is_dir()), None
    )


def checkout() -> Path | None:
    """The root of the checkout that this package runs from, or None in an installed wheel."""
    root = _PACKAGE.parent
    return root if (root / "setup.cfg").is_file() and (root / "model_zoo").is_dir() else None


def checkout_here() -> Path | None:
    """The checkout that holds the current folder; else the one that this package runs from."""
    here = Path.cwd()
    around = (
        each for each in (here, *here.parents) if all((each / name).is_dir() for name in ("model_zoo", "entries"))
    )
    return next(around, None) or checkout()
