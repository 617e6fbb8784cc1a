"""Rules of data sets for any input: sizes after resizing, labels against a plain loop, work in order in threads."""

from __future__ import annotations

import hashlib
import itertools
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from segbench.data.parallel import in_order
from segbench.data.protocols import LabelMap, spans, voc_colours
from segbench.data.resizing import Resized, ShortSide, ShortSideCrop
from segbench.errors import DataError

sides = st.integers(1, 90)
targets = st.integers(16, 64)


@settings(deadline=None)
@given(sides, sides, targets)
def test_every_shape_comes_to_the_size_of_the_rule(height, width, size):
    image, labels = Image.new("RGB", (width, height)), np.zeros((height, width), np.uint8)
    short, long = min(height, width), max(height, width)
    for rule, expected in (
        (ShortSideCrop(size), (size, size)),
        (Resized(size, 2 * size), (size, 2 * size)),
        (ShortSide(size), (size, size * long // short) if height <= width else (size * long // short, size)),
    ):
        assert rule.image(image).shape == (*expected, 3)
        assert rule.labels(labels).shape == expected


@settings(deadline=None, max_examples=20)
@given(st.integers(400, 10**6), st.booleans())
def test_extreme_shapes_are_refused(long, upright):
    shape = (long, 1) if upright else (1, long)
    for rule in (ShortSide(473), ShortSideCrop(473)):
        with pytest.raises(DataError, match=r"resized it would have .* Crop the picture"):
            rule.labels(np.zeros(shape, np.uint8))


@settings(deadline=None)
@given(st.integers(20, 60), st.integers(20, 60), st.integers(16, 20))
def test_the_crop_lies_in_the_middle(height, width, size):
    """Within a pixel: the same is cut off on both sides."""
    labels = np.arange(height * width).reshape(height, width).astype(np.uint8)
    whole, cropped = ShortSide(size).labels(labels), ShortSideCrop(size).labels(labels)
    top, left = (round((side - size) / 2) for side in whole.shape)
    assert (whole[top : top + size, left : left + size] == cropped).all()
    assert abs((whole.shape[0] - size - top) - top) <= 1
    assert abs((whole.shape[1] - size - left) - left) <= 1


@settings(deadline=None, max_examples=200)
@given(st.integers(16, 130), st.integers(16, 130), st.integers(16, 100), st.integers(0, 2**32 - 1))
def test_cutting_between_the_two_steps_of_resizing_changes_no_byte(height, width, size, seed):
    picture = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))
    whole = ShortSide(size).image(picture)
    top, left = (round((side - size) / 2) for side in whole.shape[:2])
    assert (ShortSideCrop(size).image(picture) == whole[top : top + size, left : left + size]).all()


def test_resizing_gives_the_bytes_of_all_versions_of_pillow_up_to_12():
    """The digest is that of one call of `Image.resize` in Pillow 10.1, 11.3 and 12.1; 13 differs for tall pictures."""
    rng, digest = np.random.default_rng(5), hashlib.sha256()
    for _ in range(300):
        height, width, size = (
            int(side) for side in (rng.integers(16, 130), rng.integers(16, 130), rng.integers(16, 100))
        )
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        digest.update(np.ascontiguousarray(ShortSide(size).image(picture)).data)
    assert digest.hexdigest()[:12] == "2f5066589b8f"


def plainly(values, mask):
    """The oracle: a dictionary and two loops; None for a number without meaning."""
    rows = [[values.get(number) for number in row] for row in mask]
    return None if any(label is None for row in rows for label in row) else rows


numbers = st.dictionaries(st.integers(0, 65535), st.integers(0, 255), min_size=1, max_size=9)


