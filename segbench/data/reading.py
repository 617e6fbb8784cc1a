"""Pictures and masks from files, whatever their mode; every failure names the file and the mend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import BmpImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from PIL.ImageFile import ImageFile

from segbench.data import matlab
from segbench.data.problems import numbers_error
from segbench.data.resizing import MAX_PIXELS
from segbench.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MAX_MAT_BYTES = 1_000_000  # those of SBD have a few thousand
ORIENTATION = 0x0112  # EXIF tag
TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SAMPLE_FORMAT, SIGNED = 339, 2  # TIFF tag, and its value for numbers with a sign
LOSSY = ("jpeg", "tiff_jpeg", "webp")  # compressions within a TIFF
DEEP_BITS = 16  # of a channel, the most that pictures have
DARK_BITS = 14  # a picture of 16 bits whose numbers fit in these is at most a quarter as bright as white
STRETCHED = {"L;2": 85, "L;4": 17}  # Pillow spreads grey of 2 and 4 bits over 0..255

Pixels = npt.NDArray[np.uint8]


def read_image(path: Path, bits: int | None = None) -> Image.Image:
    """A picture in RGB, 8 bits a channel, as stored; the first one of a file with several pictures.

    Grey, CMYK and palette pictures become RGB, of 16 bits the upper 8 count, transparency is left out.

    Args:
        path: the file.
        bits: of the numbers in pictures of 16 bits. None for 16; then pictures that would be almost black are refused,
            because their numbers may have fewer. What they have is never guessed: pictures of a data set would differ.

    Raises:
        DataError: not an image, damaged, or too large; numbers of other than ``bits`` bits.
    """
    with _opened(path, "image") as image:
        return _rgb(image, path, bits)


def read_turned_image(path: Path, bits: int | None = None) -> Image.Image:
    """Like `read_image`, turned as the EXIF orientation says, as viewers and labelling tools show it."""
    with _opened(path, "image") as image:
        picture = _rgb(image, path, bits)
        turn = TRANSPOSED.get(orientation(image) or 1)
        return picture if turn is None else picture.transpose(turn)


def read_size(path: Path) -> tuple[int, int]:
    """Height and width of a picture, without unpacking it.

    Raises:
        DataError: not an image, damaged, or too large.
    """
    with _opened(path, "image") as image:
        return image.height, image.width


def orientation(image: Image.Image) -> int | None:
    """The EXIF orientation of a picture, 1 to 8; 1 (as stored) if it has none, None if its EXIF cannot be read."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - Pillow raises anything on damaged EXIF; the pixels may be sound
        return None
    return found if found in TRANSPOSED else 1


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


def _rgb(image: Image.Image, path: Path, bits: int | None) -> Image.Image:
    packing = _packing(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return _grey(image, path, 12 if packing == "I;12" else bits)  # such a TIFF says how many bits it has
    if image.mode in ("I", "F"):
        raise DataError(
            f"The image {path} holds numbers without a known range (mode {image.mode}). Convert it to 8 or 16 bits."
        )
    picture = _converted(image)
    if ";16" in packing and image.format in ("PNG", "TIFF"):
        _check_colours(picture, path, bits)
    return picture


def _grey(image: Image.Image, path: Path, bits: int | None) -> Image.Image:
    numbers = np.asarray(image)
    largest = int(numbers.max())
    if bits is None and 0 < largest < 1 << DARK_BITS:  # black is black in any number of bits
        raise numbers_error(f"The image {path}", "dark", [largest], _about_dark)
    if bits is not None and largest >= 1 << bits:
        raise numbers_error(f"The image {path}", "bright", [largest], partial(_about_bright, bits=bits))
    # the upper 8 bits, as Pillow takes them of 16-bit colours
    grey = (numbers >> ((bits or DEEP_BITS) - 8)).astype(np.uint8)
    return Image.fromarray(np.repeat(grey[..., None], 3, axis=2))


def _check_colours(picture: Image.Image, path: Path, bits: int | None) -> None:
    """Refuses colours of 16 bits, of which Pillow has kept the upper 8, if their numbers have fewer bits."""
    if bits not in (None, DEEP_BITS):
        raise DataError(
            f"The image {path} has colours of {DEEP_BITS} bits, of which only the upper 8 can be read, but the data "
            f"set has numbers of {bits} bits. Convert it to 8 bits."
        )
    largest = (int(np.asarray(picture).max()) << 8) + 255
    if bits is None and largest < 1 << DARK_BITS:
        raise numbers_error(f"The image {path}", "dark colours", [largest], _about_dark_colours)


def _about_dark(numbers: Sequence[int]) -> str:
    fitting = next(bits for bits in (8, 10, 12, DARK_BITS) if max(numbers) < 1 << bits)
    return (
        f"{DEEP_BITS} bits a channel, but the largest number is {max(numbers)}: it would be almost black. If its "
        "numbers have fewer bits, convert it to 8 bits, or say how many in a dataset.yaml (which lists the classes, "
        f"too), e.g. bits: {fitting}. If it is that dark: bits: {DEEP_BITS}"
    )


def _about_dark_colours(numbers: Sequence[int]) -> str:
    return (
        f"{DEEP_BITS} bits a channel, but no number above {max(numbers)}: it would be almost black. If its numbers "
        f"have fewer bits, convert it to 8 bits. If it is that dark, say so in dataset.yaml: bits: {DEEP_BITS}"
    )


def _about_bright(numbers: Sequence[int], *, bits: int) -> str:
    return (
        f"the number {max(numbers)} has more than the {bits} bits that the data set has. Correct bits in dataset.yaml, "
        "or convert the picture."
    )


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
