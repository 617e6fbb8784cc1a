"""Evidence: counts as Parquet, long and sparse, with the run's metadata in the file.

Columns: ``strength, loss, image_id, class, intersection, predicted, target``. Rows are sorted as the groups and ids are
given and hold only classes that occur; an image without any counted pixel keeps one row of zeros, so that no image
can vanish. The same content gives the same bytes, and a digest of the content tells damage that Parquet does not see.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from segbench import schemas
from segbench.counts import Counts
from segbench.errors import ContentError

SCHEMA = pa.schema(
    [
        ("strength", pa.float64()),
        ("loss", pa.string()),
        ("image_id", pa.string()),
        ("class", pa.int32()),
        ("intersection", pa.int64()),
        ("predicted", pa.int64()),
        ("target", pa.int64()),
    ]
)
NAMES = ("loss", "image_id")
# How it is read: a long name that fills many rows takes no more memory than once.
DICTIONARY_SCHEMA = pa.schema(
    [(field.name, pa.dictionary(pa.int32(), pa.string()) if field.name in NAMES else field.type) for field in SCHEMA]
)
SCHEMA_VERSION = 2
STRENGTH = {1: "eps_255", SCHEMA_VERSION: "strength"}  # the first column, by version
METADATA_KEY, DIGEST_KEY = b"segbench", b"segbench.sha256"
# What is read of strangers: a small file may declare enough to fill any memory.
MAX_ROWS = 5_000_000  # 2000 images that show 20 of their classes in 125 groups
MAX_BYTES = 2**28  # of all columns, uncompressed; MAX_ROWS with short names fit
MAX_NAME = 1000  # characters of a loss or an image id
MAX_GROUPS = 1000
MAX_ROW_GROUPS = 64
LOSS_NAME = "[a-z][a-z0-9_]{0,39}"
MAX_CELLS = 50_000_000  # images x classes, over all groups
MAX_PIXELS = 2**31 - 1  # of one image, so that sums stay in int64
CLEAN = (0.0, "clean")
# Names in the place of a loss, of attacks that are reliability checks and never candidates.
CHECK_LOSS = "check"  # at a huge ε, with gradients
CHECK_SEARCH = "check_search"  # at an ε of the protocol, without
CHECKS = frozenset({CHECK_LOSS, CHECK_SEARCH})

CHECK_EPS_255, SEARCH_EPS_255 = 64.0, 8.0  # their radii

Key = tuple[float, str]


@dataclass(frozen=True)
class Group:
    """The counts of one (ε, loss): image ids, and counts (N,K) in their order."""

    image_ids: tuple[str, ...]
    counts: Counts


@dataclass(frozen=True)
class Evidence:
    """Groups by (strength, loss), clean images under `CLEAN`, and the run's metadata (``num_classes`` among it)."""

    groups: Mapping[Key, Group]
    metadata: Mapping[str, Any]


def to_bytes(evidence: Evidence) -> bytes:
    """The Parquet file."""
    parts = [_rows(key, group) for key, group in evidence.groups.items()]
    metadata = {**evidence.metadata, "schema_version": SCHEMA_VERSION}
    text = json.dumps(metadata, sort_keys=True, ensure_ascii=False, allow_nan=False)
    table = pa.concat_tables(parts) if parts else SCHEMA.empty_table()
    table = table.replace_schema_metadata({METADATA_KEY: text.encode(), DIGEST_KEY: _digest(table, text.encode())})
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd", use_dictionary=["loss", "image_id"])
    data: bytes = buffer.getvalue().to_pybytes()
    return data


