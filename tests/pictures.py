"""Files that Pillow does not write: PNG and TIFF of any depth, byte by byte."""

from __future__ import annotations

import struct
import zlib

import numpy as np

GREY, COLOUR, INDEXED = 0, 2, 3  # colour types of PNG


def png(rows: list[bytes], width: int, depth: int, colour_type: int, palette: bytes = b"", height: int = 0) -> bytes:
    """A PNG of packed rows; ``height`` only to lie about it."""
    header = struct.pack(">IIBBBBB", width, height or len(rows), depth, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header)] + ([(b"PLTE", palette)] if palette else [])
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def tiff(values: np.ndarray, width: int = 0, height: int = 0) -> bytes:
    """An uncompressed one-channel TIFF of any numpy type and byte order; the sides only to lie about them."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    data = values.tobytes() + b"\0" * (values.nbytes % 2)
    short, long = 3, 4
    tags = [
        (256, long, width or values.shape[1]),
        (257, long, height or values.shape[0]),
        (258, short, 8 * values.dtype.itemsize),
        (259, short, 1),  # no compression
        (262, short, 1),  # 0 is black
        (273, long, 8),  # where the data begin
        (277, short, 1),  # one channel
        (278, long, height or values.shape[0]),
        (279, long, len(data)),
        (339, short, {"u": 1, "i": 2, "f": 3}[values.dtype.kind]),
    ]
    entries = b"".join(
        struct.pack(order + "HHI", tag, kind, 1) + struct.pack(order + ("HH" if kind == short else "I"), *each)
        for tag, kind, value in tags
        for each in [(value, 0) if kind == short else (value,)]
    )
    magic = {"<": b"II*\0", ">": b"MM\0*"}[order]
    return (
        magic
        + struct.pack(order + "I", 8 + len(data))
        + data
        + struct.pack(order + "H", len(tags))
        + entries
        + bytes(4)
    )
