"""Pictures and masks from files, whatever their mode; every failure names the file and the mend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import BmpImagePlugin, Image, ImageOps, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from PIL.ImageFile import ImageFile

from segbench.data import matlab
from segbench.data.resizing import MAX_PIXELS
from segbench.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MAX_MAT_BYTES = 1_000_000  # those of SBD have a few thousand
ORIENTATION = 0x0112  # EXIF tag
SAMPLE_FORMAT, SIGNED = 339, 2  # TIFF tag, and its value for numbers with a sign
LOSSY = ("jpeg", "tiff_jpeg", "webp")  # compressions within a TIFF
STRETCHED = {"L;2": 85, "L;4": 17}  # Pillow spreads grey of 2 and 4 bits over 0..255

Pixels = npt.NDArray[np.uint8]


def read_image(path: Path) -> Image.Image:
    """A picture in RGB, 8 bits a channel, as stored; the first one of a file with several pictures.

    Grey, CMYK and palette pictures become RGB, of 16 bits the upper 8 count, transparency is left out.

    Raises:
        DataError: not an image, damaged, or too large.
    """
    with _opened(path, "image") as image:
        return _rgb(image, path)


def read_turned_image(path: Path) -> Image.Image:
    """Like `read_image`, turned as the EXIF orientation says, as viewers and labelling tools show it."""
    with _opened(path, "image") as image:
        image.load()
        return _rgb(ImageOps.exif_transpose(image) if is_turned(image) else image, path)


def read_size(path: Path) -> tuple[int, int]:
    """Height and width of a picture, without unpacking it.

    Raises:
        DataError: not an image, damaged, or too large.
    """
    with _opened(path, "image") as image:
        return image.height, image.width


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
        _refuse_lossy(image, path)
        if image.mode in ("RGB", "RGBA"):
            return _opaque(image, path)
        packing, labels = _packing(image), np.asarray(image)
        if labels.ndim != 2 or labels.dtype.kind not in "biu":
            raise DataError(
                f"The mask {path} is not a one-channel image of whole numbers (it is {image.mode}). "
                "Convert it to indexed PNG."
            )
        if stretch := STRETCHED.get(packing[:3]):
            return labels // stretch
        return labels.astype(np.uint8) if labels.dtype == np.bool_ else _signed(image, labels)


def read_colour_mask(path: Path) -> Pixels:
    """(H,W,3) uint8, of RGB files and of indexed ones through their palette.

    Raises:
        DataError: not a mask, damaged, or too large.
    """
    with _opened(path, "mask") as image:
        _refuse_lossy(image, path)
        if image.mode not in ("RGB", "RGBA", "P"):
            raise DataError(f"The mask {path} does not hold colours (it is {image.mode}). Take the colour-coded one.")
        return _opaque(image, path)


def _refuse_lossy(image: Image.Image, path: Path) -> None:
    if image.format in ("JPEG", "WEBP") or image.info.get("compression") in LOSSY:
        raise DataError(
            f"The mask {path} is compressed as a photograph ({image.format}), which changes labels. "
            "Take the original mask, as PNG without loss."
        )


def _opaque(image: Image.Image, path: Path) -> Pixels:
    if image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255):
        raise DataError(f"The mask {path} is partly transparent. Save it without transparency.")
    return np.asarray(_converted(image))


def _packing(image: Image.Image) -> str:
    """How the file packs its pixels, in Pillow's words; known until they are read."""
    arguments = image.tile[0][3] if isinstance(image, ImageFile) and image.tile else None
    return arguments[0] if isinstance(arguments, tuple) else str(arguments)


def _signed(image: Image.Image, labels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Numbers of a TIFF with the sign that it says, which Pillow forgets for 8 bits and invents for 32."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return labels
    kind = "i" if image.tag_v2.get(SAMPLE_FORMAT, (1,))[0] == SIGNED else "u"
    return labels if labels.dtype.kind == kind else labels.view(f"{kind}{labels.itemsize}")


def _rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        grey = (np.asarray(image) >> 8).astype(np.uint8)  # as Pillow does for 16-bit colours; here it might cut at 255
        return Image.fromarray(np.repeat(grey[..., None], 3, axis=2))
    if image.mode in ("I", "F"):
        raise DataError(
            f"The image {path} holds numbers without a known range (mode {image.mode}). Convert it to 8 or 16 bits."
        )
    return _converted(image)


def _converted(image: Image.Image) -> Image.Image:
    image.load()
    image.info.pop("transparency", None)  # Pillow would warn that it is lost
    return image if image.mode == "RGB" else image.convert("RGB")


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[Image.Image]:
    """The picture, its pixels not yet read."""
    try:
        with path.open("rb") as file, _picture(file) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width}x{image.height} pixels; {MAX_PIXELS} in all are allowed"
                raise DataError(_too_large(path, kind, size))
            yield image
    except DataError:
        raise
    except Exception as error:  # Pillow's readers raise anything on damaged files, SyntaxError among it
        raise DataError(f"Cannot read the {kind} {path}: {error}. Restore or convert the file.") from error


def _picture(file: IO[bytes]) -> ImageFile:
    """The reader for the first bytes, whatever the file's name.

    `Image.open` would warn of a large picture that is about to be refused, and knows formats that start programs.
    """
    readers: dict[bytes, type[ImageFile]] = {
        b"\x89PNG": PngImagePlugin.PngImageFile,
        b"\xff\xd8\xff": JpegImagePlugin.JpegImageFile,
        b"II": TiffImagePlugin.TiffImageFile,
        b"MM": TiffImagePlugin.TiffImageFile,
        b"BM": BmpImagePlugin.BmpImageFile,
        b"RIFF": WebPImagePlugin.WebPImageFile,
    }
    start = file.read(4)
    file.seek(0)
    for prefix, reader in readers.items():
        if start.startswith(prefix):
            return reader(file)
    raise ValueError("it is no PNG, JPEG, TIFF, BMP or WebP file" if start else "it is empty")


def _too_large(path: Path, kind: str, size: str) -> str:
    return (
        f"The {kind} {path} is too large ({size}): a damaged or malicious file. "
        "It was not unpacked. Remove it, or cut it into tiles."
    )


def _read_mat(path: Path) -> npt.NDArray[Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MAT_BYTES + 1)
        if len(data) > MAX_MAT_BYTES:
            raise DataError(_too_large(path, "mask", f"more than {MAX_MAT_BYTES} bytes"))
        return matlab.read_field(data, "GTcls", "Segmentation")
    except (OSError, ValueError) as error:
        raise DataError(
            f"Cannot read the mask {path}: {error} (expected is GTcls.Segmentation, as in SBD). Restore the file."
        ) from error
