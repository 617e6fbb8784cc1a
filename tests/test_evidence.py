"""Evidence survives the round trip, and whatever else lies in a file is refused with a ContentError."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segbench import evidence
from segbench.counts import Counts, count
from segbench.errors import ContentError
from segbench.evidence import CLEAN, METADATA_KEY, SCHEMA, Evidence, Group, from_bytes, to_bytes

NUM_CLASSES = 4
IGNORE = 255


def group(image_ids: tuple[str, ...], seed: int = 0, ignored: float = 0.2, num_classes: int = NUM_CLASSES) -> Group:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, (len(image_ids), 5, 6))
    labels[rng.random(labels.shape) < ignored] = IGNORE
    predictions = rng.integers(0, num_classes, labels.shape)
    return Group(image_ids, count(predictions, labels, num_classes))


def sample() -> Evidence:
    ids = ("a", "b", "ü/3 x")
    groups = {CLEAN: group(ids), (4.0, "mce"): group(ids, 1), (0.25, "js"): group(ids, 2)}
    return Evidence(groups, {"num_classes": NUM_CLASSES, "run_id": "ab" * 8, "checks": [{"value": 0.5}]})


def same(first: Evidence, second: Evidence) -> bool:
    """Equal in content and in the order of groups and images."""
    return (
        first.metadata == second.metadata
        and list(first.groups) == list(second.groups)
        and all(
            mine.image_ids == other.image_ids
            and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(mine.counts, other.counts, strict=True))
            for mine, other in zip(first.groups.values(), second.groups.values(), strict=True)
        )
    )


@st.composite
def evidences(draw: st.DrawFn) -> Evidence:
    num_classes = draw(st.integers(2, 6))
    keys = st.tuples(
        st.floats(0, 255, exclude_min=True) | st.integers(1, 255).map(float), st.sampled_from(["mce", "js", "a_1"])
    )
    names = st.lists(st.text(st.characters(codec="utf-8"), max_size=8), max_size=5, unique=True)
    groups = {
        key: group(tuple(draw(names)), draw(st.integers(0, 99)), draw(st.sampled_from([0.0, 0.3, 1.0])), num_classes)
        for key in draw(st.lists(keys | st.just(CLEAN), max_size=4, unique=True))
    }
    extra = draw(
        st.dictionaries(
            st.text(max_size=5), st.none() | st.integers(1 - 2**63, 2**63 - 1) | st.text(max_size=5), max_size=3
        )
    )
    groups = {key: value for key, value in groups.items() if value.image_ids}  # a group without images has no rows
    return Evidence(groups, {**extra, "num_classes": num_classes})


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(evidences())
def test_round_trip(found: Evidence) -> None:
    data = to_bytes(found)
    assert same(from_bytes(data, source="f"), found)
    assert to_bytes(from_bytes(data, source="f")) == data


def test_the_same_content_gives_the_same_bytes() -> None:
    one, other = sample(), sample()
    metadata = dict(reversed(other.metadata.items()))  # the order of keys is not content
    assert to_bytes(one) == to_bytes(Evidence(other.groups, metadata))


@pytest.mark.parametrize("part", ["counts", "image id", "loss", "eps", "metadata"])
def test_other_content_gives_other_bytes(part: str) -> None:
    found = sample()
    groups, metadata = dict(found.groups), dict(found.metadata)
    mce = groups.pop((4.0, "mce"))
    if part == "counts":
        groups[(4.0, "mce")] = group(mce.image_ids, 7)
    elif part == "image id":
        groups[(4.0, "mce")] = Group(("a", "b", "c"), mce.counts)
    elif part == "loss":
        groups[(4.0, "js")] = mce
    elif part == "eps":
        groups[(4.5, "mce")] = mce
    else:
        groups, metadata["run_id"] = dict(found.groups), "other"
    assert to_bytes(Evidence(groups, metadata)) != to_bytes(found)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the threads of a process in /proc")
def test_no_thread_of_arrow_is_left_that_could_abort_the_process_at_its_end() -> None:
    program = """if True:
        import os
        from segbench.evidence import from_bytes, to_bytes
        from tests.test_evidence import sample

        before = len(os.listdir("/proc/self/task"))
        from_bytes(to_bytes(sample()), source="f")
        print(len(os.listdir("/proc/self/task")) - before)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def test_an_image_without_valid_pixels_survives() -> None:
    zeros = np.zeros((2, NUM_CLASSES), np.int64)
    counts = Counts(zeros.copy(), zeros.copy(), zeros.copy())
    counts.predicted[1, 2] = counts.target[1, 3] = 5
    found = Evidence({CLEAN: Group(("void", "seen"), counts)}, {"num_classes": NUM_CLASSES})
    assert same(from_bytes(to_bytes(found), source="f"), found)


