"""Radii as users write them, and what the digest and the seeds of the random starts depend on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segbench.errors import UsageError
from segbench.protocol import OFFICIAL_RADII_255, PROTOCOLS, SEA_V1, SEA_V2, Threat, get_protocol, parse_eps


@pytest.mark.parametrize(
    ("values", "radii"),
    [
        (["8/255"], (8.0,)),
        ([8], (8.0,)),
        (["8"], (8.0,)),
        (["8", "8/255", 8.0], (8.0,)),
        (["0.25"], (0.25,)),
        ([0.25], (0.25,)),
        ([".5"], (0.5,)),
        (["0.25/255", 1], (0.25, 1.0)),
        ([255], (255.0,)),
        ([" 4 / 255 "], (4.0,)),
        ([12, 4, 8], (4.0, 8.0, 12.0)),
        ([1e-3], (1e-3,)),
        ([np.float32(0.5), np.int64(4)], (0.5, 4.0)),
    ],
)
def test_parse_eps(values: list[Any], radii: tuple[float, ...]) -> None:
    assert parse_eps(values) == radii
    assert all(type(eps) is float for eps in parse_eps(values))


@pytest.mark.parametrize(
    "value",
    [
        0, 0.0, "0", "0/255", "-0", -1, "-8", "-8/255", 256, 255.5, "256/255", "300", float("nan"), float("inf"), "nan",
        "inf", "-inf", "1e400", "1e999/255", "", " ", "eight", "8/256", "8/", "/255", "4 8", "4,8", "8/255/255", "0x8",
        "8%", 1e-5, 5e-324, None, True, "٨",
    ],
)  # fmt: skip
def test_parse_eps_refuses(value: Any) -> None:
    with pytest.raises(UsageError, match="ε must be above 0 and at most 255") as caught:
        parse_eps([4, value])
    assert repr(value) in str(caught.value)


def test_parse_eps_of_nothing() -> None:
    with pytest.raises(UsageError, match="at least one ε"):
        parse_eps([])


@given(st.lists(st.floats(0.001, 255), min_size=1, max_size=5))
def test_parse_eps_keeps_every_float(values: list[float]) -> None:
    assert parse_eps(values) == tuple(sorted(set(values)))
    assert parse_eps([f"{value!r}/255" for value in values]) == tuple(sorted(set(values)))


CHANGES: dict[str, Any] = {
    "name": "sea-v2",
    "threat": Threat("l2", "max", "1/255"),
    "losses": ("mce", "mce_bal", "js"),
    "iterations": 299,
    "schedule": "const",
    "seed": 226,
    "search_seed": 1,
    "search_orders": 9,
    "largest_margin": 20.0,
}


def test_every_field_changes_the_digest() -> None:
    assert CHANGES.keys() == {field.name for field in dataclasses.fields(SEA_V1)}
    digests = {dataclasses.replace(SEA_V1, **{field: value}).digest() for field, value in CHANGES.items()}
    for change in ({"kind": "l2"}, {"measure": "mean"}, {"unit": "1"}):
        digests.add(dataclasses.replace(SEA_V1, threat=dataclasses.replace(SEA_V1.threat, **change)).digest())
    assert len(digests) == len(CHANGES) + 2  # one threat is in both
    assert SEA_V1.digest() not in digests
    assert dataclasses.replace(SEA_V1).digest() == SEA_V1.digest()


def test_the_published_protocol_never_changes() -> None:
    """Entries state this digest; a change needs a protocol of another name."""
    assert SEA_V1.digest() == "8896f131e88bb70fb245d5967a55cea5a561ec4186fd0ee58763496bdf8852a6"
    assert SEA_V2.digest() == "3e5b3b4e7bade7e7014a29cea32fea3c0bf19f0a9431829fb9c47b3feab5c9ed"
    assert OFFICIAL_RADII_255 == (4, 8, 12)


def test_a_protocol_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SEA_V1.iterations = 1  # type: ignore[misc]


seeds = st.integers(0, 2**63 - 1)
radii = st.floats(0, 255, exclude_min=True)


@given(seeds, st.text(), st.sampled_from(SEA_V1.losses), radii)
def test_a_start_seed_is_a_function_of_its_four_inputs(seed: int, image_id: str, loss: str, eps: float) -> None:
    protocol = dataclasses.replace(SEA_V1, seed=seed)
    found = protocol.start_seed(image_id, loss, eps)
    assert 0 <= found <= 2**63 - 1
    others = {field: value for field, value in CHANGES.items() if field != "seed"}
    assert dataclasses.replace(protocol, **others).start_seed(image_id, loss, eps) == found


def test_each_input_changes_the_start_seed() -> None:
    found = {
        dataclasses.replace(SEA_V1, seed=seed).start_seed(image_id, loss, eps)
        for seed in (0, 1, 225)
        for image_id in ("a", "b", "a1", "", "a,b", '"')
        for loss in SEA_V1.losses
        for eps in (0.25, 2.5, 4.0, 8.0)
    }
    assert len(found) == 3 * 6 * 3 * 4
    assert SEA_V1.start_seed("a", "mce", 8) == SEA_V1.start_seed("a", "mce", 8.0)


def test_start_seeds_of_published_entries_never_change() -> None:
    assert SEA_V1.start_seed("image", "mce_bal", 8.0) == 8054323736372188343


def test_get_protocol() -> None:
    assert get_protocol("sea-v1") is SEA_V1
    assert get_protocol("sea-v2") is SEA_V2
    with pytest.raises(UsageError, match=r"Unknown protocol 'sea-v3'\. Did you mean 'sea-v"):
        get_protocol("sea-v3")
    assert all(name == protocol.name for name, protocol in PROTOCOLS.items())


def test_the_documentation_states_the_largest_margin_of_sea_v2() -> None:
    docs = Path(__file__).resolve().parents[1] / "docs"
    for page in ("protocol.md", "attacks.md"):
        text = (docs / page).read_text("utf-8")
        assert f"m = {SEA_V2.largest_margin:g}" in text
        assert "m = 40" not in text
