"""Augmentation and batches: image and labels stay together; what is drawn depends on seed, epoch and place alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segbench.errors import DataError
from segbench.training.augmentation import augment, cut
from segbench.training.data import batches
from segbench.training.distributed import Processes
from tests.tiny import data, scenes, tiny

CPU = torch.device("cpu")
ALONE = Processes(CPU)
PLAIN = tiny(flip=0.0, blur=0.0, base=0, crop=0)


def rng(seed=0):
    return np.random.default_rng(seed)


def ramp(height, width):
    """Pixels that say where they were, and labels that say the same: row in red, column in green, both in the label."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows % 250 + 1, columns % 250 + 1, np.full_like(rows, 7)], axis=-1).astype(np.uint8)
    return pixels, ((rows * 7 + columns * 3) % 200).astype(np.uint8)


def label_of(pixels):
    """The label that a pixel of a ramp has."""
    return (7 * (pixels[..., 0].astype(int) - 1) + 3 * (pixels[..., 1].astype(int) - 1)) % 200


def test_a_recipe_without_augmentation_changes_nothing():
    pixels, labels = ramp(40, 50)
    found, their_labels = augment(pixels, labels, PLAIN, rng())
    assert np.array_equal(found, pixels)
    assert np.array_equal(their_labels, labels)


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(32, 64), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_windows_and_flips_keep_image_and_labels_together_and_ignore_what_they_add(height, width, crop, flip, seed):
    """Every pixel that comes from the image has its own label, every other one is black and ignored."""
    pixels, labels = augment(*ramp(height, width), replace(PLAIN, crop=crop, flip=flip), rng(seed))
    assert pixels.shape == (crop, crop, 3)
    assert labels.shape == (crop, crop)
    added = pixels[..., 2] == 0
    assert added.sum() == crop * crop - min(height, crop) * min(width, crop)
    assert (labels[added] == 255).all()
    assert (pixels[added] == 0).all()
    assert np.array_equal(labels[~added], label_of(pixels[~added]))
    if height >= crop and width >= crop:  # a window, mirrored or not: neighbours stay neighbours
        assert (np.diff(pixels[..., 0].astype(int), axis=0) == 1).all()
        assert len(np.unique(np.diff(pixels[..., 1].astype(int), axis=1))) == 1


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 80), st.integers(1, 80), st.integers(32, 96), st.integers(32, 48), st.floats(0.1, 2),
    st.floats(1, 3), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_views_of_any_image_have_the_size_of_the_crop(height, width, base, crop, low, factor, flip, blur, seed):
    recipe = replace(PLAIN, base=base, crop=crop, scale=(low, low * factor), flip=flip, blur=blur)
    pixels, labels = augment(*ramp(height, width), recipe, rng(seed))
    again, their_labels = augment(*ramp(height, width), recipe, rng(seed))
    assert (pixels.shape, pixels.dtype) == ((crop, crop, 3), np.uint8)
    assert labels.shape == (crop, crop)
    assert set(np.unique(labels)) <= {*range(200), 255}
    assert np.array_equal(pixels, again)
    assert np.array_equal(labels, their_labels)


def test_windows_reach_every_corner_of_the_image_and_no_further():
    pixels, labels = ramp(50, 60)
    last = np.nextafter(1, 0)
    for down, right, top, left in ((0, 0, 0, 0), (last, last, 18, 28), (0, last, 0, 28), (0.5, 0.5, 9, 14)):
        window, theirs = cut(pixels, labels, 32, down, right)
        assert np.array_equal(window, pixels[top : top + 32, left : left + 32])
        assert np.array_equal(theirs, labels[top : top + 32, left : left + 32])
    places = {tuple(augment(pixels, labels, replace(PLAIN, crop=32), rng(seed))[0][0, 0, :2]) for seed in range(4000)}
    assert len(places) == 19 * 29


def test_small_images_are_padded_at_the_right_and_below():
    pixels, labels = ramp(40, 20)
    window, theirs = cut(pixels, labels, 32, 0.999, 0.999)
    assert np.array_equal(window[:, :20], pixels[8:])
    assert (window[:, 20:] == 0).all()
    assert np.array_equal(theirs[:, :20], labels[8:])
    assert (theirs[:, 20:] == 255).all()