def test_evidence_without_rows_is_read() -> None:
    assert from_bytes(to_bytes(Evidence({}, {"num_classes": 2})), source="f").groups == {}


def test_a_truncated_file_is_refused_at_every_length() -> None:
    data = to_bytes(sample())
    for length in range(len(data)):
        with pytest.raises(ContentError, match=r"cut\.parquet"):
            from_bytes(data[:length], source="cut.parquet")


@pytest.mark.slow
def test_a_flipped_byte_is_refused_or_changes_nothing() -> None:
    """Some bytes of Parquet carry nothing that is read; every other flip must be seen."""
    found = sample()
    data = to_bytes(found)
    refused = 0
    for place in range(len(data)):
        for mask in (0x01, 0xFF):
            damaged = bytearray(data)
            damaged[place] ^= mask
            try:
                assert same(from_bytes(bytes(damaged), source="f"), found), f"byte {place} ^ {mask}"
            except ContentError:
                refused += 1
    assert refused > len(data)  # of two flips per byte


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=300), st.booleans())
def test_arbitrary_bytes_are_refused(noise: bytes, dressed: bool) -> None:
    with pytest.raises(ContentError):
        from_bytes(b"PAR1" + noise + b"PAR1" if dressed else noise, source="f")


ROW: dict[str, Any] = {
    "strength": 4.0, "loss": "mce", "image_id": "a", "class": 0, "intersection": 1, "predicted": 2, "target": 2,
}  # fmt: skip
METADATA: dict[str, Any] = {"num_classes": NUM_CLASSES, "schema_version": 2}


def parquet(rows: list[dict[str, Any]], schema: pa.Schema = SCHEMA, metadata: Any = METADATA) -> bytes:
    """A file by hand; metadata is JSON data, raw bytes, or None for none."""
    table = pa.Table.from_pylist(rows, schema=schema)
    if metadata is not None:
        raw = metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()
        table = table.replace_schema_metadata({METADATA_KEY: raw})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def with_column(name: str, type_: pa.DataType) -> pa.Schema:
    return SCHEMA.set(SCHEMA.get_field_index(name), pa.field(name, type_))


@pytest.mark.parametrize(
    "schema",
    [
        pa.schema([field for field in SCHEMA if field.name != "target"]),
        SCHEMA.append(pa.field("more", pa.int64())),
        with_column("predicted", pa.float64()),
        with_column("class", pa.int64()),
        with_column("loss", pa.binary()),
        SCHEMA.set(0, pa.field("eps", pa.float64())),
        pa.schema(list(reversed(SCHEMA))),
    ],
)
def test_other_columns_are_refused(schema: pa.Schema) -> None:
    rows = [{name: ROW.get(name, 1) for name in schema.names}]
    if schema.field(1).type == pa.binary():
        rows[0]["loss"] = b"mce"
    with pytest.raises(ContentError, match=r"columns of evidence: strength, loss, image_id, class"):
        from_bytes(parquet(rows, schema), source="f")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"intersection": -1}, "negative"),
        ({"predicted": -1, "intersection": -2}, "negative"),
        ({"target": 2**31, "predicted": 2**31}, "more pixels"),
        ({"target": 2**62, "predicted": 2**62, "intersection": 2**62}, "more pixels"),
        ({"intersection": 3, "target": 3, "predicted": 2}, "above its parts"),
        ({"intersection": 3, "target": 2, "predicted": 3}, "above its parts"),
        ({"predicted": 3}, "predicted than labelled"),
        ({"class": -1}, "class out of range"),
        ({"class": NUM_CLASSES}, "class out of range"),
        ({"strength": float("nan")}, "radius"),
        ({"strength": float("inf")}, "radius"),
        ({"strength": -4.0}, "radius"),
        ({"strength": 256.0}, "radius"),
        *(({name: None}, "empty cells") for name in ROW),
    ],
)
def test_counts_that_cannot_be_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ContentError, match=f"f .*{said}|f: .*{said}"):
        from_bytes(parquet([{**ROW, "image_id": "b"}, {**ROW, **changes}]), source="f")


