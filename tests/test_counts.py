"""Counts against plain loops, the definitions and torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassJaccardIndex

from segbench.counts import Counts, count, merge
from segbench.errors import UsageError

IGNORE = 255


@st.composite
def batches(draw: st.DrawFn, min_images: int = 1) -> tuple[np.ndarray, np.ndarray, int]:
    """Predictions and labels (N,H,W), and K; from none to all of the pixels are ignored, some classes never occur."""
    n, h, w = draw(st.integers(min_images, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    num_classes = draw(st.integers(2, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    used = rng.choice(num_classes, size=draw(st.integers(1, num_classes)), replace=False)
    labels, predictions = rng.choice(used, (n, h, w)), rng.integers(0, num_classes, (n, h, w))
    share = draw(st.sampled_from([0.0, 0.1, 0.6, 1.0]))
    labels[rng.random(labels.shape) < share] = IGNORE
    predictions = np.where(rng.random(labels.shape) < 0.5, labels, predictions)
    predictions[predictions == IGNORE] = 0
    return predictions, labels, num_classes


def loops(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> Counts:
    result = Counts(*(np.zeros((len(labels), num_classes), np.int64) for _ in range(3)))
    for image in range(labels.shape[0]):
        for row in range(labels.shape[1]):
            for column in range(labels.shape[2]):
                label, prediction = labels[image, row, column], predictions[image, row, column]
                if label != IGNORE:
                    result.target[image, label] += 1
                    result.predicted[image, prediction] += 1
                    result.intersection[image, label] += label == prediction
    return result


def same(first: Counts, second: Counts) -> bool:
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@settings(deadline=None, max_examples=150)
@given(batches())
def test_count_equals_a_loop_over_pixels(batch: tuple[np.ndarray, np.ndarray, int]) -> None:
    assert same(count(*batch), loops(*batch))


@settings(deadline=None, max_examples=100)
@given(batches())
def test_scores_equal_their_definitions(batch: tuple[np.ndarray, np.ndarray, int]) -> None:
    predictions, labels, num_classes = batch
    found, valid = count(*batch), labels != IGNORE
    correct = (predictions == labels) & valid
    recalls, ious = [], []
    for c in range(num_classes):
        labelled, predicted = valid & (labels == c), valid & (predictions == c)
        if labelled.any():
            recalls.append((labelled & predicted).sum() / labelled.sum())
        if (labelled | predicted).any():
            ious.append((labelled & predicted).sum() / (labelled | predicted).sum())
    assert found.aacc() == pytest.approx(correct.sum() / valid.sum() if valid.any() else 0, abs=1e-12)
    assert found.macc() == pytest.approx(np.mean(recalls) if recalls else 0, abs=1e-12)
    assert found.miou() == pytest.approx(np.mean(ious) if ious else 0, abs=1e-12)
    assert found.correct.tolist() == correct.sum(axis=(1, 2)).tolist()
    assert np.isfinite(found.iou()).sum() == len(ious)


@settings(deadline=None, max_examples=100)
@given(batches())
def test_miou_equals_torchmetrics(batch: tuple[np.ndarray, np.ndarray, int]) -> None:
    """Torchmetrics leaves out classes without a pixel, too; without any valid pixel it gives NaN and we 0."""
    predictions, labels, num_classes = batch
    metric = MulticlassJaccardIndex(num_classes=num_classes, average="macro", ignore_index=IGNORE)
    expected = float(metric(torch.from_numpy(predictions), torch.from_numpy(labels)))
    expected = 0.0 if np.isnan(expected) else expected
    assert count(*batch).miou() == pytest.approx(expected, abs=1e-6)


def test_a_class_that_is_only_predicted_counts_as_zero_iou_but_not_in_macc() -> None:
    found = count(np.array([[[0, 2]]]), np.array([[[0, 0]]]), 3)
    assert found.miou() == pytest.approx((1 / 2 + 0) / 2)
    assert found.macc() == 0.5
    assert found.iou()[:1] == 0.5
    assert np.isnan(found.iou()[1])


@settings(deadline=None, max_examples=60)
@given(batches(min_images=2), st.data())
def test_batches_and_their_order_do_not_matter(batch: tuple[np.ndarray, np.ndarray, int], data: st.DataObject) -> None:
    predictions, labels, num_classes = batch
    whole = count(*batch)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(labels) - 1))))
    pieces = zip(np.split(predictions, cuts), np.split(labels, cuts), strict=True)
    parts = [count(p, y, num_classes) for p, y in pieces]
    assert same(merge(parts), whole)
    order = data.draw(st.permutations(range(len(labels))))
    shuffled = merge(whole.take(np.array([row])) for row in order)
    assert same(shuffled, whole.take(np.array(order)))
    assert (shuffled.aacc(), shuffled.macc(), shuffled.miou()) == (whole.aacc(), whole.macc(), whole.miou())


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_every_integer_type_gives_int64(dtype: type) -> None:
    found = count(np.array([[[1, 0]]], dtype), np.array([[[1, IGNORE]]], dtype), 2)
    assert all(array.dtype == np.int64 for array in found)
    assert found.target.tolist() == [[0, 1]]


def test_tensors_are_counted_like_arrays() -> None:
    predictions, labels = torch.tensor([[[1, 0]]]), torch.tensor([[[1, 1]]])
    assert same(count(predictions, labels, 2), count(predictions.numpy(), labels.numpy(), 2))


def test_the_ignored_label_may_be_a_class() -> None:
    found = count(np.array([[[0, 1, 1]]]), np.array([[[0, 1, 2]]]), 3, ignore_index=0)
    assert found.target.tolist() == [[0, 1, 1]]
    assert found.aacc() == 0.5


def test_predictions_on_ignored_pixels_may_be_anything() -> None:
    assert count(np.array([[[99, 1]]]), np.array([[[IGNORE, 1]]]), 2).aacc() == 1


def test_no_image_gives_no_rows() -> None:
    empty = np.zeros((0, 4, 4), np.int64)
    found = count(empty, empty, 3)
    assert (found.num_images, found.num_classes) == (0, 3)
    assert (found.aacc(), found.macc(), found.miou()) == (0, 0, 0)


@pytest.mark.parametrize(
    ("predictions", "labels", "said"),
    [
        (np.zeros((1, 2, 2), int), np.zeros((1, 2, 3), int), r"\(1, 2, 2\)"),
        (np.zeros((2, 2), int), np.zeros((2, 2), int), "N,H,W"),
        (np.zeros((1, 1, 1, 1), int), np.zeros((1, 1, 1, 1), int), "N,H,W"),
        (np.array([[[3]]]), np.array([[[0]]]), "predictions contain 3.*0..2"),
        (np.array([[[-1]]]), np.array([[[0]]]), "predictions contain -1"),
        (np.array([[[0]]]), np.array([[[3]]]), "labels contain 3"),
        (np.array([[[0]]]), np.array([[[-1]]]), "labels contain -1"),
        (np.array([[[0]]]), np.array([[[254]]]), "labels contain 254"),
        (np.array([[[0.7]]]), np.array([[[0]]]), "predictions.*float64.*integers"),
        (np.array([[[0]]]), np.array([[[np.nan]]]), "labels.*float64.*integers"),
    ],
)
def test_bad_input_is_refused(predictions: np.ndarray, labels: np.ndarray, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        count(predictions, labels, 3)


def test_merging_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="no counts"):
        merge([])


def test_merging_counts_of_other_classes_is_refused() -> None:
    one = np.zeros((1, 1, 1), np.int64)
    with pytest.raises(UsageError, match="classes"):
        merge([count(one, one, 2), count(one, one, 3)])