def test_the_short_side_takes_every_size_from_half_to_twice_the_base():
    """As `scale: [0.5, 2]` of the paper says: measured on how long a step of known length has become."""
    labels = np.zeros((60, 90), np.uint8)
    labels[:, 45:] = 1
    pixels = np.repeat(labels[..., None] * 200, 3, axis=-1)
    sizes = []
    for seed in range(800):
        recipe = replace(PLAIN, base=40, scale=(0.5, 2.0), crop=128)
        found, theirs = augment(pixels, labels, recipe, rng(seed))
        inside = theirs != 255
        height, width = inside.any(axis=1).sum(), inside.any(axis=0).sum()
        assert width == int(height * 90 / 60)
        ones = (theirs[0] == 1).sum()  # the step is still in the middle, in the image as in the labels
        assert abs(2 * ones - width) <= 1
        assert abs((found[0, :, 0] > 100).sum() - ones) <= 1
        sizes.append(height)
    assert set(sizes) == set(range(20, 81))
    assert np.mean(sizes) == pytest.approx(50, abs=2)
    assert {
        augment(pixels, labels, replace(PLAIN, base=40, scale=(1, 1), crop=40), rng(seed))[0].shape for seed in range(9)
    } == {(40, 40, 3)}


def test_labels_are_scaled_without_mixing_them():
    labels = np.array([[0, 7], [255, 3]], np.uint8).repeat(31, axis=0).repeat(37, axis=1)
    recipe = replace(PLAIN, base=50, crop=100, scale=(0.5, 2))
    for seed in range(30):
        _, found = augment(np.zeros((*labels.shape, 3), np.uint8), labels, recipe, rng(seed))
        assert set(np.unique(found)) <= {0, 3, 7, 255}


def test_flips_mirror_both_with_the_probability_of_the_recipe():
    pixels, labels = ramp(40, 50)
    flipped = 0
    for seed in range(400):
        found, theirs = augment(pixels, labels, replace(PLAIN, flip=0.3), rng(seed))
        turn = slice(None, None, -1) if found[0, 0, 1] != 1 else slice(None)
        flipped += turn.step is not None
        assert np.array_equal(found, pixels[:, turn])
        assert np.array_equal(theirs, labels[:, turn])
    assert flipped == pytest.approx(120, abs=40)
    always = augment(pixels, labels, replace(PLAIN, flip=1.0), rng())
    assert np.array_equal(always[0], pixels[:, ::-1])


def test_blur_changes_pixels_and_leaves_labels_alone():
    """Less contrast, the same brightness, and the strength is drawn."""
    pixels = rng(1).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    labels = ramp(40, 50)[1]
    contrasts = set()
    for seed in range(20):
        found, theirs = augment(pixels, labels, replace(PLAIN, blur=1.0), rng(seed))
        assert np.array_equal(theirs, labels)
        assert found.std() <= pixels.std()
        assert found.mean() == pytest.approx(pixels.mean(), abs=2)
        contrasts.add(round(float(found.std()), 1))
    assert len(contrasts) > 5
    assert min(contrasts) < 0.5 * pixels.std()
    blurred = sum(
        not np.array_equal(augment(pixels, labels, replace(PLAIN, blur=0.5), rng(seed))[0], pixels)
        for seed in range(400)
    )
    assert blurred == pytest.approx(200, abs=60)  # a very weak blur changes nothing


def test_views_are_a_function_of_the_generator_and_what_one_draws_does_not_change_another():
    """Switching one augmentation off leaves the draws of the others."""
    pixels, labels = ramp(80, 80)
    everything = replace(PLAIN, crop=40, flip=1.0)
    window = augment(pixels, labels, everything, rng(5))[1]
    assert np.array_equal(augment(pixels, labels, everything, rng(5))[1], window)
    assert np.array_equal(augment(pixels, labels, replace(everything, blur=1.0), rng(5))[1], window)
    assert np.array_equal(augment(pixels, labels, replace(everything, flip=0.0), rng(5))[1][:, ::-1], window)
    assert not np.array_equal(augment(pixels, labels, everything, rng(6))[1], window)


# Batches


VIEWS = {"crop": 40, "base": 64, "scale": [0.75, 1.5], "blur": 0.5, "batch_size": 4}


def all_of(recipe, epoch=0, processes=ALONE, first_step=0, source=None):
    return list(batches(source or data().train, recipe, epoch, processes, first_step))


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) for mine, yours in zip(ours, theirs, strict=True) for a, b in zip(mine, yours, strict=True)
    )