def _rows(key: Key, group: Group) -> pa.Table:
    counts = group.counts
    present = (counts.predicted > 0) | (counts.target > 0)
    present[:, 0] |= ~present.any(axis=1)
    images, classes = np.nonzero(present)
    rows = np.bincount(images, minlength=len(group.image_ids)).tolist()
    columns = [
        _numbers(np.full(len(images), key[0])),
        _names([key[1]], [len(images)]),
        _names(group.image_ids, rows),
        _numbers(classes.astype(np.int32)),
        *(_numbers(array[images, classes]) for array in counts),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _numbers(values: npt.NDArray[Any]) -> pa.Array:
    """A column of the same type. From Python objects or NumPy, pyarrow would import pandas first: most of a second."""
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def _values(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """The numbers of a column without gaps; ``to_numpy`` would import pandas."""
    return np.from_dlpack(column.combine_chunks())


def _names(names: Sequence[str], rows: Sequence[int]) -> pa.Array:
    """A column that repeats each name for so many rows."""
    texts = [name.encode() for name in names]
    ends = np.cumsum([0, *np.repeat([len(text) for text in texts], rows)]).astype(np.int32)
    data = b"".join(text * number for text, number in zip(texts, rows, strict=True))
    return pa.StringArray.from_buffers(len(ends) - 1, pa.py_buffer(ends), pa.py_buffer(data))


def _digest(table: pa.Table, metadata: bytes) -> bytes:
    """SHA-256 of metadata and cells, however Parquet stores them."""
    digest = hashlib.sha256(metadata)
    for column in table.columns:
        if pa.types.is_string(column.type) or pa.types.is_dictionary(column.type):
            names, codes = _codes(column)
            digest.update(json.dumps(names).encode())
            digest.update(codes.tobytes())
        else:
            digest.update(_values(column).tobytes())
    return digest.hexdigest().encode()


def _codes(column: pa.ChunkedArray) -> tuple[list[str], npt.NDArray[np.int32]]:
    """A column of names as its names in the order in which they first appear, and a code for each row."""
    coded = pa.types.is_dictionary(column.type)
    values = column.unify_dictionaries().combine_chunks() if coded else column.combine_chunks().dictionary_encode()
    given = np.from_dlpack(values.indices)
    present, first = np.unique(given, return_index=True)
    order = present[np.argsort(first)]
    code_of = np.zeros(max(len(values.dictionary), 1), np.int32)
    code_of[order] = np.arange(len(order))
    names = values.dictionary.to_pylist()
    return [names[place] for place in order], code_of[given]


def from_bytes(data: bytes, *, source: str, schema_version: int = SCHEMA_VERSION) -> Evidence:
    """Reads and checks a Parquet file of this version; of an older one for `segbench.entries.migration` alone.

    Raises:
        ContentError: not Parquet, another version or schema, damaged, or counts that cannot be; names ``source``.
    """
    try:
        # Without Arrow's threads: they let go of a Python file late, and abort a process that exits just then.
        with pq.ParquetFile(pa.BufferReader(data), read_dictionary=list(NAMES), pre_buffer=False) as file:
            if file.metadata.num_rows > MAX_ROWS:
                raise ContentError(f"{source} has {file.metadata.num_rows} rows; at most {MAX_ROWS} are read.")
            if file.num_row_groups > MAX_ROW_GROUPS:
                raise ContentError(f"{source} has {file.num_row_groups} row groups; at most {MAX_ROW_GROUPS} are read.")
            size = sum(abs(file.metadata.row_group(i).total_byte_size) for i in range(file.num_row_groups))
            if size > MAX_BYTES:
                raise ContentError(f"{source} has {size} bytes when unpacked; at most {MAX_BYTES} are read.")
            schema, metadata = file.schema_arrow.remove_metadata(), file.schema_arrow.metadata or {}
            names = [STRENGTH[schema_version], *SCHEMA.names[1:]]
            if schema_version == SCHEMA_VERSION and schema.names[:1] == [STRENGTH[1]]:
                raise ContentError(schemas.other_version(source, 1, SCHEMA_VERSION))
            if schema.names != names or schema.types != DICTIONARY_SCHEMA.types:
                raise ContentError(f"{source} does not have the columns of evidence: {', '.join(names)}.")
            table = file.read(use_threads=False).rename_columns(SCHEMA.names)
        table.validate(full=True)
        run = schemas.parse(metadata.get(METADATA_KEY, b"null").decode(), source=source)
    except KeyError as error:  # a column that should be read as a dictionary
        raise ContentError(f"{source} does not have the columns of evidence: {', '.join(SCHEMA.names)}.") from error
    except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
        raise ContentError(f"{source} is damaged or not a Parquet file: {error}".splitlines()[0]) from error
    if not isinstance(run, dict) or not isinstance(run.get("num_classes"), int) or not 2 <= run["num_classes"] <= 65535:
        raise ContentError(f"{source} carries no segbench metadata.")
    if (stated := run.pop("schema_version", 1)) != schema_version:
        raise ContentError(schemas.other_version(source, stated, SCHEMA_VERSION))
    groups = _groups(table, run["num_classes"], source)
    if metadata.get(DIGEST_KEY) != _digest(table, metadata[METADATA_KEY]):
        raise ContentError(f"{source} is damaged: its content does not fit its digest.")
    return Evidence(groups, run)


def _groups(table: pa.Table, num_classes: int, source: str) -> dict[Key, Group]:
    if any(column.null_count for column in table.columns):
        raise ContentError(f"{source} has empty cells.")
    eps = _values(table["strength"])
    (loss_names, loss_codes), (image_names, image_codes) = (_codes(table[name]) for name in NAMES)
    for name in (*loss_names, *image_names):
        if len(name) > MAX_NAME:
            raise ContentError(f"{source} has a name of {len(name)} characters; at most {MAX_NAME} are read.")
    if wrong := [name for name in loss_names if not re.fullmatch(LOSS_NAME, name)]:
        raise ContentError(f"{source} has an attack named {wrong[0][:40]!r}; names are of a-z, 0-9 and _.")
    if len(set(loss_names)) != len(loss_names) or len(set(image_names)) != len(image_names):
        raise ContentError(f"{source} is damaged: a name has two codes.")
    classes = _values(table["class"])
    values = [_values(table[name]) for name in ("intersection", "predicted", "target")]
    if not ((eps >= 0) & (eps <= 255)).all() or (classes < 0).any() or (classes >= num_classes).any():
        raise ContentError(f"{source} has a radius or class out of range.")
    if any((value < 0).any() or (value > MAX_PIXELS).any() for value in values):
        raise ContentError(f"{source} has counts that cannot be: negative, or more pixels than an image has.")
    if (values[0] > values[1]).any() or (values[0] > values[2]).any():
        raise ContentError(f"{source} has counts that cannot be: an intersection above its parts.")
    groups: dict[Key, Group] = {}
    starts: list[int] = []
    if len(eps):
        changes = (eps[1:] != eps[:-1]) | (loss_codes[1:] != loss_codes[:-1])
        starts = np.flatnonzero(np.r_[True, changes]).tolist()
    if len(starts) > MAX_GROUPS:
        raise ContentError(f"{source} has {len(starts)} groups of rows; at most {MAX_GROUPS} are read.")
    cells = 0
    for start, end in itertools.pairwise([*starts, len(eps)]):
        key = (float(eps[start]), loss_names[loss_codes[start]])
        if key in groups:
            raise ContentError(f"{source}: the rows of ε = {key[0]}/255, {key[1]} are not together.")
        codes, first = np.unique(image_codes[start:end], return_index=True)
        codes = codes[np.argsort(first)]
        cells += len(codes) * num_classes
        if cells > MAX_CELLS:
            raise ContentError(f"{source} has more than {MAX_CELLS} images x classes; no more are read.")
        row_of = np.full(len(image_names), -1)
        row_of[codes] = np.arange(len(codes))
        rows = row_of[image_codes[start:end]]
        flat = rows * num_classes + classes[start:end]
        if len(np.unique(flat)) != len(flat):
            raise ContentError(f"{source}: ε = {key[0]}/255, {key[1]} counts an image and class twice.")
        arrays = []
        for value in values:
            dense = np.zeros(len(codes) * num_classes, np.int64)
            dense[flat] = value[start:end]
            arrays.append(dense.reshape(len(codes), num_classes))
        counts = Counts(*arrays)
        if (counts.predicted.sum(axis=1) != counts.target.sum(axis=1)).any():
            raise ContentError(
                f"{source}: ε = {key[0]}/255, {key[1]} has an image with more or fewer predicted than labelled pixels."
            )
        groups[key] = Group(tuple(image_names[code] for code in codes), counts)
    return groups