def test_a_row_twice_is_refused() -> None:
    with pytest.raises(ContentError, match="counts an image and class twice"):
        from_bytes(parquet([ROW, {**ROW, "image_id": "b"}, ROW]), source="f")


def test_a_split_group_is_refused() -> None:
    with pytest.raises(ContentError, match=r"ε = 4.0/255, mce are not together"):
        from_bytes(parquet([ROW, {**ROW, "loss": "js"}, {**ROW, "image_id": "b"}]), source="f")


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        b"",
        b"\xff\xfe",
        b"null",
        b"[4]",
        b"{}",
        b"[" * 100_000,
        {"num_classes": "4"},
        {"num_classes": 4.0},
        {"num_classes": True},
        {"num_classes": 1},
        {"num_classes": 0},
        {"num_classes": -4},
        {"num_classes": 65536},
        {"num_classes": 10**40},
        {"num_classes": NUM_CLASSES, "zero_gradients": 10**400},
        b'{"num_classes": 4, "num_classes": 4}',
        b'{"num_classes": 4, "value": NaN}',
    ],
)
def test_missing_or_foreign_metadata_is_refused(metadata: Any) -> None:
    with pytest.raises(ContentError, match=r"^f (carries no segbench metadata|is damaged|is not valid JSON)"):
        from_bytes(parquet([ROW], metadata=metadata), source="f")


def test_a_file_without_digest_is_refused() -> None:
    with pytest.raises(ContentError, match="digest"):
        from_bytes(parquet([ROW]), source="f")


@pytest.mark.parametrize("part", ["metadata", "cell", "image id"])
def test_edited_content_is_refused(part: str) -> None:
    """Edited with Parquet's own tools, the digest left as it was."""
    table = pq.read_table(io.BytesIO(to_bytes(sample())))
    kept = table.schema.metadata
    if part == "metadata":
        table = table.replace_schema_metadata({**kept, METADATA_KEY: kept[METADATA_KEY].replace(b"abab", b"acab")})
    else:
        rows = table.to_pylist()
        if part == "cell":
            wrong = next(row for row in rows if row["intersection"] > 0)
            wrong["intersection"] -= 1
        else:
            rows = [{**row, "image_id": row["image_id"].replace("b", "c")} for row in rows]
        table = pa.Table.from_pylist(rows, schema=table.schema)
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    with pytest.raises(ContentError, match="digest"):
        from_bytes(buffer.getvalue(), source="f")


