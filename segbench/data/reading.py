"""Pictures and masks from files, whatever their mode; every failure names the file and the mend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from segbench.data.resizing import MAX_PIXELS
from segbench.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MAX_MAT_BYTES = 1_000_000  # those of SBD have a few thousand; a .mat file expands up to a thousandfold
ORIENTATION = 0x0112  # EXIF tag

Pixels = npt.NDArray[np.uint8]


def read_image(path: Path) -> Pixels:
    """(H,W,3) uint8, as stored. Grey, CMYK, palette and 16-bit pictures become RGB; transparency is left out.

    Raises:
        DataError: not an image, damaged, or too large.
    """
    with _opened(path, "image") as image:
        return _rgb(image, path)


def read_turned_image(path: Path) -> Pixels:
    """Like `read_image`, turned as the EXIF orientation says, as viewers and labelling tools show it."""
    with _opened(path, "image") as image:
        return _rgb(ImageOps.exif_transpose(image) if is_turned(image) else image, path)


def is_turned(image: Image.Image) -> bool:
    """Whether a picture carries an EXIF orientation that turns or mirrors it."""
    return image.getexif().get(ORIENTATION, 1) not in (0, 1)


def read_mask(path: Path) -> npt.NDArray[Any]:
    """(H,W) whole numbers as stored (a palette is not applied), or (H,W,3) uint8 if the file holds colours.

    A ``.mat`` file is read as one of SBD: ``GTcls.Segmentation``.

    Raises:
        DataError: not a mask, damaged, or too large.
    """
    if path.suffix.lower() == ".mat":
        return _read_mat(path)
    with _opened(path, "mask") as image:
        if image.format == "JPEG":
            raise DataError(
                f"The mask {path} is a JPEG, which changes labels. Take the original mask, as PNG without loss."
            )
        if image.mode in ("RGB", "RGBA"):
            return _opaque(image, path)
        labels = np.asarray(image)
        if labels.dtype == np.bool_:
            return labels.astype(np.uint8)
        if labels.ndim != 2 or labels.dtype.kind not in "iu":
            raise DataError(
                f"The mask {path} is not a one-channel image of whole numbers (it is {image.mode}). "
                "Convert it to indexed PNG."
            )
        return labels


def read_colour_mask(path: Path) -> Pixels:
    """(H,W,3) uint8, of RGB files and of indexed ones through their palette.

    Raises:
        DataError: not a mask, damaged, or too large.
    """
    with _opened(path, "mask") as image:
        if image.format == "JPEG":
            raise DataError(
                f"The mask {path} is a JPEG, which changes colours. Take the original mask, as PNG without loss."
            )
        if image.mode not in ("RGB", "RGBA", "P"):
            raise DataError(f"The mask {path} does not hold colours (it is {image.mode}). Take the colour-coded one.")
        return _opaque(image, path)


def _opaque(image: Image.Image, path: Path) -> Pixels:
    if image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255):
        raise DataError(f"The mask {path} is partly transparent. Save it without transparency.")
    return np.asarray(image.convert("RGB"))


def _rgb(image: Image.Image, path: Path) -> Pixels:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # 0..65535 to 0..255, rounded; Pillow would cut at 255
        grey = ((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise DataError(
            f"The image {path} holds numbers without a known range (mode {image.mode}). Convert it to 8 or 16 bits."
        )
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[Image.Image]:
    """The picture with its pixels read."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(_too_large(path, kind, f"{image.width}x{image.height} pixels"))
            image.load()
            yield image
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(_too_large(path, kind, str(error))) from error
    except Exception as error:  # Pillow's readers raise anything on damaged files, SyntaxError among it
        raise DataError(f"Cannot read the {kind} {path}: {error}. Restore or convert the file.") from error


def _too_large(path: Path, kind: str, size: str) -> str:
    return (
        f"The {kind} {path} is too large ({size}; {MAX_PIXELS} are allowed): a damaged or malicious file. "
        "It was not unpacked. Remove it, or cut it into tiles."
    )


def _read_mat(path: Path) -> npt.NDArray[Any]:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError("Masks in .mat files need scipy: pip install 'segbench[data]'") from error
    try:
        if path.stat().st_size > MAX_MAT_BYTES:
            raise DataError(_too_large(path, "mask", f"{path.stat().st_size} bytes"))
        labels = loadmat(path, mat_dtype=False)["GTcls"]["Segmentation"][0, 0]
    except DataError:
        raise
    except Exception as error:  # of damaged files anything
        raise DataError(
            f"Cannot read the mask {path}: {error} (expected is GTcls.Segmentation, as in SBD). Restore the file."
        ) from error
    if not isinstance(labels, np.ndarray) or labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise DataError(f"The mask {path} holds no two-dimensional whole numbers in GTcls.Segmentation. Restore it.")
    return labels