def test_batches_are_a_function_of_seed_and_epoch():
    recipe = tiny(**VIEWS)
    first = all_of(recipe)
    assert len(first) == 3
    assert first[0].images.shape == (4, 3, 40, 40)
    assert first[0].labels.shape == (4, 40, 40)
    assert first[0].images.dtype == first[0].labels.dtype == torch.uint8
    assert equal(first, all_of(recipe))
    assert not equal(first, all_of(recipe, epoch=1))
    assert not equal(first, all_of(replace(recipe, seed=1)))


def test_every_image_is_seen_once_an_epoch_in_another_order_each_time():
    source = data().train
    ids = {source.read(image_id)[0].tobytes(): image_id for image_id in source.image_ids}
    orders = [
        [
            ids[image.permute(1, 2, 0).numpy().tobytes()]
            for batch in all_of(PLAIN, epoch, source=source)
            for image in batch.images
        ]
        for epoch in range(4)
    ]
    assert all(sorted(order) == sorted(source.image_ids) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_images_that_fill_no_batch_wait_for_another_epoch():
    assert [len(batch.images) for batch in all_of(tiny(batch_size=5))] == [5, 5]


@pytest.mark.parametrize("world", [2, 4])
def test_batches_do_not_depend_on_how_they_are_divided_among_processes(world):
    """The shares of all processes, one after the other, are the batch of a single one: same images, same views."""
    recipe = tiny(**VIEWS)
    shares = [all_of(recipe, 3, Processes(CPU, rank, world)) for rank in range(world)]
    joined = [[torch.cat(parts) for parts in zip(*step, strict=True)] for step in zip(*shares, strict=True)]
    assert all(len(batch.images) == 4 // world for share in shares for batch in share)
    assert equal(joined, all_of(recipe, 3))


@pytest.mark.parametrize("first_step", [0, 1, 2, 3])
def test_batches_do_not_depend_on_the_step_at_which_a_run_continues(first_step):
    recipe = tiny(**VIEWS)
    assert equal(all_of(recipe, 2, first_step=first_step), all_of(recipe, 2)[first_step:])


def test_flips_and_windows_of_batches_keep_image_and_labels_together():
    base = scenes()
    source = replace(base, class_names=tuple(map(str, range(200))), read=lambda image_id: ramp(64, 64))
    for batch in all_of(tiny(crop=48), 3, source=source):
        for image, labels in zip(batch.images, batch.labels, strict=True):
            assert np.array_equal(labels.numpy(), label_of(image.permute(1, 2, 0).numpy()))


def test_images_of_several_sizes_need_a_crop():
    base = scenes()
    small = tuple(array[:40, :36] for array in base.read("00002"))
    mixed = replace(base, read=lambda name: small if name == "00002" else base.read(name))
    with pytest.raises(DataError, match=r"36x40 pixels \('00002'\) and 64x64 pixels .*--set crop=N"):
        all_of(tiny(), source=mixed)
    assert len(all_of(tiny(crop=48), source=mixed)) == 3


def test_images_too_small_for_the_architecture_need_a_crop():
    base = scenes()
    small = replace(base, read=lambda name: tuple(array[:31] for array in base.read(name)))
    with pytest.raises(DataError, match=r"32x32 pixels or more: '000\d\d'\. Give the recipe a crop"):
        all_of(tiny(), source=small)
    padded = all_of(tiny(crop=32, flip=0), source=small)[0]
    assert (padded.labels[:, 31] == 255).all()


def test_damaged_images_are_named():
    base = scenes()
    wrong = replace(base, read=lambda name: (base.read(name)[0], np.full((64, 64), 8, np.uint8)))
    with pytest.raises(DataError, match=r"shapes: '000\d\d': the mask has the label 8; allowed are 0\.\.7 and 255"):
        all_of(tiny(), source=wrong)


def test_the_blur_has_the_sigma_that_is_drawn():
    """Measured on an edge, whose derivative is the kernel: 0.1 to 1.1 pixels."""
    pixels = np.zeros((9, 41, 3), np.uint8)
    pixels[:, 20:] = 255
    place = np.arange(40) - 19  # of the edge
    for seed in range(30):
        drawn = 0.1 + rng(seed).uniform(size=6)[5]
        blurred, _ = augment(pixels, np.zeros((9, 41), np.uint8), replace(PLAIN, blur=1.0), rng(seed))
        kernel = np.diff(blurred[4, :, 0].astype(float)) / 255
        assert np.sqrt((kernel * place**2).sum()) == pytest.approx(drawn, abs=0.12)  # pixels have 8 bits