@pytest.mark.parametrize(
    ("limit", "value", "said"),
    [
        ("MAX_ROWS", 1, "2 rows; at most 1"),
        ("MAX_GROUPS", 1, "2 groups"),
        ("MAX_CELLS", 7, "more than 7 images x classes"),
    ],
)
def test_what_is_read_is_limited(limit: str, value: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = parquet([ROW, {**ROW, "loss": "js"}])
    monkeypatch.setattr(evidence, limit, value)
    with pytest.raises(ContentError, match=said):
        from_bytes(data, source="f")


def test_a_small_file_cannot_fill_the_memory() -> None:
    """100,000 images of 65,535 classes would be 150 GB of dense counts."""
    rows = 100_000
    table = pa.table(
        {
            "strength": np.zeros(rows), "loss": ["clean"] * rows, "image_id": list(map(str, range(rows))),
            "class": np.zeros(rows, np.int32), **dict.fromkeys(SCHEMA.names[4:], np.ones(rows, np.int64)),
        },
        schema=SCHEMA,
    )  # fmt: skip
    table = table.replace_schema_metadata({METADATA_KEY: b'{"num_classes": 65535, "schema_version": 2}'})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    with pytest.raises(ContentError, match="images x classes"):
        from_bytes(buffer.getvalue(), source="f")


def varint(number: int) -> bytes:
    """A zigzag variable-length integer, as Parquet's footer writes i64."""
    number, found = number << 1, bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def test_a_huge_declared_number_of_rows_is_refused() -> None:
    """The footer says a billion rows; it is believed before anything is allocated, and refused."""
    rows = [{**ROW, "image_id": str(number)} for number in range(5000)]
    data = parquet(rows)
    footer_size = int.from_bytes(data[-8:-4], "little")
    body, footer = data[: -8 - footer_size], data[-8 - footer_size : -8]
    forged = footer.replace(varint(5000), varint(10**9))
    assert forged != footer
    forged_file = body + forged + len(forged).to_bytes(4, "little") + b"PAR1"
    with pytest.raises(ContentError, match="1000000000 rows"):
        from_bytes(forged_file, source="f")


def test_how_parquet_stores_the_rows_does_not_matter() -> None:
    found = sample()
    table = pq.read_table(io.BytesIO(to_bytes(found)))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=3, compression="snappy")
    assert same(from_bytes(buffer.getvalue(), source="f"), found)


def test_a_long_name_is_refused_before_it_is_repeated() -> None:
    """Rows that share a long name are read with one copy of it; a name as long as this has no purpose."""
    data = parquet([{**ROW, "image_id": "x" * 100_000, "class": number} for number in range(3)])
    with pytest.raises(ContentError, match="a name of 100000 characters"):
        from_bytes(data, source="f")


@pytest.mark.parametrize("way", ["one page", "many row groups"])
def test_a_small_file_that_unpacks_to_much_is_refused(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that are stored again and again, compressed to nearly nothing."""
    rows = 200
    ids = [f"{number:03d}" + "x" * 50_000 for number in range(rows)]
    table = pa.Table.from_pylist([{**ROW, "image_id": name} for name in ids], schema=SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(
        table, buffer, compression="zstd", use_dictionary=False, row_group_size=rows if way == "one page" else 1
    )
    monkeypatch.setattr(evidence, "MAX_BYTES", 2**20)
    with pytest.raises(ContentError, match=r"bytes when unpacked; at most 1048576|200 row groups; at most 64 are read"):
        from_bytes(buffer.getvalue(), source="f")


def test_a_name_stored_under_two_codes_is_refused() -> None:
    """Written as a dictionary with a duplicate, one image could be counted twice."""
    ids = pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int32()), pa.array(["a", "a"]))
    table = pa.Table.from_pylist([ROW, ROW], schema=SCHEMA).set_column(2, "image_id", ids)
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: b'{"num_classes": 4, "schema_version": 2}'}), buffer)
    with pytest.raises(ContentError, match=r"two codes|an image and class twice|columns of evidence"):
        from_bytes(buffer.getvalue(), source="f")


def test_the_version_is_stated_in_the_file_and_another_one_is_refused() -> None:
    stored = pq.read_schema(io.BytesIO(to_bytes(sample()))).metadata[METADATA_KEY]
    assert json.loads(stored)["schema_version"] == 2
    for version, said in ((1, "segbench entries migrate"), (3, "pip install -U segbench"), ("x", "pip install -U")):
        with pytest.raises(ContentError, match=f"f has schema version {version!r}; .*{said}"):
            from_bytes(parquet([ROW], metadata={**METADATA, "schema_version": version}), source="f")
