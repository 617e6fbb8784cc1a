"""A figure: one picture of a report, as SVG and PNG. Torch-free."""

from __future__ import annotations

import base64
import io
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple
from xml.sax.saxutils import quoteattr

from segbench.errors import SegbenchError

INSTALL = "Reports need altair, vl-convert-python and jinja2. Install them: pip install 'segbench[site]'"


class Figure(NamedTuple):
    """A picture with what is written about it.

    Attributes:
        name: of its files, lower case.
        title: what is seen.
        caption: how to read it, in a sentence or two.
        svg, png: the files.
        width: in pixels at which the picture is meant to be seen.
    """

    name: str
    title: str
    caption: str
    svg: bytes
    png: bytes
    width: int


def chart(name: str, title: str, caption: str, spec: Any) -> Figure:
    """A figure from an Altair chart.

    Raises:
        SegbenchError: a library is missing.
    """
    try:
        import altair as alt
        import vl_convert
    except ImportError as error:
        raise SegbenchError(INSTALL) from error
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    text: Mapping[str, Any] = spec.to_dict()
    svg = vl_convert.vegalite_to_svg(dict(text), vl_version=version).encode()
    png = vl_convert.vegalite_to_png(dict(text), vl_version=version, scale=2)
    return Figure(name, title, caption, svg, png, _width(png) // 2)


def picture(name: str, title: str, caption: str, image: Any) -> Figure:
    """A figure from a Pillow image; the SVG holds the PNG."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    png = file.getvalue()
    size = f'width="{image.width}" height="{image.height}"'
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {image.width} {image.height}">'
        f"<title>{_escaped(title)}</title>"
        f"<image {size} href={quoteattr(data_uri(png, 'image/png'))}/></svg>"
    )
    return Figure(name, title, caption, svg.encode(), png, image.width)


def data_uri(data: bytes, kind: str) -> str:
    """A file as a link that needs no file."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _escaped(text: str) -> str:
    return quoteattr(text)[1:-1].replace("\x00", "")


def _width(png: bytes) -> int:
    width: int = struct.unpack(">I", png[16:20])[0]
    return width
