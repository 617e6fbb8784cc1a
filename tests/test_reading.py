"""Pictures and masks in every mode that files have: the right numbers, or a refusal that names the file."""

from __future__ import annotations

import resource
import struct
import sys
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.io
import scipy.sparse
from PIL import Image

from segbench.data import reading
from segbench.data.protocols import as_stored
from segbench.data.resizing import ShortSideCrop
from segbench.errors import DataError
from tests.pictures import COLOUR, GREY, INDEXED, png, tiff

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (5, 7, 3), np.uint8)
LABELS = RNG.integers(0, 21, (5, 7)).astype(np.uint8)
PALETTE = RNG.integers(0, 256, (256, 3), np.uint8)


@pytest.fixture(autouse=True)
def _no_warnings():
    """What Pillow warns of is refused or meant."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def as_read(path):
    return np.asarray(reading.read_image(path))


def indexed(labels=LABELS):
    image = Image.fromarray(labels)
    image.putpalette(PALETTE.tobytes())
    return image


# Pictures


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp", ".jpg"])
def test_colours_are_read_as_stored(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(COLOURS).save(path, **({"lossless": True} if suffix == ".webp" else {}))
    with Image.open(path) as image:
        expected = np.asarray(image) if suffix == ".jpg" else COLOURS
    assert (as_read(path) == expected).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGBA", "P", "P with transparency"])
def test_other_modes_become_rgb_without_transparency(tmp_path, mode):
    path, grey, alpha = tmp_path / "a.png", COLOURS[..., 0], COLOURS[..., 1]
    if mode == "1":
        Image.fromarray(grey > 99).save(path)
        expected = np.where(grey > 99, 255, 0)[..., None]
    elif mode == "L":
        Image.fromarray(grey).save(path)
        expected = grey[..., None]
    elif mode == "LA":
        Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]).save(path)
        expected = grey[..., None]
    elif mode == "RGBA":
        Image.fromarray(np.dstack([COLOURS, alpha])).save(path)
        expected = COLOURS
    else:
        indexed().save(path, **({"transparency": bytes(range(256))} if "with" in mode else {}))
        expected = PALETTE[LABELS]
    found = as_read(path)
    assert found.shape == (5, 7, 3)
    assert (found == expected).all()


def test_cmyk_of_print_shops_becomes_rgb(tmp_path):
    """Photoshop stores the inks inverted, and says so in a marker."""
    Image.new("CMYK", (16, 16), (200, 100, 30, 40)).save(tmp_path / "a.jpg")
    assert b"Adobe" in (tmp_path / "a.jpg").read_bytes()
    expected = [(255 - ink) * (255 - 40) / 255 for ink in (200, 100, 30)]
    assert np.abs(as_read(tmp_path / "a.jpg") - np.array(expected)).max() < 3


def grey_of_16_bits(folder, values, kind="png"):
    path = folder / f"a.{kind[:3]}"
    path.write_bytes(
        png([row.astype(">u2").tobytes() for row in values], values.shape[1], 16, GREY)
        if kind == "png"
        else tiff(values.astype(">u2" if "big" in kind else "<u2"))
    )
    return path


@pytest.mark.parametrize("kind", ["png", "tif", "tif, big-endian"])
def test_grey_of_16_bits_is_scaled_not_cut(tmp_path, kind):
    values = np.array([[0, 255, 256, 300], [0x8000, 0xFEFF, 0xFF00, 0xFFFF]], np.uint16)
    path = grey_of_16_bits(tmp_path, values, kind)
    assert as_read(path)[..., 1].tolist() == [[0, 0, 1, 1], [128, 254, 255, 255]]
    assert (reading.read_mask(path) == values).all()


def test_colours_of_16_bits_are_scaled_likewise(tmp_path):
    values = RNG.integers(0, 1 << 16, (5, 7, 3)).astype(">u2")
    (tmp_path / "a.png").write_bytes(png([row.tobytes() for row in values], 7, 16, COLOUR))
    assert (as_read(tmp_path / "a.png") == values // 256).all()


@pytest.mark.parametrize("read", [reading.read_image, reading.read_turned_image])
@pytest.mark.parametrize("kind", ["png", "tif", "tif, big-endian"])
@pytest.mark.parametrize(("bits", "largest"), [(8, 255), (12, 4095), (14, 16383)])
def test_grey_of_16_bits_with_smaller_numbers_is_refused_until_their_bits_are_said(tmp_path, read, kind, bits, largest):
    path = grey_of_16_bits(tmp_path, np.array([[0, largest // 2, largest]]), kind)
    with pytest.raises(DataError, match=rf"a\.{kind[:3]}: 16 bits .* number is {largest}: .*e\.g\. bits: {bits}\."):
        read(path)
    assert np.asarray(read(path, bits))[0, :, 0].tolist() == [0, 127, 255]
    assert np.asarray(read(path, 16))[0, :, 0].tolist() == [0, largest // 2 >> 8, largest >> 8]  # as dark as it is
    with pytest.raises(DataError, match=rf"the number {largest} has more than the {bits - 1} bits"):
        read(path, bits - 1)


def test_a_picture_of_16_bits_is_as_bright_as_it_is_from_a_quarter_on(tmp_path):
    assert as_read(grey_of_16_bits(tmp_path, np.array([[0, 1 << 14]])))[0, :, 0].tolist() == [0, 64]


def test_a_tiff_that_says_12_bits_is_read_so(tmp_path):
    packed = bytes([0xFF, 0xF8, 0x00])  # 4095, 2048
    values = np.frombuffer(packed + b"\0", np.uint8)[None]
    data = tiff(values, width=2).replace(
        struct.pack("<HHIHH", 258, 3, 1, 8, 0), struct.pack("<HHIHH", 258, 3, 1, 12, 0)
    )
    (tmp_path / "a.tif").write_bytes(data)
    assert as_read(tmp_path / "a.tif")[0, :, 0].tolist() == [255, 128]


@pytest.mark.parametrize("largest", [255, 4095])
def test_colours_of_16_bits_with_smaller_numbers_are_refused(tmp_path, largest):
    values = RNG.integers(0, largest + 1, (5, 7, 3)).astype(">u2")
    values[0, 0] = largest
    path = tmp_path / "a.png"
    path.write_bytes(png([row.tobytes() for row in values], 7, 16, COLOUR))
    with pytest.raises(DataError, match=rf"no number above {largest}: .*convert it to 8 bits"):
        as_read(path)
    assert (np.asarray(reading.read_image(path, 16)) == values // 256).all()
    with pytest.raises(DataError, match=r"only the upper 8 can be read, .* 12 bits\. Convert it to 8 bits"):
        reading.read_image(path, 12)


TAGS = {"garbage": b"garbage garbage", "nothing": b""}
# orientation 6, and a resolution of -1/0 as a rational with sign
RATIONAL = b"II*\0" + struct.pack("<IHHHIHHHHIIIii", 8, 2, 0x0112, 3, 1, 6, 0, 0x011A, 10, 1, 38, 0, -1, 0)


@pytest.mark.parametrize("read", [reading.read_image, reading.read_turned_image])
@pytest.mark.parametrize("exif", TAGS)
def test_pictures_with_damaged_exif_are_read_as_stored(tmp_path, read, exif):
    (tmp_path / "a.png").write_bytes(with_exif(TAGS[exif]))
    Image.fromarray(COLOURS).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + TAGS[exif])
    assert (np.asarray(read(tmp_path / "a.png")) == COLOURS).all()
    assert read(tmp_path / "a.jpg").size == COLOURS.shape[1::-1]


def test_a_senseless_rational_hides_no_orientation(tmp_path):
    (tmp_path / "a.png").write_bytes(with_exif(RATIONAL))
    assert (np.asarray(reading.read_turned_image(tmp_path / "a.png")) == AS_SEEN[6](COLOURS)).all()


def with_exif(content: bytes) -> bytes:
    whole = png([row.tobytes() for row in COLOURS], COLOURS.shape[1], 8, COLOUR)
    place = whole.index(b"IDAT") - 4
    checksum = struct.pack(">I", zlib.crc32(b"eXIf" + content))
    return whole[:place] + struct.pack(">I", len(content)) + b"eXIf" + content + checksum + whole[place:]


@pytest.mark.parametrize("kind", ["f4", "i4", "u4", "i2"])
def test_numbers_without_a_range_are_no_picture(tmp_path, kind):
    (tmp_path / "a.tif").write_bytes(tiff(np.zeros((3, 4), kind)))
    with pytest.raises(DataError, match=r"a\.tif holds numbers without a known range .*Convert it"):
        as_read(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", [".tif", ".png", ".webp"])
def test_of_several_pictures_the_first_is_read(tmp_path, suffix):
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200)]
    exact = {"lossless": True} if suffix == ".webp" else {}
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], **exact)
    with Image.open(tmp_path / f"a{suffix}") as image:
        assert image.n_frames == 2
    assert (as_read(tmp_path / f"a{suffix}") == 10).all()


def test_a_telephone_s_double_picture_is_its_first(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "MPO"
        assert (as_read(tmp_path / "a.jpg") == np.asarray(image)).all()
    with pytest.raises(DataError, match="compressed as a photograph"):
        reading.read_mask(tmp_path / "a.jpg")


AS_SEEN = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: np.rot90(stored, 2),
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored),
}


@pytest.mark.parametrize("orientation", AS_SEEN)
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_pictures_are_turned_as_viewers_do_where_that_is_asked(tmp_path, orientation, suffix):
    path, exif = tmp_path / f"a{suffix}", Image.Exif()
    exif[reading.ORIENTATION] = orientation
    Image.fromarray(COLOURS).save(path, exif=exif)
    stored = as_read(path)
    if suffix == ".png":
        assert (stored == COLOURS).all()
    assert (np.asarray(reading.read_turned_image(path)) == AS_SEEN[orientation](stored)).all()
    with Image.open(path) as image:
        assert reading.orientation(image) == orientation


def test_a_senseless_orientation_turns_nothing(tmp_path):
    exif = Image.Exif()
    exif[reading.ORIENTATION] = 77
    Image.fromarray(COLOURS).save(tmp_path / "a.png", exif=exif)
    assert (np.asarray(reading.read_turned_image(tmp_path / "a.png")) == COLOURS).all()


def test_the_content_counts_and_not_the_name(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert (as_read(tmp_path / "a.jpg") == COLOURS).all()
    for content, said in ((b"%!PS-Adobe-3.0 EPSF-3.0\n", "it is no PNG, JPEG"), (b"", "it is empty")):
        (tmp_path / "b.png").write_bytes(content)
        with pytest.raises(DataError, match=rf"Cannot read the image .*b\.png: {said}"):
            as_read(tmp_path / "b.png")


# Masks


@pytest.mark.parametrize(
    "kind", ["indexed", "indexed, transparent", "grey", "16 bits", "32 bits", "bmp", "deflated tif"]
)
def test_labels_are_read_as_stored(tmp_path, kind):
    path = tmp_path / ("a.png" if kind in ("indexed", "indexed, transparent", "grey", "16 bits") else "a.tif")
    labels = LABELS.copy()
    labels[0, 0] = 255
    if kind.startswith("indexed"):
        indexed(labels).save(path, **({"transparency": 3} if "," in kind else {}))
    elif "bits" in kind:
        Image.fromarray(labels.astype({"1": np.uint16, "3": np.int32}[kind[0]])).save(path)
    elif kind == "bmp":
        Image.fromarray(labels).save(path := tmp_path / "a.bmp")
    else:
        Image.fromarray(labels).save(path, **({"compression": "tiff_adobe_deflate"} if "tif" in kind else {}))
    found = reading.read_mask(path)
    assert (found == labels).all()
    assert (as_stored(21).apply(found, "a") == labels).all()


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("colour_type", [GREY, INDEXED])
def test_labels_of_few_bits_are_not_stretched(tmp_path, depth, colour_type):
    """Pillow spreads grey of 2 and 4 bits over 0..255: label 1 would become 85 or 17, the last one 255."""
    values = np.arange(8) % (1 << depth)
    bits = "".join(f"{value:0{depth}b}" for value in values)
    row = int(bits, 2).to_bytes(depth, "big")
    palette = PALETTE[: 1 << depth].tobytes() if colour_type == INDEXED else b""
    (tmp_path / "a.png").write_bytes(png([row, row], 8, depth, colour_type, palette))
    assert reading.read_mask(tmp_path / "a.png").tolist() == [values.tolist()] * 2


@pytest.mark.parametrize(
    ("kind", "value"),
    [("i1", -1), ("<i2", -2), (">i2", -3), ("<i4", -1), ("<u4", 70000), ("<u4", 4294967295), ("<u2", 300)],
)
def test_impossible_labels_are_refused_with_their_value(tmp_path, kind, value):
    (tmp_path / "a.tif").write_bytes(tiff(np.array([[0, 1, value]], kind)))
    found = reading.read_mask(tmp_path / "a.tif")
    assert found.tolist() == [[0, 1, value]]
    with pytest.raises(
        DataError, match=rf"here: the mask has the label {value}; allowed are 0\.\.20 and 255 \(ignored\)"
    ):
        as_stored(21).apply(found, "here")


@pytest.mark.parametrize("kind", ["f4", "f8"])
def test_fractions_are_no_labels(tmp_path, kind):
    (tmp_path / "a.tif").write_bytes(tiff(np.zeros((3, 4), kind)))
    with pytest.raises(DataError, match=r"[Tt]he mask .*a\.tif"):
        reading.read_mask(tmp_path / "a.tif")


@pytest.mark.parametrize("read", [reading.read_mask, reading.read_colour_mask])
def test_colours_of_masks(tmp_path, read):
    Image.fromarray(COLOURS).save(tmp_path / "rgb.png")
    assert (read(tmp_path / "rgb.png") == COLOURS).all()
    alpha = np.full((5, 7), 255, np.uint8)
    Image.fromarray(np.dstack([COLOURS, alpha])).save(tmp_path / "rgba.png")
    assert (read(tmp_path / "rgba.png") == COLOURS).all()
    alpha[2, 3] = 254
    Image.fromarray(np.dstack([COLOURS, alpha])).save(tmp_path / "rgba.png")
    with pytest.raises(DataError, match=r"rgba\.png is partly transparent. Save it without"):
        read(tmp_path / "rgba.png")


def test_colours_of_indexed_masks_come_from_the_palette(tmp_path):
    indexed().save(tmp_path / "a.png", transparency=bytes(range(256)))
    assert (reading.read_colour_mask(tmp_path / "a.png") == PALETTE[LABELS]).all()
    Image.fromarray(LABELS).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"does not hold colours \(it is L\)"):
        reading.read_colour_mask(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("read", [reading.read_mask, reading.read_colour_mask])
def test_masks_that_were_compressed_as_photographs_are_refused(tmp_path, suffix, read):
    compression = {"compression": "jpeg"} if suffix == ".tif" else {}
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / f"a{suffix}", **compression)
    with pytest.raises(DataError, match=rf"a{suffix} is compressed as a photograph .* PNG without loss"):
        read(tmp_path / f"a{suffix}")


def test_grey_with_transparency_is_no_mask(tmp_path):
    Image.new("LA", (4, 3), (1, 255)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"not a one-channel image of whole numbers \(it is LA\)"):
        reading.read_mask(tmp_path / "a.png")


# Masks of SBD


def sbd(labels, **others):
    boundaries = np.empty((20, 1), object)
    for index in range(20):
        boundaries[index, 0] = scipy.sparse.csc_matrix((labels == index).astype(float))
    fields = {"Boundaries": boundaries, "Segmentation": labels, "CategoriesPresent": np.unique(labels)[:, None]}
    return {"GTcls": fields | others}


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("shape", [(30, 50), (2, 1)])
def test_sbd_as_distributed(tmp_path, compressed, shape):
    labels = RNG.integers(0, 21, shape).astype(np.uint8)
    scipy.io.savemat(tmp_path / "a.mat", {"before": 1} | sbd(labels), do_compression=compressed)
    assert (reading.read_mask(tmp_path / "a.mat") == labels).all()


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"other": LABELS}, "it has no struct GTcls"),
        ({"GTcls": LABELS}, "it has no struct GTcls"),
        ({"GTcls": {"Boundaries": 1}}, "GTcls has no field Segmentation"),
        (sbd(LABELS, Segmentation=LABELS + 0.5), "it holds no two-dimensional whole numbers"),
        (sbd(LABELS, Segmentation="abc"), "it holds no two-dimensional whole numbers"),
        (sbd(LABELS, Segmentation={"a": 1}), "it holds no two-dimensional whole numbers"),
        (
            sbd(LABELS, Segmentation=scipy.sparse.csc_matrix(LABELS.astype(float))),
            "it holds no two-dimensional whole numbers",
        ),
        (sbd(LABELS, Segmentation=np.zeros((2, 2, 2), np.uint8)), "it holds no two-dimensional whole numbers"),
    ],
)
def test_mat_files_of_other_content_are_refused(tmp_path, content, said, compressed):
    scipy.io.savemat(tmp_path / "a.mat", content, do_compression=compressed)
    with pytest.raises(DataError, match=rf"a\.mat: {said}.* \(expected is GTcls\.Segmentation, as in SBD\)"):
        reading.read_mask(tmp_path / "a.mat")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no MATLAB file"),
        (b"<html>" * 99, "no MATLAB file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(999), "MATLAB 7.3"),
        (b"MATLAB 7.3 MAT-file".ljust(512) + b"\x89HDF\r\n\x1a\n" + bytes(999), "MATLAB 7.3"),
        (bytes(1_000_001), "too large"),
        (None, "No such file"),
    ],
)
def test_files_that_are_not_mat_files_are_refused(tmp_path, content, said):
    if content is not None:
        (tmp_path / "a.mat").write_bytes(content)
    with pytest.raises(DataError, match=f"a.mat.*{said}"):
        reading.read_mask(tmp_path / "a.mat")


@pytest.mark.parametrize("compressed", [True, False])
def test_damaged_mat_files_never_raise_anything_but_a_data_error(tmp_path, compressed):
    path = tmp_path / "a.mat"
    scipy.io.savemat(path, sbd(LABELS), do_compression=compressed)
    data, refused = path.read_bytes(), 0
    for place in range(0, len(data), 7 if compressed else 37):
        for damaged in (data[:place], data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]):
            path.write_bytes(damaged)
            try:
                reading.read_mask(path)
            except DataError as error:
                refused += str(path) in str(error)
    assert refused > 20


# Bombs


@pytest.mark.slow
def test_a_mat_file_that_expands_is_not_unpacked(tmp_path):
    packer, block = zlib.compressobj(9), bytes(1_000_000)
    packed = b"".join(packer.compress(block) for _ in range(150)) + packer.flush()
    assert len(packed) < reading.MAX_MAT_BYTES
    header = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM"
    (tmp_path / "a.mat").write_bytes(header + (15).to_bytes(4, "little") + len(packed).to_bytes(4, "little") + packed)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"a\.mat: it expands to more than 10000000 bytes"):
            reading.read_mask(tmp_path / "a.mat")
        assert tracemalloc.get_traced_memory()[1] < 40_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [(10_000, 9_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_pictures_that_are_too_large_are_named_and_not_unpacked(tmp_path, size, suffix):
    """Without a warning of Pillow's, which begins at 9e7 pixels; and without the memory."""
    path, (width, height) = tmp_path / f"a{suffix}", size
    path.write_bytes(
        png([bytes(9)], width, 8, GREY, height=height)
        if suffix == ".png"
        else tiff(np.zeros((2, 2), np.uint8), width, height)
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (reading.read_image, reading.read_turned_image, reading.read_mask, reading.read_colour_mask):
        with pytest.raises(DataError, match=rf"a{suffix} is too large \({width}x{height} pixels; .* was not unpacked"):
            read(path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1 if sys.platform == "darwin" else 1024) < 50_000_000


def test_a_small_picture_that_resizing_blows_up_is_refused():
    for shape in ((1, 20_000), (20_000, 1)):
        with pytest.raises(DataError, match=r"resized it would have .* more than 89000000 in all. Crop the picture"):
            ShortSideCrop(473).image(Image.new("RGB", shape[::-1]))
        with pytest.raises(DataError, match="resized it would have"):
            ShortSideCrop(473).labels(np.zeros(shape, np.uint8))


def test_threads_read_the_same_pixels(tmp_path):
    paths = []
    for index in range(8):
        pixels = RNG.integers(0, 256, (40, 50, 3), np.uint8)
        paths += [tmp_path / f"{index}{suffix}" for suffix in (".png", ".jpg", ".tif", ".webp")]
        for path in paths[-4:]:
            Image.fromarray(pixels).save(path)
    expected = [as_read(path) for path in paths]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda path: np.asarray(reading.read_turned_image(path)), paths * 4))
    assert all((a == b).all() for a, b in zip(found, expected * 4, strict=True))


def test_a_black_picture_is_black_in_any_number_of_bits(tmp_path):
    Image.fromarray(np.zeros((4, 5), np.uint16)).save(tmp_path / "black.png")
    assert not np.asarray(reading.read_image(tmp_path / "black.png")).any()
