"""A report: its figures and tables, and the page of them. Torch-free until pictures are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segbench import __version__
from segbench.data.catalogue import class_names
from segbench.errors import SegbenchError
from segbench.reporting import charts, outcomes
from segbench.reporting.analysis import View, views
from segbench.reporting.figures import INSTALL, Figure, data_uri
from segbench.reporting.runs import Material
from segbench.reporting.style import METRICS

if TYPE_CHECKING:
    from segbench.reporting.gallery import Pictures

KINDS = (("sweep", "Iterations and seeds"), ("targeted", "Targeted attacks"), ("minimum", "Minimum ε"))
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Report:
    """What is shown.

    Attributes:
        material: the runs.
        names: of the classes.
        views: of the main run; empty without one.
        figures: by section: ``scores``, ``comparison``, ``sweep``, ``targeted``, ``minimum``, ``pictures``.
        remarks: on the pictures, where they are not as the run has them.
    """

    material: Material
    names: Sequence[str]
    views: Sequence[View]
    figures: Mapping[str, Sequence[Figure]]
    remarks: Sequence[str] = field(default_factory=list)

    def all_figures(self) -> list[Figure]:
        """In the order of the page."""
        return [each for section in self.figures.values() for each in section]


def make(material: Material, pictures: Pictures | None) -> Report:
    """Draws everything.

    Args:
        material: the runs.
        pictures: None for none.

    Raises:
        SegbenchError: a library is missing.
        UsageError, ModelError, DataError, RunError: the pictures cannot be made.
    """
    found = views(material.main) if material.main else []
    about = material.first.manifest["dataset"]
    names = class_names(about["id"]) or [f"class {number}" for number in range(about["num_classes"])]
    figures: dict[str, list[Figure]] = {"scores": charts.of_views(found, names) if found else []}
    for kind, draw in (
        ("comparison", outcomes.comparison), ("sweep", outcomes.sweep), ("targeted", outcomes.targeted),
        ("minimum", outcomes.minimum),
    ):  # fmt: skip
        documents = material.documents.get(kind, [])
        figures[kind] = [
            draw(document, kind if len(documents) == 1 else f"{kind}_{number + 1}")
            for number, document in enumerate(documents)
        ]
    remarks: list[str] = []
    if pictures is not None and material.main is not None:
        from segbench.reporting.gallery import gallery

        figures["pictures"], remarks = gallery(material.main, found, pictures)
    return Report(material, names, found, figures, remarks)


def page(report: Report) -> bytes:
    """The report as one HTML file that asks nobody for anything.

    Raises:
        SegbenchError: jinja2 is missing.
    """
    try:
        import jinja2
    except ImportError as error:
        raise SegbenchError(INSTALL) from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "interval": _interval, "uri": _uri}
    manifest = report.material.first.manifest
    entry = next(iter(report.material.documents.get("entry", [])), None)
    text = environment.get_template("report.html.j2").render(
        report=report,
        manifest=manifest,
        entry=entry,
        flags=_flags(report, entry),
        kinds=KINDS,
        sections=_sections(report),
        strata=[view.strata for view in report.views],
        documents=report.material.documents,
        version=__version__,
    )
    return text.encode("utf-8", "replace")


def _sections(report: Report) -> list[tuple[str, str]]:
    """Anchor and heading of each section that the page has."""
    found = [("numbers", "The numbers")] if report.views else []
    found += [("other-attacks", "Other attacks")] if report.figures["comparison"] else []
    found += [(f"{kind}-section", heading) for kind, heading in KINDS if report.figures[kind]]
    return found + ([("pictures", "What it looks like")] if report.figures.get("pictures") else [])


def _flags(report: Report, entry: Mapping[str, Any] | None) -> list[str]:
    """What a reader must know before the numbers."""
    found = [] if entry is None else [flag["message"] for flag in entry["flags"] if flag["level"] == "warning"]
    for document in report.material.documents.get("comparison", []):
        found += [
            f"At {flag['strength']:g}/255 {flag['attack']}, which needs no gradient of this model, is "
            f"{100 * flag['below']:.1f} points of {METRICS[flag['metric']]} below SEA: a sign of masked gradients."
            for flag in document.get("flags", [])
        ]
    return found


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _interval(value: Sequence[float]) -> str:
    return f"{100 * value[0]:.1f}–{100 * value[1]:.1f}"


def _uri(figure: Figure) -> str:
    """Charts as SVG, which is sharp at any size; sheets of pictures as PNG."""
    if figure.svg.find(b"<image") >= 0:
        return data_uri(figure.png, "image/png")
    return data_uri(figure.svg, "image/svg+xml")
