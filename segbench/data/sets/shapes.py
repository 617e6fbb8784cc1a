"""``shapes``: procedurally drawn scenes, the data set that travels inside the package.

Objects of seven classes stand, overlap and are lit over a structured background. A class shows in three ways: its
outline (what a robust model must learn), its hue (shared by neighbouring classes, so it only helps) and a faint
fine texture (easy to learn and erased by a small perturbation). The validation images are stored and checksummed;
the training split is drawn from a seed.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib.resources import files

import numpy as np
import numpy.typing as npt

from segbench.data.dataset import SegmentationDataset
from segbench.data.protocols import voc_colours
from segbench.data.weights import COUNTED, inverse_frequency
from segbench.errors import DataError
from segbench.files import sha256_bytes

SIZE = 64
CLASS_NAMES = ("background", "disc", "square", "triangle", "ring", "cross", "star", "bar")
VALIDATION_SEED = 20261122
VALIDATION_IMAGES = 32
TRAINING_IMAGES = 4096
OBJECT = 48  # side of a crop around a single object in pixels
OBJECTS = {"train": (1, 8192), "val": (2, 512)}  # seed and number of crops
VALIDATION_SHA256 = "2f5247e7c6bb25d99cb7a69b264dafe624b5d338e4c338f3a104877bcb53777d"
# 1/N_c normalised to sum 1, N_c counted over the training split drawn from seed 0 (`class_weights_of_training`).
CLASS_WEIGHTS = (0.01127, 0.11515, 0.11780, 0.15096, 0.12637, 0.14061, 0.13569, 0.20216)

Array = npt.NDArray[np.float64]


def _disc(u: Array, v: Array) -> Array:
    return np.hypot(u, v) - 0.85


def _square(u: Array, v: Array) -> Array:
    distance: Array = np.maximum(np.abs(u), np.abs(v)) - 0.75
    return distance


def _triangle(u: Array, v: Array) -> Array:
    return np.maximum(np.abs(u) * 0.866 + v * 0.5, -v) - 0.58


def _ring(u: Array, v: Array) -> Array:
    return np.abs(np.hypot(u, v) - 0.72) - 0.24


def _cross(u: Array, v: Array) -> Array:
    distance: Array = np.minimum(
        np.maximum(np.abs(u) - 0.95, np.abs(v) - 0.28), np.maximum(np.abs(u) - 0.28, np.abs(v) - 0.95)
    )
    return distance


def _star(u: Array, v: Array) -> Array:
    angle = np.mod(np.arctan2(u, v), 2 * np.pi / 5) - np.pi / 5
    distance: Array = np.hypot(u, v) * (0.75 + 0.62 * (1 - np.abs(angle) / (np.pi / 5))) - 0.78
    return distance


def _bar(u: Array, v: Array) -> Array:
    return np.hypot(u - np.clip(u, -0.85, 0.85), v) - 0.3


OUTLINES: tuple[Callable[[Array, Array], Array], ...] = (_disc, _square, _triangle, _ring, _cross, _star, _bar)


def _hue(hue: float, saturation: float, value: float) -> Array:
    """An RGB colour from hue, saturation and value in [0,1]."""
    k = np.mod(np.array([5.0, 3.0, 1.0]) + 6 * hue, 6)
    colour: Array = value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)
    return colour


def _smooth_noise(rng: np.random.Generator, cells: int) -> Array:
    """(SIZE,SIZE) noise in [-1,1]: a random grid, interpolated bilinearly."""
    grid = rng.uniform(-1, 1, (cells + 1, cells + 1))
    position = np.linspace(0, cells, SIZE, endpoint=False)
    low = position.astype(int)
    part = position - low
    rows = grid[low] * (1 - part)[:, None] + grid[low + 1] * part[:, None]
    noise: Array = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    return noise


def _background(rng: np.random.Generator, x: Array, y: Array) -> Array:
    """(SIZE,SIZE,3): two surfaces that meet in a line, each with stripes and blotches."""
    image = np.empty((SIZE, SIZE, 3))
    slope, height = rng.uniform(-0.4, 0.4), rng.uniform(0.3, 0.7) * SIZE
    for side in (y < height + slope * (x - SIZE / 2), y >= height + slope * (x - SIZE / 2)):
        colour = _hue(rng.uniform(), rng.uniform(0.05, 0.35), rng.uniform(0.35, 0.75))
        angle, period = rng.uniform(0, np.pi), rng.uniform(5, 16)
        stripes = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period + rng.uniform(0, 6.28))
        surface = 1 + rng.uniform(0.0, 0.15) * stripes + 0.18 * _smooth_noise(rng, int(rng.integers(3, 9)))
        image[side] = (surface[..., None] * colour)[side]
    return image


def _add_object(
    rng: np.random.Generator, image: Array, x: Array, y: Array, kind: int, radius: float, angle: float, at: Array
) -> tuple[Array, Array]:
    """The image with an object of class ``kind + 1`` on it, and the signed distance to its outline in pixels."""
    u = ((x - at[0]) * np.cos(angle) + (y - at[1]) * np.sin(angle)) / radius
    v = ((y - at[1]) * np.cos(angle) - (x - at[0]) * np.sin(angle)) / radius
    distance = OUTLINES[kind](u, v) * radius
    cover = np.clip(0.5 - distance, 0, 1)
    colour = _hue(kind / len(OUTLINES) + rng.normal(0, 0.09), rng.uniform(0.35, 0.8), rng.uniform(0.45, 0.9))
    turn = np.pi * kind / len(OUTLINES)  # the texture's direction belongs to the class, not to the object's pose
    grain = np.sin(2 * np.pi * (x * np.cos(turn) + y * np.sin(turn)) / 3.2 + rng.uniform(0, 6.28))
    light = 1 + 0.25 * (u * rng.uniform(-1, 1) + v * rng.uniform(-1, 1)) + 0.05 * grain
    return image * (1 - cover[..., None]) + light[..., None] * colour * cover[..., None], distance


def _photographed(rng: np.random.Generator, image: Array, x: Array, y: Array) -> npt.NDArray[np.uint8]:
    """The scene under a lamp, with noise, in 8 bits."""
    lamp = np.hypot(x - rng.uniform(0, SIZE), y - rng.uniform(0, SIZE)) / SIZE
    image = image * (rng.uniform(0.95, 1.15) - rng.uniform(0.1, 0.4) * lamp)[..., None]
    image = image + rng.normal(0, 0.02, image.shape)
    pixels: npt.NDArray[np.uint8] = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return pixels


def draw_scene(seed: int, index: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """One scene: image (64,64,3) uint8 and label (64,64) uint8, a function of ``seed`` and ``index`` alone."""
    rng = np.random.default_rng([seed, index])
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64)
    image = _background(rng, x, y)
    label = np.zeros((SIZE, SIZE), np.uint8)
    for _ in range(int(rng.integers(3, 7))):
        kind = int(rng.integers(len(OUTLINES)))
        radius, angle = rng.uniform(10, 20), rng.uniform(0, 2 * np.pi)
        image, distance = _add_object(rng, image, x, y, kind, radius, angle, rng.uniform(6, SIZE - 6, 2))
        label[distance < 0] = kind + 1
    return _photographed(rng, image, x, y), label


def draw_object(seed: int, index: int) -> tuple[npt.NDArray[np.uint8], int]:
    """A crop around a single object: image (48,48,3) uint8 and its outline in 0..6."""
    rng = np.random.default_rng([seed, index, OBJECT])  # another stream than that of the scenes
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64)
    kind = int(rng.integers(len(OUTLINES)))
    radius, angle = rng.uniform(10, 20), rng.uniform(0, 2 * np.pi)
    at = SIZE / 2 + rng.uniform(-6, 6, 2)
    image, _ = _add_object(rng, _background(rng, x, y), x, y, kind, radius, angle, at)
    margin = (SIZE - OBJECT) // 2
    return _photographed(rng, image, x, y)[margin:-margin, margin:-margin], kind


def draw_split(seed: int, count: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """``count`` scenes: images (count,64,64,3) and labels (count,64,64), uint8."""
    scenes = [draw_scene(seed, index) for index in range(count)]
    return np.stack([image for image, _ in scenes]), np.stack([label for _, label in scenes])


def class_weights_of_training(seed: int = 0) -> npt.NDArray[np.float64]:
    """1/N_c of the training split, normalised to sum 1: how `CLASS_WEIGHTS` was computed."""
    pixels = np.zeros(len(CLASS_NAMES), np.int64)
    for index in range(TRAINING_IMAGES):
        pixels += np.bincount(draw_scene(seed, index)[1].ravel(), minlength=len(CLASS_NAMES))
    return inverse_frequency(pixels)


@lru_cache(maxsize=1)
def _stored_validation() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    data = (files("segbench.data") / "files" / "shapes_val.npz").read_bytes()
    if sha256_bytes(data) != VALIDATION_SHA256:
        raise DataError(
            "The stored images of 'shapes' are damaged (checksum). Mend: pip install --force-reinstall segbench"
        )
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        return archive["images"], archive["labels"]


@dataclass(frozen=True)
class _Scenes:
    """Images and labels (N,64,64,...) of a split; a class, so that the data set can be pickled."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]

    def read(self, image_id: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        return self.images[int(image_id)], self.labels[int(image_id)]


def _scene_weights() -> tuple[npt.NDArray[np.float64], str]:
    return np.array(CLASS_WEIGHTS), COUNTED


def load_shapes(split: str = "val", *, seed: int = 0, count: int = TRAINING_IMAGES) -> SegmentationDataset:
    """The data set.

    Args:
        split: ``val`` (32 stored images) or ``train`` (drawn from ``seed``).
        seed: of the training split.
        count: number of training images.

    Raises:
        DataError: unknown split, or damaged files.
    """
    if split == "val":
        images, labels = _stored_validation()
    elif split == "train":
        images, labels = draw_split(seed, count)
    else:
        raise DataError(f"'shapes' has the splits 'val' and 'train', not {split!r}.")
    return SegmentationDataset(
        id="shapes",
        split=split,
        class_names=CLASS_NAMES,
        image_ids=_ids(len(images)),
        read=_Scenes(images, labels).read,
        count_weights=_scene_weights,
        palette=voc_colours(len(CLASS_NAMES)),
    )


def load_objects(split: str = "val", *, count: int | None = None) -> SegmentationDataset:
    """Crops around single objects for training a classifier, the small stand-in for ImageNet; 7 classes.

    Each label map holds the object's class at every pixel. Other seeds than those of the scenes: no scene is seen.

    Args:
        split: ``train`` or ``val``.
        count: number of crops, if not all.

    Raises:
        DataError: unknown split.
    """
    if split not in OBJECTS:
        raise DataError(f"The objects of 'shapes' have the splits 'val' and 'train', not {split!r}.")
    seed, number = OBJECTS[split]
    return SegmentationDataset(
        id="shapes",
        split=split,
        class_names=CLASS_NAMES[1:],
        image_ids=_ids(count or number),
        read=partial(_object, seed),
        count_weights=_object_weights,
        palette=voc_colours(len(CLASS_NAMES))[1:],
    )


@cache  # each is drawn when it is first read
def _object(seed: int, image_id: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    pixels, kind = draw_object(seed, int(image_id))
    return pixels, np.full((OBJECT, OBJECT), kind, np.uint8)


def _object_weights() -> tuple[npt.NDArray[np.float64], str]:
    return np.full(len(OUTLINES), 1 / len(OUTLINES)), "all classes are drawn equally often"


def _ids(number: int) -> tuple[str, ...]:
    return tuple(f"{index:05d}" for index in range(number))
