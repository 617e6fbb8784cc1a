"""One matrix out of a MATLAB file (versions 5 to 7), as SBD keeps its masks, in bounded memory.

Not by scipy, which believes whatever lengths a file states and unpacks whatever expands: a single flipped byte ends
the whole process (scipy 1.17, found by the test that damages files). This reader unpacks no more than `MAX_UNPACKED`
bytes, and makes no array that is larger than the bytes that are there. Tests compare it with what scipy writes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

HEADER = 128  # bytes; the last two tell the byte order
MAX_UNPACKED = 10_000_000
MATRIX, COMPRESSED = 14, 15  # types of elements
WHOLE = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 12: "i8", 13: "u8"}
STRUCT, NUMERIC = 2, range(6, 16)  # classes of matrices


def read_field(data: bytes, variable: str, field: str) -> npt.NDArray[Any]:
    """The whole numbers of ``variable.field``, two-dimensional.

    Raises:
        ValueError: says what is wrong with the file.
    """
    if b"HDF\r\n\x1a\n" in data[:1024] or data.startswith(b"MATLAB 7.3"):
        raise ValueError("it is of MATLAB 7.3 (HDF5); save it with -v7")
    order = {b"IM": "<", b"MI": ">"}.get(data[HEADER - 2 : HEADER])
    if order is None:
        raise ValueError("it is no MATLAB file of version 5 to 7")
    try:
        for kind, content in _elements(data[HEADER:], order):
            if kind == COMPRESSED:
                kind, content = next(_elements(_unpacked(content), order), (0, b""))
            if kind == MATRIX and (found := _field(content, variable, field, order)) is not None:
                return _numbers(found, order)
    except (struct.error, zlib.error) as error:
        raise ValueError(f"it is damaged ({error})") from error
    raise ValueError(f"it has no struct {variable}")


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Type and content of each element."""
    place = 0
    while place < len(data):
        kind, size = struct.unpack_from(order + "II", data, place)
        start, after = place + 8, place + 8 + size + (0 if kind == COMPRESSED else -size % 8)
        if kind >> 16:  # up to four bytes stand beside their type and length
            kind, size, start, after = kind & 0xFFFF, kind >> 16, place + 4, place + 8
        if start + size > len(data):
            raise ValueError("it ends too early")
        yield kind, data[start : start + size]
        place = after


def _unpacked(content: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(content, MAX_UNPACKED)
    if unpacker.unconsumed_tail:
        raise ValueError(f"it expands to more than {MAX_UNPACKED} bytes: a damaged or malicious file")
    return data


def _field(content: bytes, variable: str, field: str, order: str) -> bytes | None:
    """The matrix of a field, if this is the struct ``variable``."""
    (_, flags), _, (_, name), *rest = _elements(content, order)
    if name != variable.encode() or _class(flags, order) != STRUCT or len(rest) < 2:
        return None
    (length,), names = struct.unpack(order + "i", rest[0][1]), rest[1][1]
    fields = [names[place : place + length].split(b"\0")[0] for place in range(0, len(names), length)]
    for each, (kind, matrix) in zip(fields, rest[2:], strict=False):
        if each == field.encode() and kind == MATRIX:
            return matrix
    raise ValueError(f"{variable} has no field {field}")


def _numbers(matrix: bytes, order: str) -> npt.NDArray[Any]:
    (_, flags), (_, sides), _, (kind, values), *_ = _elements(matrix, order)
    shape = np.frombuffer(sides, order + "i4")
    if len(shape) != 2 or _class(flags, order) not in NUMERIC or kind not in WHOLE:
        raise ValueError("it holds no two-dimensional whole numbers")
    return np.frombuffer(values, order + WHOLE[kind]).reshape(tuple(shape), order="F")


def _class(flags: bytes, order: str) -> int:
    first: int = struct.unpack_from(order + "I", flags)[0]
    return first & 0xFF