@settings(deadline=None, max_examples=60)
@given(numbers, st.data(), st.sampled_from(["u1", "<u2", ">u2", "i4", "u4"]))
def test_numbers_are_mapped_as_a_dictionary_does(values, data, kind):
    least, most = int(np.iinfo(kind).min), int(np.iinfo(kind).max)
    some = st.sampled_from(sorted(values)) | st.sampled_from([-1, 0, 7, 65536, most])
    mask = [data.draw(st.lists(some.filter(lambda number: least <= number <= most), min_size=1, max_size=6))]
    expected = plainly(values, mask)
    if expected is None:
        with pytest.raises(DataError, match="here: the mask has the label"):
            LabelMap(values).apply(np.array(mask, kind), "here")
    else:
        assert LabelMap(values).apply(np.array(mask, kind), "here").tolist() == expected


def test_the_mend_of_a_number_without_meaning_is_the_maps_own():
    for mask in (np.array([[9]], np.uint8), np.array([[9]], np.int32)):
        with pytest.raises(DataError, match=r"label 9; allowed are 1\. Correct the mask or the class list\.$"):
            LabelMap({1: 1}).apply(mask, "here")
        with pytest.raises(DataError, match=r"label 9; allowed are 1\. Ask the town\.$"):
            LabelMap({1: 1}, mend="Ask the town.").apply(mask, "here")


colours = st.tuples(*[st.integers(0, 255)] * 3)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(st.dictionaries(colours, st.integers(0, 255), min_size=1, max_size=9), st.data())
def test_colours_are_mapped_as_a_dictionary_does(values, data):
    mask = data.draw(st.lists(st.sampled_from(sorted(values)) | colours, min_size=1, max_size=6))
    wrong = [colour for colour in mask if colour not in values]
    pixels = np.array([mask], np.uint8)
    if wrong:
        with pytest.raises(DataError) as caught:
            LabelMap(colours=values).apply(pixels, "here")
        assert all("#{:02x}{:02x}{:02x}".format(*colour) in str(caught.value) for colour in wrong)
    else:
        assert LabelMap(colours=values).apply(pixels, "here").tolist() == [[values[colour] for colour in mask]]


@given(st.sets(st.integers(0, 300)))
def test_spans_say_exactly_the_numbers(values):
    said = []
    for part in filter(None, spans(list(values)).split(", ")):
        first, _, last = part.partition("..")
        said.append(range(int(first), int(last or first) + 1))
    assert [number for part in said for number in part] == sorted(values)
    assert all(after.start > before.stop for before, after in itertools.pairwise(said))  # none could be joined


def test_colours_of_the_development_kit():
    """As in its documentation; the last colour is void's."""
    found = voc_colours(256)
    assert found[:5] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128))
    assert (found[15], found[20], found[255]) == ((192, 128, 128), (0, 64, 128), (224, 224, 192))
    assert len(set(found)) == 256


@pytest.mark.parametrize("workers", [0, 1, 3, None])
def test_results_come_in_order(workers):
    def slow_at_first(number):
        time.sleep(0.01 if number < 3 else 0)
        return number * number

    assert list(in_order(slow_at_first, range(40), workers)) == [number * number for number in range(40)]
    assert list(in_order(slow_at_first, [], workers)) == []


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_exceptions_come_in_their_place(workers):
    def fails_at_five(number):
        if number >= 5:
            raise DataError(f"number {number}")
        time.sleep(0.005)
        return number

    seen = []
    with pytest.raises(DataError, match="number 5"):  # noqa: PT012 - what came before it counts
        for number in in_order(fails_at_five, range(20), workers):
            seen.append(number)
    assert seen == [0, 1, 2, 3, 4]


def test_threads_stop_when_the_consumer_breaks_off():
    called = []

    def work(number):
        called.append(number)
        time.sleep(0.002)
        return number

    results = in_order(work, range(1000), 3)
    assert [next(results), next(results)] == [0, 1]
    results.close()
    done = len(called)
    assert done <= 2 + 2 * 3 + 1
    time.sleep(0.02)
    assert len(called) == done
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("segbench-data")]
